"""Builds an editor's transformer without its weights, from its configuration alone."""

from __future__ import annotations

import torch
from torch import nn

from rl_edit.editors.location import Location
from rl_edit.errors import InputError

SETTINGS = "transformer/config.json"


def transformer_skeleton(place: Location) -> nn.Module:
    """Builds the transformer of a diffusers pipeline on the meta device.

    Raises:
        InputError: its configuration describes no transformer of diffusers.
    """
    import diffusers

    settings = place.read_json(SETTINGS)
    try:
        # The name of one of diffusers' own classes; code of a repository is never run.
        kind = getattr(diffusers, settings["_class_name"])
        with torch.device("meta"):
            transformer = kind.from_config(settings)
    except Exception as error:
        raise InputError(
            f"{SETTINGS} of {place.name} describes no transformer of diffusers "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): save the editor again"
        ) from error
    assert isinstance(transformer, nn.Module)
    return transformer
