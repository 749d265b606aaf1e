"""Chat templates with images, for each family of judges.

EditScore's Qwen2.5-VL judges were trained on a system prompt and on a mark ``<img1>: `` before each
image (``apply_chat_template`` in ``editscore/mllm_tools/qwen25vl.py`` of the ``editscore`` 0.2
package, Apache-2.0). Its Qwen3-VL judges use the checkpoint's own template, which for one user turn
is the same without both.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from rl_edit.errors import InputError
from rl_edit.rewards.model_files import require_image_processor, require_model

Family = Literal["qwen2_5_vl", "qwen3_vl"]
FamilyChoice = Literal["auto", "qwen2_5_vl", "qwen3_vl"]

SYSTEM: dict[Family, str] = {"qwen2_5_vl": "You are a helpful assistant.", "qwen3_vl": ""}
IMAGE = "<|image_pad|>"

# EditScore's judges of 7, 32 and 72 billion parameters are Qwen2.5-VL.
_QWEN_2_5 = re.compile(r"qwen[-_]?2[._-]?5|editscore-(7|32|72)b", re.IGNORECASE)


def family_named(model: str) -> Family:
    """Derives the family from the name of a served model.

    Any other model takes images, then text, as Qwen3-VL does.
    """
    return "qwen2_5_vl" if _QWEN_2_5.search(model) else "qwen3_vl"


def family_of(checkpoint: str) -> Family:
    """Reads the family from the config of a checkpoint."""
    from transformers import AutoConfig

    model_type: Any = AutoConfig.from_pretrained(checkpoint).model_type
    for family in SYSTEM:
        if family == model_type:
            return family
    raise InputError(
        f"{checkpoint} holds a {model_type} model, whose chat template is not known here. Use "
        f"{' or '.join(SYSTEM)}, or serve it."
    )


def require_judge(path: str, *, transport: str) -> None:
    """Refuses a judge of the own process that is not here, or that no template here fits."""
    model_type = require_model(path, reward=f"transport {transport}").get("model_type")
    if model_type not in SYSTEM:
        raise InputError(
            f"{path} holds a {model_type} model, whose chat template is not known here. Use "
            f"{' or '.join(SYSTEM)}, or serve it."
        )
    require_image_processor(path, reward=f"transport {transport}")


def mark(family: Family, number: int) -> str:
    """Returns the text before image ``number``, from 1."""
    return f"<img{number}>: " if family == "qwen2_5_vl" else ""


def chat_text(family: Family, num_images: int, prompt: str) -> str:
    """Writes one user turn, open for the judge's answer, with one ``IMAGE`` per image."""
    system = f"<|im_start|>system\n{SYSTEM[family]}<|im_end|>\n" if SYSTEM[family] else ""
    images = "".join(
        f"{mark(family, number)}<|vision_start|>{IMAGE}<|vision_end|>"
        for number in range(1, num_images + 1)
    )
    # An instruction that contains control tokens must not end the user's turn or add an image.
    words = prompt.replace("<|", "< |")
    return f"{system}<|im_start|>user\n{images}{words}<|im_end|>\n<|im_start|>assistant\n"
