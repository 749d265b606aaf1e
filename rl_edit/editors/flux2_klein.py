"""FLUX.2-klein: our denoising loop's view of the real diffusers components.

The 4B and 9B checkpoints are distilled to few steps and take no guidance; their base checkpoints
take classifier-free guidance against the empty instruction. Text is a chat of one message, read by
Qwen3; all of its padded rows are part of the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from rl_edit.data.editor_text import TextReading
from rl_edit.editors.chat_text import ChatText
from rl_edit.editors.chunks import Prediction, velocity_in_chunks
from rl_edit.editors.component_files import pipeline_bytes, pipeline_files
from rl_edit.editors.family import EditorFacts, EditorSettings
from rl_edit.editors.flux2_latents import (
    Flux2Inputs,
    batched_inputs,
    decoded_pixels,
    encoded_source,
    flux2_forward,
    flux2_sigmas,
)
from rl_edit.editors.frozen import chosen_device, device_of, dtype_named, freeze
from rl_edit.editors.guidance import (
    NEGATIVE,
    ClassifierFree,
    guided_prediction,
    is_guided,
    require_guidance,
)
from rl_edit.editors.local_defaults import local_defaults
from rl_edit.editors.location import INDEX, local_value, locate
from rl_edit.editors.lora_targets import ATTENTION_PROJECTIONS
from rl_edit.editors.pixels import decoded_in_chunks
from rl_edit.editors.skeleton import (
    last_layers,
    read_settings,
    require_layers,
    transformer_skeleton,
)
from rl_edit.editors.stock_pipeline import stock_pipeline
from rl_edit.editors.text_reading import tokenizer_of
from rl_edit.errors import InputError
from rl_edit.method.attention import MassTally
from rl_edit.types import Conditioning, EditTask

if TYPE_CHECKING:
    from diffusers import Flux2KleinPipeline

TEXT_LAYERS = (9, 18, 27)
"""Layers of the text encoder whose states are read (``text_encoder_out_layers`` of the pipeline).
"""

SINGLE_BLOCKS = ("to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out")
"""Projections of the single blocks, which attention shares with the MLP."""


class Flux2KleinConfig(EditorSettings):
    """Settings of a FLUX.2-klein editor.

    Attributes:
        true_cfg: scale of classifier-free guidance against the empty instruction,
            ``velocity = negative + true_cfg * (positive - negative)``; two forwards a velocity.
            1 is off, as a distilled checkpoint needs it. By default 4, as in the stock pipeline,
            for a directory that holds a base checkpoint, else 1.
        detach_negative: run the negative forward without gradient.
        max_text_tokens: tokens of instruction and chat template. There is no text mask, so it is
            part of the function. By default the pipeline's 512, or its tokenizer's
            ``model_max_length`` where that is less.
        gradient_checkpointing: trade compute for memory in training.
    """

    pipeline: ClassVar[str] = "Flux2KleinPipeline"
    kind: Literal["flux2_klein"] = "flux2_klein"
    # 1 is right for an id of the hub, which is not asked, where it is a distilled checkpoint.
    true_cfg: float = Field(default=1.0, ge=1)
    detach_negative: bool = False
    max_text_tokens: int = Field(default=512, ge=16)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Flux2KleinConfig:
        if self.true_cfg == 1 and self.detach_negative:
            raise ValueError(
                "detach_negative is a setting of the negative forward, which true_cfg 1 leaves "
                "out: raise true_cfg above 1, or leave it out."
            )
        return self

    @classmethod
    def defaults(cls, path: str) -> dict[str, Any]:
        """Returns what an editor was made for."""
        defaults = local_defaults(path)
        # Flux2KleinPipeline.__call__: guidance_scale 4.0, which a distilled checkpoint ignores.
        if local_value(path, INDEX, "is_distilled") is False:
            defaults["true_cfg"] = 4.0
        return defaults

    @property
    def guided(self) -> bool:
        """Classifier-free guidance is the second forward."""
        return self.true_cfg > 1

    @property
    def edit_steps(self) -> int:
        """4 as the distilled checkpoints' model cards; 50 is the stock pipeline's default."""
        return 50 if self.guided else 4

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention projections of both kinds of blocks."""
        return (*ATTENTION_PROJECTIONS, *SINGLE_BLOCKS)

    def read_text(self, texts: Sequence[str]) -> tuple[TextReading, ...]:
        """Reads instructions with the tokenizer and its chat template."""
        tokenizer = tokenizer_of(locate(self.path, self.revision), "tokenizer")
        return _chat(tokenizer, self.max_text_tokens).read(texts)

    def inspect(self) -> EditorFacts:
        """Checks all files, and reads the configurations of all models.

        Raises:
            InputError: as in the seam; or guidance for a distilled checkpoint.
        """
        place = locate(self.path, self.revision)
        files = pipeline_files(place, dtype=self.dtype)
        blocks, layers = read_settings(
            place,
            self.pipeline,
            lambda vae, transformer: (
                len(vae["block_out_channels"]),
                transformer["num_layers"] + transformer["num_single_layers"],
            ),
        )
        require_layers(self, layers)
        depth = place.read_json("text_encoder/config.json").get("num_hidden_layers", 0)
        if depth < TEXT_LAYERS[-1]:
            raise InputError(
                f"text_encoder of {place.name} has {depth} layers, but a {self.pipeline} reads the "
                f"states of layer {TEXT_LAYERS[-1]}. Copy or save the editor again"
            )
        distilled = bool(place.read_json(INDEX).get("is_distilled", False))
        return EditorFacts(
            # The VAE halves the sides between its blocks; a token joins 2 x 2 of its pixels.
            pixels_per_token=2 * 2 ** (blocks - 1),
            notes=(*files.notes, *self._guidance_notes(distilled)),
        )

    def _guidance_notes(self, distilled: bool) -> tuple[str, ...]:
        if distilled and self.guided:
            raise InputError(
                f"editor.true_cfg is {self.true_cfg:g}, but {self.path} is distilled "
                "(is_distilled in its model_index.json) and was made to run without guidance; the "
                "stock pipeline would ignore it. Set editor.true_cfg=1, or name the base checkpoint"
            )
        if not distilled and not self.guided:
            return (
                f"{self.path} is a base checkpoint, which the stock pipeline runs with guidance "
                "4: editor.true_cfg is 1, so its images are weaker. Set editor.true_cfg=4",
            )
        return ()

    def skeleton(self) -> nn.Module:
        """Builds the transformer of the editor's configuration on the meta device."""
        return transformer_skeleton(locate(self.path, self.revision))

    def weight_bytes(self) -> int:
        """Counts transformer, VAE and text encoder: all of them lie on the device."""
        return pipeline_bytes(locate(self.path, self.revision), dtype=self.dtype)

    def load(self) -> Flux2KleinEditor:
        """Loads the stock pipeline and freezes it."""
        # Guidance for a distilled checkpoint is refused before its weights are read.
        self.inspect()
        pipeline = stock_pipeline(locate(self.path, self.revision), self.pipeline, self.dtype)
        return Flux2KleinEditor(pipeline.to(chosen_device(self.device)), self)


def _chat(tokenizer: Any, max_tokens: int) -> ChatText:
    """The chat of one message, with the arguments of the stock pipeline."""

    def render(instruction: str) -> str:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return text

    return ChatText(tokenizer=tokenizer, render=render, max_tokens=max_tokens)


class Flux2KleinEditor:
    """A frozen Flux2KleinPipeline as an :class:`~rl_edit.editors.family.Editor`."""

    def __init__(self, pipeline: Flux2KleinPipeline, config: Flux2KleinConfig) -> None:
        self.config = config
        self.pipeline = pipeline
        self.transformer: nn.Module = pipeline.transformer
        # Packing joins 2 x 2 latent pixels into a token.
        self.pixels_per_token: int = pipeline.vae_scale_factor * 2
        freeze((pipeline.transformer, pipeline.vae, pipeline.text_encoder))
        # Blocks are recomputed in the backward pass, with the same bits.
        if config.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        blocks = [
            *pipeline.transformer.transformer_blocks,
            *pipeline.transformer.single_transformer_blocks,
        ]
        self._watched = [block.get_submodule("attn") for block in last_layers(config, blocks)]

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
        source, grid = encoded_source(
            self.pipeline,
            task,
            unit=self.pixels_per_token,
            device=self.device,
            dtype=self.dtype,
        )
        chat = _chat(self.pipeline.tokenizer, self.config.max_text_tokens)
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
            text_encoder_out_layers=TEXT_LAYERS,
        )
        states: Tensor = embeds[0].cpu()
        return states

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        """Returns (token, channel); target and source have the same grid."""
        tokens, channels = conditioning.source_latents.shape
        return tokens, channels

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
        scale = self.config.true_cfg
        require_guidance(conditioning, guided=self.config.guided, setting=f"true_cfg {scale:g}")
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
                ClassifierFree(scale),
                record=record,
                detach=self.config.detach_negative,
            ),
        )

    def _forward(
        self, latents: Tensor, sigma: Tensor, inputs: Flux2Inputs, *, record: bool
    ) -> Prediction:
        # Hooks cost time, so they are there only where the mass is asked for.
        watched = self._watched if record else []
        return flux2_forward(self.transformer, latents, sigma, inputs, watched=watched)

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
