"""Edit-GRPO (arXiv 2605.16951): edit and background as separate signals over a softened border.

Only its abstract is public.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shares(edited: Tensor, soft_border: int) -> Tensor:
    """Computes how much each token belongs to (edit, background) [2, token].

    The mean of the mask [row, column] within ``soft_border`` tokens.
    """
    rows, columns = edited.shape
    inside = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            top, left = max(row - soft_border, 0), max(column - soft_border, 0)
            inside[row, column] = (
                edited[top : row + soft_border + 1, left : column + soft_border + 1].double().mean()
            )
    return torch.stack([inside.flatten(), 1 - inside.flatten()])


def advantages(edit_rewards: Tensor, keep_rewards: Tensor) -> Tensor:
    """Standardises the rewards [candidate] of either side apart, to [candidate, 2].

    A side that does not vary gives 0.
    """
    columns = []
    for rewards in (edit_rewards, keep_rewards):
        deviation = rewards.std(correction=0)
        columns.append(
            (rewards - rewards.mean()) / deviation
            if float(deviation) > 0
            else torch.zeros_like(rewards)
        )
    return torch.stack(columns, dim=1)
