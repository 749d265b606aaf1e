"""FLUX.2-klein: our denoising loop's view of the real diffusers components.

The 4B and 9B checkpoints are distilled to few steps and take no guidance; their base checkpoints
take classifier-free guidance against the empty instruction. Text is a chat of one message, read by
Qwen3; all of its padded rows are part of the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from rl_edit.data.editor_text import TextReading
from rl_edit.editors.chat_text import ChatText
from rl_edit.editors.component_files import pipeline_bytes
from rl_edit.editors.family import EditorFacts, EditorSettings
from rl_edit.editors.flux2_editor import SINGLE_BLOCKS, Flux2Editor, flux2_facts
from rl_edit.editors.frozen import chosen_device
from rl_edit.editors.local_defaults import local_defaults
from rl_edit.editors.location import INDEX, local_value, locate
from rl_edit.editors.lora_targets import ATTENTION_PROJECTIONS
from rl_edit.editors.skeleton import transformer_skeleton
from rl_edit.editors.stock_pipeline import stock_pipeline
from rl_edit.editors.text_reading import tokenizer_of
from rl_edit.errors import InputError
from rl_edit.method.attention import HeadAverage

_BASE_CHECKPOINTS = tuple(f"black-forest-labs/FLUX.2-klein-base-{size}" for size in ("4B", "9B"))
"""Released checkpoints that are not distilled."""


class Flux2KleinConfig(EditorSettings):
    """Settings of a FLUX.2-klein editor.

    Attributes:
        true_cfg: scale of classifier-free guidance against the empty instruction,
            ``velocity = negative + true_cfg * (positive - negative)``; two forwards a velocity.
            1 is off, as a distilled checkpoint needs it. By default 4, as in the stock pipeline,
            for a directory that holds a base checkpoint and for the released ones, else 1.
        detach_negative: run the negative forward without gradient.
        max_text_tokens: tokens of instruction and chat template. There is no text mask, so it is
            part of the function. By default the pipeline's 512, or its tokenizer's
            ``model_max_length`` where that is less.
        gradient_checkpointing: trade compute for memory in training.
    """

    pipeline: ClassVar[str] = "Flux2KleinPipeline"
    released: ClassVar[tuple[str, ...]] = (
        *(f"black-forest-labs/FLUX.2-klein-{size}" for size in ("4B", "9B")),
        *_BASE_CHECKPOINTS,
    )
    head_averages: ClassVar[tuple[HeadAverage, ...]] = ("renormalised", "joint")
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
        if local_value(path, INDEX, "is_distilled") is False or path in _BASE_CHECKPOINTS:
            defaults["true_cfg"] = 4.0
        return defaults

    @property
    def guided(self) -> bool:
        """Classifier-free guidance is the second forward."""
        return self.true_cfg > 1

    @property
    def embedded_guidance(self) -> None:
        """The transformer has no embedding of a scale."""
        return None

    @property
    def text_layers(self) -> tuple[int, ...]:
        """``text_encoder_out_layers`` of the stock pipeline."""
        return (9, 18, 27)

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
        return self.chat(tokenizer).read(texts)

    def chat(self, tokenizer: Any) -> ChatText:
        """The chat of one message, with the arguments of the stock pipeline."""

        def render(instruction: str) -> str:
            text: str = tokenizer.apply_chat_template(
                [{"role": "user", "content": instruction}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            return text

        return ChatText(tokenizer=tokenizer, render=render, max_tokens=self.max_text_tokens)

    def inspect(self) -> EditorFacts:
        """Checks all files, and reads the configurations of all models.

        Raises:
            InputError: as in the seam; or guidance for a distilled checkpoint.
        """
        facts = flux2_facts(self, self.pipeline, self.revision, depth="num_hidden_layers")
        index = locate(self.path, self.revision).read_json(INDEX)
        distilled = bool(index.get("is_distilled", False))
        return replace(facts, notes=(*facts.notes, *self._guidance_notes(distilled)))

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

    def load(self) -> Flux2Editor:
        """Loads the stock pipeline and freezes it."""
        # Guidance for a distilled checkpoint is refused before its weights are read.
        self.inspect()
        pipeline = stock_pipeline(locate(self.path, self.revision), self.pipeline, self.dtype)
        return Flux2Editor(pipeline.to(chosen_device(self.device)), self)
