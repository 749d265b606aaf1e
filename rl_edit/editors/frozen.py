"""Puts an editor's modules on their device, frozen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def chosen_device(device: str) -> str:
    """Resolves "auto": a GPU when there is one.

    Asked where an editor is loaded and not in the configuration, which is read on machines without
    a GPU too.
    """
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def freeze(modules: Iterable[nn.Module]) -> None:
    """Switches gradients and training mode off; adapters are attached later, with their own."""
    for module in modules:
        module.requires_grad_(False).eval()


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's parameters."""
    return next(module.parameters()).device


def dtype_named(name: str) -> torch.dtype:
    """Returns the number format of a configured name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
