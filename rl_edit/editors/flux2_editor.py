"""The editor of FLUX.2 pipelines: our denoising loop's view of the real diffusers components.

The families differ in their text encoder, its chat template and their guidance, which their
settings name. From the same latents the result is bitwise the stock pipeline's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rl_edit.editors.chat_text import ChatText
from rl_edit.editors.chunks import Prediction
from rl_edit.editors.component_files import pipeline_files
from rl_edit.editors.family import EditorFacts, EditorFamily
from rl_edit.editors.flux2_latents import (
    Flux2Inputs,
    batched_inputs,
    decoded_pixels,
    encoded_source,
    flux2_forward,
    flux2_sigmas,
)
from rl_edit.editors.frozen import FrozenEditor
from rl_edit.editors.guidance import NEGATIVE, ClassifierFree, guided_velocity, is_guided
from rl_edit.editors.location import locate
from rl_edit.editors.pixels import decoded_in_chunks
from rl_edit.editors.skeleton import last_layers, read_settings, require_layers
from rl_edit.errors import InputError
from rl_edit.method.attention import HeadAverage, MassTally
from rl_edit.types import Conditioning, EditTask

SINGLE_BLOCKS = ("to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out")
"""Projections of the single blocks, which attention shares with the MLP."""


class Flux2Settings(EditorFamily, Protocol):
    """Settings of a family of FLUX.2 editors, as their editor reads them."""

    @property
    def max_text_tokens(self) -> int: ...

    @property
    def attention_average(self) -> HeadAverage: ...

    @property
    def gradient_checkpointing(self) -> bool: ...

    @property
    def embedded_guidance(self) -> float | None:
        """Scale that the transformer takes as an input; None where it takes none."""
        ...

    @property
    def true_cfg(self) -> float:
        """Scale of classifier-free guidance against the empty instruction; 1 is off."""
        ...

    @property
    def detach_negative(self) -> bool: ...

    @property
    def text_layers(self) -> tuple[int, ...]:
        """Layers of the text encoder whose states are read."""
        ...

    def chat(self, tokenizer: Any) -> ChatText:
        """Returns the template that the stock pipeline puts around an instruction."""
        ...


class Flux2Editor(FrozenEditor[Flux2Settings]):
    """A frozen pipeline of FLUX.2 as an :class:`~rl_edit.editors.family.Editor`."""

    def __init__(self, pipeline: Any, config: Flux2Settings) -> None:
        modules = (pipeline.transformer, pipeline.vae, pipeline.text_encoder)
        super().__init__(config, pipeline.transformer, modules)
        self.pipeline = pipeline
        # Packing joins 2 x 2 latent pixels into a token.
        self.pixels_per_token: int = pipeline.vae_scale_factor * 2
        blocks = [
            *pipeline.transformer.transformer_blocks,
            *pipeline.transformer.single_transformer_blocks,
        ]
        self._watched = [block.get_submodule("attn") for block in last_layers(config, blocks)]

    @torch.no_grad()
    def encode(self, task: EditTask) -> Conditioning:
        """Encodes text and source as the stock pipeline does.

        Raises:
            ValueError: the source does not lie on the canvas.
        """
        source, grid = encoded_source(
            self.pipeline,
            task,
            unit=self.pixels_per_token,
            device=self.device,
            dtype=self.dtype,
        )
        chat = self.config.chat(self.pipeline.tokenizer)
        encodings = {
            "prompt_embeds": self._text(task.instruction),
            # Template and padding are read too, but no part of the instruction.
            "text_rows": chat.rows(task.instruction),
        }
        if self.config.guided:
            encodings[NEGATIVE + "prompt_embeds"] = self._text("")
        return Conditioning(source_latents=source, grid=grid, tensors=encodings)

    def _text(self, words: str) -> Float[Tensor, "text text_dim"]:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=words,
            device=self.device,
            max_sequence_length=self.config.max_text_tokens,
            text_encoder_out_layers=self.config.text_layers,
        )
        states: Tensor = embeds[0].cpu()
        return states

    def sigmas(self, num_steps: int, conditioning: Conditioning) -> Float[Tensor, " step_plus_1"]:
        """Returns the stock pipeline's grid."""
        return flux2_sigmas(self.pipeline.scheduler, num_steps, conditioning)

    def velocity(
        self,
        latents: Float[Tensor, "batch token channel"],
        sigma: Float[Tensor, " batch"],
        conditioning: Conditioning | Sequence[Conditioning],
        tally: MassTally | None = None,
    ) -> Float[Tensor, "batch token channel"]:
        """Predicts the guided velocity in chunks of ``micro_batch`` rows.

        Raises:
            ValueError: a conditioning whose negative branch the guidance needs or leaves unread.
        """
        return guided_velocity(
            latents,
            sigma,
            conditioning,
            tally,
            config=self.config,
            guidance=ClassifierFree(self.config.true_cfg),
            pack=self._branches,
            forward=self._forward,
        )

    def _forward(
        self, latents: Tensor, sigma: Tensor, inputs: Flux2Inputs, record: bool
    ) -> Prediction:
        # Hooks cost time, so they are there only where the mass is asked for.
        watched = self._watched if record else []
        return flux2_forward(
            self.transformer,
            latents,
            sigma,
            inputs,
            watched=watched,
            average=self.config.attention_average,
            guidance=self.config.embedded_guidance,
        )

    def _branches(self, many: Sequence[Conditioning]) -> tuple[Flux2Inputs, ...]:
        """Batches the forward that reads the instruction, and with guidance the negative one."""
        return tuple(
            batched_inputs(self.pipeline, many, prefix, device=self.device, dtype=self.dtype)
            for prefix in ("", NEGATIVE)[: 1 + is_guided(many[0])]
        )

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch token channel"], conditioning: Conditioning
    ) -> UInt8[Tensor, "batch height width 3"]:
        """Decodes in chunks of ``micro_batch``, with the stock pipeline's rounding."""
        return decoded_in_chunks(
            latents,
            lambda part: decoded_pixels(
                self.pipeline, part.to(self.device, self.dtype), conditioning.grid
            ),
            size=self.config.micro_batch,
        )


def flux2_facts(
    config: Flux2Settings, pipeline: str, revision: str | None, *, depth: str
) -> EditorFacts:
    """Checks all files of a FLUX.2 editor, and reads the configurations of all models.

    Args:
        pipeline: name of the pipeline's class.
        depth: name of the number of the text encoder's layers, with dots, in its configuration.

    Raises:
        InputError: as in the seam.
    """
    place = locate(config.path, revision)
    files = pipeline_files(place, dtype=config.dtype)
    blocks, layers = read_settings(
        place,
        pipeline,
        lambda vae, transformer: (
            len(vae["block_out_channels"]),
            transformer["num_layers"] + transformer["num_single_layers"],
        ),
    )
    require_layers(config, layers)
    settings: Any = place.read_json("text_encoder/config.json")
    for name in depth.split("."):
        settings = settings.get(name, {}) if isinstance(settings, dict) else settings
    count = settings if isinstance(settings, int) else 0
    if count < config.text_layers[-1]:
        raise InputError(
            f"text_encoder of {place.name} has {count} layers, but a {pipeline} reads the states "
            f"of layer {config.text_layers[-1]}. Copy or save the editor again"
        )
    # The VAE halves the sides between its blocks; a token joins 2 x 2 of its pixels.
    return EditorFacts(pixels_per_token=2 * 2 ** (blocks - 1), notes=files.notes)
