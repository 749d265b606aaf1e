"""A small Qwen tokenizer: byte-level, with a token for each word of the shapes world."""

from __future__ import annotations

from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import Qwen2TokenizerFast

from rl_edit.data import shapes

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
    *, max_length: int = 512, further: tuple[str, ...] = ()
) -> Qwen2TokenizerFast:
    """Makes a byte-level BPE that reads every text, and each known word as one token.

    Args:
        max_length: ``model_max_length``.
        further: special tokens beyond :data:`SPECIAL`.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], int] = {}
    for word in shapes.vocabulary():
        # Within a sentence a word begins with its space.
        for text in (word, f" {word}"):
            ((symbols, _),) = byte_level.pre_tokenize_str(text)
            parts = list(symbols)
            # Merges of earlier words fire first; new ones start from what they leave.
            while pairs := [
                (merges[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in merges
            ]:
                _, i = min(pairs)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            while len(parts) > 1:
                merges[parts[0], parts[1]] = len(merges)
                parts[:2] = [parts[0] + parts[1]]
                vocabulary.append(parts[0])
    # Without repeats, in order: a merge may make a token that another word has made.
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Qwen2TokenizerFast(
        vocab=ids, merges=list(merges), model_max_length=max_length, eos_token=SPECIAL[2]
    )
    # The class itself adds <|endoftext|>, which pads.
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:], *further]})
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
