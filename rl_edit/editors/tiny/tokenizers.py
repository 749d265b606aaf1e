"""Tokenizers of the built-in editor: stock classes over the words of the shapes world."""

from __future__ import annotations

from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5TokenizerFast


def make_t5_tokenizer(words: tuple[str, ...]) -> T5TokenizerFast:
    """Makes a unigram tokenizer with a piece per known word, in lower case and Capitalised.

    Other text is spelled in single characters of ASCII and Latin-1; anything beyond becomes
    ``<unk>`` in place, so every text encodes.
    """
    # Scores are log probabilities: a word of one piece is likelier than its letters.
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    characters = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0x100))]
    pieces += [(c, -10.0) for c in characters]
    seen = {piece for piece, _ in pieces}
    for word in words:
        # A word nearly always follows a space; the piece without one serves text such as "(red".
        for piece, score in ((f"▁{word}", -1.0), (f"▁{word.capitalize()}", -1.5), (word, -2.0)):
            if piece not in seen:
                seen.add(piece)
                pieces.append((piece, score))
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def make_clip_tokenizer(words: tuple[str, ...]) -> CLIPTokenizer:
    """Makes a byte-level BPE over all 256 bytes, with merges that make each known word a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *(f"{c}</w>" for c in alphabet)]
    merges: dict[tuple[str, str], int] = {}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in words:
        ((symbols, _),) = byte_level.pre_tokenize_str(word.lower())
        parts = [*symbols[:-1], f"{symbols[-1]}</w>"]
        # Known merges fire first, in rank order: one learned from an earlier word ("r"+"e" of
        # "red") fires in a later one ("green"), and new merges must start from what it leaves.
        while pairs := [
            (merges[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in merges
        ]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = len(merges)
            parts[:2] = [parts[0] + parts[1]]
            vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    # Without repeats, in order: a merge may make a token that another word has made.
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=list(merges), model_max_length=77)
