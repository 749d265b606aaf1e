"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1 on SqueezeNet 1.1 features, of the kept region.

The network is written here in plain torch, for the published packages need torchvision. Its weights are not shipped: they
are read from a local safetensors file.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rl_edit.errors import InputError
from rl_edit.measures.pixels import unit_range
from rl_edit.rewards.cache import content_sha256
from rl_edit.rewards.term import RewardTerm, Sides
from rl_edit.types import Candidates, Score

CONVERT = (
    "python -c \"import lpips, safetensors.torch as s; s.save_file({k: v.clone() for k, v in lpips.LPIPS(net='squeeze')"
    ".state_dict().items()}, 'lpips_squeeze.safetensors')\""
)
"""Makes the file of weights, wherever the ``lpips`` package is installed."""

SMALLEST = 32
"""Edge in pixels below which the deepest feature map would be empty."""

_TAPS = (1, 4, 7, 9, 10, 11, 12)
_CHANNELS = (64, 128, 256, 384, 384, 512, 512)


class Fire(nn.Module):
    """SqueezeNet's block: a narrow layer, then 1x1 and 3x3 filters side by side."""

    def __init__(self, channels: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1).relu()


class PerceptualDistance(nn.Module):
    """Squared differences of unit-normalised features, weighed by channel: ``sum_l w_l . (f_l(a) - f_l(b))^2``, a map per layer."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.features = nn.Sequential(
            *(
                nn.Conv2d(3, 64, 3, stride=2),
                nn.ReLU(),
                pool,
                Fire(64, 16, 64),
                Fire(128, 16, 64),
                pool,
                Fire(128, 32, 128),
            ),
            *(
                Fire(256, 32, 128),
                pool,
                Fire(256, 48, 192),
                Fire(384, 48, 192),
                Fire(384, 64, 256),
                Fire(512, 64, 256),
            ),
        )
        self.lins = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in _CHANNELS)
        # Mean and deviation of natural images for inputs in -1..1.
        self.register_buffer(
            "shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False
        )
        self.register_buffer(
            "scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False
        )

    def forward(
        self, a: Float[Tensor, "batch 3 height width"], b: Float[Tensor, "batch 3 height width"]
    ) -> list[Float[Tensor, "batch 1 rows columns"]]:
        """One map per layer, from images in -1..1."""
        pairs = zip(self._tapped(a), self._tapped(b), strict=True)
        return [
            lin((first - second).square())
            for lin, (first, second) in zip(self.lins, pairs, strict=True)
        ]

    def _tapped(self, image: Tensor) -> list[Tensor]:
        x, found = (image - self.shift) / self.scale, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return found


class Lpips(RewardTerm):
    """Perceptual distance from the source outside the edit mask; 0 is identical, and lower is better.

    What lies inside the mask never counts: it is made the same in both pictures. The conventions differ in how:

    * ``masked``: both show the source there, and the distance map is averaged over kept pixels.
    * ``zero_filled``: both are black there, and the map is averaged over all pixels, so that the value falls as the mask grows
      (CompBench and PIE-Bench).

    Attributes:
        weights: safetensors file of the network, made from the ``lpips`` package's own (see ``CONVERT``).
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
                f"weights({weights!r}) of LPIPS is no safetensors file here, so there is no network to compare with. "
                f"Make one where the lpips package is installed: {CONVERT}"
            )
        return weights

    @property
    def lower_is_better(self) -> bool:
        return True

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "weights": content_sha256(self.weights)}

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
    """LPIPS of ``images [G, H, W, 3]`` against ``source [H, W, 3]`` where ``keep``."""
    height, width = keep.shape
    if min(height, width) < SMALLEST:
        raise InputError(
            f"An image of {width}x{height} pixels is too small for LPIPS. Use at least {SMALLEST} pixels each way."
        )
    outside = unit_range(source) if convention == "masked" else torch.zeros((), dtype=torch.float64)
    edited, original = (
        torch.where(keep[..., None], unit_range(image), outside) for image in (images, source)
    )
    first, second = (
        (2 * image - 1).float().movedim(-1, -3) for image in (edited, original.expand_as(edited))
    )
    maps = net(first, second)
    if convention == "zero_filled":
        return torch.stack([layer.mean(dim=(1, 2, 3)) for layer in maps]).sum(dim=0)
    full = torch.stack(
        [
            F.interpolate(layer, size=(height, width), mode="bilinear", align_corners=False)
            for layer in maps
        ]
    ).sum(dim=0)
    return full[:, 0, keep].mean(dim=-1)


@cache
def network(weights: str) -> PerceptualDistance:
    """The network of a weights file, once per process.

    Raises:
        InputError: the file is not what ``CONVERT`` makes.
    """
    try:
        stored = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"The LPIPS weights {weights!r} cannot be read ({error}). Make them again: {CONVERT}"
        ) from error
    net = PerceptualDistance()
    named = {_ours(name): tensor.float() for name, tensor in stored.items()}
    wanted = net.state_dict()
    wrong = sorted(
        name
        for name, tensor in wanted.items()
        if name not in named or named[name].shape != tensor.shape
    )
    if wrong:
        raise InputError(
            f"The LPIPS weights {weights!r} lack {wrong[0]!r} or hold it in another shape. Make them again: {CONVERT}"
        )
    if any(bool((named[name] < 0).any()) for name in wanted if name.startswith("lins.")):
        raise InputError(
            f"The LPIPS weights {weights!r} have negative channel weights: a distance could be below 0. Use version 0.1."
        )
    net.load_state_dict({name: named[name] for name in wanted})
    return net.eval().requires_grad_(False)


def _ours(name: str) -> str:
    """``net.slice2.3.squeeze.weight`` and ``lin0.model.1.weight`` of the lpips package under the names used here."""
    return re.sub(
        r"^lin(\d)\.model\.\d\.", r"lins.\1.", re.sub(r"^net\.slice\d\.", "features.", name)
    )
