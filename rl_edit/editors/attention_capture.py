"""Attention mass of diffusers' joint-attention blocks, recorded while a forward runs unchanged.

Double blocks give text its own query norm (``norm_added_q``), and image keys come alone. In single
blocks queries and keys both come as [text, target, source]. Families whose transformers have such
blocks share this file; their rotary embeddings differ and are passed in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rl_edit.method.attention import HeadAverage, text_to_image_mass

_NORMS = {
    "norm_q": "query",
    "norm_k": "key",
    "norm_added_q": "text_query",
    "norm_added_k": "text_key",
}
"""Submodules whose outputs are read, and the names that they are read under."""

Rotate = Callable[[Tensor, Any, slice], Tensor]
"""Turns values by the rotary embedding that the module got, at places of the joint sequence."""


def rotated_as_flux(values: Tensor, rotary: Sequence[Tensor], places: slice) -> Tensor:
    """Applies FLUX's rotary embedding, tables of cosines and sines over the joint sequence."""
    from diffusers.models.embeddings import apply_rotary_emb

    part = tuple(table[places] for table in rotary)
    rotated: Tensor = apply_rotary_emb(values, part, sequence_dim=1)
    return rotated


@contextmanager
def captured(
    modules: Sequence[nn.Module],
    text_rows: Tensor,
    num_tokens: int,
    *,
    average: HeadAverage = "renormalised",
    rotate: Rotate = rotated_as_flux,
) -> Iterator[list[Tensor]]:
    """Yields a list to which each module's forward adds its text-to-target mass ``[batch, token]``.

    Hooks read normalised queries and keys and never return a value, so the output of the fused
    attention keeps its bits.

    Args:
        modules: attention modules.
        text_rows: True for the text tokens whose queries count, ``[batch, text]``.
        num_tokens: target tokens L; they follow the text in joint keys.
        average: order of averaging heads and renormalising.
        rotate: applies the rotary embedding of the family.
    """
    masses: list[Tensor] = []
    handles: list[RemovableHandle] = []
    try:
        for module in modules:
            handles += _hooks(module, text_rows, num_tokens, average, rotate, masses.append)
        yield masses
    finally:
        # A forward that failed must leave no hook behind.
        for handle in handles:
            handle.remove()


def _hooks(
    module: nn.Module,
    text_rows: Tensor,
    num_tokens: int,
    average: HeadAverage,
    rotate: Rotate,
    add: Callable[[Tensor], None],
) -> Iterator[RemovableHandle]:
    # Of this thread: autograd recomputes checkpointed blocks in threads of its own.
    parts = threading.local()

    def remember(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: setattr(parts, name, output)

    def rotated(values: Tensor, rotary: Any, places: slice) -> Tensor:
        # Gradients end here.
        values = values.detach()
        return values if rotary is None else rotate(values, rotary, places)

    def measure(_module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        num_text = text_rows.shape[1]
        # Positions are those of the joint sequence [text, target, source], in double blocks too.
        target = slice(num_text, num_text + num_tokens)
        rotary = kwargs.get("image_rotary_emb")
        query = getattr(parts, "text_query", parts.query[:, :num_text])
        query = rotated(query, rotary, slice(num_text))
        key = rotated(_keys(parts, num_text, target), rotary, target)
        others = None
        if average == "joint":
            behind = slice(target.stop, None)
            others = torch.cat(
                [
                    rotated(_keys(parts, num_text, place), rotary, place)
                    for place in (slice(num_text), behind)
                ],
                dim=1,
            )
        add(text_to_image_mass(query, key, text_rows, others))
        # Queries and keys are large: they are let go before the next block.
        vars(parts).clear()

    for norm, name in _NORMS.items():
        # Single blocks have no projections of their own for text.
        if norm.startswith("norm_added") and getattr(module, "added_kv_proj_dim", None) is None:
            continue
        yield module.get_submodule(norm).register_forward_hook(remember(name))
    yield module.register_forward_hook(measure, with_kwargs=True)


def _keys(parts: threading.local, num_text: int, place: slice) -> Tensor:
    """Returns keys at places of the joint sequence, which double blocks hold in two parts."""
    text: Tensor | None = getattr(parts, "text_key", None)
    key: Tensor = parts.key
    if text is None:
        return key[:, place]
    if place.stop == num_text:
        return text
    return key[:, place.start - num_text : place.stop and place.stop - num_text]
