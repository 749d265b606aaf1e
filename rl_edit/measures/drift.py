"""Measures drift of the background that a single distance hides.

Drift is a seam around the edit, a shift in brightness, lost or new texture, or a grid. Every
measure compares the background pixels of a group ``[G, H, W, 3]`` with their source ``[H, W, 3]``,
both uint8, and gives one number per candidate. Intensities are 0..1; luma is ITU-R BT.601. An
untouched background gives 0, and 1 for the edges.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from rl_edit.types import Candidates

# Width of the ring just outside the mask. Most of what a soft edge or a badly pasted patch changes
# lies within.
SEAM_PIXELS = 4
# Bins of the luma histogram: a small background would leave most of 256 bins empty.
ENTROPY_LEVELS = 64
# One grey level, added to both edge densities, so that a flat background has a ratio too.
EDGE_FLOOR = 1 / 255
# ITU-R BT.601.
_LUMA = (0.299, 0.587, 0.114)

Images = UInt8[Tensor, "group height width 3"]
Source = UInt8[Tensor, "height width 3"]
Keep = Bool[Tensor, "height width"]
PerCandidate = Float[Tensor, " group"]


def drift(candidates: Candidates) -> dict[str, tuple[float, ...]]:
    """Measures the whole panel, by name; NaN where a measure is undefined."""
    images, source, keep = candidates.images, candidates.task.source, ~candidates.task.edit_mask
    measures = {
        "seam": seam(images, source, keep),
        "brightness": brightness(images, source, keep),
        "edges": edges(images, source, keep),
        "entropy": entropy(images, source, keep),
        "spectrum": spectrum(images, source, keep),
    }
    return {name: tuple(values.tolist()) for name, values in measures.items()}


def seam(images: Images, source: Source, keep: Keep) -> PerCandidate:
    """Computes mean absolute change near the mask minus the mean further away; -1..1.

    Near is within ``SEAM_PIXELS``. Above 0 the edit bleeds over its edge. NaN where no background
    pixel lies further away.
    """
    # Dilation of the mask by a square of SEAM_PIXELS each way.
    near = F.max_pool2d((~keep)[None].float(), 2 * SEAM_PIXELS + 1, stride=1, padding=SEAM_PIXELS)[
        0
    ].bool()
    change = (images.float() - source.float()).abs().mean(dim=-1) / 255
    return change[:, keep & near].mean(dim=1) - change[:, ~near].mean(dim=1)


def brightness(images: Images, source: Source, keep: Keep) -> PerCandidate:
    """Computes mean luma minus the source's, -1..1. Below 0 the background got darker."""
    return (luma(images) - luma(source))[:, keep].mean(dim=1)


def edges(images: Images, source: Source, keep: Keep) -> PerCandidate:
    """Divides the edge density by the source's.

    Below 1 the background was smoothed, above 1 it has gained texture or noise. The density is the
    mean absolute difference between neighbours, across and down, that are both background.
    """
    across, down = keep[:, 1:] & keep[:, :-1], keep[1:] & keep[:-1]

    def density(image: Float[Tensor, "*batch height width"]) -> Tensor:
        steps = torch.cat([image.diff(dim=-1)[..., across], image.diff(dim=-2)[..., down]], dim=-1)
        return steps.abs().mean(dim=-1) + EDGE_FLOOR

    return density(luma(images)) / density(luma(source))


def entropy(images: Images, source: Source, keep: Keep) -> PerCandidate:
    """Computes the Shannon entropy of the luma histogram minus the source's, in bits.

    Below 0 tones were merged, above 0 there are new ones.
    """
    both = torch.cat([luma(source)[None], luma(images)])[:, keep]
    level = (both * ENTROPY_LEVELS).long().clamp_max(ENTROPY_LEVELS - 1)
    counts = torch.zeros(len(both), ENTROPY_LEVELS).scatter_add_(1, level, torch.ones_like(both))
    # H = -sum p log2 p, with 0 log 0 = 0.
    bits = torch.special.entr(counts / both.shape[1]).sum(dim=1) / math.log(2)
    difference: Tensor = bits[1:] - bits[0]
    return difference


def spectrum(images: Images, source: Source, keep: Keep) -> PerCandidate:
    """Computes the amplitude of the strongest wave in the background's change of luma.

    The mean change is taken out, since it is :func:`brightness`, and the edit counts as unchanged.
    A grid, as patches and decoders leave it, gathers in one peak what noise of the same size
    spreads over all of them.
    """
    change = luma(images) - luma(source)
    change = torch.where(keep, change - change[:, keep].mean(dim=1)[:, None, None], 0.0)
    # A sine of amplitude A over n pixels has two coefficients of size A n / 2.
    waves = 2 * torch.fft.rfft2(change).abs().flatten(1) / keep.sum()
    largest: Tensor = waves[:, 1:].amax(dim=1)
    return largest


def luma(image: UInt8[Tensor, "*batch height width 3"]) -> Float[Tensor, "*batch height width"]:
    """Computes perceived brightness, 0..1."""
    return image.float() @ image.new_tensor(_LUMA, dtype=torch.float32) / 255
