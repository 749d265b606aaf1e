"""Editors: an editor encodes a task, predicts velocities, decodes latents, and shows attention.

This package is the only home of diffusers. :mod:`rl_edit.editors.family` is the seam, and each
family is one file beside it. A family of yours is named by ``kind: module:Class`` and needs no edit
here; a built-in one is a file and its place in ``EditorConfig`` and ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter
from torch import nn

from rl_edit.editors.adapter_config import AdapterConfig
from rl_edit.editors.family import Editor, EditorFacts, EditorFamily, EditorSettings
from rl_edit.editors.flux2 import Flux2Config
from rl_edit.editors.flux2_klein import Flux2KleinConfig
from rl_edit.editors.flux_kontext import FluxKontextConfig
from rl_edit.editors.location import BUILTIN, BUILTIN_WEIGHTS, INDEX, local_pipeline, locate
from rl_edit.editors.lora import LoraConfig, attach, read
from rl_edit.editors.lora_targets import require_fit
from rl_edit.editors.omnigen2 import OmniGen2Config
from rl_edit.editors.qwen_image_edit import QwenImageEditConfig
from rl_edit.editors.qwen_image_edit_plus import QwenImageEditPlusConfig
from rl_edit.errors import InputError
from rl_edit.method.plugins import Plugin
from rl_edit.types import AdapterWeights

__all__ = [
    "BUILTIN",
    "BUILTIN_WEIGHTS",
    "FAMILIES",
    "Editor",
    "EditorConfig",
    "EditorFacts",
    "EditorFamily",
    "EditorSettings",
    "Flux2Config",
    "Flux2KleinConfig",
    "FluxKontextConfig",
    "OmniGen2Config",
    "QwenImageEditConfig",
    "QwenImageEditPlusConfig",
    "editor_config",
    "editor_identity",
    "inspect_editor",
    "load_editor",
    "read_adapter",
    "require_adapter",
    "require_targets",
]

FAMILIES = (
    FluxKontextConfig,
    Flux2Config,
    Flux2KleinConfig,
    OmniGen2Config,
    QwenImageEditConfig,
    QwenImageEditPlusConfig,
)
"""Built-in families. Without a ``kind`` and an editor on this machine, the first is meant."""


def _with_kind(value: Any) -> Any:
    """Names the family that ``model_index.json`` names, where the settings name none."""
    if not isinstance(value, Mapping) or "kind" in value:
        return value
    path = value.get("path", BUILTIN)
    # An editor on the hub is not asked here: reading a configuration must not need the network. The
    # released ones are known by name; any other that is not of the first family is refused by
    # inspect_editor, which says which kind it is.
    pipeline = local_pipeline(path) if isinstance(path, str) else None
    family = next(
        (f for f in FAMILIES if f.pipeline == pipeline or path in f.released), FAMILIES[0]
    )
    return {"kind": family.model_fields["kind"].default, **value}


BuiltInFamily = (
    FluxKontextConfig
    | Flux2Config
    | Flux2KleinConfig
    | OmniGen2Config
    | QwenImageEditConfig
    | QwenImageEditPlusConfig
)
"""Settings of the built-in families; the same classes as in ``FAMILIES``."""

EditorConfig = Annotated[
    # The union itself; pydantic names the known kinds where it is given another.
    Annotated[BuiltInFamily, Field(discriminator="kind")],
    # A kind with a colon goes to the class that it names, which must offer EditorFamily.
    Plugin(setting="editor", protocol=EditorFamily),
    # The last annotation runs first: the kind must be there before the family is chosen.
    BeforeValidator(_with_kind),
]
"""Settings of an editor: a union over families, by ``kind``."""

_EDITOR_CONFIG: TypeAdapter[BuiltInFamily] = TypeAdapter(EditorConfig)


def editor_config(settings: Mapping[str, Any]) -> BuiltInFamily:
    """Reads the settings of an editor, as they stand under ``editor:`` in a configuration.

    Raises:
        ValueError: they are of no family, or refused by theirs.
    """
    return _EDITOR_CONFIG.validate_python(settings)


def inspect_editor(config: EditorFamily) -> EditorFacts:
    """Finds an editor and reads its configuration only (on the hub: three small files).

    Raises:
        InputError: it cannot be found or reached, or no family here trains it.
    """
    _require_trainable(config)
    return config.inspect()


def load_editor(config: EditorFamily) -> Editor:
    """Loads the editor of a config, frozen, on its device.

    Raises:
        InputError: it cannot be found or reached, or no family here trains it.
    """
    _require_trainable(config)
    return config.load()


def editor_bytes(config: EditorFamily) -> int:
    """Returns the bytes of an editor's weights once loaded; 0 where the family does not say."""
    # Optional, so that a family of yours need not offer it.
    count = getattr(config, "weight_bytes", None)
    return int(count()) if count is not None else 0


def require_targets(config: EditorFamily, lora: LoraConfig) -> None:
    """Refuses LoRA settings that the editor cannot take, before any weight is loaded.

    A family that offers no ``skeleton`` is checked when the adapter is attached.

    Raises:
        InputError: a target fits no module (with the nearest names), or PEFT refuses the settings.
    """
    skeleton = _skeleton(config)
    if skeleton is not None:
        attach(skeleton, lora, seed=0)


def read_adapter(config: EditorFamily, place: Path) -> tuple[AdapterWeights, AdapterConfig]:
    """Reads an adapter of this editor, in any form that its stock pipeline takes.

    Raises:
        InputError: there is none, or it is of another model or in another form.
    """
    # Only the built-in families have a stock pipeline; a family of yours reads diffusers' own form.
    stock = {"pipeline": config.pipeline} if isinstance(config, FAMILIES) else {}
    return read(place, **stock)


def require_adapter(config: EditorFamily, weights: AdapterWeights) -> None:
    """Refuses an adapter of another editor, before any weight of this one is loaded.

    Raises:
        InputError: its modules are not there, or have other widths.
    """
    skeleton = _skeleton(config)
    if skeleton is not None:
        require_fit(skeleton, weights)


def _skeleton(config: EditorFamily) -> nn.Module | None:
    # Optional, so that a family of yours need not offer it.
    build = getattr(config, "skeleton", None)
    return build() if build is not None else None


def editor_identity(config: EditorFamily) -> str:
    """Names the frozen base; see :func:`rl_edit.editors.location.identity_of`."""
    return config.identity()


def _require_trainable(config: EditorFamily) -> None:
    """Refuses a pipeline of another class than the family's, before any weight is read."""
    if not isinstance(config, FAMILIES):
        return  # a plugin knows by itself which editors are its own
    place = locate(config.path, config.revision)
    # On the hub this downloads a few hundred bytes, which inspect and load need as well.
    index = place.read_json(INDEX)
    pipeline = index.get("_class_name") if isinstance(index, dict) else None
    if pipeline != config.pipeline:
        kind = next(
            (f.model_fields["kind"].default for f in FAMILIES if f.pipeline == pipeline), ""
        )
        if kind:
            raise InputError(
                f"{place.name} is a {pipeline}, and editor.kind is {config.kind}, which runs a "
                f"{config.pipeline}: set editor.kind={kind}"
            )
        trainable = ", ".join(family.pipeline for family in FAMILIES)
        seen = f"is a {pipeline}" if pipeline else f"names no pipeline in its {INDEX}"
        raise InputError(
            f"{place.name} {seen}, this version trains {trainable}: give such "
            "an editor, or name a family of yours as editor.kind=module:Class"
        )
