"""A small Qwen tokenizer: byte-level, with a token for each word of the shapes world."""

from __future__ import annotations

from transformers import Qwen2TokenizerFast

from rl_edit.data import shapes
from rl_edit.editors.tiny_families._byte_level import vocabulary_and_merges

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Special tokens of Qwen's text models; the first pads."""

VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
"""Further special tokens of its models that see images."""

# As Qwen's own: a line per message, and for the answer an empty thought where none is wanted.
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_qwen_tokenizer(
    *, max_length: int = 512, further: tuple[str, ...] = (), words: tuple[str, ...] = ()
) -> Qwen2TokenizerFast:
    """Makes a byte-level BPE that reads every text, and each known word as one token.

    Args:
        max_length: ``model_max_length``.
        further: special tokens beyond :data:`SPECIAL`.
        words: known words beyond those of the shapes world.
    """
    ids, merges = vocabulary_and_merges((*shapes.vocabulary(), *words))
    tokenizer = Qwen2TokenizerFast(
        vocab=ids, merges=merges, model_max_length=max_length, eos_token=SPECIAL[2]
    )
    # The class itself adds <|endoftext|>, which pads.
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:], *further]})
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
