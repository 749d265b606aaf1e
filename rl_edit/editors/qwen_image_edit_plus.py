"""Qwen-Image-Edit-2509 and -2511: our denoising loop's view of the real diffusers components.

Qwen2.5-VL reads the instruction behind a numbered list of the source images, each at about
384 x 384 pixels. Tasks have one source here, so the list has one entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from PIL import Image
from pydantic import Field, model_validator
from torch import nn

from rl_edit.data.editor_text import TextReading
from rl_edit.editors.component_files import pipeline_bytes
from rl_edit.editors.family import EditorFacts, EditorSettings
from rl_edit.editors.frozen import chosen_device
from rl_edit.editors.location import locate
from rl_edit.editors.qwen_defaults import NEGATIVE_PROMPT, qwen_defaults
from rl_edit.editors.qwen_editor import QwenEditor, load_qwen, qwen_facts
from rl_edit.editors.qwen_text import QwenText
from rl_edit.editors.skeleton import transformer_skeleton
from rl_edit.editors.text_reading import tokenizer_of
from rl_edit.method.attention import HeadAverage


class QwenImageEditPlusConfig(EditorSettings):
    """Settings of a Qwen-Image-Edit-2509 or -2511 editor.

    Attributes:
        true_cfg: scale of classifier-free guidance whose result keeps the length of the positive
            velocity, per token; two forwards a velocity. 1 is off. By default 4, as in the model
            card.
        negative_prompt: text that the negative forward reads instead of the instruction. By default
            a single space, as in the model card.
        detach_negative: run the negative forward without gradient. By default both branches have
            theirs: the gradient is then that of the velocity which is rolled out.
        max_text_tokens: tokens of an instruction, template and image not counted. By default the
            1024 that the stock pipeline documents, or its tokenizer's ``model_max_length`` where
            that is less.
        gradient_checkpointing: trade compute for memory in training.
    """

    pipeline: ClassVar[str] = "QwenImageEditPlusPipeline"
    released: ClassVar[tuple[str, ...]] = ("Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2511")
    head_averages: ClassVar[tuple[HeadAverage, ...]] = ("renormalised", "joint")
    kind: Literal["qwen_image_edit_plus"] = "qwen_image_edit_plus"
    # The model card's; the stock pipeline has it on only where a negative prompt is passed.
    true_cfg: float = Field(default=4.0, ge=1)
    negative_prompt: str = NEGATIVE_PROMPT
    detach_negative: bool = False
    max_text_tokens: int = Field(default=1024, ge=4)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _possible(self) -> QwenImageEditPlusConfig:
        negative = self.negative_prompt
        if self.true_cfg == 1 and (negative != NEGATIVE_PROMPT or self.detach_negative):
            raise ValueError(
                f"negative_prompt {negative!r} and detach_negative {self.detach_negative} are "
                "settings of a negative forward, which true_cfg 1 leaves out: raise true_cfg "
                "above 1, or leave them out."
            )
        return self

    @classmethod
    def defaults(cls, path: str) -> dict[str, Any]:
        """Returns what an editor was made for."""
        return qwen_defaults(path)

    @property
    def guided(self) -> bool:
        """Classifier-free guidance is the second forward."""
        return self.true_cfg > 1

    @property
    def edit_steps(self) -> int:
        """40 as in the model card."""
        return 40

    def prompt_images(self, pipeline: Any, source: Image.Image) -> Any:
        """The source at the size that the stock pipeline shows the text encoder."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

        width, height = stock.calculate_dimensions(
            stock.CONDITION_IMAGE_SIZE, source.width / source.height
        )
        return [pipeline.image_processor.resize(source, height, width)]

    def read_text(self, texts: Sequence[str]) -> tuple[TextReading, ...]:
        """Reads instructions with the tokenizer."""
        tokenizer = tokenizer_of(locate(self.path, self.revision), "tokenizer")
        return QwenText(tokenizer=tokenizer, max_tokens=self.max_text_tokens).read(texts)

    def inspect(self) -> EditorFacts:
        """Checks all files, and reads the configurations of VAE and transformer."""
        return qwen_facts(self, self.pipeline, self.revision)

    def skeleton(self) -> nn.Module:
        """Builds the transformer of the editor's configuration on the meta device."""
        return transformer_skeleton(locate(self.path, self.revision))

    def weight_bytes(self) -> int:
        """Counts transformer, VAE and text encoder: all of them lie on the device."""
        return pipeline_bytes(locate(self.path, self.revision), dtype=self.dtype)

    def load(self) -> QwenEditor:
        """Loads the stock pipeline and freezes it."""
        pipeline = load_qwen(locate(self.path, self.revision), self.pipeline, self.dtype)
        return QwenEditor(pipeline.to(chosen_device(self.device)), self)
