"""The editor of Qwen-Image-Edit pipelines: our denoising loop's view of the diffusers components.

The text encoder sees the source image too. Texts are not padded: a forward takes rows of one text
length, so no row attends to padding and none depends on the texts beside it. From the same latents
the result is bitwise the stock pipeline's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from rl_edit.editors.chunks import Prediction
from rl_edit.editors.family import Dtype
from rl_edit.editors.frozen import FrozenEditor
from rl_edit.editors.guidance import (
    NEGATIVE,
    NormRescaled,
    guided_velocity,
    is_guided,
    text_lengths,
)
from rl_edit.editors.location import Location
from rl_edit.editors.pixels import decoded_in_chunks, source_image
from rl_edit.editors.qwen_latents import (
    PROMPT,
    QwenInputs,
    batched_inputs,
    decoded_pixels,
    encoded_source,
    qwen_forward,
    qwen_sigmas,
)
from rl_edit.editors.qwen_text import QwenText
from rl_edit.editors.skeleton import last_layers
from rl_edit.editors.stock_pipeline import stock_pipeline
from rl_edit.method.attention import MassTally
from rl_edit.types import Conditioning, EditTask

if TYPE_CHECKING:
    from rl_edit.editors.qwen_settings import QwenSettings


class QwenEditor(FrozenEditor["QwenSettings"]):
    """A frozen pipeline of Qwen-Image-Edit as an :class:`~rl_edit.editors.family.Editor`."""

    def __init__(self, pipeline: Any, config: QwenSettings) -> None:
        modules = (pipeline.transformer, pipeline.vae, pipeline.text_encoder)
        super().__init__(config, pipeline.transformer, modules)
        self.pipeline = pipeline
        # Packing joins 2 x 2 latent pixels into a token.
        self.pixels_per_token: int = pipeline.vae_scale_factor * 2
        blocks = last_layers(config, list(pipeline.transformer.transformer_blocks))
        self._watched = [block.get_submodule("attn") for block in blocks]

    @torch.no_grad()
    def encode(self, task: EditTask) -> Conditioning:
        """Encodes text and source as the stock pipeline does.

        Raises:
            ValueError: the source does not lie on the canvas.
        """
        image = source_image(task, unit=self.pixels_per_token)
        source = encoded_source(self.pipeline, image, device=self.device, dtype=self.dtype)
        text = QwenText(tokenizer=self.pipeline.tokenizer, max_tokens=self.config.max_text_tokens)
        instruction = text.readable(task.instruction)
        embeds = self._text(instruction, image)
        # Template and images are read too, but no part of the instruction.
        _, after = self.pipeline.prompt_template_encode.split("{}")
        rows = text.rows(instruction, after, len(embeds))
        encodings = {PROMPT: embeds, "text_rows": rows}
        if self.config.guided:
            negative = text.readable(self.config.negative_prompt)
            encodings[NEGATIVE + PROMPT] = self._text(negative, image)
        unit = self.pixels_per_token
        return Conditioning(
            source_latents=source,
            grid=(image.height // unit, image.width // unit),
            tensors=encodings,
        )

    def _text(self, words: str, image: Image.Image) -> Float[Tensor, "text text_dim"]:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=words,
            image=self.config.prompt_images(self.pipeline, image),
            device=self.device,
        )
        states: Tensor = embeds[0].cpu()
        return states

    def sigmas(self, num_steps: int, conditioning: Conditioning) -> Float[Tensor, " step_plus_1"]:
        """Returns the stock pipeline's grid, shifted by the number of tokens."""
        return qwen_sigmas(self.pipeline.scheduler, num_steps, conditioning)

    def velocity(
        self,
        latents: Float[Tensor, "batch token channel"],
        sigma: Float[Tensor, " batch"],
        conditioning: Conditioning | Sequence[Conditioning],
        tally: MassTally | None = None,
    ) -> Float[Tensor, "batch token channel"]:
        """Predicts the guided velocity in chunks of ``micro_batch`` rows of one text length.

        Raises:
            ValueError: a conditioning whose negative branch the guidance needs or leaves unread.
        """
        return guided_velocity(
            latents,
            sigma,
            conditioning,
            tally,
            config=self.config,
            guidance=NormRescaled(self.config.true_cfg),
            pack=self._branches,
            forward=self._forward,
            alike=partial(text_lengths, name=PROMPT),
        )

    def _forward(
        self, latents: Tensor, sigma: Tensor, inputs: QwenInputs, record: bool
    ) -> Prediction:
        # Hooks cost time, so they are there only where the mass is asked for.
        watched = self._watched if record else []
        average = self.config.attention_average
        return qwen_forward(
            self.transformer, latents, sigma, inputs, watched=watched, average=average
        )

    def _branches(self, many: Sequence[Conditioning]) -> tuple[QwenInputs, ...]:
        """Batches the forward that reads the instruction, and with guidance the negative one."""
        return tuple(
            batched_inputs(many, prefix, device=self.device, dtype=self.dtype)
            for prefix in ("", NEGATIVE)[: 1 + is_guided(many[0])]
        )

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch token channel"], conditioning: Conditioning
    ) -> UInt8[Tensor, "batch height width 3"]:
        """Decodes in chunks of ``micro_batch``, with the stock pipeline's rounding."""
        height, width = (side * self.pixels_per_token for side in conditioning.grid)

        def pixels(part: Tensor) -> np.ndarray:
            return decoded_pixels(self.pipeline, part.to(self.device, self.dtype), height, width)

        return decoded_in_chunks(latents, pixels, size=self.config.micro_batch)


def load_qwen(place: Location, kind: str, dtype: Dtype) -> Any:
    """Loads a stock pipeline with a processor that needs no torchvision.

    Args:
        kind: name of the pipeline's class.

    Raises:
        InputError: it cannot be loaded, with what to do.
    """
    from rl_edit.editors.qwen_processor import load_processor

    pipeline = stock_pipeline(place, kind, dtype, processor=None)
    # Set afterwards: diffusers would ask for the processor's class, which needs torchvision.
    pipeline.register_modules(processor=load_processor(place, pipeline.tokenizer))
    return pipeline
