"""Quality of an editor on held-out tasks of the shapes world: numbers and a sheet of images."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from rl_edit.data import shapes
from rl_edit.editors.tiny.latent_tasks import pixels, step_generator
from rl_edit.editors.tiny.recipe import (
    DEFAULT_GUIDANCE,
    EVALUATION_STEPS,
    MAX_TEXT_TOKENS,
    PretrainConfig,
)
from rl_edit.types import PairedTask


@dataclass(frozen=True, kw_only=True)
class EditMetrics:
    """Measurements on held-out tasks: means over ``num_tasks`` tasks, PSNR in dB of 8-bit RGB.

    Attributes:
        vae_psnr: reconstruction of complete targets; the ceiling of everything below.
        vae_background_psnr: reconstruction of the sources outside the edit mask.
        progress: ``1 - |edit - target| / |source - target|`` inside the mask, clipped to [0, 1];
            1 is a perfect edit.
        progress_by_type: the same per task type.
        background_psnr: edit against source outside the mask.
    """

    num_tasks: int
    vae_psnr: float
    vae_background_psnr: float
    progress: float
    progress_by_type: dict[str, float]
    background_psnr: float


@torch.no_grad()
def edit_images(
    pipeline: FluxKontextPipeline,
    tasks: Sequence[PairedTask],
    *,
    seed: int,
    num_steps: int = EVALUATION_STEPS,
) -> UInt8[Tensor, "batch height width 3"]:
    """Edits each task once by the stock pipeline.

    Euler steps, from noise that depends on (seed, task) alone.
    """
    sources = torch.stack([task.source for task in tasks])
    height, width = sources.shape[1:3]
    results = pipeline(
        image=sources.permute(0, 3, 1, 2).float() / 255.0,
        prompt=[task.instruction for task in tasks],
        height=height,
        width=width,
        # The stock pipeline would resize to about a megapixel.
        max_area=height * width,
        _auto_resize=False,
        num_inference_steps=num_steps,
        guidance_scale=DEFAULT_GUIDANCE,
        max_sequence_length=MAX_TEXT_TOKENS,
        generator=[step_generator(seed, 3, zlib.crc32(task.task_id.encode())) for task in tasks],
        output_type="pt",
    ).images
    return _bytes(results)


@torch.no_grad()
def measure(
    pipeline: FluxKontextPipeline, config: PretrainConfig, *, num_tasks: int
) -> EditMetrics:
    """Measures the first ``num_tasks`` tasks of the validation split.

    Pretraining never draws them.
    """
    tasks = [shapes.task("validation", i) for i in range(num_tasks)]
    progress: dict[str, list[float]] = {}
    background: list[float] = []
    reconstruction: list[float] = []
    ceiling: list[float] = []
    # In parts, because of memory. Noises are keyed by task, so the size changes no number.
    for start in range(0, num_tasks, 64):
        part = tasks[start : start + 64]
        edits = edit_images(pipeline, part, seed=config.seed)
        # Reconstructions: the best that an editor with this autoencoder could do.
        targets, sources = (
            _reconstruct(pipeline.vae, torch.stack(images))
            for images in ([t.target for t in part], [t.source for t in part])
        )
        for task, edit, target, source in zip(part, edits, targets, sources, strict=True):
            progress.setdefault(task.task_type, []).append(_progress(edit, task))
            outside = ~task.edit_mask
            background.append(_psnr(edit[outside], task.source[outside]))
            reconstruction.append(_psnr(target, task.target))
            ceiling.append(_psnr(source[outside], task.source[outside]))
    return EditMetrics(
        num_tasks=num_tasks,
        vae_psnr=fmean(reconstruction),
        vae_background_psnr=fmean(ceiling),
        progress=fmean(value for values in progress.values() for value in values),
        progress_by_type={name: fmean(values) for name, values in sorted(progress.items())},
        background_psnr=fmean(background),
    )


def sample_sheet(
    pipeline: FluxKontextPipeline, config: PretrainConfig, *, num_tasks: int = 18
) -> Image.Image:
    """Draws a column for each held-out task; from above: source, mask, target, edit."""
    tasks = [shapes.task("validation", i) for i in range(num_tasks)]
    edits = edit_images(pipeline, tasks, seed=config.seed)
    white = torch.tensor(255, dtype=torch.uint8)
    columns = [
        torch.cat(
            [task.source, task.edit_mask[..., None].expand(-1, -1, 3) * white, task.target, edit]
        )
        for task, edit in zip(tasks, edits, strict=True)
    ]
    sheet = Image.fromarray(torch.cat(columns, dim=1).numpy())
    # Nearest, so that single pixels can be seen.
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)


def summary(metrics: EditMetrics) -> str:
    """Returns the metrics on one line."""
    by_type = ", ".join(f"{name} {value:.2f}" for name, value in metrics.progress_by_type.items())
    return (
        f"{metrics.num_tasks} held-out tasks: instruction progress {metrics.progress:.3f} "
        f"({by_type}); background {metrics.background_psnr:.2f} dB of "
        f"{metrics.vae_background_psnr:.2f} dB; autoencoder {metrics.vae_psnr:.2f} dB"
    )


def _progress(edit: UInt8[Tensor, "height width 3"], task: PairedTask) -> float:
    # 1 - |edit - target| / |source - target| inside the mask.
    mask = task.edit_mask
    left = (edit[mask].float() - task.target[mask].float()).abs().mean()
    path = (task.source[mask].float() - task.target[mask].float()).abs().mean()
    return (1 - left / path).clamp(0, 1).item()


def _reconstruct(
    vae: AutoencoderKL, images: UInt8[Tensor, "batch height width 3"]
) -> UInt8[Tensor, "batch height width 3"]:
    return _bytes(vae.decode(vae.encode(pixels(images)).latent_dist.mode()).sample / 2 + 0.5)


def _bytes(images: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch height width 3"]:
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1)


def _psnr(image: UInt8[Tensor, "*shape"], reference: UInt8[Tensor, "*shape"]) -> float:
    # Equal images would be infinite; a floor of the squared error ends at 78 dB.
    error = (image.float() - reference.float()).square().mean().clamp_min(1e-3)
    return (10 * torch.log10(255.0**2 / error)).item()
