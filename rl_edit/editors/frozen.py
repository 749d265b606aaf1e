"""Holds an editor's frozen modules, whatever its family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from rl_edit.types import Conditioning


def chosen_device(device: str) -> str:
    """Resolves "auto": a GPU when there is one.

    Asked where an editor is loaded and not in the configuration, which is read on machines without
    a GPU too.
    """
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


class FrozenSettings(Protocol):
    """Settings of an editor, as far as its modules go."""

    @property
    def dtype(self) -> str: ...

    @property
    def gradient_checkpointing(self) -> bool: ...


C = TypeVar("C", bound=FrozenSettings)


class FrozenEditor(Generic[C]):
    """Holds the frozen transformer of an editor; a family encodes, predicts and decodes.

    Attributes:
        config: settings of the editor.
    """

    def __init__(self, config: C, transformer: Any, modules: Iterable[nn.Module]) -> None:
        self.config = config
        self.transformer: nn.Module = transformer
        for module in modules:
            # Adapters are attached later and take gradients of their own.
            module.requires_grad_(False).eval()
        # Blocks are recomputed in the backward pass, with the same bits.
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the frozen base."""
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return dtype

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        """Returns (token, channel); target and source have the same grid."""
        tokens, channels = conditioning.source_latents.shape
        return tokens, channels
