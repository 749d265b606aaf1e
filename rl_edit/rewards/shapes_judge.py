"""Scores edits whose exact result is known, as EditScore would, without a language model.

It reads source, result and target and no scene description, so it works for any paired task. It
compares pixels: "followed" means agreement with this one target, not with every correct image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_edit.errors import InputError
from rl_edit.measures.pixels import gaussian_mean, unit_range
from rl_edit.method.regions import labelled_regions
from rl_edit.rewards.term import RewardTerm, Sides
from rl_edit.rewards.vlm.editscore import overall
from rl_edit.scores import RegionScores
from rl_edit.types import Candidates, PairedTask, RegionsTask, Score

# Errors at which each quality falls to half of the scale, in units of an RMS error with peak 1:
# 10^(-25/20) is 25 dB.
_HALF_BACKGROUND = 10 ** (-25 / 20)
_HALF_TEXTURE = 10 ** (-25 / 20)
_HALF_ARTEFACTS = 0.12
# At 2.5 a reconstruction at 34 dB keeps 9.3 of 10 points while 25 dB keeps 5: mild loss costs
# little, but it costs.
_FALL = 2.5

# Missing detail is counted at half the weight of added noise: autoencoders soften every image.
_DEFICIT = 0.5
_CHANGED = 8 / 255
# A place with less than this share of the largest place's change is a speck of a hand-drawn mask.
_SPECK = 0.02
# RMS response of the 4-neighbour Laplacian to unit white noise, sqrt(4^2 + 4 * 1^2). Dividing by it
# gives noise-equivalent units.
_LAPLACIAN_GAIN = math.sqrt(20.0)
# Sub-scores of the coarse variant are integers of EditScore's scale.
_COARSE_STEPS = 25

# Scales are those of an image of 64 pixels and grow with it: a shift of one pixel in 64 is eight in
# 512.
_REFERENCE_SIZE = 64
_ALIGNMENT_SIGMA = 0.8
_ENERGY_SIGMA = 1.5
_BLOTCH_SIGMA = 2.0


class ShapesJudge(RewardTerm):
    """Scores ``sqrt(min(SC) * min(PQ))`` in 0..10.

    The exact target scores 10 and an untouched source 0.

    SC, semantic consistency:

    * ``instruction``: progress ``1 - |edit - target| / |source - target|`` (L1, slightly blurred)
      over the pixels that truly change, clipped to 0..1; the mean over separate regions.
    * ``not_over_edited``: a logistic in background PSNR against the source: 5 at 25 dB, 9.3 at
      34 dB, never flat.

    PQ, perceptual quality, inside the mask:

    * ``clean``: local high-frequency energy (Laplacian) against the target's; noise costs more than
      softness.
    * ``artefacts``: seams, edges across the mask's border that the target does not have, and
      blotches, smooth deviations where the mask allowed a change and the target has none.

    All four are continuous, so slightly different edits get different scores. Without any progress
    the score is 0. A target that differs from the source outside the mask scores below 10 itself.

    Attributes:
        coarse: round each sub-score to 26 levels, as a language-model judge answers, to study
            coarse rewards.
    """

    kind: Literal["shapes_judge"] = "shapes_judge"
    coarse: bool = False

    responds_to: ClassVar[Sides] = "both"
    requires: ClassVar[frozenset[str]] = frozenset({"target"})
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 10.0
    needs_attention: ClassVar[bool] = False
    gives_regions: ClassVar[bool] = True

    @property
    def quick(self) -> bool:
        return True

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Components, each 0..10: ``instruction, not_over_edited, clean, artefacts, SC, PQ``.

        Regions, 0..1 as the region judge's: the progress of every region, and ``not_over_edited``
        for the background. This is phi of SpatialFlow-GRPO's Eq. 3 without its factor for the
        complete image, by which damage anywhere would lower every region.
        """
        task = candidates.task
        if not isinstance(task, PairedTask):
            raise InputError(
                f"Task {task.task_id!r} has no target, and this judge compares with it. Use data "
                "with targets."
            )
        scene = _Scene.of(task)
        edits = unit_range(candidates.images)
        if edits.shape[1:] != scene.source.shape:
            raise InputError(
                f"Candidates of size {tuple(edits.shape[1:3])} cannot be compared with a source of "
                f"size {scene.mask.shape}."
            )
        if not bool(scene.changed.any()):
            reason = (
                f"the target of task {task.task_id!r} equals its source inside the mask, so "
                "progress is undefined"
            )
            return (Score(value=None, reason=reason),) * len(edits)
        instruction, by_region = _instruction(edits, scene)
        parts = {
            "instruction": instruction,
            "not_over_edited": _not_over_edited(edits, scene),
            "clean": _clean(edits, scene),
            "artefacts": _artefacts(edits, scene),
        }
        if self.coarse:
            parts = {
                name: (part * _COARSE_STEPS / 10).round() * 10 / _COARSE_STEPS
                for name, part in parts.items()
            }
        rows = zip(*(part.tolist() for part in parts.values()), strict=True)
        return tuple(
            _composed(dict(zip(parts, row, strict=True)), where)
            for row, where in zip(rows, by_region.tolist(), strict=True)
        )


def _composed(parts: dict[str, float], by_region: list[float]) -> Score:
    sc = (parts["instruction"], parts["not_over_edited"])
    pq = (parts["clean"], parts["artefacts"])
    return Score(
        value=min(overall(sc, pq), 10.0),
        components={**parts, "SC": min(sc), "PQ": min(pq)},
        regions=RegionScores(
            areas=tuple(progress / 10 for progress in by_region),
            background=parts["not_over_edited"] / 10,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """A task in the judge's units, with the difference between target and source.

    Attributes:
        changed: pixels inside the mask that truly differ.
        places: the separate region each pixel of the mask belongs to, from 1; 0 outside.
        known: how many regions the task lists one by one; 0 when places were found by connectivity.
        unit: image size relative to the one the scales are meant for.
    """

    source: Float[Tensor, "height width 3"]
    target: Float[Tensor, "height width 3"]
    mask: Bool[Tensor, "height width"]
    changed: Bool[Tensor, "height width"]
    places: Int64[Tensor, "height width"]
    known: int
    unit: float

    @staticmethod
    def of(task: PairedTask) -> _Scene:
        source, target = unit_range(task.source), unit_range(task.target)
        changed = ((source - target).abs().amax(dim=-1) > _CHANGED) & task.edit_mask
        known = task.regions if isinstance(task, RegionsTask) else None
        places = labelled_regions(task.edit_mask) if known is None else _numbered(known)
        unit = max(min(task.edit_mask.shape) / _REFERENCE_SIZE, 1.0)
        return _Scene(
            source=source,
            target=target,
            mask=task.edit_mask,
            changed=changed,
            places=places,
            known=0 if known is None else len(known),
            unit=unit,
        )


def _instruction(
    edits: Float[Tensor, "group height width 3"], scene: _Scene
) -> tuple[Float[Tensor, " group"], Float[Tensor, "group region"]]:
    """Computes progress as the mean over places, and for each known region.

    A region in which nothing was to change has full progress.
    """
    sigma = _ALIGNMENT_SIGMA * scene.unit
    source, target, edited = (
        _blurred(scene.source, sigma),
        _blurred(scene.target, sigma),
        _blurred(edits, sigma),
    )
    remaining = (edited - target).abs().mean(dim=-1)
    requested = (source - target).abs().mean(dim=-1)
    # Summed by place rather than masked one by one: a photograph's mask may fall into thousands of
    # specks.
    place, num_places = scene.places[scene.changed], max(int(scene.places.max()), scene.known) + 1
    requested_of = requested.new_zeros(num_places).index_add(0, place, requested[scene.changed])
    remaining_of = requested.new_zeros(len(edits), num_places).index_add(
        1, place, remaining[:, scene.changed]
    )
    counted = requested_of > _SPECK * requested_of.max()
    # 1 - |edit - target| / |source - target|, on 0..10.
    progress = 10 * (1 - remaining_of / requested_of).clamp(0, 1)
    mean = progress[:, counted].mean(dim=-1)
    return mean, torch.where(counted, progress, 10.0)[:, 1:] if scene.known else mean[:, None]


def _not_over_edited(
    edits: Float[Tensor, "group height width 3"], scene: _Scene
) -> Float[Tensor, " group"]:
    # RMS error of the background; equals 10^(-PSNR / 20).
    squared = (edits - scene.source).square().mean(dim=-1)
    return _falling(squared[:, ~scene.mask].mean(dim=-1).sqrt(), _HALF_BACKGROUND)


def _clean(edits: Float[Tensor, "group height width 3"], scene: _Scene) -> Float[Tensor, " group"]:
    sigma = _ENERGY_SIGMA * scene.unit
    detail, expected = _fine_detail(edits, sigma), _fine_detail(scene.target, sigma)
    excess = (detail - expected).clamp_min(0) + _DEFICIT * (expected - detail).clamp_min(0)
    return _falling(excess[:, scene.mask].mean(dim=-1), _HALF_TEXTURE)


def _fine_detail(
    image: Float[Tensor, "*group height width 3"], sigma: float
) -> Float[Tensor, "*group height width"]:
    """Computes the local RMS of the Laplacian, in noise-equivalent units.

    It is pooled, so the exact place of a detail does not count.
    """
    padded = F.pad(image.movedim(-1, -3), (1, 1, 1, 1), mode="replicate")
    centre = padded[..., 1:-1, 1:-1]
    neighbours = (
        padded[..., :-2, 1:-1]
        + padded[..., 2:, 1:-1]
        + padded[..., 1:-1, :-2]
        + padded[..., 1:-1, 2:]
    )
    energy = (neighbours - 4 * centre).square().mean(dim=-3)
    # The square root is infinitely steep at 0: rounding below it would otherwise show as a
    # difference of 1e-9.
    return _blurred(energy[..., None], sigma)[..., 0].clamp_min(0).sqrt() / _LAPLACIAN_GAIN


def _artefacts(
    edits: Float[Tensor, "group height width 3"], scene: _Scene
) -> Float[Tensor, " group"]:
    return _falling(_seam(edits, scene) + _blotches(edits, scene), _HALF_ARTEFACTS)


def _seam(edits: Float[Tensor, "group height width 3"], scene: _Scene) -> Float[Tensor, " group"]:
    """Computes the mean step across the mask's border beyond the target's.

    It is taken over neighbouring pixels on the two sides.
    """
    excess, pairs = torch.zeros(len(edits), dtype=edits.dtype, device=edits.device), 0
    for dim in (0, 1):
        crossing = scene.mask.diff(dim=dim)
        step = edits.diff(dim=dim + 1).abs().mean(dim=-1)[:, crossing]
        expected = scene.target.diff(dim=dim).abs().mean(dim=-1)[crossing]
        excess = excess + (step - expected).clamp_min(0).sum(dim=-1)
        pairs += int(crossing.sum())
    return excess / max(pairs, 1)


def _blotches(
    edits: Float[Tensor, "group height width 3"], scene: _Scene
) -> Float[Tensor, " group"]:
    """Computes the RMS of smooth deviations where a change was allowed and not requested."""
    spare = scene.mask & ~scene.changed
    if not bool(spare.any()):
        return torch.zeros(len(edits), dtype=edits.dtype, device=edits.device)
    weight = spare.to(edits.dtype)[..., None]
    sigma = _BLOTCH_SIGMA * scene.unit
    # Averaged over spare pixels only: an error of the object itself counts under ``instruction``.
    smooth = _blurred((edits - scene.target) * weight, sigma) / _blurred(weight, sigma).clamp_min(
        1e-6
    )
    return smooth.square().mean(dim=-1)[:, spare].mean(dim=-1).sqrt()


def _falling(error: Float[Tensor, " group"], half: float) -> Float[Tensor, " group"]:
    """Maps an error to a score, 10 without error and 5 at ``half``.

    ``10 / (1 + (error / half)^2.5)``, strictly falling.
    """
    return 10 / (1 + (error / half) ** _FALL)


def _blurred(
    image: Float[Tensor, "*group height width channel"], sigma: float
) -> Float[Tensor, "*group height width channel"]:
    return gaussian_mean(image, sigma=sigma, radius=math.ceil(3 * sigma))


def _numbered(regions: Bool[Tensor, "region height width"]) -> Int64[Tensor, "height width"]:
    number = torch.arange(1, len(regions) + 1, device=regions.device)[:, None, None]
    return (regions * number).amax(dim=0)
