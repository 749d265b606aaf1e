"""Scores every region of an edit and its background with a vision-language model, in one request.

This follows the reward of SpatialFlow-GRPO (arXiv 2606.26872), whose judge is a model tuned for it.
Region scores of an untuned model are weak: they take two values, and hardly change when images are
withheld. Audit them before training, and add a pixel reward on the background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rl_edit.rewards.term import Sides
from rl_edit.rewards.vlm.judge_reward import JudgeQuestion, JudgeReward, mean_of
from rl_edit.rewards.vlm.prompts import region_question, region_schema
from rl_edit.scores import RegionScores
from rl_edit.types import EditTask, Score, areas_of

_COLOURS = ("#ff0000", "#00c8ff", "#ffd000", "#ff00ff", "#00ff40", "#ff8000")
# Share of a region's longer side. Its surroundings show the judge what the region is part of.
_CROP_MARGIN = 0.25


class RegionJudge(JudgeReward):
    """Averages ``sqrt(phi * overall) / C`` (Eq. 3) over regions, background and passes; 0..1.

    ``phi`` is the lower of success and preservation in a region; the background has one score.
    ``overall`` is the lower of naturalness and cleanness of the complete image, the same for all
    regions of a candidate. C is the top of the scale. The paper gives each region an advantage of
    its own; the value is their mean, and ``Score.regions`` has them one by one. A task without
    regions has its mask as the only one.

    Attributes:
        show: how the judge sees where a region is. "outlined": a third image, the source with
            numbered outlines of the masks. "boxed": the same with their bounding boxes. "cropped":
            each region cut out of source and edit with a margin, after both.
    """

    kind: Literal["region_judge"] = "region_judge"
    show: Literal["outlined", "boxed", "cropped"] = "outlined"

    responds_to: ClassVar[Sides] = "both"
    high: ClassVar[float] = 1.0
    gives_regions: ClassVar[bool] = True

    def questions(
        self, task: EditTask, edited: UInt8[Tensor, "height width 3"]
    ) -> tuple[JudgeQuestion, ...]:
        regions = areas_of(task)
        boxes = [box_of(region) for region in regions]
        # Two images a region, in the order of the region's number, which the prompt relies on.
        if self.show == "cropped":
            cut = [_margin(box, task.edit_mask.shape) for box in boxes]
            more = tuple(
                image[top:bottom, left:right]
                for left, top, right, bottom in cut
                for image in (task.source, edited)
            )
            places = ", ".join(
                f"images {2 * number + 1} and {2 * number + 2} show region {number}"
                for number in range(1, len(boxes) + 1)
            )
            labels = tuple(
                f"region {number} of the {which}"
                for number in range(1, len(boxes) + 1)
                for which in ("original", "edited image")
            )
            shown = (
                "After them the same regions are cut out of both, first the original, then the "
                f"result: {places}."
            )
        else:
            areas = (
                regions
                if self.show == "outlined"
                else torch.stack([_filled(box, task.edit_mask) for box in boxes])
            )
            more = (_marked(task.source, areas, boxes),)
            labels = ("the original with numbered regions",)
            shape = "outlines" if self.show == "outlined" else "boxes"
            shown = (
                f"The third image is the original again, with numbered {shape} drawn on it for you "
                "to see where its regions are."
            )
        return (
            JudgeQuestion(
                name="regions",
                images=(task.source, edited, *more),
                labels=("the original (source)", "the edited image (result)", *labels),
                prompt=region_question(task.instruction, shown, len(regions), self.score_range),
                schema=region_schema(len(regions), self.score_range),
            ),
        )

    def combined(self, passes: Sequence[Sequence[tuple[float, ...]]]) -> Score:
        """Averages the passes.

        Regions hold Eq. 3 values, 0..1. Components, 0..10 as the judge answered:
        ``region.N.success``, ``region.N.preservation`` and ``background.preservation``, and of the
        complete image ``naturalness`` and ``cleanness``.
        """
        by_answer = [_Answer.of(numbers) for (numbers,) in passes]
        by_pass = [answer.regions() for answer in by_answer]
        # The mean over all numbers at once, not of means: their rounding would differ.
        scores = [score for regions in by_pass for score in (*regions.areas, regions.background)]
        return Score(
            value=min(fmean(scores), self.high),
            components=mean_of([answer.components() for answer in by_answer]),
            regions=RegionScores(
                areas=tuple(map(fmean, zip(*(r.areas for r in by_pass), strict=True))),
                background=fmean(regions.background for regions in by_pass),
            ),
        )


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """The numbers of one answer, 0..10.

    Attributes:
        pairs: (success, preservation) of each region.
    """

    pairs: tuple[tuple[float, float], ...]
    background: float
    naturalness: float
    cleanness: float

    @staticmethod
    def of(numbers: Sequence[float]) -> _Answer:
        """Reads the numbers in the order of ``region_schema``."""
        *pairs, background, naturalness, cleanness = numbers
        return _Answer(
            pairs=tuple(zip(pairs[0::2], pairs[1::2], strict=True)),
            background=background,
            naturalness=naturalness,
            cleanness=cleanness,
        )

    def regions(self) -> RegionScores:
        """Computes Eq. 3 of every region and of the background."""
        overall = min(self.naturalness, self.cleanness)
        return RegionScores(
            areas=tuple(_eq3(min(pair), overall) for pair in self.pairs),
            background=_eq3(self.background, overall),
        )

    def components(self) -> dict[str, float]:
        """Names the answer's own numbers."""
        by_region = {
            f"region.{number}.{name}": score
            for number, pair in enumerate(self.pairs)
            for name, score in zip(("success", "preservation"), pair, strict=True)
        }
        return {
            **by_region,
            "background.preservation": self.background,
            "naturalness": self.naturalness,
            "cleanness": self.cleanness,
        }


def _eq3(phi: float, overall: float) -> float:
    # SpatialFlow-GRPO Eq. 3: sqrt(phi * overall) / C. Both are on 0..10 here, so C is 10.
    return min(math.sqrt(phi * overall) / 10, 1.0)


def box_of(region: Bool[Tensor, "height width"]) -> tuple[int, int, int, int]:
    """Computes the bounding box: (left, top, past the right, past the bottom)."""
    rows, columns = region.any(dim=1).nonzero(), region.any(dim=0).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _margin(box: tuple[int, int, int, int], size: Sequence[int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    by = math.ceil(_CROP_MARGIN * max(right - left, bottom - top))
    # A box at the border keeps the margin on its other sides.
    return max(left - by, 0), max(top - by, 0), min(right + by, size[1]), min(bottom + by, size[0])


def _filled(
    box: tuple[int, int, int, int], like: Bool[Tensor, "height width"]
) -> Bool[Tensor, "height width"]:
    left, top, right, bottom = box
    area = torch.zeros_like(like)
    area[top:bottom, left:right] = True
    return area


def _marked(
    source: UInt8[Tensor, "height width 3"],
    areas: Bool[Tensor, "region height width"],
    boxes: Sequence[tuple[int, int, int, int]],
) -> UInt8[Tensor, "height width 3"]:
    """Copies the image and draws each area's outline and number on it."""
    image = Image.fromarray(source.cpu().numpy())
    draw, side = ImageDraw.Draw(image), min(image.size)
    font, width = ImageFont.load_default(max(10, side // 24)), max(1, side // 256)
    for number, (area, (left, top, _, _)) in enumerate(zip(areas, boxes, strict=True), start=1):
        colour = _COLOURS[(number - 1) % len(_COLOURS)]
        # Beyond the image is outside the area: an outline runs along the image's border too.
        outside = F.pad(1 - area.float(), (width,) * 4, value=1.0)
        # The ring of pixels in the area that have a pixel outside within ``width``.
        edge = area & F.max_pool2d(outside[None], 2 * width + 1, stride=1)[0].bool()
        draw.bitmap((0, 0), Image.fromarray(edge.cpu().numpy().astype(np.uint8) * 255), fill=colour)
        corner = (left + width + 1, top + width)
        draw.rectangle(draw.textbbox(corner, str(number), font=font), fill="#000000")
        draw.text(corner, str(number), fill=colour, font=font)
    return torch.from_numpy(np.array(image))
