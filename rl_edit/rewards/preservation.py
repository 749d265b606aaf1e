"""Scores how well the image outside the edit mask was preserved."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field
from torch import Tensor

from rl_edit.measures import pixels
from rl_edit.rewards.term import RewardTerm, Sides
from rl_edit.types import Candidates, Score

# PSNR that gets the full score in CoCoEdit.
CEILING_DB = 40.0
# Share of SSIM in CoCoEdit's similarity, by variant; PSNR has the rest.
SSIM_WEIGHT = {"fixed": 0.35, "paper": 0.5, "release": 0.35}


class Preservation(RewardTerm):
    """Mixes PSNR and SSIM of the background against the source; 0..1.

    ``(1 - w) * clip(PSNR / ceiling, 0, 1) + w * max(SSIM, 0)``, over pixels outside the mask. The
    mixture is CoCoEdit's with free weights; :class:`Similarity` has those of the paper and of the
    release.

    The PSNR part saturates: above ``ceiling_db`` it is 1 whatever the background does, and only
    SSIM still distinguishes candidates. Raise the ceiling for editors whose background is better.

    Attributes:
        ceiling_db: PSNR that gets the full score.
        ssim_weight: w.
    """

    kind: Literal["preservation"] = "preservation"
    ceiling_db: float = Field(default=CEILING_DB, gt=0, le=pixels.MAX_PSNR)
    ssim_weight: float = Field(default=0.5, ge=0, le=1)

    responds_to: ClassVar[Sides] = "outside"
    requires: ClassVar[frozenset[str]] = frozenset()
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    needs_attention: ClassVar[bool] = False

    @property
    def quick(self) -> bool:
        return True

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Components: ``psnr`` (dB, masked convention) and ``ssim`` (map masked)."""
        task = candidates.task
        psnr = pixels.psnr(candidates.images, task.source, ~task.edit_mask, "masked")
        ssim = pixels.ssim(candidates.images, task.source, ~task.edit_mask, "map_masked")
        return _mixed(psnr, ssim, ceiling_db=self.ceiling_db, ssim_weight=self.ssim_weight)


class Similarity(RewardTerm):
    """CoCoEdit's pixel similarity of the background, r_sim (arXiv 2602.14068); 0..1.

    It mixes clip(PSNR / 40, 0, 1) and SSIM.

    =======  ===========  ==============================  ====================================
    variant  PSNR : SSIM  PSNR                            SSIM
    =======  ===========  ==============================  ====================================
    fixed    .65 : .35    over background pixels and      map averaged over background pixels
                          channels
    paper    .5 : .5      the same: the paper says no     the same
                          more
    release  .65 : .35    squared error of three          see :func:`released_ssim`: saturates,
                          channels over one channel's     so that PSNR alone distinguishes
                          pixels: 10 log10(3) = 4.77 dB   edits
                          low, everywhere
    =======  ===========  ==============================  ====================================

    "fixed" is the release with both defects corrected. The constant offset of the PSNR part does
    not change advantages until it meets the ceiling (which it moves from 40 to 44.77 dB) or 0 dB.
    The flattening of the SSIM part does.

    Attributes:
        variant: whose weights and arithmetic.
    """

    kind: Literal["similarity"] = "similarity"
    variant: Literal["fixed", "paper", "release"] = "fixed"

    responds_to: ClassVar[Sides] = "outside"
    requires: ClassVar[frozenset[str]] = frozenset()
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    needs_attention: ClassVar[bool] = False

    @property
    def quick(self) -> bool:
        return True

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Components: ``psnr`` in dB and ``ssim``, by the variant's arithmetic."""
        task, released = candidates.task, self.variant == "release"
        psnr = pixels.psnr(
            candidates.images, task.source, ~task.edit_mask, "cocoedit" if released else "masked"
        )
        # Only the release computes both parts in its own way.
        if released:
            ssim = released_ssim(candidates.images, task.source, ~task.edit_mask)
        else:
            ssim = pixels.ssim(candidates.images, task.source, ~task.edit_mask, "map_masked")
        return _mixed(psnr, ssim, ceiling_db=CEILING_DB, ssim_weight=SSIM_WEIGHT[self.variant])


def released_ssim(
    images: UInt8[Tensor, "group height width 3"],
    source: UInt8[Tensor, "height width 3"],
    keep: Bool[Tensor, "height width"],
) -> Float[Tensor, " group"]:
    """Computes SSIM over the background as CoCoEdit's code has it, clipped to 0..1.

    Its windowed sums have Gaussian weights, which add up to 1, and are divided by the number of
    background pixels in the window, up to 121. So means come out a hundred times too small, fall
    below the two constants of SSIM, and all images look alike.
    """
    weight = keep.to(torch.float64)
    rows, columns = (_offsets(side, images.device) for side in keep.shape)
    reach = pixels.SSIM_WINDOW // 2
    # Background pixels in each window, which the released code divides by.
    area = ((rows.abs() <= reach).double() @ weight @ (columns.abs() <= reach).double()).clamp(
        min=1e-8
    )

    def mean(
        planes: Float[Tensor, "group 3 height width"],
    ) -> Float[Tensor, "group 3 height width"]:
        return _gaussian(rows) @ (planes * weight) @ _gaussian(columns) / area

    a, b = (
        pixels.unit_range(image).movedim(-1, -3)
        for image in (images, source[None].expand_as(images))
    )
    mean_a, mean_b = mean(a), mean(b)
    spread = mean(a * a) + mean(b * b) - mean_a**2 - mean_b**2
    shared = mean(a * b) - mean_a * mean_b
    # SSIM of Wang et al. 2004, with C1 = 0.01^2 and C2 = 0.03^2.
    alike = (2 * mean_a * mean_b + 0.01**2) * (2 * shared + 0.03**2)
    similarity = (alike / ((mean_a**2 + mean_b**2 + 0.01**2) * (spread + 0.03**2))).mean(dim=1)
    return ((similarity * weight).sum(dim=(-2, -1)) / weight.sum()).clamp(0, 1)


def _offsets(size: int, device: torch.device) -> Float[Tensor, "size size"]:
    """Lists how far every place is from every other along a side."""
    place = torch.arange(size, dtype=torch.float64, device=device)
    return place[:, None] - place


def _gaussian(offsets: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """Computes the window's weights along a side; they sum to 1 inside the border."""
    reach = pixels.SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * pixels.SSIM_SIGMA**2)) * (offsets.abs() <= reach)
    return weights / torch.exp(
        -(torch.arange(-reach, reach + 1).double() ** 2) / (2 * pixels.SSIM_SIGMA**2)
    ).sum().to(weights)


def _mixed(
    psnr: Float[Tensor, " group"],
    ssim: Float[Tensor, " group"],
    *,
    ceiling_db: float,
    ssim_weight: float,
) -> tuple[Score, ...]:
    """Clips both parts to 0..1 and mixes them; components stay as measured."""
    # SSIM may be negative; the mixture must stay in 0..1.
    values = (1 - ssim_weight) * (psnr / ceiling_db).clamp(0, 1) + ssim_weight * ssim.clamp(0, 1)
    rows = zip(values.clamp(0, 1).tolist(), psnr.tolist(), ssim.tolist(), strict=True)
    return tuple(
        Score(value=value, components={"psnr": db, "ssim": similarity})
        for value, db, similarity in rows
    )
