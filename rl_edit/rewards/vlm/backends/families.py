"""How a conversation with pictures is written for each family of judges.

EditScore's Qwen2.5-VL judges were trained on a system prompt and on pictures announced as ``<img1>: `` (``apply_chat_template``
in ``editscore/mllm_tools/qwen25vl.py`` of the ``editscore`` 0.2 package, Apache-2.0). Its Qwen3-VL judges use the checkpoint's own
template, which for one user turn is the same without both.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from rl_edit.errors import InputError

Family = Literal["qwen2_5_vl", "qwen3_vl"]
FamilyChoice = Literal["auto", "qwen2_5_vl", "qwen3_vl"]

SYSTEM = {"qwen2_5_vl": "You are a helpful assistant.", "qwen3_vl": ""}
IMAGE = "<|image_pad|>"

_QWEN_2_5 = re.compile(r"qwen[-_]?2[._-]?5|editscore-(7|32|72)b", re.IGNORECASE)


def family_named(model: str) -> Family:
    """The family a served model's name tells of. Pictures then words, as Qwen3-VL has it, is what any other model takes."""
    return "qwen2_5_vl" if _QWEN_2_5.search(model) else "qwen3_vl"


def family_of(checkpoint: str) -> Family:
    """The family a checkpoint's config states."""
    from transformers import AutoConfig

    family: Any = AutoConfig.from_pretrained(checkpoint).model_type
    if family in SYSTEM:
        return family
    raise InputError(
        f"{checkpoint} holds a {family} model, and how it is spoken to is not known here. Use {' or '.join(SYSTEM)}, or serve it."
    )


def mark(family: Family, number: int) -> str:
    """What stands before picture ``number``, from 1."""
    return f"<img{number}>: " if family == "qwen2_5_vl" else ""


def chat_text(family: Family, num_images: int, prompt: str) -> str:
    """The raw text of one user turn, open for the judge's answer; one ``IMAGE`` a picture."""
    system = f"<|im_start|>system\n{SYSTEM[family]}<|im_end|>\n" if SYSTEM[family] else ""
    images = "".join(
        f"{mark(family, number)}<|vision_start|>{IMAGE}<|vision_end|>"
        for number in range(1, num_images + 1)
    )
    # An instruction that contains control tokens must not be able to end the user's turn or to add a picture.
    return f"{system}<|im_start|>user\n{images}{prompt.replace('<|', '< |')}<|im_end|>\n<|im_start|>assistant\n"
