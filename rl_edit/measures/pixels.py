"""Image metrics over a part of the image, each with its convention named.

"Background PSNR" means three different numbers in the literature, up to 15 dB apart on the same
images, so no function here has a default convention. Images are ``[..., height, width, 3]``, uint8
in 0..255 or floating point in 0..1. ``keep`` is True where a pixel counts (the background is
``~edit_mask``). Leading dimensions broadcast: a group ``[G, H, W, 3]`` against one source
``[H, W, 3]`` gives ``[G]``. Computed in double precision.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_edit.errors import InputError

MAX_PSNR = 60.0
"""Largest reported PSNR, in dB; that of identical images would be infinite.

Means, differences and intervals stay finite. No autoencoder of the editors reaches it.
"""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
# (k L)^2 with k 0.01 and 0.03 and peak L = 1 (Wang et al. 2004).
_C1 = 0.01**2
_C2 = 0.03**2

PsnrConvention = Literal["masked", "zero_filled", "cocoedit"]
SsimConvention = Literal["map_masked", "zero_filled"]


def psnr(
    a: Tensor, b: Tensor, keep: Bool[Tensor, "*#batch height width"], convention: PsnrConvention
) -> Float[Tensor, "*batch"]:
    """Computes the peak signal-to-noise ratio over ``keep``, in dB, at most ``MAX_PSNR``.

    With d the difference (peak 1), k the pixels that count, C = 3 channels:

    * ``masked``: MSE = sum(k d^2) / (C sum k), the mean over the pixels that count.
    * ``zero_filled``: MSE = sum(k d^2) / (C H W), both images blackened elsewhere (CompBench,
      PIE-Bench and the tables of RC-GRPO-Editing). It equals masked + 10 log10(H W / sum k), so it
      grows with the size of the edit.
    * ``cocoedit``: MSE = sum(k d^2) / sum k, a three-channel sum over a one-channel count
      (CoCoEdit's released reward). It equals masked - 10 log10(3).
    """
    first, second, weight = _aligned(a, b, keep)
    squared = (weight[..., None] * (first - second).square()).sum(dim=(-3, -2, -1))
    num_counted = weight.sum(dim=(-2, -1))
    channels = first.shape[-1]
    if convention == "masked":
        count = channels * num_counted
    elif convention == "zero_filled":
        count = torch.full_like(num_counted, channels * weight.shape[-2] * weight.shape[-1])
    elif convention == "cocoedit":
        count = num_counted
    else:
        raise InputError(
            f"PSNR convention {convention!r} is not known. Use masked, zero_filled or cocoedit."
        )
    # PSNR = 10 log10(peak^2 / MSE), with peak 1.
    return (-10.0 * torch.log10(squared / count)).clamp_max(MAX_PSNR)


def ssim(
    a: Tensor, b: Tensor, keep: Bool[Tensor, "*#batch height width"], convention: SsimConvention
) -> Float[Tensor, "*batch"]:
    """Computes the structural similarity (Wang et al. 2004), mean over channels.

    * ``map_masked``: the similarity map of the complete images, averaged over ``keep``. Windows
      within 5 pixels of the edit still see it.
    * ``zero_filled``: similarity of the two images blackened outside ``keep``, averaged over all
      pixels. The black part counts as perfect agreement.

    Windows are Gaussian, 11 pixels wide, sigma 1.5. They are cut and renormalised at the border;
    images smaller than the window shrink it.
    """
    first, second, weight = _aligned(a, b, keep)
    if convention == "map_masked":
        similarity = _ssim_map(first, second).mean(dim=-1)
        return (weight * similarity).sum(dim=(-2, -1)) / weight.sum(dim=(-2, -1))
    if convention == "zero_filled":
        return _ssim_map(first * weight[..., None], second * weight[..., None]).mean(
            dim=(-3, -2, -1)
        )
    raise InputError(f"SSIM convention {convention!r} is not known. Use map_masked or zero_filled.")


def keep_fraction(keep: Bool[Tensor, "*batch height width"]) -> Float[Tensor, "*batch"]:
    """Computes the share of pixels that count. A zero-filled number depends on it."""
    return keep.to(torch.float64).mean(dim=(-2, -1))


def unit_range(image: Tensor) -> Tensor:
    """Double precision in 0..1 from uint8 in 0..255 or floating point in 0..1."""
    if image.dtype == torch.uint8:
        return image.to(torch.float64) / 255.0
    if image.is_floating_point():
        return image.to(torch.float64)
    raise InputError(
        f"An image of type {image.dtype} has no known range. Pass uint8 in 0..255 or floating "
        "point in 0..1."
    )


def _aligned(a: Tensor, b: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if keep.dtype != torch.bool:
        raise InputError(
            f"keep has type {keep.dtype}: which value means 'counts' would be a guess. Pass a bool "
            "mask, True = counts."
        )
    if a.shape[-3:-1] != keep.shape[-2:] or b.shape[-3:-1] != keep.shape[-2:]:
        sizes = f"{tuple(a.shape[-3:-1])}, {tuple(b.shape[-3:-1])} and {tuple(keep.shape[-2:])}"
        raise InputError(
            f"Images and mask differ in size ({sizes}), so pixels do not correspond. "
            "Resize them first."
        )
    if not bool(keep.flatten(-2).any(dim=-1).all()):
        raise InputError(
            "A mask keeps no pixel, so there is nothing to compare. The edit mask must not cover "
            "the whole image."
        )
    first, second = unit_range(a), unit_range(b)
    batch = torch.broadcast_shapes(a.shape[:-3], b.shape[:-3], keep.shape[:-2])
    weight = keep.to(torch.float64).expand(*batch, *keep.shape[-2:])
    return (
        first.expand(*batch, *first.shape[-3:]),
        second.expand(*batch, *second.shape[-3:]),
        weight,
    )


def _ssim_map(
    a: Float[Tensor, "*batch height width channel"], b: Float[Tensor, "*batch height width channel"]
) -> Tensor:
    """Computes the similarity at every pixel and channel, in the shape of the images."""
    mean_a, mean_b = _windowed_mean(a), _windowed_mean(b)
    var_a = _windowed_mean(a * a) - mean_a * mean_a
    var_b = _windowed_mean(b * b) - mean_b * mean_b
    cov = _windowed_mean(a * b) - mean_a * mean_b
    # SSIM = (2 ma mb + C1)(2 cov + C2) / ((ma^2 + mb^2 + C1)(va + vb + C2)). Sums in place of
    # products by 2: identical images give exactly 1.
    luminance = (mean_a * mean_b + mean_a * mean_b + _C1) / (
        mean_a * mean_a + mean_b * mean_b + _C1
    )
    structure = (cov + cov + _C2) / (var_a + var_b + _C2)
    return luminance * structure


def _windowed_mean(image: Float[Tensor, "*batch height width channel"]) -> Tensor:
    shortest = min(image.shape[-3], image.shape[-2])
    size = min(SSIM_WINDOW, shortest if shortest % 2 else shortest - 1)
    return gaussian_mean(image, sigma=SSIM_SIGMA, radius=max(size, 1) // 2)


def gaussian_mean(
    image: Float[Tensor, "*batch height width channel"], *, sigma: float, radius: int
) -> Float[Tensor, "*batch height width channel"]:
    """Computes Gaussian means around each pixel, cut and renormalised at the border."""
    # Two products with a band matrix: a double-precision convolution takes minutes where this takes
    # a second.
    planes = image.movedim(-1, -3)
    rows = _band(planes.shape[-2], sigma=sigma, radius=radius, like=image)
    columns = _band(planes.shape[-1], sigma=sigma, radius=radius, like=image)
    return (rows @ planes @ columns.mT).movedim(-3, -1)


def _band(size: int, *, sigma: float, radius: int, like: Tensor) -> Float[Tensor, "size size"]:
    """Makes the matrix whose row i holds the window's weights around pixel i; rows sum to 1."""
    position = torch.arange(size, dtype=like.dtype, device=like.device)
    offset = position[:, None] - position
    weight = torch.exp(-(offset**2) / (2 * sigma**2)) * (offset.abs() <= radius)
    return weight / weight.sum(dim=1, keepdim=True)
