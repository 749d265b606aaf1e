"""FLUX.1-Kontext: our denoising loop's view of the real diffusers components.

The stock pipeline resizes silently and draws its own noise, so its parts are driven here: encode,
transformer, scheduler grid, decode. From the same latents the result is bitwise the stock
pipeline's (``tests/test_editor.py``).

Model libraries take seconds to import. They are imported where an editor is loaded and used: a
mistake in a configuration is reported without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from rl_edit.data.editor_text import TextReading
from rl_edit.editors.attention_capture import captured
from rl_edit.editors.chunks import Prediction, shared_grid, stacked
from rl_edit.editors.component_files import pipeline_bytes, pipeline_files
from rl_edit.editors.family import EditorFacts, EditorSettings
from rl_edit.editors.flux_defaults import builtin_misfit, flux_defaults
from rl_edit.editors.frozen import FrozenEditor, chosen_device
from rl_edit.editors.guidance import NEGATIVE, ClassifierFree, guided_velocity, is_guided
from rl_edit.editors.location import BUILTIN, locate
from rl_edit.editors.pixels import decoded_in_chunks, source_image
from rl_edit.editors.skeleton import (
    last_layers,
    read_settings,
    require_layers,
    transformer_skeleton,
)
from rl_edit.editors.stock_pipeline import stock_pipeline
from rl_edit.method import flow
from rl_edit.method.attention import HeadAverage, MassTally
from rl_edit.types import Conditioning, EditTask

if TYPE_CHECKING:
    from diffusers import FluxKontextPipeline

TEXT_TENSORS = ("prompt_embeds", "pooled")
"""Encodings of a prompt: T5 states ``[text, text_dim]`` and CLIP's pooled vector ``[pooled_dim]``.

``text_rows`` ``[text]`` stands beside them: True for instruction tokens (no padding, no end
marker), the rows from which attention is read.
"""

MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2")
"""Parts of the pipeline that have weights."""


class FluxKontextConfig(EditorSettings):
    """Settings of a FLUX.1-Kontext editor.

    Attributes:
        guidance: embedded guidance scale, the same in rollout, training and evaluation
            (FLUX.1-Kontext: 2.5).
        true_cfg: scale of true classifier-free guidance,
            ``velocity = negative + true_cfg * (positive - negative)``; two forwards a velocity.
            1 is off: the positive forward alone.
        negative_prompt: text that the negative forward reads instead of the instruction.
        detach_negative: run the negative forward without gradient, as in flow_grpo's training of
            SD3. By default both branches have theirs (our choice): the gradient is then that of the
            velocity which is rolled out.
        max_text_tokens: T5 length. FLUX applies no text mask, so it is part of the function. By
            default 32 for the built-in editor, else its T5 tokenizer's ``model_max_length``, at
            most the pipeline's 512 (FLUX.1-Kontext: 512).
        gradient_checkpointing: trade compute for memory in training.
    """

    pipeline: ClassVar[str] = "FluxKontextPipeline"
    released: ClassVar[tuple[str, ...]] = ("black-forest-labs/FLUX.1-Kontext-dev",)
    head_averages: ClassVar[tuple[HeadAverage, ...]] = ("renormalised", "joint")
    kind: Literal["flux_kontext"] = "flux_kontext"
    # 2.5 as in FLUX.1-Kontext's model card.
    guidance: float = Field(default=2.5, ge=0)
    true_cfg: float = Field(default=1.0, ge=1)
    negative_prompt: str = ""
    detach_negative: bool = False
    max_text_tokens: int = Field(default=32, ge=4)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _possible(self) -> FluxKontextConfig:
        if self.true_cfg == 1 and (self.negative_prompt or self.detach_negative):
            raise ValueError(
                f"negative_prompt {self.negative_prompt!r} and detach_negative "
                f"{self.detach_negative} are settings of a negative forward, which true_cfg 1 "
                "leaves out: raise true_cfg above 1, or leave them out."
            )
        return self

    @classmethod
    def defaults(cls, path: str) -> dict[str, Any]:
        """Returns what an editor that is not built in was made for."""
        return {} if path == BUILTIN else flux_defaults(path)

    @property
    def edit_steps(self) -> int:
        """12 for the built-in editor; 28 is the stock pipeline's ``num_inference_steps``."""
        return 12 if self.path == BUILTIN else 28

    def read_text(self, texts: Sequence[str]) -> tuple[TextReading, ...]:
        """Reads instructions with both tokenizers."""
        from rl_edit.editors.text_reading import read_with_flux

        place = locate(self.path, self.revision)
        return read_with_flux(place, texts, max_text_tokens=self.max_text_tokens)

    def misfit(self, height: int, width: int) -> str:
        """Says what the built-in editor is for, where an image is clearly something else."""
        return builtin_misfit(height, width, self.resolution) if self.path == BUILTIN else ""

    @property
    def guided(self) -> bool:
        """True guidance is the second forward; the embedded guidance takes none."""
        return self.true_cfg > 1

    def inspect(self) -> EditorFacts:
        """Checks all files, and reads the VAE's and the transformer's configuration."""
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
        # The VAE halves the sides between its blocks; packing halves them once more.
        return EditorFacts(pixels_per_token=2 * 2 ** (blocks - 1), notes=files.notes)

    def skeleton(self) -> nn.Module:
        """Builds the transformer of the editor's configuration on the meta device."""
        return transformer_skeleton(locate(self.path, self.revision))

    def weight_bytes(self) -> int:
        """Counts transformer, VAE and both text encoders: all of them lie on the device."""
        return pipeline_bytes(locate(self.path, self.revision), dtype=self.dtype)

    def load(self) -> FluxKontextEditor:
        """Loads the stock pipeline and freezes it."""
        pipeline = stock_pipeline(locate(self.path, self.revision), self.pipeline, self.dtype)
        return FluxKontextEditor(pipeline.to(chosen_device(self.device)), self)


class FluxKontextEditor(FrozenEditor[FluxKontextConfig]):
    """A frozen FluxKontextPipeline as an :class:`~rl_edit.editors.family.Editor`."""

    def __init__(self, pipeline: FluxKontextPipeline, config: FluxKontextConfig) -> None:
        modules = [getattr(pipeline, name) for name in MODELS]
        super().__init__(config, pipeline.transformer, modules)
        self.pipeline = pipeline
        # Packing joins 2 x 2 latent pixels into a token.
        self.pixels_per_token: int = pipeline.vae_scale_factor * 2
        joint = [
            *pipeline.transformer.transformer_blocks,
            *pipeline.transformer.single_transformer_blocks,
        ]
        self._attention_modules = [
            block.get_submodule("attn") for block in last_layers(config, joint)
        ]

    @torch.no_grad()
    def encode(self, task: EditTask) -> Conditioning:
        """Encodes text and source as the stock pipeline does.

        Raises:
            ValueError: the source does not lie on the canvas.
        """
        image = source_image(task, unit=self.pixels_per_token)
        pixels = self.pipeline.image_processor.preprocess(image)
        clean = self.pipeline._encode_vae_image(pixels.to(self.device, self.dtype), generator=None)
        packed = self.pipeline._pack_latents(clean, 1, *clean.shape[1:])
        # On the CPU: the record travels to other processes.
        encodings = {
            **self._text(task.instruction),
            "text_rows": self._instruction_rows(task.instruction),
        }
        if self.config.guided:
            negative = self._text(self.config.negative_prompt)
            encodings |= {NEGATIVE + name: value for name, value in negative.items()}
        return Conditioning(
            source_latents=packed[0].float().cpu(),
            grid=(image.height // self.pixels_per_token, image.width // self.pixels_per_token),
            tensors=encodings,
        )

    def _text(self, words: str) -> dict[str, Tensor]:
        """Encodes a prompt, padded to ``max_text_tokens``; see :data:`TEXT_TENSORS`."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=words,
            prompt_2=None,
            device=self.device,
            max_sequence_length=self.config.max_text_tokens,
        )
        return dict(zip(TEXT_TENSORS, (embeds[0].cpu(), pooled[0].cpu()), strict=True))

    def _instruction_rows(self, instruction: str) -> Bool[Tensor, " text"]:
        """Marks the tokens of the instruction; all of them where it has none."""
        # tokenizer_2 is T5's: its tokens are the text rows of the joint attention.
        tokenizer = self.pipeline.tokenizer_2
        length = self.config.max_text_tokens
        tokens = tokenizer(
            instruction,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids[0]
        special = (ids == tokenizer.eos_token_id) | (ids == tokenizer.pad_token_id)
        rows: Tensor = tokens.attention_mask[0].bool() & ~special
        return rows if bool(rows.any()) else torch.ones(length, dtype=torch.bool)

    def sigmas(self, num_steps: int, conditioning: Conditioning) -> Float[Tensor, " step_plus_1"]:
        """Returns the stock pipeline's grid, shifted by the number of tokens."""
        from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

        scheduler = self.pipeline.scheduler
        settings = scheduler.config
        # The defaults are those of the stock pipeline.
        mu = calculate_shift(
            conditioning.grid[0] * conditioning.grid[1],
            settings.get("base_image_seq_len", 256),
            settings.get("max_image_seq_len", 4096),
            settings.get("base_shift", 0.5),
            settings.get("max_shift", 1.15),
        )
        uniform = np.linspace(1.0, 1 / num_steps, num_steps)
        scheduler.set_timesteps(sigmas=uniform, mu=mu, device="cpu")
        # A copy: the scheduler keeps and changes its own.
        grid: Tensor = scheduler.sigmas.clone()
        return grid

    def velocity(
        self,
        latents: Float[Tensor, "batch token channel"],
        sigma: Float[Tensor, " batch"],
        conditioning: Conditioning | Sequence[Conditioning],
        tally: MassTally | None = None,
    ) -> Float[Tensor, "batch token channel"]:
        """Predicts the guided velocity in chunks of ``micro_batch`` rows.

        The last chunk is padded with copies, so that a row's bits do not depend on its batch. With
        ``true_cfg`` w above 1 each chunk has a second forward, of the negative prompt and of the
        same shape, and the velocity is ``negative + w * (positive - negative)``, as in the stock
        pipeline. Attention is that of the positive forward.

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
            pack=self._packed,
            forward=self._forward,
        )

    def _forward(self, latents: Tensor, sigma: Tensor, packed: _Packed, record: bool) -> Prediction:
        tokens = latents.shape[1]
        guidance = None
        # FLUX.1-schnell and its like have no guidance embedding.
        settings: Any = self.transformer.config
        if settings.guidance_embeds:
            guidance = torch.full(
                (len(latents),), self.config.guidance, dtype=torch.float32, device=self.device
            )
        # Kontext reads the source as further tokens behind the target's.
        hidden = torch.cat([latents.to(self.device, self.dtype), packed.source], dim=1)
        modules = self._attention_modules if record else []
        average = self.config.attention_average
        with captured(modules, packed.text_rows, tokens, average=average) as masses:
            out = self.transformer(
                hidden_states=hidden,
                timestep=flow.model_time(sigma.to(self.device), self.dtype),
                guidance=guidance,
                pooled_projections=packed.pooled,
                encoder_hidden_states=packed.prompt_embeds,
                txt_ids=packed.text_ids,
                img_ids=packed.image_ids,
                return_dict=False,
            )[0][:, :tokens]
        mass = torch.stack(masses).mean(dim=0) if masses else None
        return Prediction(velocity=out.to(latents.device, torch.float32), mass=mass)

    def _packed(self, many: Sequence[Conditioning]) -> tuple[_Packed, ...]:
        """Batches conditionings on the device, with token ids as the stock pipeline builds them.

        Returns:
            the forward that reads the instruction, and with guidance the negative one.
        """
        rows, columns = shared_grid(many)
        device, dtype = self.device, self.dtype
        target = self.pipeline._prepare_latent_image_ids(1, rows, columns, device, dtype)
        # The first id separates source from target tokens; the others are row and column.
        source = target.clone()
        source[..., 0] = 1
        text_rows = stacked(many, "text_rows").to(device)

        def batched(prefix: str) -> _Packed:
            embeds, pooled = (
                stacked(many, prefix + name).to(device, dtype) for name in TEXT_TENSORS
            )
            return _Packed(
                prompt_embeds=embeds,
                pooled=pooled,
                text_rows=text_rows,
                source=torch.stack([c.source_latents for c in many]).to(device, dtype),
                text_ids=torch.zeros(text_rows.shape[1], 3, device=device, dtype=dtype),
                image_ids=torch.cat([target, source]),
            )

        return tuple(batched(prefix) for prefix in ("", NEGATIVE)[: 1 + is_guided(many[0])])

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch token channel"], conditioning: Conditioning
    ) -> UInt8[Tensor, "batch height width 3"]:
        """Decodes in chunks of ``micro_batch``, with the stock pipeline's rounding."""
        height, width = (side * self.pixels_per_token for side in conditioning.grid)
        vae, factor = self.pipeline.vae, self.pipeline.vae_scale_factor

        def pixels(part: Tensor) -> np.ndarray:
            part = part.to(self.device, self.dtype)
            spatial = self.pipeline._unpack_latents(part, height, width, factor)
            # Inverts the normalisation of encode.
            spatial = (spatial / vae.config.scaling_factor) + vae.config.shift_factor
            decoded = vae.decode(spatial, return_dict=False)[0]
            shown: np.ndarray = self.pipeline.image_processor.postprocess(decoded, output_type="np")
            return shown

        return decoded_in_chunks(latents, pixels, size=self.config.micro_batch)


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """Batched conditioning of one forward of one micro-batch, on the device."""

    prompt_embeds: Float[Tensor, "batch text text_dim"]
    pooled: Float[Tensor, "batch pooled_dim"]
    text_rows: Bool[Tensor, "batch text"]
    source: Float[Tensor, "batch token channel"]
    text_ids: Float[Tensor, "text 3"]
    image_ids: Float[Tensor, "token_both 3"]
