"""Settings that both families of Qwen-Image-Edit editors have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from PIL import Image
from pydantic import Field, model_validator
from torch import nn

from rl_edit.data.editor_text import TextReading
from rl_edit.editors.component_files import pipeline_bytes, pipeline_files
from rl_edit.editors.family import EditorFacts, EditorSettings
from rl_edit.editors.frozen import chosen_device
from rl_edit.editors.location import locate
from rl_edit.editors.qwen_defaults import NEGATIVE_PROMPT, qwen_defaults
from rl_edit.editors.qwen_editor import QwenEditor, load_qwen
from rl_edit.editors.qwen_text import QwenText
from rl_edit.editors.skeleton import read_settings, require_layers, transformer_skeleton
from rl_edit.editors.text_reading import tokenizer_of
from rl_edit.method.attention import HeadAverage


class QwenSettings(EditorSettings):
    """Settings of a Qwen-Image-Edit editor of either family.

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

    if TYPE_CHECKING:
        # Each family's own field; declared here it would be a setting without a default.
        kind: str

    pipeline: ClassVar[str]
    head_averages: ClassVar[tuple[HeadAverage, ...]] = ("renormalised", "joint")
    # The model card's; the stock pipeline has it on only where a negative prompt is passed.
    true_cfg: float = Field(default=4.0, ge=1)
    negative_prompt: str = NEGATIVE_PROMPT
    detach_negative: bool = False
    max_text_tokens: int = Field(default=1024, ge=4)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Self:
        negative = self.negative_prompt
        if self.true_cfg == 1 and (negative != NEGATIVE_PROMPT or self.detach_negative):
            raise ValueError(
                f"negative_prompt {negative!r} and detach_negative {self.detach_negative} are "
                "settings of a negative forward, which true_cfg 1 leaves out: raise true_cfg "
                "above 1, or leave them out."
            )
        return self

    @abstractmethod
    def prompt_images(self, pipeline: Any, source: Image.Image) -> Any:
        """Returns the images that the text encoder sees, as the stock pipeline passes them."""

    @classmethod
    def defaults(cls, path: str) -> dict[str, Any]:
        """Returns what an editor was made for."""
        return qwen_defaults(path)

    @property
    def guided(self) -> bool:
        """Classifier-free guidance is the second forward."""
        return self.true_cfg > 1

    def read_text(self, texts: Sequence[str]) -> tuple[TextReading, ...]:
        """Reads instructions with the tokenizer."""
        tokenizer = tokenizer_of(locate(self.path, self.revision), "tokenizer")
        return QwenText(tokenizer=tokenizer, max_tokens=self.max_text_tokens).read(texts)

    def inspect(self) -> EditorFacts:
        """Checks all files, and reads the configurations of VAE and transformer."""
        place = locate(self.path, self.revision)
        files = pipeline_files(place, dtype=self.dtype)
        halvings, layers = read_settings(
            place,
            self.pipeline,
            lambda vae, transformer: (
                len(vae["temperal_downsample"]),
                int(transformer["num_layers"]),
            ),
        )
        require_layers(self, layers)
        # The VAE halves the sides so often; a token joins 2 x 2 of its pixels.
        return EditorFacts(pixels_per_token=2 * 2**halvings, notes=files.notes)

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
