"""The processor of Qwen2.5-VL for text and images, which needs no torchvision.

transformers' own class has a part for videos, and that part imports torchvision.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

from rl_edit.editors.location import Location

FOLDER = "processor"


class ImageTextProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """Reads texts with images as its base class does."""

    # The base class finds its parts by the names here: one for videos is not among them.
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def load_processor(place: Location, tokenizer: Any) -> ImageTextProcessor:
    """Loads the image part of a pipeline's processor, and joins the pipeline's tokenizer to it.

    Raises:
        InputError: its files cannot be had.
    """
    try:
        images = Qwen2VLImageProcessorPil.from_pretrained(
            place.name, subfolder=FOLDER, revision=place.revision, local_files_only=place.local
        )
    # The library raises errors of many kinds; each means that the files cannot be had.
    except Exception as error:
        raise place.unreachable(error) from error
    return ImageTextProcessor(images, tokenizer)
