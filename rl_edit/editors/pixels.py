"""Images at an editor's border: the source that goes in, the pixels that come out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from rl_edit.types import EditTask


def source_image(task: EditTask, *, unit: int) -> Image.Image:
    """Returns the source of a task that lies on the canvas.

    As a PIL image, not as a tensor: a stock image processor then lays memory out as in its
    pipeline, and convolutions round by layout.

    Args:
        unit: side of the square of pixels that one token covers.

    Raises:
        ValueError: the source does not lie on the canvas.
    """
    height, width, _ = task.source.shape
    if height % unit or width % unit:
        raise ValueError(
            f"task {task.task_id} is {height}x{width} px, not a multiple of {unit}: "
            "fit it to the canvas first"
        )
    return Image.fromarray(task.source.cpu().numpy())


def decoded_in_chunks(
    latents: Float[Tensor, "batch token channel"],
    decode: Callable[[Tensor], np.ndarray],
    *,
    size: int,
) -> UInt8[Tensor, "batch height width 3"]:
    """Decodes ``size`` rows at a time, with the stock pipelines' rounding.

    Args:
        decode: gives pixels in [0, 1], ``[batch, height, width, 3]``.
    """
    images = []
    for part in latents.split(size):
        # Truncation would darken by half a level.
        images.append(torch.from_numpy((decode(part) * 255).round().astype(np.uint8)))
    return torch.cat(images)
