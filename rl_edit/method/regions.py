"""Regions: from an image mask to tokens, and from tokens to pooling rows.

Pooling rows are the one tensor, ``[region, token]``, that says where. A row of weights sums to 1.
Whole image is one uniform row; RC-GRPO's masked metric is one two-area row; region credit is
several rows.
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
    """Projects the edit mask to the token grid, row-major, as latents are packed.

    A token belongs to the edit region if any of its pixels does.

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
    # A maximum over each token's pixels is "any".
    pooled = F.max_pool2d(
        edit_mask.float()[None, None], kernel_size=(height // rows, width // columns)
    )
    return pooled.flatten().bool()


def token_areas(
    areas: Bool[Tensor, "area height width"], grid: tuple[int, int]
) -> Bool[Tensor, "area rows columns"]:
    """Projects separate edit areas to the token grid; they stay disjoint.

    A token belongs to an area if any of its pixels does, and to the smallest of several. The union
    is :func:`token_mask` of the areas' union. An area whose tokens all belong to others stays
    empty, so that order and number of areas are the task's.
    """
    rows, columns = grid
    tokens = torch.stack([token_mask(area, grid) for area in areas]).reshape(-1, rows, columns)
    taken = torch.zeros(rows, columns, dtype=torch.bool)
    disjoint = torch.zeros_like(tokens)
    # Smallest first, or a large area would take all tokens of a small one beside it. Stable, so
    # that areas of one size are taken in the task's order.
    for index in areas.flatten(1).sum(dim=1).argsort(stable=True).tolist():
        disjoint[index] = tokens[index] & ~taken
        taken |= tokens[index]
    return disjoint


def softened(share: Float[Tensor, "rows columns"], width: int) -> Float[Tensor, "rows columns"]:
    """Blends a mask's border over ``width`` tokens to either side.

    A box mean of the tokens inside the image.
    """
    if width == 0:
        return share
    kernel = 2 * width + 1
    # Padding is not counted: at the image's border the mean is over fewer tokens.
    return F.avg_pool2d(
        share[None, None], kernel, stride=1, padding=width, count_include_pad=False
    )[0, 0]


def eroded(mask: Bool[Tensor, "rows columns"], radius: int) -> Bool[Tensor, "rows columns"]:
    """Erodes a mask by ``radius`` rows and columns; the image's border does not erode it."""
    if radius == 0:
        return mask
    # Erosion is dilation of the complement. Max pooling pads with -inf: the border never erodes.
    return ~F.max_pool2d((~mask).float()[None, None], 2 * radius + 1, stride=1, padding=radius)[
        0, 0
    ].bool()


def labelled_regions(mask: Bool[Tensor, "height width"]) -> Int64[Tensor, "height width"]:
    """Numbers the separate (8-connected) regions of a mask from 1, in reading order; 0 is outside.

    Horizontal runs of pixels are joined with the touching runs of the row above (union-find).
    """
    parent: list[int] = []

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]  # halves the path for the next search
            run = parent[run]
        return run

    runs: list[tuple[int, int, int]] = []  # (row, first column, past the last)
    above: list[int] = []
    for row, line in enumerate(mask.cpu().numpy()):
        # A change from 0 to 1 begins a run and one from 1 to 0 ends it.
        edges = np.flatnonzero(np.diff(line.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        here = []
        for start, stop in edges.tolist():
            run = len(runs)
            runs.append((row, start, stop))
            parent.append(run)
            here.append(run)
            for other in above:
                # <= on both sides: runs that meet at a corner touch.
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
    """Whole image: every token weighs the same.

    The metric of Neighbor GRPO (arXiv 2511.16955), mean-reduced.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["uniform"] = "uniform"

    def __call__(self, mask: Bool[Tensor, " token"]) -> Float[Tensor, "1 token"]:
        return torch.full((1, mask.numel()), 1.0 / mask.numel())


class MaskedRows(BaseModel):
    """Region-normalised masked metric with two bandwidths.

    RC-GRPO-Editing (arXiv 2604.09386), Appendix Eq. B.3. ``d = d_in / h_in^2 + d_out / h_out^2``
    with each part the mean over its own area, so that a large background does not dominate; an area
    of zero tokens contributes nothing. The row is that metric divided by ``1 / h_in^2 + 1 /
    h_out^2``, so that it sums to 1; the surrogate's temperature carries the constant (with both
    bandwidths 1, temperature 0.5 here is temperature 1 there).

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
        # 1 / (|M| h_in^2) on the mask and 1 / (|not M| h_out^2) beside it, made to sum to 1.
        row = (
            inside / inside.sum().clamp(min=1) / self.inside**2
            + outside / outside.sum().clamp(min=1) / self.outside**2
        )
        return (row / row.sum())[None]


Rows = Annotated[UniformRows | MaskedRows, Field(discriminator="kind")]
