"""Runs an editor's forward in chunks of one shape, so that a row's bits do not depend on its batch.

A family says how conditionings are batched and what one forward is; the loop over the rows is here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rl_edit.method.attention import MassTally
from rl_edit.types import Conditioning

P = TypeVar("P")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of one forward.

    Attributes:
        velocity: fp32, on the device of the latents: solvers and objectives compute in it.
        mass: attention mass of the instruction, averaged over layers; None where none is measured.
    """

    velocity: Float[Tensor, "batch token channel"]
    mass: Float[Tensor, "batch token"] | None


def shared_grid(many: Sequence[Conditioning]) -> tuple[int, int]:
    """Returns the token grid of a batch.

    Raises:
        ValueError: its conditionings do not share one canvas.
    """
    grids = {c.grid for c in many}
    if len(grids) != 1:
        raise ValueError(f"one batch must share one canvas, got token grids {sorted(grids)}")
    return next(iter(grids))


def stacked(many: Sequence[Conditioning], name: str) -> Tensor:
    """Batches one tensor of the conditionings."""
    return torch.stack([c.tensors[name] for c in many])


def velocity_in_chunks(
    latents: Float[Tensor, "batch token channel"],
    sigma: Float[Tensor, " batch"],
    conditioning: Conditioning | Sequence[Conditioning],
    tally: MassTally | None,
    *,
    size: int,
    pack: Callable[[Sequence[Conditioning]], P],
    predict: Callable[[Tensor, Tensor, P, bool], Prediction],
    alike: Callable[[Conditioning], Hashable] = lambda _: None,
) -> Float[Tensor, "batch token channel"]:
    """Predicts the velocity of all rows, ``size`` of them at a time.

    Args:
        conditioning: one for the complete batch, or one per row.
        tally: takes the attention mass of each row, NaN where none is measured.
        pack: batches ``size`` conditionings on the device.
        predict: runs one chunk; the last argument asks for the attention mass.
        alike: rows of one chunk must have the same value, as a length of text that is not padded.

    Raises:
        ValueError: the conditionings do not share one canvas.
    """
    rows = len(latents)
    shared = isinstance(conditioning, Conditioning)
    many = [conditioning] * rows if isinstance(conditioning, Conditioning) else conditioning
    # Refused as a whole, before a part of it runs.
    shared_grid(many)
    outputs: list[Tensor] = []
    masses: list[Tensor] = []
    order: list[int] = []
    packed: P | None = None
    for part in _chunks(many, size, alike):
        # Past the last row, copies of it: every forward has the same shape.
        index = [part[min(i, len(part) - 1)] for i in range(size)]
        # One conditioning for all rows is packed once.
        if packed is None or not shared:
            packed = pack([many[i] for i in index])
        chunk = predict(latents[index], sigma[index], packed, tally is not None)
        outputs.append(chunk.velocity[: len(part)])
        if chunk.mass is not None:
            masses.append(chunk.mass[: len(part)])
        order += part
    # Back in the order of the batch.
    place = torch.tensor(order).argsort()
    if tally is not None:
        unmeasured = latents.new_full(latents.shape[:2], float("nan"))
        tally.add(torch.cat(masses)[place.to(masses[0].device)] if masses else unmeasured)
    return torch.cat(outputs)[place.to(latents.device)]


def _chunks(
    many: Sequence[Conditioning], size: int, alike: Callable[[Conditioning], Hashable]
) -> Iterator[list[int]]:
    """Yields the rows of each chunk; those that are alike first come first."""
    groups: dict[Hashable, list[int]] = {}
    for row, conditioning in enumerate(many):
        groups.setdefault(alike(conditioning), []).append(row)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
