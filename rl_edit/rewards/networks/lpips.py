"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1 on SqueezeNet 1.1 features.

The network is written here in plain torch, since the published packages need torchvision. Its
weights are not shipped: they are read from a local safetensors file.
"""

from __future__ import annotations

import re
from functools import cache

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rl_edit.errors import InputError

# Makes the file of weights, wherever the ``lpips`` package is installed.
CONVERT = (
    'python -c "import lpips, safetensors.torch as s; s.save_file({k: v.clone() for k, v in '
    "lpips.LPIPS(net='squeeze').state_dict().items()}, 'lpips_squeeze.safetensors')\""
)

# Layers of SqueezeNet after which features are compared, and their channels.
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
    """Weighs squared differences of unit-normalised features by channel.

    ``sum_l w_l . (f_l(a) - f_l(b))^2``, one map per layer l.
    """

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
        """Computes one map per layer, from images in -1..1."""
        pairs = zip(self._tapped(a), self._tapped(b), strict=True)
        return [
            lin((first - second).square())
            for lin, (first, second) in zip(self.lins, pairs, strict=True)
        ]

    def _tapped(self, image: Tensor) -> list[Tensor]:
        x, features = (image - self.shift) / self.scale, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                # Unit length at every place, as in the paper's Eq. 1.
                features.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return features


@cache
def network(weights: str) -> PerceptualDistance:
    """Loads the network of a weights file, once per process.

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
    # The package's file holds the same tensors under longer names.
    named = {_ours(name): tensor.float() for name, tensor in stored.items()}
    expected = net.state_dict()
    wrong = sorted(
        name
        for name, tensor in expected.items()
        if name not in named or named[name].shape != tensor.shape
    )
    if wrong:
        raise InputError(
            f"The LPIPS weights {weights!r} lack {wrong[0]!r} or hold it in another shape. "
            f"Make them again: {CONVERT}"
        )
    if any(bool((named[name] < 0).any()) for name in expected if name.startswith("lins.")):
        raise InputError(
            f"The LPIPS weights {weights!r} have negative channel weights: a distance could be "
            "below 0. Use version 0.1."
        )
    net.load_state_dict({name: named[name] for name in expected})
    # No gradient: a reward is a number.
    return net.eval().requires_grad_(False)


def _ours(name: str) -> str:
    """Renames a tensor of the lpips package, such as ``net.slice2.3.squeeze.weight``."""
    return re.sub(
        r"^lin(\d)\.model\.\d\.", r"lins.\1.", re.sub(r"^net\.slice\d\.", "features.", name)
    )
