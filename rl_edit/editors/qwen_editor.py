"""The editor of Qwen-Image-Edit pipelines: our denoising loop's view of the diffusers components.

The text encoder sees the source image too. Texts are not padded: a forward takes rows of one text
length, so no row attends to padding and none depends on the texts beside it. From the same latents
the result is bitwise the stock pipeline's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from rl_edit.editors.chunks import Prediction, shared_grid, velocity_in_chunks
from rl_edit.editors.component_files import pipeline_files
from rl_edit.editors.family import Dtype, EditorFacts, EditorFamily
from rl_edit.editors.frozen import device_of, dtype_named, freeze
from rl_edit.editors.guidance import (
    NEGATIVE,
    NormRescaled,
    guided_prediction,
    is_guided,
    require_guidance,
)
from rl_edit.editors.location import Location, locate
from rl_edit.editors.pixels import decoded_in_chunks, source_image
from rl_edit.editors.qwen_latents import (
    PROMPT,
    QwenInputs,
    batched_inputs,
    by_text_length,
    decoded_pixels,
    encoded_source,
    qwen_forward,
    qwen_sigmas,
)
from rl_edit.editors.qwen_text import QwenText
from rl_edit.editors.skeleton import last_layers, read_settings, require_layers
from rl_edit.editors.stock_pipeline import stock_pipeline
from rl_edit.method.attention import HeadAverage, MassTally
from rl_edit.types import Conditioning, EditTask


class QwenSettings(EditorFamily, Protocol):
    """Settings of a family of Qwen-Image-Edit editors, as their editor reads them."""

    @property
    def attention_average(self) -> HeadAverage: ...

    @property
    def gradient_checkpointing(self) -> bool: ...

    @property
    def true_cfg(self) -> float:
        """Scale of norm-rescaled classifier-free guidance; 1 is off."""
        ...

    @property
    def negative_prompt(self) -> str: ...

    @property
    def detach_negative(self) -> bool: ...

    @property
    def max_text_tokens(self) -> int: ...

    def prompt_images(self, pipeline: Any, source: Image.Image) -> Any:
        """Returns the images that the text encoder sees, as the stock pipeline passes them."""
        ...


class QwenEditor:
    """A frozen pipeline of Qwen-Image-Edit as an :class:`~rl_edit.editors.family.Editor`."""

    def __init__(self, pipeline: Any, config: QwenSettings) -> None:
        self.config = config
        self.pipeline = pipeline
        self.transformer: nn.Module = pipeline.transformer
        # Packing joins 2 x 2 latent pixels into a token.
        self.pixels_per_token: int = pipeline.vae_scale_factor * 2
        freeze((pipeline.transformer, pipeline.vae, pipeline.text_encoder))
        # Blocks are recomputed in the backward pass, with the same bits.
        if config.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        blocks = last_layers(config, list(pipeline.transformer.transformer_blocks))
        self._watched = [block.get_submodule("attn") for block in blocks]

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return device_of(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the frozen base."""
        return dtype_named(self.config.dtype)

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

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        """Returns (token, channel); target and source have the same grid."""
        tokens, channels = conditioning.source_latents.shape
        return tokens, channels

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
        scale = self.config.true_cfg
        require_guidance(conditioning, guided=self.config.guided, setting=f"true_cfg {scale:g}")
        if isinstance(conditioning, Conditioning):
            return self._predicted(latents, sigma, conditioning, tally)
        # Refused as a whole, before a part of it runs.
        shared_grid(conditioning)
        parts = by_text_length(conditioning)
        tallies = [MassTally() if tally is not None else None for _ in parts]
        velocities = [
            self._predicted(latents[part], sigma[part], [conditioning[i] for i in part], counted)
            for part, counted in zip(parts, tallies, strict=True)
        ]
        # Back in the order of the batch.
        order = torch.tensor([i for part in parts for i in part]).argsort()
        if tally is not None:
            masses = torch.cat([counted.mean() for counted in tallies if counted is not None])
            tally.add(masses[order])
        return torch.cat(velocities)[order.to(latents.device)]

    def _predicted(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning | Sequence[Conditioning],
        tally: MassTally | None,
    ) -> Tensor:
        return velocity_in_chunks(
            latents,
            sigma,
            conditioning,
            tally,
            size=self.config.micro_batch,
            pack=self._branches,
            predict=lambda x, s, branches, record: guided_prediction(
                lambda inputs, record: self._forward(x, s, inputs, record=record),
                branches,
                NormRescaled(self.config.true_cfg),
                record=record,
                detach=self.config.detach_negative,
            ),
        )

    def _forward(
        self, latents: Tensor, sigma: Tensor, inputs: QwenInputs, *, record: bool
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


def qwen_facts(config: QwenSettings, pipeline: str, revision: str | None) -> EditorFacts:
    """Checks all files, and reads the VAE's and the transformer's configuration.

    Args:
        pipeline: name of the pipeline's class.

    Raises:
        InputError: as in the seam.
    """
    place = locate(config.path, revision)
    files = pipeline_files(place, dtype=config.dtype)
    halvings, layers = read_settings(
        place,
        pipeline,
        lambda vae, transformer: (
            len(vae["temperal_downsample"]),
            int(transformer["num_layers"]),
        ),
    )
    require_layers(config, layers)
    return EditorFacts(pixels_per_token=2 * 2**halvings, notes=files.notes)


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
