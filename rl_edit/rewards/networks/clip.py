"""CLIP (arXiv 2103.00020): unit vectors of images and texts, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from rl_edit.rewards.model_files import loading, require_complete

# The constants every released CLIP was trained with.
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])


class Clip:
    """A loaded model.

    Args:
        model: a local directory or a hub id, with safetensors weights.
        device: where it runs.
    """

    def __init__(self, model: str, device: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        with loading(model):
            loaded_model, report = CLIPModel.from_pretrained(
                model,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                # Refused below, by name.
                ignore_mismatched_sizes=True,
            )
            require_complete(model, report)
            self._model: Any = loaded_model.to(device).eval()
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._device = device

    @torch.no_grad()
    def image_vectors(
        self, images: Sequence[UInt8[Tensor, "height width 3"]]
    ) -> Float[Tensor, "image feature"]:
        """Encodes images as unit vectors.

        The shorter edge is resized to the model's input (bicubic); the model sees the middle
        square.
        """
        edge = self._model.config.vision_config.image_size
        pixels = torch.stack([pixel_values(image, edge) for image in images])
        return _unit(self._model.get_image_features(pixel_values=pixels.to(self._device)))

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str]) -> Float[Tensor, "text feature"]:
        """Encodes texts as unit vectors. A text is cut to the model's length."""
        # Longer texts fail in the model's position embeddings.
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self._device)
        features = self._model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return _unit(features)


@cache
def loaded(model: str, device: str) -> Clip:
    """Loads a model, once per process. ``auto`` is the GPU that this process sees, if any."""
    return Clip(
        model, ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )


def pixel_values(image: UInt8[Tensor, "height width 3"], edge: int) -> Float[Tensor, "3 edge edge"]:
    """Prepares an image as CLIP's own processor does; the library's one needs torchvision."""
    height, width = image.shape[:2]
    short = min(height, width)
    # Truncated, as the processor does: rounding would shift the crop by a pixel.
    size = (int(edge * width / short), int(edge * height / short))
    resized = Image.fromarray(image.cpu().numpy()).resize(size, Image.Resampling.BICUBIC)
    # The middle square.
    left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
    pixels = (
        torch.from_numpy(np.array(resized.crop((left, top, left + edge, top + edge)))).float() / 255
    )
    return ((pixels - _MEAN) / _DEVIATION).movedim(-1, 0)


def _unit(features: Any) -> Tensor:
    # transformers 5 wraps what transformers 4 returned.
    vectors: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return torch.nn.functional.normalize(vectors.double().cpu(), dim=-1)
