"""From an image mask to tokens, and from tokens to pooling rows: the one tensor, ``[region,
token]``, that says where.

A row of pooling weights sums to 1. Whole image is one uniform row; RC-GRPO's masked metric is one
two-area row; region credit is several rows.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


def token_mask(
    edit_mask: Bool[Tensor, "height width"], grid: tuple[int, int]
) -> Bool[Tensor, " token"]:
    """Edit region on the token grid: a token belongs to it if any of its pixels does. Row-major, as
    latents are packed.

    Raises:
        ValueError: when the canvas is not a whole number of tokens.
    """
    height, width = edit_mask.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise ValueError(
            f"mask of {height}x{width} px does not divide into a {rows}x{columns} token grid; fit "
            "the task to the canvas"
        )
    pooled = F.max_pool2d(
        edit_mask.float()[None, None], kernel_size=(height // rows, width // columns)
    )
    return pooled.flatten().bool()


def token_areas(
    areas: Bool[Tensor, "area height width"], grid: tuple[int, int]
) -> Bool[Tensor, "kept rows columns"]:
    """Separate edit areas on the token grid: a token belongs to an area if any of its pixels does,
    to the smallest of several.

    The areas stay disjoint, their union is :func:`token_mask` of theirs, and one that others cover
    whole is left empty, so that their order and number are the task's.
    """
    rows, columns = grid
    flat = torch.stack([token_mask(area, grid) for area in areas]).reshape(-1, rows, columns)
    taken = torch.zeros(rows, columns, dtype=torch.bool)
    kept = torch.zeros_like(flat)
    for index in areas.flatten(1).sum(dim=1).argsort(stable=True).tolist():
        kept[index] = flat[index] & ~taken
        taken |= flat[index]
    return kept


def softened(share: Float[Tensor, "rows columns"], width: int) -> Float[Tensor, "rows columns"]:
    """A mask whose border is blended over ``width`` tokens to either side (a box mean that never
    looks beyond the picture)."""
    if width == 0:
        return share
    kernel = 2 * width + 1
    return F.avg_pool2d(
        share[None, None], kernel, stride=1, padding=width, count_include_pad=False
    )[0, 0]


def eroded(mask: Bool[Tensor, "rows columns"], radius: int) -> Bool[Tensor, "rows columns"]:
    """Tokens of a mask that lie at least ``radius`` (in rows and columns) inside it; the picture's
    own border does not erode."""
    if radius == 0:
        return mask
    return ~F.max_pool2d((~mask).float()[None, None], 2 * radius + 1, stride=1, padding=radius)[
        0, 0
    ].bool()


def labelled_regions(mask: Bool[Tensor, "height width"]) -> Int64[Tensor, "height width"]:
    """The separate (8-connected) region each pixel of a mask belongs to, from 1 in reading order; 0
    outside.

    Horizontal runs of pixels, joined with the touching runs of the row above.
    """
    parent: list[int] = []

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    runs: list[tuple[int, int, int]] = []
    above: list[int] = []
    for row, line in enumerate(mask.cpu().numpy()):
        edges = np.flatnonzero(np.diff(line.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        here = []
        for start, stop in edges.tolist():
            run = len(runs)
            runs.append((row, start, stop))
            parent.append(run)
            here.append(run)
            for other in above:
                if runs[other][1] <= stop and start <= runs[other][2]:
                    first, second = sorted((root(other), root(run)))
                    parent[second] = first
        above = here
    labels = torch.zeros(mask.shape, dtype=torch.int64)
    number: dict[int, int] = {}
    for run, (row, start, stop) in enumerate(runs):
        labels[row, start:stop] = number.setdefault(root(run), len(number) + 1)
    return labels.to(mask.device)


class UniformRows(BaseModel):
    """Whole image: every token weighs the same. The plain metric of Neighbor GRPO (arXiv
    2511.16955), mean-reduced."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["uniform"] = "uniform"

    def __call__(self, mask: Bool[Tensor, " token"]) -> Float[Tensor, "1 token"]:
        return torch.full((1, mask.numel()), 1.0 / mask.numel())


class MaskedRows(BaseModel):
    """Region-normalised masked metric with two bandwidths (RC-GRPO-Editing, arXiv 2604.09386,
    Appendix Eq. B.3).

    ``d = d_in / h_in^2 + d_out / h_out^2`` with each part the mean over its own area, so that a
    large background does not dominate; an area of zero tokens contributes nothing. The row is that
    metric divided by ``1 / h_in^2 + 1 / h_out^2``, so that it sums to 1; the surrogate's
    temperature carries the constant (with both bandwidths 1, temperature 0.5 here is temperature 1
    there).

    Attributes:
        inside, outside: bandwidths ``h_in`` and ``h_out``; a smaller one weighs its area more. The
            paper does not state its values; 1 and 1 weigh both areas equally. Its ablation moves
            their ratio either way.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["masked"] = "masked"
    inside: float = Field(default=1.0, gt=0)
    outside: float = Field(default=1.0, gt=0)

    def __call__(self, mask: Bool[Tensor, " token"]) -> Float[Tensor, "1 token"]:
        inside, outside = mask.float(), (~mask).float()
        row = (
            inside / inside.sum().clamp(min=1) / self.inside**2
            + outside / outside.sum().clamp(min=1) / self.outside**2
        )
        return (row / row.sum())[None]


Rows = Annotated[UniformRows | MaskedRows, Field(discriminator="kind")]
