"""What every run measures inside and outside the mask, whatever its rewards are."""

from __future__ import annotations

import math

from rl_edit.measures.pixels import psnr, ssim
from rl_edit.method.attention import concentration_density
from rl_edit.types import Candidates


def diagnostics(candidates: Candidates) -> dict[str, tuple[float, ...]]:
    """Measures that need no reward, one value per candidate.

    ``background.*`` compares pixels outside the mask with the source (dB, masked convention; SSIM averaged over kept pixels);
    ``change.inside`` is the mean absolute change inside it, 0..1; ``concentration`` is the density of RC-GRPO Eq. 17-18.
    """
    task = candidates.task
    keep = ~task.edit_mask
    source = task.source[None].expand_as(candidates.images)
    inside = (candidates.images.float() - task.source.float())[:, task.edit_mask].abs().mean(
        dim=(1, 2)
    ) / 255
    measures = {
        "background.psnr": psnr(candidates.images, source, keep, convention="masked"),
        "background.psnr_zero_filled": psnr(
            candidates.images, source, keep, convention="zero_filled"
        ),
        "background.ssim": ssim(candidates.images, source, keep, convention="map_masked"),
        "change.inside": inside,
        "concentration": concentration_density(candidates.attention, candidates.token_mask),
    }
    return {
        name: tuple(v if math.isfinite(v) else math.nan for v in values.tolist())
        for name, values in measures.items()
    }
