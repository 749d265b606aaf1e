"""The edit region of an instruction that came without a mask, from what the base editor does with it. Pure tensors, no editor.

Two sources, neither of which anybody drew: where the base editor's own edits differ from the source, and where the instruction
looks while they are made. Ours; the papers of the family take masks as given. How well it agrees with true masks is measured by
``rl-edit find-masks`` and ``benchmarks/results/automask.md``. It finds where the *base* edits: where the base edits the wrong place,
that place is found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rl_edit.method.regions import labelled_regions, token_mask


@dataclass(frozen=True, kw_only=True)
class FoundRegions:
    """The separate places of an edit: disjoint, none empty, in reading order; their union is the mask."""

    regions: Bool[Tensor, "region height width"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a found mask is a true one.

    Attributes:
        iou: pixels of both over pixels of either.
        precision, recall: pixels of both over those found, and over those that are true.
        same_number: whether both have as many separate places.
    """

    iou: float
    precision: float
    recall: float
    same_number: bool


def agreement(found: Bool[Tensor, "height width"], true: Bool[Tensor, "height width"]) -> Agreement:
    """Of two masks, neither of them empty."""
    both = int((found & true).sum())
    return Agreement(
        iou=both / int((found | true).sum()),
        precision=both / int(found.sum()),
        recall=both / int(true.sum()),
        same_number=bool(labelled_regions(found).max() == labelled_regions(true).max()),
    )


@dataclass(frozen=True, kw_only=True)
class NotFound:
    """Why there is no mask.

    Attributes:
        kind: "unchanged" (the base editor leaves the picture as it is), "specks" (nothing of a size that counts), "scattered" (too
            many places), "everywhere" (too little would be left to keep).
        reason: the same in words, with the numbers.
    """

    kind: Literal["unchanged", "specks", "scattered", "everywhere"]
    reason: str


class MaskFinder(BaseModel):
    """``s = (1 - w) * c + w * a`` above Otsu's threshold, without specks, grown by a margin; each connected part is a region.

    c is the change that the base editor makes, smoothed; a is the attention mass, brought from tokens to pixels. Either is scaled
    from its ground, the level that the least changed part of the picture stays under, to its largest value: an editor that shifts
    the whole picture a little has changed nothing more in one place than in another. Lengths are shares of the picture's shorter
    side, areas of its area.

    Attributes:
        attention_weight: w. Alone, attention agrees with true masks half as well as change does; a little of it costs nothing, and its
            gain is hardly more than the noise (benchmarks/results/automask.md, which chose the defaults).
        smoothing: standard deviation of the Gaussian.
        floor: least rise of the smoothed change above its ground, 1 being black against white. Below it the base editor did not edit.
        min_area: least area of a connected part above the threshold.
        margin: by which every part grows to each side. Otsu's threshold stands high on a changed object's flank.
        box: whether a region is the bounding box of its part; boxes that meet become one.
        max_regions: regions. A change in more places than that is no edit of a place.
        max_area: greatest area of all regions together; what is left is the part that gives the ground.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    attention_weight: float = Field(default=0.1, ge=0, le=1)
    smoothing: float = Field(default=0.016, ge=0, lt=0.5)
    floor: float = Field(default=0.1, ge=0, le=1)
    min_area: float = Field(default=0.005, ge=0, lt=1)
    margin: float = Field(default=0.03, ge=0, lt=0.5)
    box: bool = True
    max_regions: int = Field(default=8, ge=1, le=255)
    max_area: float = Field(default=0.7, gt=0, le=1)

    def __call__(
        self, change: Float[Tensor, "height width"], attention: Float[Tensor, "rows columns"]
    ) -> FoundRegions | NotFound:
        """Regions on the canvas.

        Args:
            change: mean over the base editor's edits and over channels of ``|edit - source|``, intensities 0..1.
            attention: text-to-image mass on the token grid, mean over the same edits. Not read at ``attention_weight`` 0.

        Raises:
            ValueError: for an attention that was not measured, where it is read.
        """
        side = min(change.shape)
        smooth = smoothed(change, self.smoothing * side)
        ground = float(self._ground(smooth))
        rise = float(smooth.max()) - ground
        if rise < self.floor:
            reason = f"the edits rise {rise:.3f} above the {ground:.3f} by which most of the picture changes, the floor is {self.floor:g}"
            return NotFound(
                kind="unchanged" if ground < self.floor else "everywhere", reason=reason
            )
        score = (1 - self.attention_weight) * self._scaled(smooth)
        if self.attention_weight > 0:
            if not bool(attention.isfinite().all()):
                raise ValueError(
                    f"attention_weight is {self.attention_weight:g} and no attention was measured: set it to 0, or measure it"
                )
            upsampled = F.interpolate(
                attention[None, None].to(score), change.shape, mode="bilinear"
            )[0, 0]
            score = score + self.attention_weight * self._scaled(upsampled)
        labels = labelled_regions(score > otsu(score.flatten()))
        sizes = labels.flatten().bincount(minlength=2)[1:] / labels.numel()
        counted = (sizes >= self.min_area).nonzero()[:, 0] + 1
        if not len(counted):
            biggest = float(sizes.max())
            return NotFound(
                kind="specks",
                reason=f"the largest part covers {biggest:.2%} of the picture, the least is {self.min_area:.2%}",
            )
        regions = self._grown(torch.isin(labels, counted), round(self.margin * side))
        if len(regions) > self.max_regions:
            return NotFound(
                kind="scattered",
                reason=f"there are {len(regions)} separate parts, the most is {self.max_regions}",
            )
        mask = regions.any(dim=0)
        covered = float(mask.float().mean())
        if covered > self.max_area or bool(
            token_mask(mask, (attention.shape[0], attention.shape[1])).all()
        ):
            return NotFound(
                kind="everywhere",
                reason=f"the regions cover {covered:.0%} of the picture, the most is {self.max_area:.0%} and one token of background",
            )
        return FoundRegions(regions=regions)

    def _ground(self, values: Float[Tensor, "height width"]) -> Float[Tensor, ""]:
        """What a share ``1 - largest`` of the picture stays under."""
        return values.flatten().kthvalue(max(round((1 - self.max_area) * values.numel()), 1)).values

    def _scaled(self, values: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
        """Ground to 0, largest to 1, clipped below; all 0 where nothing stands out."""
        ground = self._ground(values)
        return ((values - ground) / (values.max() - ground).clamp(min=1e-12)).clamp(min=0)

    def _grown(
        self, mask: Bool[Tensor, "height width"], margin: int
    ) -> Bool[Tensor, "region height width"]:
        """The parts of a mask with their margin, as boxes where they are boxes; parts that then meet are one."""
        if margin:
            mask = F.max_pool2d(mask.float()[None, None], 2 * margin + 1, stride=1, padding=margin)[
                0, 0
            ].bool()
        regions = _parts(mask)
        while self.box:
            boxes = regions.any(dim=2)[:, :, None] & regions.any(dim=1)[:, None, :]
            if torch.equal(boxes, regions):
                break
            regions = _parts(boxes.any(dim=0))
        return regions


def otsu(values: Float[Tensor, " value"]) -> float:
    """Otsu's threshold (1979): of all cuts of the sorted values, the middle of the one with the greatest variance between its sides."""
    ordered = values.double().sort().values
    total = ordered.cumsum(dim=0)
    below = torch.arange(1, len(ordered), dtype=torch.float64, device=values.device)
    above = len(ordered) - below
    gap = total[:-1] / below - (total[-1] - total[:-1]) / above
    cut = int((below * above * gap.square()).argmax())
    return float((ordered[cut] + ordered[cut + 1]) / 2)


def smoothed(image: Float[Tensor, "height width"], sigma: float) -> Float[Tensor, "height width"]:
    """Gaussian mean around each pixel, ``sigma`` in pixels, windows cut and renormalised at the border; 0 leaves it as it is."""
    if sigma == 0:
        return image
    rows, columns = (_band(size, sigma).to(image) for size in image.shape)
    return rows @ image @ columns.mT


def _band(size: int, sigma: float) -> Float[Tensor, "size size"]:
    place = torch.arange(size, dtype=torch.float64)
    offset = place[:, None] - place
    weight = torch.exp(-(offset**2) / (2 * sigma**2)) * (offset.abs() <= math.ceil(3 * sigma))
    return weight / weight.sum(dim=1, keepdim=True)


def _parts(mask: Bool[Tensor, "height width"]) -> Bool[Tensor, "part height width"]:
    """The connected parts of a mask, one a row, in reading order."""
    labels = labelled_regions(mask)
    return labels[None] == torch.arange(1, int(labels.max()) + 1, device=mask.device)[:, None, None]
