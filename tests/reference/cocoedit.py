"""CoCoEdit (arXiv 2602.14068): two hinges beside DiffusionNFT's loss.

As in the paper, as released, and as meant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.diffusion_nft import predictions

RING = 0.2


def region_weights(
    edited: Tensor, radius: int, *, silent_without_core: bool = False
) -> tuple[Tensor, Tensor]:
    """Computes W of the background and of the edited region [token], from a mask [row, column].

    1 where a token and all its neighbours within ``radius`` agree, 0.2 in the ring in between, 0 in
    the other region's core.
    """
    rows, columns = edited.shape
    core = torch.zeros(2, rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            around = edited[
                max(row - radius, 0) : row + radius + 1,
                max(column - radius, 0) : column + radius + 1,
            ]
            core[0, row, column] = float(not around.any())
            core[1, row, column] = float(around.all())
    ring = RING * (core.sum(dim=0) == 0).double()
    keep, edit = ((part + ring).clamp(0, 1) for part in core)
    if silent_without_core:
        keep, edit = keep * bool(core[0].any()), edit * bool(core[1].any())
    return keep.flatten(), edit.flatten()


def distance(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Averages ``W (a - b)^2`` over tokens and channels [token, channel], divided by ``sum W``."""
    return (weights[:, None] * (a - b) ** 2).sum() / max(float(weights.sum()) * a.shape[1], 1e-6)


def hinges(
    x: Tensor,
    s: float,
    clean: Tensor,
    source: Tensor,
    v: Tensor,
    v_old: Tensor,
    r: Tensor,
    keep: Tensor,
    edit: Tensor,
    *,
    beta: float,
    variant: str,
    keep_weight: float,
    edit_weight: float,
    keep_tolerance: float,
    edit_tolerance: float,
) -> Tensor:
    """Computes what is added to the loss.

    The published edit hinge is put on the negative policy; "fixed" puts it on the policy itself.
    """
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(x)):
        positive, negative = predictions(x[i], s, v[i], v_old[i], beta)
        current = x[i] - s * v[i]
        away = distance(positive, clean[i] if variant == "release" else source, keep)
        near = distance(current if variant == "fixed" else negative, source, edit)
        # r relu(d_keep - tolerance) + (1 - r) relu(tolerance - d_edit), mean over candidates
        if bool(keep.any()):
            total = total + keep_weight * r[i] * torch.relu(away - keep_tolerance) / len(x)
        if bool(edit.any()):
            total = total + edit_weight * (1 - r[i]) * torch.relu(edit_tolerance - near) / len(x)
    return total
