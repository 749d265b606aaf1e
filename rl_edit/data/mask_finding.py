"""Edit regions of an instruction without a mask, from the base editor's edits. Pure tensors.

Two sources, neither of which a person drew: the places where the base editor's edits differ from
the source, and the places that the instruction attends to while they are made. Ours; the papers of
the family take masks as given. Agreement with true masks is measured by ``rl-edit find-masks`` and
in ``benchmarks/results/automask.md``. The regions are those that the *base* edits: where it edits
the wrong place, that place is returned.
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
    """Separate places of an edit: disjoint, none empty, in reading order; together the mask."""

    regions: Bool[Tensor, "region height width"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of a found mask with a true one.

    Attributes:
        iou: pixels of both over pixels of either.
        precision, recall: pixels of both over those found, and over those that are true.
        same_number: whether both have as many separate places.
    """

    iou: float
    precision: float
    recall: float
    same_number: bool


def agreement(mask: Bool[Tensor, "height width"], true: Bool[Tensor, "height width"]) -> Agreement:
    """Measures the agreement of two masks, neither of them empty."""
    both = int((mask & true).sum())
    return Agreement(
        iou=both / int((mask | true).sum()),
        precision=both / int(mask.sum()),
        recall=both / int(true.sum()),
        # Labels count up from 1, so the largest is the number of places.
        same_number=bool(labelled_regions(mask).max() == labelled_regions(true).max()),
    )


@dataclass(frozen=True, kw_only=True)
class NotFound:
    """The reason for a row without a mask.

    Attributes:
        kind: "unchanged" (the base editor leaves the image as it is), "specks" (nothing of a size
            that counts), "scattered" (too many places), "everywhere" (too little would be left to
            keep).
        reason: the same in words, with the numbers.
    """

    kind: Literal["unchanged", "specks", "scattered", "everywhere"]
    reason: str


class MaskFinder(BaseModel):
    """Finds regions by a threshold on change and attention.

    ``s = (1 - w) * c + w * a`` above Otsu's threshold, without specks, grown by a margin; each
    connected part is a region. c is the change that the base editor makes, smoothed; a is the
    attention mass, brought from tokens to pixels. Either is scaled from its ground, the level that
    the least changed part of the image stays under, to its largest value: an editor that shifts the
    complete image a little has changed nothing more in one place than in another. Lengths are
    shares of the image's shorter side, areas of its area.

    Attributes:
        attention_weight: w. With 1, attention agrees with true masks half as well as change does. A
            little of it costs nothing, and its gain is hardly more than the noise
            (benchmarks/results/automask.md, which chose the defaults).
        smoothing: standard deviation of the Gaussian.
        floor: smallest rise of the smoothed change above its ground, 1 being black against white.
            Below it the base editor did not edit.
        min_area: smallest area of a connected part above the threshold.
        margin: by which every part grows to each side. Otsu's threshold stands high on a changed
            object's flank.
        box: whether a region is the bounding box of its part. Boxes that meet become one.
        max_regions: regions. A change in more places than that is no edit of a place.
        max_area: greatest area of all regions together. The rest is the part that gives the ground.
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
        """Returns regions on the canvas.

        Args:
            change: mean over the base editor's edits and over channels of ``|edit - source|``,
                intensities 0..1.
            attention: text-to-image mass on the token grid, mean over the same edits. Not read at
                ``attention_weight`` 0.

        Raises:
            ValueError: attention is read and was not measured.
        """
        side = min(change.shape)
        smooth = smoothed(change, self.smoothing * side)
        ground = float(self._ground(smooth))
        rise = float(smooth.max()) - ground
        if rise < self.floor:
            # A high ground means that the image changed as a whole, a low one that it did not.
            return NotFound(
                kind="unchanged" if ground < self.floor else "everywhere",
                reason=f"the edits rise {rise:.3f} above the {ground:.3f} by which most of the "
                f"image changes, the floor is {self.floor:g}",
            )
        score = self._score(smooth, attention)
        labels = labelled_regions(score > otsu(score.flatten()))
        # Label 0 is the ground; sizes are shares of the area.
        sizes = labels.flatten().bincount(minlength=2)[1:] / labels.numel()
        counted = (sizes >= self.min_area).nonzero()[:, 0] + 1
        if not len(counted):
            return NotFound(
                kind="specks",
                reason=f"the largest part covers {float(sizes.max()):.2%} of the image, the least "
                f"is {self.min_area:.2%}",
            )
        regions = self._grown(torch.isin(labels, counted), round(self.margin * side))
        refusal = self._refusal(regions, (attention.shape[0], attention.shape[1]))
        return refusal or FoundRegions(regions=regions)

    def _score(
        self, smooth: Float[Tensor, "height width"], attention: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, "height width"]:
        """Returns s of the class docstring."""
        # s = (1 - w) * c + w * a
        score = (1 - self.attention_weight) * self._scaled(smooth)
        if self.attention_weight == 0:
            return score
        if not bool(attention.isfinite().all()):
            raise ValueError(
                f"attention_weight is {self.attention_weight:g} and no attention was measured: set "
                "it to 0, or measure it"
            )
        tokens = attention[None, None].to(score)
        pixels = F.interpolate(tokens, smooth.shape, mode="bilinear")[0, 0]
        return score + self.attention_weight * self._scaled(pixels)

    def _refusal(
        self, regions: Bool[Tensor, "region height width"], grid: tuple[int, int]
    ) -> NotFound | None:
        """Refuses too many regions, and regions that leave no background to train on."""
        if len(regions) > self.max_regions:
            return NotFound(
                kind="scattered",
                reason=f"there are {len(regions)} separate parts, the most is {self.max_regions}",
            )
        mask = regions.any(dim=0)
        covered = float(mask.float().mean())
        # A mask may be small and still touch every token, of which one must be background.
        if covered > self.max_area or bool(token_mask(mask, grid).all()):
            return NotFound(
                kind="everywhere",
                reason=f"the regions cover {covered:.0%} of the image, the most is "
                f"{self.max_area:.0%} and one token of background",
            )
        return None

    def _ground(self, values: Float[Tensor, "height width"]) -> Float[Tensor, ""]:
        """Returns the level that a share ``1 - max_area`` of the image stays under."""
        rank = max(round((1 - self.max_area) * values.numel()), 1)
        return values.flatten().kthvalue(rank).values

    def _scaled(self, values: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
        """Maps the ground to 0 and the largest value to 1, clipped below."""
        ground = self._ground(values)
        # The clamp makes a flat map all 0 instead of 0 / 0.
        return ((values - ground) / (values.max() - ground).clamp(min=1e-12)).clamp(min=0)

    def _grown(
        self, mask: Bool[Tensor, "height width"], margin: int
    ) -> Bool[Tensor, "region height width"]:
        """Returns the parts of a mask with their margin; parts that then meet are one."""
        if margin:
            # Max pooling with stride 1 grows a mask by a square.
            pixels = mask.float()[None, None]
            mask = F.max_pool2d(pixels, 2 * margin + 1, stride=1, padding=margin)[0, 0].bool()
        regions = _parts(mask)
        # A box may reach into another region, and their union is a part with a larger box.
        while self.box:
            boxes = regions.any(dim=2)[:, :, None] & regions.any(dim=1)[:, None, :]
            if torch.equal(boxes, regions):
                break
            regions = _parts(boxes.any(dim=0))
        return regions


def otsu(values: Float[Tensor, " value"]) -> float:
    """Returns Otsu's threshold (1979).

    Of all cuts of the sorted values, it is the middle of the one with the greatest variance between
    its two sides.
    """
    ordered = values.double().sort().values
    total = ordered.cumsum(dim=0)
    below = torch.arange(1, len(ordered), dtype=torch.float64, device=values.device)
    above = len(ordered) - below
    # Variance between the sides, up to a constant: n_below * n_above * (mean difference)^2.
    gap = total[:-1] / below - (total[-1] - total[:-1]) / above
    cut = int((below * above * gap.square()).argmax())
    return float((ordered[cut] + ordered[cut + 1]) / 2)


def smoothed(image: Float[Tensor, "height width"], sigma: float) -> Float[Tensor, "height width"]:
    """Returns the Gaussian mean around each pixel; ``sigma`` in pixels, 0 leaves the image.

    Windows are cut and renormalised at the border.
    """
    if sigma == 0:
        return image
    # The Gaussian separates, so that two small matrix products do.
    rows, columns = (_band(size, sigma).to(image) for size in image.shape)
    return rows @ image @ columns.mT


def _band(size: int, sigma: float) -> Float[Tensor, "size size"]:
    """Returns the Gaussian's weights of each place for each other, cut at 3 sigma."""
    place = torch.arange(size, dtype=torch.float64)
    offset = place[:, None] - place
    weight = torch.exp(-(offset**2) / (2 * sigma**2)) * (offset.abs() <= math.ceil(3 * sigma))
    return weight / weight.sum(dim=1, keepdim=True)


def _parts(mask: Bool[Tensor, "height width"]) -> Bool[Tensor, "part height width"]:
    """Returns the connected parts of a mask, one a row, in reading order."""
    labels = labelled_regions(mask)
    numbers = torch.arange(1, int(labels.max()) + 1, device=mask.device)
    return labels[None] == numbers[:, None, None]
