"""Scores the edited place by CLIP: CompBench's LC-T and LC-I (arXiv 2505.12200)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from rl_edit.errors import InputError
from rl_edit.rewards.cache import content_sha256
from rl_edit.rewards.model_files import require_model, stored_bytes
from rl_edit.rewards.networks import clip
from rl_edit.rewards.term import RewardTerm, Sides
from rl_edit.types import Candidates, PairedTask, Score

_SQUARE = 512


class ClipSimilarity(RewardTerm):
    """Compares the bounding box of the edit mask with a caption or with the target.

    * ``caption`` (LC-T): ``max(100 cos(crop, caption), 0)``, 0..100; the mean over captions
      separated by "|".
    * ``target`` (LC-I): ``cos(crop, the target's crop)``, -1..1.

    Attributes:
        compare: what the crop is compared with.
        model: directory or hub id of a CLIP model; CompBench's is ViT-L/14.
        crop: "compbench" squashes images to 512x512 and leaves out the box's last row and column,
            as its script does; "exact" is the box itself.
        device: "auto" is the GPU this process was given, if any.
    """

    kind: Literal["clip"] = "clip"
    compare: Literal["caption", "target"] = "caption"
    model: str = "openai/clip-vit-large-patch14"
    crop: Literal["exact", "compbench"] = "exact"
    device: str = "auto"

    # It crops to the bounding box of the mask; pixels elsewhere do not reach the model.
    responds_to: ClassVar[Sides] = "inside"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({self.compare})

    @property
    def low(self) -> float:
        return 0.0 if self.compare == "caption" else -1.0

    @property
    def high(self) -> float:
        return 100.0 if self.compare == "caption" else 1.0

    @property
    def needs_attention(self) -> bool:
        return False

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "model": content_sha256(self.model)}

    def gpu_weights(self) -> dict[str, int]:
        return {} if self.device == "cpu" else {self.model: stored_bytes(self.model, "float32")}

    def require_files(self) -> None:
        super().require_files()
        kind = require_model(self.model, reward=f"reward {self.name!r}").get("model_type")
        if kind != "clip":
            raise InputError(
                f"{self.model}, the model of reward {self.name!r}, is of type {kind!r} and not "
                "CLIP, so its vectors could not be compared. Give a CLIP model such as "
                "openai/clip-vit-large-patch14."
            )

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Component: ``cosine``, the mean over captions before they are cut off at 0."""
        task = candidates.task
        if not isinstance(task, PairedTask):
            raise InputError(
                f"Task {task.task_id!r} has neither target nor caption, and CLIP compares with "
                "one. Use data with them."
            )
        model = clip.loaded(self.model, self.device)
        crops = model.image_vectors(
            [self._crop(image, task.edit_mask) for image in candidates.images]
        )
        if self.compare == "target":
            cosines = crops @ model.image_vectors([self._crop(task.target, task.edit_mask)]).T
            values = cosines.mean(dim=1).clamp(-1, 1)
        else:
            captions = [caption.strip() for caption in task.caption.split("|")]
            if not all(captions):
                reason = (
                    f"the caption of task {task.task_id} is empty, so there is no text to compare "
                    "with"
                )
                return (Score(value=None, reason=reason),) * len(candidates.images)
            cosines = crops @ model.text_vectors(captions).T
            # CLIPScore (arXiv 2104.08718) per caption, then the mean: a caption that does not fit
            # counts 0 and not below.
            values = (100 * cosines).clamp(0, 100).mean(dim=1)
        rows = zip(values.tolist(), cosines.mean(dim=1).tolist(), strict=True)
        return tuple(Score(value=value, components={"cosine": cosine}) for value, cosine in rows)

    def _crop(
        self, image: UInt8[Tensor, "height width 3"], mask: Bool[Tensor, "height width"]
    ) -> UInt8[Tensor, "rows columns 3"]:
        short = 0
        if self.crop == "compbench":
            image, mask, short = (
                _squashed(image, Image.Resampling.BICUBIC),
                _squashed(mask, Image.Resampling.NEAREST),
                1,
            )
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        if len(rows) <= short or len(columns) <= short:
            raise InputError(
                "The box of the edit mask has no area left after CompBench's crop: there is "
                "nothing to compare. Use 'crop: exact'."
            )
        # CompBench's script takes the last row and column, which belong to the box, as the end that
        # does not.
        return image[rows[0] : rows[-1] + 1 - short, columns[0] : columns[-1] + 1 - short]


def _squashed(values: Tensor, resample: Image.Resampling) -> Tensor:
    """Resizes to 512x512, whatever the shape."""
    pixels = values.cpu().numpy()
    image = Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == np.bool_ else pixels)
    resized = torch.from_numpy(np.array(image.resize((_SQUARE, _SQUARE), resample)))
    return resized > 0 if values.dtype == torch.bool else resized
