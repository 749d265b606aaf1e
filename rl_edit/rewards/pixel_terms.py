"""Scores the background by PSNR and SSIM against the source, conventions named."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from rl_edit.measures import pixels
from rl_edit.rewards.term import RewardTerm, Sides
from rl_edit.types import Candidates, Score


class Psnr(RewardTerm):
    """Measures the peak signal-to-noise ratio outside the edit mask, in dB.

    It saturates: above ``ceiling_db`` the score stays the same, and a group of such candidates
    teaches nothing. The component ``saturated`` is 1 there, so its mean is the share of candidates
    that the term can no longer distinguish.

    Attributes:
        convention: see :func:`rl_edit.measures.pixels.psnr`. The three differ by up to 15 dB on the
            same image.
        ceiling_db: highest value; at most the one that identical images get.
    """

    kind: Literal["psnr"] = "psnr"
    convention: pixels.PsnrConvention = "masked"
    ceiling_db: float = Field(default=pixels.MAX_PSNR, gt=0, le=pixels.MAX_PSNR)

    responds_to: ClassVar[Sides] = "outside"
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_attention: ClassVar[bool] = False

    @property
    def low(self) -> float:
        """Lowest value: black against white. CoCoEdit's convention counts that error thrice."""
        # MSE is 1, or 3 with a sum over channels: 0 dB, or -10 log10(3).
        return -10 * math.log10(3) - 1e-9 if self.convention == "cocoedit" else 0.0

    @property
    def high(self) -> float:
        return self.ceiling_db

    @property
    def quick(self) -> bool:
        return True

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Components: ``saturated`` and ``keep_fraction``; zero-filled values depend on it."""
        task = candidates.task
        values = pixels.psnr(candidates.images, task.source, ~task.edit_mask, self.convention)
        # Rounding may leave the exact lower bound by its last bit.
        return _scores(values.clamp_min(self.low), self.ceiling_db, ~task.edit_mask)


class Ssim(RewardTerm):
    """Measures structural similarity outside the edit mask, -1..1.

    Zero-filled, it grows with the edit mask, whose black counts as perfect agreement: a large mask
    saturates it.

    Attributes:
        convention: see :func:`rl_edit.measures.pixels.ssim`.
        ceiling: highest value; better candidates get no more. The component ``saturated`` is 1
            there.
    """

    kind: Literal["ssim"] = "ssim"
    convention: pixels.SsimConvention = "map_masked"
    ceiling: float = Field(default=1.0, gt=-1, le=1)

    responds_to: ClassVar[Sides] = "outside"
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_attention: ClassVar[bool] = False
    low: ClassVar[float] = -1.0

    @property
    def high(self) -> float:
        return self.ceiling

    @property
    def quick(self) -> bool:
        return True

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Components: ``saturated`` and ``keep_fraction``; zero-filled values depend on it."""
        task = candidates.task
        values = pixels.ssim(candidates.images, task.source, ~task.edit_mask, self.convention)
        return _scores(values.clamp_min(self.low), self.ceiling, ~task.edit_mask)


def _scores(values: Tensor, ceiling: float, keep: Tensor) -> tuple[Score, ...]:
    fraction = float(pixels.keep_fraction(keep))
    return tuple(
        Score(
            # Clipped here and not refused as out of range: reaching the ceiling is no fault.
            value=min(value, ceiling),
            components={"saturated": float(value >= ceiling), "keep_fraction": fraction},
        )
        for value in values.tolist()
    )
