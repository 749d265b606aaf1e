"""Limits the next tokens so that an answer has the form of a JSON schema and ends in time.

Only parts that the judges' schemas need are supported: objects with every key required (written in
the schema's order), arrays of a fixed length, strings, and whole numbers from 0. The layout is
fixed (``{"key": [1, 2]}``), so one character decides the next state.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from rl_edit.errors import InputError


class _Text(NamedTuple):
    """The inside of a string and its closing quote."""


class _Integer(NamedTuple):
    """A whole number from 0 to ``top``."""

    top: int


class _State(NamedTuple):
    """The progress of an answer: the current piece, and the part of it that limits the rest."""

    piece: int
    done: str


class Form:
    """The answers a schema admits, one character after the other."""

    start = _State(0, "")

    def __init__(self, schema: dict[str, Any]) -> None:
        self._pieces: list[str | _Text | _Integer] = []
        for piece in _pieces(schema):
            # Neighbouring literals become one, which keeps the number of states small.
            if isinstance(piece, str) and self._pieces and isinstance(self._pieces[-1], str):
                self._pieces[-1] += piece
            else:
                self._pieces.append(piece)

    def after(self, state: _State, text: str) -> _State | None:
        """Advances the state by a text; None when the text does not fit."""
        here: _State | None = state
        for character in text:
            if here is None:
                return None
            here = self._step(here, character)
        return here

    def missing(self, state: _State) -> int:
        """Counts the characters that the shortest ending still needs."""
        rest = self._pieces[state.piece :]
        shortest = sum(len(piece) if isinstance(piece, str) else 1 for piece in rest)
        if not rest:
            return 0
        # A literal is as far as it is written, a begun number may end, and an escape in a string
        # needs its second character.
        return shortest + (
            1
            if isinstance(rest[0], _Text)
            else -1
            if isinstance(rest[0], _Integer)
            else -len(state.done)
        ) * bool(state.done)

    def _step(self, state: _State, character: str) -> _State | None:
        if state.piece == len(self._pieces):
            return None
        piece, following = self._pieces[state.piece], _State(state.piece + 1, "")
        if isinstance(piece, str):
            if piece[len(state.done)] != character:
                return None
            written = state.done + character
            return following if written == piece else _State(state.piece, written)
        if isinstance(piece, _Text):
            # After a backslash.
            if state.done:
                return _State(state.piece, "") if character in '"\\/bfnrt' else None
            if character == '"':
                return following
            return (
                None if character < " " else _State(state.piece, "\\" if character == "\\" else "")
            )
        # No leading zero, and never above the top of the scale.
        digits = state.done + character
        if character in "0123456789" and digits == str(int(digits)) and int(digits) <= piece.top:
            return _State(state.piece, digits)
        # A number has no end mark: the next piece's first character ends it.
        return self._step(following, character) if state.done else None


class Vocabulary:
    """Finds the tokens that fit each state of a form. States are few, so results are cached."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._starting: dict[str, list[int]] = defaultdict(list)
        for token, text in enumerate(texts):
            if text:
                self._starting[text[0]].append(token)
        self.fitting = cache(self._fitting)

    def _fitting(self, form: Form, state: _State) -> dict[int, tuple[_State, int]]:
        """Maps every token that fits to the next state and the characters missing then."""
        fitting = {}
        for first, tokens in self._starting.items():
            # Most tokens begin with a character that does not fit; they are not tried.
            if form.after(state, first) is None:
                continue
            for token in tokens:
                if (following := form.after(state, self._texts[token])) is not None:
                    fitting[token] = following, form.missing(following)
        return fitting


class Constraint:
    """Lists the allowed tokens of one answer, as ``prefix_allowed_tokens_fn``.

    A string is closed in time for the rest to fit into ``max_tokens``.
    """

    def __init__(
        self, form: Form, vocabulary: Vocabulary, *, prompt_tokens: int, max_tokens: int, end: int
    ) -> None:
        if form.missing(form.start) >= max_tokens:
            raise InputError(
                f"max_tokens({max_tokens}) cannot hold the shortest answer of this form "
                f"({form.missing(form.start)} characters), so no judge could give one. Raise "
                "max_tokens."
            )
        self._form, self._vocabulary, self._end = form, vocabulary, end
        self._read, self._limit = prompt_tokens, prompt_tokens + max_tokens
        self._state: _State = form.start

    def __call__(self, batch: int, tokens: Any) -> list[int]:
        # Generation hands over the complete sequence each time; only new tokens advance the state.
        for token in tokens[self._read :].tolist():
            self._state = self._vocabulary.fitting(self._form, self._state)[token][0]
        self._read = len(tokens)
        # After this token, with one reserved for the end.
        left = self._limit - self._read - 2
        allowed = [
            token
            for token, (_, missing) in self._vocabulary.fitting(self._form, self._state).items()
            if missing <= left
        ]
        # Nothing fits after the last piece: the answer ends.
        return allowed or [self._end]


def _pieces(schema: dict[str, Any]) -> Iterator[str | _Text | _Integer]:
    kind = schema["type"]
    if kind == "object":
        for number, (key, value) in enumerate(schema["properties"].items()):
            yield (", " if number else "{") + json.dumps(key) + ": "
            yield from _pieces(value)
        yield "}"
    elif kind == "array":
        for number in range(schema["minItems"]):
            yield ", " if number else "["
            yield from _pieces(schema["items"])
        yield "]"
    elif kind == "string":
        yield '"'
        yield _Text()
    elif kind == "integer":
        yield _Integer(schema["maximum"])
    else:
        raise InputError(
            f"An answer of type {kind!r} cannot be constrained here. Use object, array, string or "
            "integer."
        )
