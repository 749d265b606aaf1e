"""Qwen-Image-Edit-2509 and -2511: a list of sources, which the text encoder sees small.

Qwen2.5-VL reads the instruction behind a numbered list of the source images, each at about
384 x 384 pixels. Tasks have one source here, so the list has one entry.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from PIL import Image

from rl_edit.editors.qwen_settings import QwenSettings


class QwenImageEditPlusConfig(QwenSettings):
    """Settings of a Qwen-Image-Edit-2509 or -2511 editor."""

    pipeline: ClassVar[str] = "QwenImageEditPlusPipeline"
    released: ClassVar[tuple[str, ...]] = ("Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2511")
    kind: Literal["qwen_image_edit_plus"] = "qwen_image_edit_plus"

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
