"""Checks that LoRA targets and adapters fit a transformer, by names and shapes alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from rl_edit.errors import InputError
from rl_edit.types import AdapterWeights

_BASE = ".base_layer"
"""Suffix under which PEFT keeps the linear layer that it wraps."""


ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention)
"""Layers that PEFT's LoRA can adapt."""


ATTENTION_PROJECTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
"""LoRA targets of RC-GRPO-Editing ("attention projections"), by their module names in diffusers.

Single blocks of FLUX.1 have q, k and v alone.
"""


def matches(target: str, name: str) -> bool:
    """Does a target name a layer: completely, or by the last parts of its name?

    As PEFT matches; a ``*`` stands for one part, which PEFT does not have.
    """
    pattern = re.escape(target).replace(r"\*", "[^.]+")
    return re.fullmatch(rf"(.*\.)?{pattern}", name) is not None


def expanded(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """Replaces targets with a ``*`` by the layers that they name; PEFT reads the result."""
    known = list(names)
    return [
        name
        for target in targets
        for name in (
            [target] if "*" not in target else [name for name in known if matches(target, name)]
        )
    ]


def layer_names(transformer: nn.Module) -> list[str]:
    """Lists the layers of the editor itself that can take an adapter."""
    return list(_layers(transformer))


def _layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers of the editor itself that can take an adapter, by name."""
    return {
        # A layer with an adapter on it goes by its own name.
        name.removesuffix(_BASE): module
        for name, module in transformer.named_modules()
        if isinstance(module, ADAPTABLE) and ".lora_" not in name
    }


def unmatched(transformer: nn.Module, targets: Iterable[str]) -> str | None:
    """Describes targets that fit no layer, with the nearest names; None where all fit."""
    names, requested = _layers(transformer), list(targets)
    if not requested:
        return (
            "lora.targets is empty, so no module would get an adapter and nothing would be "
            "trained: name layers, or leave it out for all attention projections"
        )
    missing = [target for target in requested if not any(matches(target, name) for name in names)]
    if not missing:
        return None
    ends = list(dict.fromkeys(end for name in names for end in _ends(name)))
    lines = []
    for target in missing:
        near = difflib.get_close_matches(target, ends, n=3, cutoff=0.6)
        # Quotes show what a bare name hides, such as a space at its end.
        shown = target if target == target.strip() and target else repr(target)
        lines.append(shown + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    short = [end for end in ends if end.count(".") < 1 or end.rsplit(".", 1)[1].isdigit()]
    return (
        f"lora.targets {', '.join(lines)} fit{'s' * (len(lines) == 1)} no module of this editor, "
        "so that part of it would get no adapter: name layers by the ends of their names "
        f"({', '.join(short[:12])}{', ...' if len(short) > 12 else ''})"
    )


def _ends(name: str) -> list[str]:
    """Returns a module's name and its last parts, shortest first, e.g. ``to_out.0``."""
    parts = name.split(".")
    ends = [parts[-count:] for count in range(1, min(len(parts), 3) + 1)]
    # An end that begins with a number is a place in a list.
    return [".".join(end) for end in ends if not end[0].isdigit()] + [name]


def require_modules(transformer: nn.Module, modules: Iterable[str]) -> None:
    """Refuses an adapter with modules that an editor does not have.

    Raises:
        InputError: of some or all of them.
    """
    layers, requested = _layers(transformer), list(modules)
    absent = [module for module in requested if module not in layers]
    if absent:
        raise InputError(
            f"the adapter does not fit this editor's LoRA: {len(absent)} of its {len(requested)} "
            f"modules are not there (unexpected {', '.join(absent[:3])}), so it was trained on "
            "another editor. Name that one (--editor, editor.path)"
        )


def require_fit(transformer: nn.Module, weights: AdapterWeights) -> None:
    """Refuses an adapter whose modules or widths are of another editor.

    Raises:
        InputError: a module is not there, or has other sides.
    """
    sides: dict[str, dict[str, int]] = {}
    for name, value in weights.tensors.items():
        module, _, part = name.partition(".lora_")
        # A is [rank, input] and B [output, rank].
        if part in ("A.weight", "B.weight") and value.ndim == 2:
            sides.setdefault(module, {})[part[0]] = value.shape[1 if part[0] == "A" else 0]
    require_modules(transformer, sides)
    layers = _layers(transformer)
    for module, side in sides.items():
        layer = layers[module]
        # The sides of other layers are PEFT's to check.
        if not isinstance(layer, nn.Linear):
            continue
        out, into = layer.out_features, layer.in_features
        if side.get("A", into) != into or side.get("B", out) != out:
            raise InputError(
                f"adapter {weights.id} does not fit this editor's LoRA: {module} takes "
                f"{side.get('A', into)} numbers and gives {side.get('B', out)} in the adapter, "
                f"{into} and {out} here, so it was trained on an editor of another width. Name "
                "that one (--editor, editor.path)"
            )
