"""Guidance as a value: how the velocities of several forwards become one.

A conditioning holds the encodings of every forward beyond the first under names that begin with
:data:`NEGATIVE`. Embedded guidance is an input of the transformer and no matter of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from rl_edit.editors.chunks import Prediction
from rl_edit.types import Conditioning

P = TypeVar("P")

NEGATIVE = "negative_"
"""Prefix of encodings that only the further forwards read."""


class Guidance(Protocol):
    """Joins velocities: first that of the forward that reads the instruction, then the others."""

    def __call__(self, positive: Tensor, *others: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ClassifierFree:
    """True classifier-free guidance (Ho & Salimans 2022).

    Attributes:
        scale: w of ``velocity = negative + w * (positive - negative)``.
    """

    scale: float

    def __call__(self, positive: Tensor, *others: Tensor) -> Tensor:
        """Leads from the negative velocity through the positive one."""
        (negative,) = others
        return negative + self.scale * (positive - negative)


@dataclass(frozen=True)
class NormRescaled:
    """Classifier-free guidance whose result keeps the length of the positive velocity.

    Attributes:
        scale: w of ``joint = negative + w * (positive - negative)``; the velocity of each token is
            ``joint * |positive| / |joint|``, with norms over channels.
    """

    scale: float

    def __call__(self, positive: Tensor, *others: Tensor) -> Tensor:
        """Leads from the negative velocity through the positive one, token by token."""
        joint = ClassifierFree(self.scale)(positive, *others)
        # This order of operations is the stock pipeline's, bit for bit.
        length, joint_length = (torch.norm(v, dim=-1, keepdim=True) for v in (positive, joint))
        rescaled: Tensor = joint * (length / joint_length)
        return rescaled


def guided_prediction(
    forward: Callable[[P, bool], Prediction],
    branches: Sequence[P],
    guidance: Guidance,
    *,
    record: bool,
    detach: bool = False,
) -> Prediction:
    """Runs one forward per branch and joins them; a single branch is taken as it is.

    Args:
        forward: runs one branch; its second argument asks for the attention mass.
        branches: inputs, that with the instruction first. Attention is read in that one alone.
        detach: run the others without gradient.
    """
    first = forward(branches[0], record)
    if len(branches) == 1:
        return first
    # Never on where the caller switched gradients off.
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        others = [forward(branch, False).velocity for branch in branches[1:]]
    return Prediction(velocity=guidance(first.velocity, *others), mass=first.mass)


def is_guided(conditioning: Conditioning) -> bool:
    """Does a conditioning hold the encodings of further forwards?"""
    return any(name.startswith(NEGATIVE) for name in conditioning.tensors)


def require_guidance(
    conditioning: Conditioning | Sequence[Conditioning], *, guided: bool, setting: str
) -> None:
    """Refuses conditionings whose further encodings the guidance lacks or leaves unread.

    Args:
        setting: name and value of the editor's guidance, such as ``true_cfg 4``.

    Raises:
        ValueError: one of them was encoded for other guidance.
    """
    many = [conditioning] if isinstance(conditioning, Conditioning) else conditioning
    if any(is_guided(c) != guided for c in many):
        raise ValueError(
            f"a conditioning was encoded for other guidance than {setting}: encode the task anew"
        )
