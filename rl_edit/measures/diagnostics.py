"""Measures edits inside and outside the mask, whatever the rewards of the run are."""

from __future__ import annotations

import math

from torch import Tensor

from rl_edit.measures.drift import drift
from rl_edit.measures.pixels import psnr, ssim
from rl_edit.measures.reward_statistics import change_variance
from rl_edit.method.attention import concentration_density
from rl_edit.scores import Measures, PerCandidate
from rl_edit.types import Candidates


def measure(candidates: Candidates, *, complete: bool) -> Measures:
    """Measures everything that the metrics of a run report beside its rewards.

    Args:
        complete: the candidates are all of their group. From a chunk, the variance between
            candidates cannot be computed.
    """
    return Measures(
        background={**background_fidelity(candidates), **drift(candidates)},
        change_inside=change_inside(candidates),
        concentration=concentration(candidates),
        variance=change_variance(candidates) if complete else None,
    )


def background_fidelity(candidates: Candidates) -> dict[str, PerCandidate]:
    """Compares pixels outside the mask with the source.

    ``psnr`` in dB by the masked convention, ``psnr_zero_filled`` by the other one, and ``ssim``
    averaged over background pixels (see :mod:`rl_edit.measures.pixels`).
    """
    images, background = candidates.images, ~candidates.task.edit_mask
    source = candidates.task.source[None].expand_as(images)
    return {
        "psnr": _finite(psnr(images, source, background, convention="masked")),
        "psnr_zero_filled": _finite(psnr(images, source, background, convention="zero_filled")),
        "ssim": _finite(ssim(images, source, background, convention="map_masked")),
    }


def change_inside(candidates: Candidates) -> PerCandidate:
    """Computes the mean absolute change inside the mask, 0..1."""
    task = candidates.task
    change = (candidates.images.float() - task.source.float())[:, task.edit_mask].abs()
    return _finite(change.mean(dim=(1, 2)) / 255)


def concentration(candidates: Candidates) -> PerCandidate:
    """Computes the attention concentration density (RC-GRPO-Editing, Eq. 17-18)."""
    return _finite(concentration_density(candidates.attention, candidates.token_mask))


def _finite(values: Tensor) -> PerCandidate:
    # One NaN for every undefined value, such as the density of no attention at all.
    return tuple(v if math.isfinite(v) else math.nan for v in values.tolist())
