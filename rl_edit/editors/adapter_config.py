"""Settings of an adapter that was read from a file, as PEFT's own record holds them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rl_edit.errors import InputError

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations of PEFT that also change the base's weights, which a file does not hold."""


class AdapterConfig(BaseModel):
    """Settings of an adapter that was read, as PEFT applies them.

    Attributes:
        settings: all fields of PEFT's ``LoraConfig``: rank and alpha with their patterns,
            rank-stabilised scale, targets (names, or a pattern).
        modules: names of the modules that have tensors. They decide where the adapter goes, as in
            diffusers, and not the targets.
        notes: what a user should know about the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    settings: dict[str, Any]
    modules: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Rank of the modules that no pattern names."""
        return int(self.settings["r"])

    @property
    def alpha(self) -> float:
        """Alpha of the modules that no pattern names."""
        return float(self.settings["lora_alpha"])

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets as the file names them; a pattern is one."""
        named = self.settings["target_modules"]
        return (named,) if isinstance(named, str) else tuple(named or ())

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Ranks of single modules."""
        return dict(self.settings["rank_pattern"])

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """Alphas of single modules."""
        return dict(self.settings["alpha_pattern"])

    @property
    def rslora(self) -> bool:
        """Is the scale ``alpha / sqrt(rank)`` instead of ``alpha / rank``?"""
        return bool(self.settings["use_rslora"])

    def peft(self) -> PeftLoraConfig:
        """Returns the settings as PEFT's own record."""
        from peft import LoraConfig as PeftLoraConfig

        return PeftLoraConfig(**self.settings)


def require_applicable(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuses LoRAs without a scale, or whose effect does not stand in their tensors alone."""
    alphas = [settings["lora_alpha"], *settings["alpha_pattern"].values()]
    if not all(math.isfinite(alpha) for alpha in alphas):
        raise InputError(
            f"{path} has alphas that are no number ({alphas[:3]}): the settings in its metadata "
            "are damaged. Copy the adapter again"
        )
    start = str(settings.get("init_lora_weights")).lower()
    changed = next((name for name in CHANGED_BASE if start.startswith(name)), None)
    if changed:
        raise InputError(
            f"{path} is a LoRA begun with {changed} (init_lora_weights), which also changes the "
            "base's weights: convert it with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    for field in ("modules_to_save", "target_parameters", "layer_replication"):
        if settings.get(field):
            raise InputError(
                f"{path} sets {field} {settings[field]}: beside the LoRA it replaces parts of the "
                "editor, which stays frozen here. Train without it, or merge it into the editor"
            )


def require_pairs(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuses a file whose tensors are incomplete or of other ranks than its settings say.

    Raises:
        InputError: with the module.
    """
    from peft.utils.other import get_pattern_key

    rank, pattern = settings["r"], settings["rank_pattern"]
    if not isinstance(rank, int) or rank < 1 or not settings.get("target_modules"):
        raise InputError(
            f"{path} has settings without a rank (r {rank!r}) or without target_modules: they are "
            "damaged. Copy the adapter again, or save it with diffusers' save_lora_weights"
        )
    for module in sorted({name.split(".lora_")[0] for name in tensors}):
        pair = [tensors.get(f"{module}.lora_{part}.weight") for part in "AB"]
        if pair[0] is None or pair[1] is None:
            raise InputError(
                f"{path} has only one matrix of the two of {module}: the file is incomplete. Copy "
                "the adapter again"
            )
        # As PEFT finds a module's rank. A is [rank, input] and B [output, rank].
        named = pattern.get(get_pattern_key(pattern.keys(), module), rank)
        stored = (pair[0].shape[0], pair[1].shape[1] if pair[1].ndim > 1 else None)
        if stored != (named, named):
            raise InputError(
                f"{path}: the settings give {module} rank {named}, and its tensors have "
                f"{stored[0]} and {stored[1]}: file and settings do not belong together. Copy "
                "both again"
            )


def idle_patterns(path: Path, settings: Mapping[str, Any], modules: list[str]) -> list[str]:
    """Notes patterns of rank or alpha that fit no module of the file."""
    return [
        f"{path.name}: {field} {key} fits no module of the file and has no effect"
        for field in ("rank_pattern", "alpha_pattern")
        for key in settings[field]
        # As PEFT matches.
        if not any(re.match(rf"(.*\.)?({key})$", module) for module in modules)
    ]


def without_effect(
    path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Notes an adapter that changes no image: its alphas or its second matrices are all zero."""
    alphas = [settings["lora_alpha"], *settings["alpha_pattern"].values()]
    # A DoRA's magnitudes act by themselves.
    if settings.get("use_dora"):
        return []
    # Formats of 8 bits count no zeros. Converters put kohya's alpha into both matrices.
    sides = [value.float() for name, value in tensors.items() if ".lora_B." in name]
    if any(alphas) and any(bool(side.any()) for side in sides):
        return []
    seen = "its lora_B tensors are all zero" if any(alphas) else "its alpha is 0"
    return [
        f"{path.name} has no effect: {seen}, so every image is the base editor's. An untrained "
        "adapter is like this"
    ]
