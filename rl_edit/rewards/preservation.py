"""Preservation: how well the picture outside the edit mask survived, measured against the source."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rl_edit.evaluation import metrics
from rl_edit.rewards.term import RewardTerm
from rl_edit.types import Candidates, Score


class Preservation(RewardTerm):
    """``((1 - w) * clip(PSNR / ceiling, 0, 1) + w * max(SSIM, 0))`` outside the mask, in 0..1.

    The mixture is CoCoEdit's pixel similarity (arXiv 2602.14068) with both parts normalised over the kept pixels:
    its released code divides a three-channel squared error by a one-channel count (4.77 dB too low) and averages SSIM
    over windows whose weights do not sum to one, which flattens it.

    The PSNR part saturates: above ``ceiling_db`` it is 1 whatever the background does, and only SSIM still tells
    candidates apart. Raise the ceiling for editors whose background is better than that.

    Attributes:
        ceiling_db: PSNR that earns full marks.
        ssim_weight: w.
    """

    kind: Literal["preservation"] = "preservation"
    ceiling_db: float = Field(default=40.0, gt=0, le=metrics.MAX_PSNR)
    ssim_weight: float = Field(default=0.5, ge=0, le=1)

    requires: ClassVar[frozenset[str]] = frozenset()
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    needs_attention: ClassVar[bool] = False

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Components: ``psnr`` (dB, masked convention) and ``ssim`` (map masked)."""
        task = candidates.task
        psnr = metrics.psnr(candidates.images, task.source, ~task.edit_mask, "masked")
        ssim = metrics.ssim(candidates.images, task.source, ~task.edit_mask, "map_masked")
        values = (1 - self.ssim_weight) * (psnr / self.ceiling_db).clamp(0, 1) + self.ssim_weight * ssim.clamp(0, 1)
        rows = zip(values.clamp(0, 1).tolist(), psnr.tolist(), ssim.tolist(), strict=True)
        return tuple(Score(value=value, components={"psnr": db, "ssim": similarity}) for value, db, similarity in rows)
