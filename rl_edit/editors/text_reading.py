"""Reads instructions with the tokenizers of a FLUX editor, without its weights.

FLUX has two text encoders. T5 gives the tokens that the transformer attends to, up to
``max_text_tokens``. CLIP gives one summary vector, of the first 77 tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rl_edit.data.editor_text import TextReading
from rl_edit.editors.location import INDEX, Location

# Shorter words may well be spelled: "x", "3D", "RTX".
_MIN_SPELLED = 4


def read_with_flux(
    place: Location, texts: Sequence[str], *, max_text_tokens: int
) -> tuple[TextReading, ...]:
    """Reads texts as a FLUX pipeline does.

    Raises:
        InputError: the tokenizers cannot be had.
    """
    if not texts:
        return ()
    clip, t5 = (tokenizer_of(place, part) for part in ("tokenizer", "tokenizer_2"))
    unique = list(dict.fromkeys(texts))
    encoded = t5(unique, return_offsets_mapping=True, verbose=False)
    pooled = clip(unique, verbose=False)["input_ids"]
    limit = int(clip.model_max_length)
    remark = (
        f"exceed the {limit} tokens of the editor's CLIP encoder, whose summary vector then "
        "describes their beginning only. The T5 encoder reads all of them, so this is usually "
        "harmless."
    )
    strange = _unknown_words(t5, unique)
    readings = {
        text: TextReading(
            num_tokens=len(ids),
            max_tokens=max_text_tokens,
            lost=_lost(text, offsets, max_text_tokens) if len(ids) > max_text_tokens else "",
            unknown=tuple(word for word in _words(text) if word in strange),
            remark=remark if len(short) > limit else "",
        )
        for text, ids, offsets, short in zip(
            unique, encoded["input_ids"], encoded["offset_mapping"], pooled, strict=True
        )
    }
    return tuple(readings[text] for text in texts)


@lru_cache(maxsize=8)
def tokenizer_of(place: Location, part: str, *, kind: str = "") -> Any:
    """Loads a tokenizer of a pipeline, without weights.

    Args:
        part: name of its folder.
        kind: class of transformers that loads it; "" is the one that the pipeline names.

    Raises:
        InputError: it cannot be had.
    """
    index = place.read_json(INDEX)
    try:
        import transformers
        from transformers.utils import logging

        logging.set_verbosity_error()
        return getattr(transformers, kind or index[part][1]).from_pretrained(
            place.name, subfolder=part, revision=place.revision, local_files_only=place.local
        )
    # The library raises errors of many kinds; each means that the files cannot be had.
    except Exception as error:
        raise place.unreachable(error) from error


def _lost(text: str, offsets: Sequence[tuple[int, int]], limit: int) -> str:
    """Returns the part of a text beyond the limit."""
    # The last token that is read is the end mark, so the text loses one more.
    return text[offsets[limit - 1][0] :].strip()


def _words(text: str) -> list[str]:
    """Splits a text into words without punctuation, each once."""
    # Of any script: a full-width comma is punctuation too.
    blank = {ord(c): " " for c in text if unicodedata.category(c).startswith("P")}
    return list(dict.fromkeys(text.translate(blank).split()))


def _unknown_words(tokenizer: Any, texts: Sequence[str]) -> set[str]:
    """Returns the words that the tokenizer has no token for, or spells letter by letter."""
    words = list(dict.fromkeys(word for text in texts for word in _words(text)))
    if not words:
        return set()
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
    strange = set()
    for word, ids in zip(words, tokenizer(words)["input_ids"], strict=True):
        pieces = [i for i in ids if i not in special]
        letters = [p.strip("▁") for p in tokenizer.convert_ids_to_tokens(pieces)]
        spelled = len(word) >= _MIN_SPELLED and word.isalpha() and all(len(p) <= 1 for p in letters)
        if tokenizer.unk_token_id in pieces or spelled:
            strange.add(word)
    return strange
