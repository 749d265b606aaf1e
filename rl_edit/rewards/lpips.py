"""Scores the perceptual distance of the background from the source (LPIPS)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import field_validator
from torch import Tensor

from rl_edit.errors import InputError
from rl_edit.measures.pixels import unit_range
from rl_edit.rewards.cache import content_sha256
from rl_edit.rewards.networks.lpips import CONVERT, PerceptualDistance, network
from rl_edit.rewards.term import RewardTerm, Sides
from rl_edit.types import Candidates, Score

# Edge in pixels below which the deepest feature map would be empty.
SMALLEST = 32


class Lpips(RewardTerm):
    """Measures perceptual distance from the source outside the edit mask.

    0 is identical, and lower is better. The inside of the mask never counts: it is made the same in
    both images. The conventions differ in how:

    * ``masked``: both show the source there, and the distance map is averaged over the background.
    * ``zero_filled``: both are black there, and the map is averaged over all pixels, so that the
      value falls as the mask grows (CompBench and PIE-Bench).

    Attributes:
        weights: safetensors file of the network, made from the ``lpips`` package's own (see
            ``CONVERT`` in ``networks/lpips.py``).
        convention: see above.
    """

    kind: Literal["lpips"] = "lpips"
    weights: str
    convention: Literal["masked", "zero_filled"] = "masked"

    responds_to: ClassVar[Sides] = "outside"
    requires: ClassVar[frozenset[str]] = frozenset()
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = float("inf")
    needs_attention: ClassVar[bool] = False

    @field_validator("weights")
    @classmethod
    def _is_a_file(cls, weights: str) -> str:
        if not weights.endswith(".safetensors") or not Path(weights).is_file():
            raise InputError(
                f"weights({weights!r}) of LPIPS is no safetensors file here, so there is no "
                f"network to compare with. Make one where the lpips package is installed: {CONVERT}"
            )
        return weights

    @property
    def lower_is_better(self) -> bool:
        return True

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "weights": content_sha256(self.weights)}

    def require_files(self) -> None:
        super().require_files()
        # A few megabytes: loading them is the check.
        network(self.weights)

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        task = candidates.task
        values = distance(
            network(self.weights), candidates.images, task.source, ~task.edit_mask, self.convention
        )
        return tuple(Score(value=value) for value in values.tolist())


@torch.no_grad()
def distance(
    net: PerceptualDistance,
    images: Tensor,
    source: Tensor,
    keep: Bool[Tensor, "height width"],
    convention: Literal["masked", "zero_filled"],
) -> Float[Tensor, " group"]:
    """Computes LPIPS of ``images [G, H, W, 3]`` against ``source [H, W, 3]`` where ``keep``."""
    height, width = keep.shape
    if min(height, width) < SMALLEST:
        raise InputError(
            f"An image of {width}x{height} pixels is too small for LPIPS. Use at least {SMALLEST} "
            "pixels each way."
        )
    outside = unit_range(source) if convention == "masked" else torch.zeros((), dtype=torch.float64)
    edited, original = (
        torch.where(keep[..., None], unit_range(image), outside) for image in (images, source)
    )
    first, second = (
        (2 * image - 1).float().movedim(-1, -3) for image in (edited, original.expand_as(edited))
    )
    # One map per layer, each at the layer's own resolution; LPIPS is the sum of their means.
    maps = net(first, second)
    if convention == "zero_filled":
        return torch.stack([layer.mean(dim=(1, 2, 3)) for layer in maps]).sum(dim=0)
    # The mask has the resolution of the image, so maps are enlarged before it selects.
    full = torch.stack(
        [
            F.interpolate(layer, size=(height, width), mode="bilinear", align_corners=False)
            for layer in maps
        ]
    ).sum(dim=0)
    return full[:, 0, keep].mean(dim=-1)
