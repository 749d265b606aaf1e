"""Reads an editor's configuration, and builds its transformer from that alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from rl_edit.editors.family import EditorFamily
from rl_edit.editors.location import Location
from rl_edit.errors import InputError

T = TypeVar("T")

SETTINGS = "transformer/config.json"


def transformer_skeleton(place: Location, transformer: Any = None) -> nn.Module:
    """Builds the transformer of a diffusers pipeline on the meta device.

    Args:
        transformer: its class where it is none of diffusers' own.

    Raises:
        InputError: its configuration describes no transformer of diffusers.
    """
    import diffusers

    settings = place.read_json(SETTINGS)
    try:
        # The name of one of diffusers' own classes; code of a repository is never run.
        kind = transformer or getattr(diffusers, settings["_class_name"])
        with torch.device("meta"):
            built = kind.from_config(settings)
    except Exception as error:
        raise InputError(
            f"{SETTINGS} of {place.name} describes no transformer of diffusers "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): save the editor again"
        ) from error
    assert isinstance(built, nn.Module)
    return built


def read_settings(
    place: Location, pipeline: str, read: Callable[[Mapping[str, Any], Mapping[str, Any]], T]
) -> T:
    """Reads facts from the configurations of VAE and transformer.

    Args:
        pipeline: name of the pipeline's class, for the message.
        read: takes the VAE's and the transformer's configuration.

    Raises:
        InputError: one of them lacks a number that ``read`` takes.
    """
    vae, transformer = (place.read_json(f"{part}/config.json") for part in ("vae", "transformer"))
    try:
        return read(vae, transformer)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"config.json of vae or transformer of {place.name} is none of a {pipeline} "
            f"({type(error).__name__}: {error}). Copy or save the editor again"
        ) from error


def require_layers(config: EditorFamily, count: int) -> None:
    """Refuses settings that read attention in more layers than there are.

    Raises:
        InputError: with both numbers.
    """
    if config.attention_layers > count:
        raise InputError(
            f"editor.attention_layers is {config.attention_layers}, but {config.path} has {count} "
            "joint layers: use at most that"
        )


def last_layers(config: EditorFamily, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Returns the last blocks, in which attention is read.

    Raises:
        InputError: there are fewer than ``attention_layers``.
    """
    require_layers(config, len(blocks))
    return list(blocks[len(blocks) - config.attention_layers :])
