"""Edits images by the deterministic ODE, outside training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from rl_edit.editors.family import Editor
from rl_edit.method.exploration import NoiseSource
from rl_edit.method.rollout import denoise
from rl_edit.types import EditTask


@torch.no_grad()
def edited(
    editor: Editor, tasks: Sequence[EditTask], *, num_steps: int, noise: NoiseSource
) -> UInt8[Tensor, "batch height width 3"]:
    """Edits tasks of one canvas, all from one and the same noise.

    An image is then edited to the same pixels by itself and among others, and two adapters differ
    by what they do alone.
    """
    conditionings = [editor.encode(task) for task in tasks]
    shape = editor.latent_shape(conditionings[0])
    initial = noise.normal("edit", 0, shape)
    final = denoise(
        lambda latents, sigma: editor.velocity(latents, sigma, conditionings),
        initial.expand(len(tasks), *shape).clone(),
        editor.sigmas(num_steps, conditionings[0]),
    ).final
    return editor.decode(final, conditionings[0])
