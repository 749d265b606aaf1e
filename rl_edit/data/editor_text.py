"""Checks that an editor can read the instructions of a dataset: their length and their words.

An editor cuts a text that is too long without a word, and reads a word that it does not know as
letters or as nothing. The reward reads all of the instruction, so training would blame the editor
for what it never saw. Both are counted and shown before any work starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rl_edit.data.notices import NUM_EXAMPLES, Notice
from rl_edit.data.problems import refuse
from rl_edit.data.rows import Request

TooLong = Literal["error", "skip", "cut"]

_NUM_WORDS = 6
_SHOWN = 60
"""Characters of a lost text that an example quotes."""


@dataclass(frozen=True, kw_only=True)
class TextReading:
    """An instruction as an editor reads it.

    Attributes:
        num_tokens: its length, with the end mark.
        max_tokens: the longest that the editor reads.
        lost: the end of the text that the editor never reads; "" where it reads all of it.
        unknown: words that it has no token for, in the order of the text.
        remark: what a further encoder of the editor does not read, as the rest of a sentence that
            begins with the texts; "" for nothing.

    Example:
        ``TextReading(num_tokens=40, max_tokens=32, lost="and keep the rest", unknown=())``
    """

    num_tokens: int
    max_tokens: int
    lost: str = ""
    unknown: tuple[str, ...] = ()
    remark: str = ""


class TextReader(Protocol):
    """Reads texts as an editor does, without its weights."""

    @property
    def path(self) -> str: ...

    def read_text(self, texts: Sequence[str]) -> tuple[TextReading, ...] | None:
        """Reads each text; None where the editor does not say how it reads."""
        ...


@dataclass(frozen=True, kw_only=True)
class CheckedText:
    """Places of the texts that stay, and the findings about them.

    Attributes:
        retained: places of the texts that stay, in order.
    """

    retained: tuple[int, ...]
    notices: tuple[Notice, ...] = ()


def check_text(
    rows: Sequence[Request], reader: TextReader, *, too_long: TooLong, source: str
) -> CheckedText:
    """Checks the instructions of rows.

    Args:
        source: the dataset as the user named it.

    Raises:
        InputError: ``too_long`` is "error" and an instruction is, or "skip" and all of them are.
    """
    readings = reader.read_text([row.instruction for row in rows])
    if readings is None:
        return CheckedText(retained=tuple(range(len(rows))))
    cut = [index for index, reading in enumerate(readings) if reading.lost]
    stay = tuple(i for i in range(len(rows)) if too_long != "skip" or not readings[i].lost)
    if cut and (too_long == "error" or not stay):
        remedy = "shorten it, or set data.too_long=" + ("skip or cut" if stay else "cut")
        refuse(
            [f"{_quoted(rows[i].where, readings[i])}; {remedy}" for i in cut],
            num_rows=len(rows),
            source=source,
        )
    names = [row.where for row in rows]
    notices = text_notices(names, readings, editor=reader.path, skipped=too_long == "skip")
    return CheckedText(retained=stay, notices=notices)


def text_notices(
    names: Sequence[str], readings: Sequence[TextReading], *, editor: str, skipped: bool = False
) -> tuple[Notice, ...]:
    """States what an editor does not read of texts.

    Args:
        names: the name of each text, for examples.
        editor: its path, as a user named it.
        skipped: texts that are too long are left out, not cut.
    """
    pairs = [*zip(names, readings, strict=True)]
    cut = [pair for pair in pairs if pair[1].lost]
    remarked = [pair for pair in pairs if pair[1].remark and not pair[1].lost]
    unknown = [pair for pair in pairs if pair[1].unknown and not (skipped and pair[1].lost)]
    of = f"of {len(pairs)} instructions"
    notices = []
    if cut:
        notices.append(_cut_notice(cut, of, editor, skipped=skipped))
    if remarked:
        notices.append(
            Notice(
                kind="instructions-half-read",
                count=len(remarked),
                message=f"{len(remarked)} {of} {remarked[0][1].remark}",
                examples=tuple(
                    f"{name}: {reading.num_tokens} tokens"
                    for name, reading in remarked[:NUM_EXAMPLES]
                ),
            )
        )
    if unknown:
        notices.append(
            Notice(
                kind="unknown-words",
                count=len(unknown),
                message=f"{len(unknown)} {of} have words that {editor} does not know and reads as "
                "single letters or as nothing: it cannot follow them. Use its words (and its "
                "language), or another editor.",
                examples=tuple(
                    f"{name}: {', '.join(reading.unknown[:_NUM_WORDS])}"
                    for name, reading in unknown[:NUM_EXAMPLES]
                ),
            )
        )
    return tuple(notices)


def _cut_notice(
    cut: Sequence[tuple[str, TextReading]], of: str, editor: str, *, skipped: bool
) -> Notice:
    limit, longest = cut[0][1].max_tokens, max(reading.num_tokens for _, reading in cut)
    result = (
        "They are left out (data.too_long=skip)."
        if skipped
        else "Their ends never reach the editor, while rewards read all of them. Shorten them, "
        "raise editor.max_text_tokens if the editor was trained for more, or leave them out "
        "(data.too_long=skip)."
    )
    return Notice(
        kind="instructions-too-long",
        count=len(cut),
        message=f"{len(cut)} {of} are longer than the {limit} tokens that {editor} reads (the "
        f"longest has {longest}). {result}",
        examples=tuple(_quoted(name, reading) for name, reading in cut[:NUM_EXAMPLES]),
    )


def _quoted(name: str, reading: TextReading) -> str:
    lost = reading.lost if len(reading.lost) <= _SHOWN else f"{reading.lost[:_SHOWN]}..."
    return (
        f"{name}: {reading.num_tokens} tokens, the editor reads {reading.max_tokens} and never "
        f"sees {lost!r}"
    )
