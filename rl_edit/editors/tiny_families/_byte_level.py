"""Byte-level BPE that reads every text, and each word that it was made for as one token."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE


def vocabulary_and_merges(
    words: Iterable[str],
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns a vocabulary of all 256 bytes and the words, and the merges that make them."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], int] = {}
    # Within a sentence a word begins with its space.
    for text in (form for word in words for form in (word, f" {word}")):
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
    return {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, list(merges)


def byte_level_tokenizer(words: Iterable[str]) -> Tokenizer:
    """Makes the tokenizer itself, without special tokens."""
    ids, merges = vocabulary_and_merges(words)
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
