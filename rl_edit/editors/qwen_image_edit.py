"""Qwen-Image-Edit: one source, which the text encoder sees as it is.

Qwen2.5-VL reads the instruction together with the source, in a chat of one message.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from PIL import Image

from rl_edit.editors.qwen_settings import QwenSettings


class QwenImageEditConfig(QwenSettings):
    """Settings of a Qwen-Image-Edit editor."""

    pipeline: ClassVar[str] = "QwenImageEditPipeline"
    released: ClassVar[tuple[str, ...]] = ("Qwen/Qwen-Image-Edit",)
    kind: Literal["qwen_image_edit"] = "qwen_image_edit"

    @property
    def edit_steps(self) -> int:
        """50 as in the model card."""
        return 50

    def prompt_images(self, pipeline: Any, source: Image.Image) -> Any:
        """The source as it is: the stock pipeline shows the encoder what the VAE gets."""
        return source
