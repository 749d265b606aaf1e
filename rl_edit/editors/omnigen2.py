"""OmniGen2 (arXiv 2506.18871): guidance of two scales, no padding, and time that runs backwards.

Its pipeline and transformer are not in diffusers; they are written here against the published
configuration and the names of the released tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from rl_edit.data.editor_text import TextReading
from rl_edit.editors.chunks import Prediction, shared_grid, stacked
from rl_edit.editors.component_files import pipeline_bytes, pipeline_files
from rl_edit.editors.family import EditorFacts, EditorSettings
from rl_edit.editors.frozen import FrozenEditor, chosen_device
from rl_edit.editors.guidance import NEGATIVE, guided_velocity, is_guided, text_lengths
from rl_edit.editors.local_defaults import local_defaults
from rl_edit.editors.location import locate
from rl_edit.editors.pixels import decoded_in_chunks
from rl_edit.editors.skeleton import (
    last_layers,
    read_settings,
    require_layers,
    transformer_skeleton,
)
from rl_edit.errors import InputError
from rl_edit.method.attention import HeadAverage, MassTally, text_to_image_mass
from rl_edit.types import Conditioning, EditTask

if TYPE_CHECKING:
    from rl_edit.editors.omnigen2_parts import OmniGen2Parts


class OmniGen2Config(EditorSettings):
    """Settings of an OmniGen2 editor.

    Attributes:
        true_cfg: scale of guidance by the instruction (text_guidance_scale of the stock pipeline).
            1 is off: one forward a velocity. 5 as in the released script for edits.
        image_cfg: scale of guidance by the source (image_guidance_scale). With ``true_cfg`` above 1
            there are two forwards a velocity, the second without the source; with both above 1
            three: ``none + image_cfg * (source - none) + true_cfg * (all - source)``. 2 as in the
            released script; 1 where ``true_cfg`` is 1.
        negative_prompt: text that the further forwards read instead of the instruction. Empty as in
            the stock pipeline; the released script lists faults of images there.
        detach_negative: run the further forwards without gradient.
        max_text_tokens: tokens of instruction and chat template. By default 1024 as in the released
            script, or the tokenizer's limit where that is less. Texts are not padded.
        gradient_checkpointing: trade compute for memory in training.
    """

    pipeline: ClassVar[str] = "OmniGen2Pipeline"
    released: ClassVar[tuple[str, ...]] = ("OmniGen2/OmniGen2",)
    head_averages: ClassVar[tuple[HeadAverage, ...]] = ("renormalised", "joint")
    kind: Literal["omnigen2"] = "omnigen2"
    true_cfg: float = Field(default=5.0, ge=1)
    image_cfg: float = Field(default=2.0, ge=1)
    negative_prompt: str = ""
    detach_negative: bool = False
    max_text_tokens: int = Field(default=1024, ge=16)
    gradient_checkpointing: bool = False

    @model_validator(mode="before")
    @classmethod
    def _unguided(cls, settings: Any) -> Any:
        """Leaves the guidance by the source out where that by the instruction is switched off."""
        if isinstance(settings, Mapping) and settings.get("true_cfg") == 1:
            return {"image_cfg": 1.0, **settings}
        return settings

    @model_validator(mode="after")
    def _possible(self) -> OmniGen2Config:
        if self.true_cfg == 1 and (
            self.image_cfg > 1 or self.negative_prompt or self.detach_negative
        ):
            raise ValueError(
                f"image_cfg {self.image_cfg:g}, negative_prompt {self.negative_prompt!r} and "
                f"detach_negative {self.detach_negative} are settings of further forwards, which "
                "true_cfg 1 leaves out: raise true_cfg above 1, or leave them out."
            )
        return self

    @classmethod
    def defaults(cls, path: str) -> dict[str, Any]:
        """Returns what an editor was made for."""
        # The language model is named mllm there, and its tokenizer lies with the processor.
        return local_defaults(
            path, max_text_tokens=1024, tokenizer="processor", text_encoder="mllm"
        )

    @property
    def guided(self) -> bool:
        """Guidance by the instruction is a second forward; by the source a third one."""
        return self.true_cfg > 1

    @property
    def edit_steps(self) -> int:
        """50 as in the released script."""
        return 50

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention projections of refiners and joint blocks, as in the released LoRA training."""
        return ("to_q", "to_k", "to_v", "to_out.0")

    def identity(self) -> str:
        """Adds the scale that no other family has."""
        return f"{super().identity()} image_cfg={self.image_cfg:g}"

    def read_text(self, texts: Sequence[str]) -> tuple[TextReading, ...]:
        """Reads instructions with the tokenizer and its chat template."""
        from rl_edit.editors.omnigen2_parts import chat_text, text_tokenizer

        place = locate(self.path, self.revision)
        return chat_text(text_tokenizer(place), self.max_text_tokens).read(texts)

    def inspect(self) -> EditorFacts:
        """Checks all files, and reads the configurations of all models."""
        from rl_edit.editors.omnigen2_parts import PATCH, scheduler_settings

        place = locate(self.path, self.revision)
        files = pipeline_files(place, dtype=self.dtype)
        blocks, layers, patch = read_settings(
            place,
            self.pipeline,
            lambda vae, transformer: (
                len(vae["block_out_channels"]),
                transformer["num_layers"],
                transformer["patch_size"],
            ),
        )
        require_layers(self, layers)
        scheduler_settings(place)
        if patch != PATCH:
            raise InputError(
                f"transformer/config.json of {place.name} has patch_size {patch}, and tokens of "
                f"OmniGen2 are {PATCH} x {PATCH} latent pixels: copy or save the editor again"
            )
        # The VAE halves the sides between its blocks.
        return EditorFacts(pixels_per_token=patch * 2 ** (blocks - 1), notes=files.notes)

    def skeleton(self) -> nn.Module:
        """Builds the transformer of the editor's configuration on the meta device."""
        from rl_edit.editors.omnigen2_transformer import OmniGen2Transformer2DModel

        place = locate(self.path, self.revision)
        return transformer_skeleton(place, transformer=OmniGen2Transformer2DModel)

    def weight_bytes(self) -> int:
        """Counts transformer, VAE and language model: all of them lie on the device."""
        return pipeline_bytes(locate(self.path, self.revision), dtype=self.dtype)

    def load(self) -> OmniGen2Editor:
        """Loads the models and freezes them."""
        from rl_edit.editors.omnigen2_parts import load_parts

        # Bad settings and files are refused before weights are read.
        self.inspect()
        place = locate(self.path, self.revision)
        return OmniGen2Editor(load_parts(place, self.dtype, chosen_device(self.device)), self)


@dataclass(frozen=True)
class TwoScales:
    """Guidance by instruction and source, as the stock pipeline joins it.

    Attributes:
        text, image: the scales. With an image scale of 1 no forward reads the source alone.
    """

    text: float
    image: float

    def __call__(self, positive: Tensor, *others: Tensor) -> Tensor:
        """Leads from nothing to the source, and from there to the instruction."""
        *sourced, none = others
        if not sourced:
            return none + self.text * (positive - none)
        (source,) = sourced
        return none + self.image * (source - none) + self.text * (positive - source)


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Inputs of one forward, on the device; ``source`` is None where it reads none."""

    text: Float[Tensor, "batch text text_width"]
    text_rows: Bool[Tensor, "batch text"] | None
    source: Float[Tensor, "batch token channel"] | None
    grid: tuple[int, int]


class OmniGen2Editor(FrozenEditor[OmniGen2Config]):
    """A frozen OmniGen2 as an :class:`~rl_edit.editors.family.Editor`."""

    def __init__(self, pipeline: OmniGen2Parts, config: OmniGen2Config) -> None:
        super().__init__(config, pipeline.transformer, pipeline.models)
        self.pipeline = pipeline
        shrunk: int = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.pixels_per_token: int = shrunk * pipeline.transformer.config.patch_size
        self._watched = [
            block.get_submodule("attn.rotation")
            for block in last_layers(config, list(pipeline.transformer.layers))
        ]

    @torch.no_grad()
    def encode(self, task: EditTask) -> Conditioning:
        """Encodes text and source.

        Raises:
            ValueError: the source does not lie on the canvas.
        """
        from rl_edit.editors.omnigen2_parts import chat_text, encoded_source, text_states

        source, grid = encoded_source(self.pipeline, task, self.pixels_per_token)
        chat = chat_text(self.pipeline.tokenizer, self.config.max_text_tokens)
        encodings = {
            "text_states": text_states(self.pipeline, chat, task.instruction),
            # The template is read too, but no part of the instruction.
            "text_rows": chat.rows(task.instruction),
        }
        if self.config.guided:
            negative = text_states(self.pipeline, chat, self.config.negative_prompt)
            encodings[NEGATIVE + "text_states"] = negative
        return Conditioning(source_latents=source, grid=grid, tensors=encodings)

    def sigmas(self, num_steps: int, conditioning: Conditioning) -> Float[Tensor, " step_plus_1"]:
        """Returns the stock grid, turned: from noise at 1 to clean at 0."""
        from rl_edit.editors.omnigen2_parts import noise_levels

        return noise_levels(num_steps, conditioning.grid, shifted=self.pipeline.shifted)

    def velocity(
        self,
        latents: Float[Tensor, "batch token channel"],
        sigma: Float[Tensor, " batch"],
        conditioning: Conditioning | Sequence[Conditioning],
        tally: MassTally | None = None,
    ) -> Float[Tensor, "batch token channel"]:
        """Predicts the guided velocity in chunks of ``micro_batch`` rows.

        Texts are not padded, so the rows of a chunk have texts of one length, and a row's bits do
        not depend on its neighbours' words.

        Raises:
            ValueError: a conditioning whose further encodings the guidance needs or leaves unread.
        """
        return guided_velocity(
            latents,
            sigma,
            conditioning,
            tally,
            config=self.config,
            guidance=TwoScales(self.config.true_cfg, self.config.image_cfg),
            pack=self._branches,
            forward=self._forward,
            alike=partial(text_lengths, name="text_states"),
        )

    def _forward(self, latents: Tensor, sigma: Tensor, inputs: _Inputs, record: bool) -> Prediction:
        # The source is the only reference; the transformer takes several.
        sources = () if inputs.source is None else (inputs.source,)
        masses: list[Tensor] = []
        watched = self._watched if record else []
        with _captured(watched, inputs, latents.shape[1], self.config.attention_average, masses):
            out = self.transformer(
                latents.to(self.device, self.dtype),
                # Its time is 0 for noise. Rounded as the stock pipeline rounds it.
                (1 - sigma.float()).to(self.device, self.dtype),
                inputs.text,
                sources,
                (inputs.grid,) * (len(sources) + 1),
            )
        mass = torch.stack(masses).mean(dim=0) if masses else None
        # Its velocity is clean - noise.
        return Prediction(velocity=-out.to(latents.device, torch.float32), mass=mass)

    def _branches(self, many: Sequence[Conditioning]) -> tuple[_Inputs, ...]:
        """Lists the forwards: all, with guidance the source alone, and nothing."""
        device, dtype = self.device, self.dtype
        source = torch.stack([c.source_latents for c in many]).to(device, dtype)
        grid = shared_grid(many)
        text = stacked(many, "text_states").to(device, dtype)
        rows = stacked(many, "text_rows").to(device)
        everything = _Inputs(text=text, text_rows=rows, source=source, grid=grid)
        if not is_guided(many[0]):
            return (everything,)
        negative = stacked(many, NEGATIVE + "text_states").to(device, dtype)
        # In the order in which TwoScales takes them.
        images = (source, None) if self.config.image_cfg > 1 else (None,)
        others = [
            _Inputs(text=negative, text_rows=None, source=image, grid=grid) for image in images
        ]
        return (everything, *others)

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch token channel"], conditioning: Conditioning
    ) -> UInt8[Tensor, "batch height width 3"]:
        """Decodes in chunks of ``micro_batch``, with the stock pipeline's rounding."""
        from rl_edit.editors.omnigen2_parts import decoded_pixels

        return decoded_in_chunks(
            latents,
            lambda part: decoded_pixels(self.pipeline, part, conditioning.grid),
            size=self.config.micro_batch,
        )


@contextmanager
def _captured(
    watched: Sequence[nn.Module],
    inputs: _Inputs,
    num_tokens: int,
    average: HeadAverage,
    masses: list[Tensor],
) -> Iterator[None]:
    """Adds each joint layer's attention mass while a forward runs unchanged.

    Hooks read turned queries and keys of ``[text, source, target]`` and return no value.
    """

    def measure(_module: nn.Module, _inputs: Any, turned: tuple[Tensor, Tensor]) -> None:
        assert inputs.text_rows is not None
        query, key = (part.detach() for part in turned)
        # Several query heads share a key.
        key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        query = query[:, : inputs.text.shape[1]]
        # Text and source: whatever else the text sees.
        others = key[:, :-num_tokens] if average == "joint" else None
        masses.append(text_to_image_mass(query, key[:, -num_tokens:], inputs.text_rows, others))

    handles = [module.register_forward_hook(measure) for module in watched]
    try:
        yield
    finally:
        # A forward that failed must leave no hook behind.
        for handle in handles:
            handle.remove()
