"""FLUX.2-dev: guidance is an input of the transformer, and Mistral reads the text.

The chat has the pipeline's system message and the instruction. All of its padded rows are part of
the function, on the side where the tokenizer pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from rl_edit.data.editor_text import TextReading
from rl_edit.editors.chat_text import ChatText
from rl_edit.editors.component_files import pipeline_bytes
from rl_edit.editors.family import EditorFacts, EditorSettings
from rl_edit.editors.flux2_editor import SINGLE_BLOCKS, Flux2Editor, flux2_facts
from rl_edit.editors.frozen import chosen_device
from rl_edit.editors.local_defaults import local_defaults
from rl_edit.editors.location import Location, locate
from rl_edit.editors.lora_targets import ATTENTION_PROJECTIONS
from rl_edit.editors.skeleton import transformer_skeleton
from rl_edit.editors.stock_pipeline import stock_pipeline
from rl_edit.editors.text_reading import tokenizer_of
from rl_edit.method.attention import HeadAverage

_IMAGE_MARK = "[IMG]"
"""Text that the stock pipeline takes out of instructions."""


def _tokenizer(place: Location) -> Any:
    """Loads the tokenizer out of the folder of a processor.

    The processor itself also reads images, and needs torchvision; instructions have none. The
    pipeline takes either, and text becomes the same tokens.
    """
    return tokenizer_of(place, "tokenizer", kind="AutoTokenizer")


class Flux2Config(EditorSettings):
    """Settings of a FLUX.2-dev editor.

    Attributes:
        guidance: embedded guidance scale, the same in rollout, training and evaluation
            (FLUX.2-dev: 4).
        max_text_tokens: tokens of instruction, system message and chat template. There is no text
            mask, so it is part of the function. By default the pipeline's 512, or its tokenizer's
            ``model_max_length`` where that is less.
        gradient_checkpointing: trade compute for memory in training.
    """

    pipeline: ClassVar[str] = "Flux2Pipeline"
    released: ClassVar[tuple[str, ...]] = ("black-forest-labs/FLUX.2-dev",)
    head_averages: ClassVar[tuple[HeadAverage, ...]] = ("renormalised", "joint")
    kind: Literal["flux2"] = "flux2"
    # Flux2Pipeline.__call__: guidance_scale 4.0.
    guidance: float = Field(default=4.0, ge=0)
    max_text_tokens: int = Field(default=512, ge=16)
    gradient_checkpointing: bool = False

    @classmethod
    def defaults(cls, path: str) -> dict[str, Any]:
        """Returns what an editor was made for."""
        return local_defaults(path)

    @property
    def true_cfg(self) -> float:
        """There is no second forward."""
        return 1.0

    @property
    def detach_negative(self) -> bool:
        """There is no second forward."""
        return False

    @property
    def embedded_guidance(self) -> float:
        """The scale that the transformer takes."""
        return self.guidance

    @property
    def text_layers(self) -> tuple[int, ...]:
        """``text_encoder_out_layers`` of the stock pipeline."""
        return (10, 20, 30)

    @property
    def edit_steps(self) -> int:
        """50 is the stock pipeline's ``num_inference_steps``."""
        return 50

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention projections of both kinds of blocks."""
        return (*ATTENTION_PROJECTIONS, *SINGLE_BLOCKS)

    def read_text(self, texts: Sequence[str]) -> tuple[TextReading, ...]:
        """Reads instructions with the tokenizer and its chat template."""
        return self.chat(_tokenizer(locate(self.path, self.revision))).read(texts)

    def chat(self, tokenizer: Any) -> ChatText:
        """Returns the chat of system message and instruction, as the stock pipeline writes it."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        def render(instruction: str) -> str:
            (messages,) = format_input(prompts=[instruction])
            text: str = tokenizer.apply_chat_template(messages, tokenize=False)
            return text

        return ChatText(
            tokenizer=tokenizer,
            render=render,
            max_tokens=self.max_text_tokens,
            # The template has them.
            special=False,
            removed=_IMAGE_MARK,
        )

    def inspect(self) -> EditorFacts:
        """Checks all files, and reads the configurations of all models."""
        depth = "text_config.num_hidden_layers"
        return flux2_facts(self, self.pipeline, self.revision, depth=depth)

    def skeleton(self) -> nn.Module:
        """Builds the transformer of the editor's configuration on the meta device."""
        return transformer_skeleton(locate(self.path, self.revision))

    def weight_bytes(self) -> int:
        """Counts transformer, VAE and text encoder: all of them lie on the device."""
        return pipeline_bytes(locate(self.path, self.revision), dtype=self.dtype)

    def load(self) -> Flux2Editor:
        """Loads the stock pipeline and freezes it."""
        place = locate(self.path, self.revision)
        pipeline = stock_pipeline(place, self.pipeline, self.dtype, tokenizer=None)
        # Set afterwards: diffusers would ask for the processor's class, which needs torchvision.
        pipeline.register_modules(tokenizer=_tokenizer(place))
        return Flux2Editor(pipeline.to(chosen_device(self.device)), self)
