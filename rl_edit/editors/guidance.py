"""Guidance as a value: how the velocities of several forwards become one.

A conditioning holds the encodings of every forward beyond the first under names that begin with
:data:`NEGATIVE`. Embedded guidance is an input of the transformer and no matter of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rl_edit.editors.chunks import Prediction, velocity_in_chunks
from rl_edit.method.attention import MassTally
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


class GuidedSettings(Protocol):
    """Settings of an editor, as far as its guidance goes."""

    @property
    def micro_batch(self) -> int: ...

    @property
    def guided(self) -> bool: ...

    @property
    def true_cfg(self) -> float: ...

    @property
    def detach_negative(self) -> bool: ...


def guided_velocity(
    latents: Float[Tensor, "batch token channel"],
    sigma: Float[Tensor, " batch"],
    conditioning: Conditioning | Sequence[Conditioning],
    tally: MassTally | None,
    *,
    config: GuidedSettings,
    guidance: Guidance,
    pack: Callable[[Sequence[Conditioning]], Sequence[P]],
    forward: Callable[[Tensor, Tensor, P, bool], Prediction],
    alike: Callable[[Conditioning], Hashable] = lambda _: None,
) -> Float[Tensor, "batch token channel"]:
    """Predicts the guided velocity of all rows, in chunks of ``micro_batch``.

    Args:
        tally, alike: as in :func:`~rl_edit.editors.chunks.velocity_in_chunks`.
        pack: batches conditionings on the device, once for each forward.
        forward: runs one forward of one chunk; its last argument asks for the attention mass.

    Raises:
        ValueError: a conditioning whose further encodings the guidance needs or leaves unread, or
            that is of another canvas.
    """
    setting = f"true_cfg {config.true_cfg:g}"
    require_guidance(conditioning, guided=config.guided, setting=setting)

    def predict(latents: Tensor, sigma: Tensor, branches: Sequence[P], record: bool) -> Prediction:
        return guided_prediction(
            partial(forward, latents, sigma),
            branches,
            guidance,
            record=record,
            detach=config.detach_negative,
        )

    return velocity_in_chunks(
        latents,
        sigma,
        conditioning,
        tally,
        size=config.micro_batch,
        pack=pack,
        predict=predict,
        alike=alike,
    )


def text_lengths(conditioning: Conditioning, name: str) -> tuple[int, ...]:
    """Returns the lengths of a conditioning's texts: of the instruction's and the negative one's.

    Args:
        name: of the tensor that has a row for each token.
    """
    names = (name, NEGATIVE + name)
    return tuple(len(conditioning.tensors[n]) for n in names if n in conditioning.tensors)
