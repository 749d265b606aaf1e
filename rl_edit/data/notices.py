"""Says what was left out, converted or guessed while a dataset was opened.

A silent wrong answer is the worst defect. Each finding about rows that are used nevertheless is a
:class:`Notice`. Verbs show all of them before any work starts; with ``data.strict`` the first one
stops the command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl_edit.errors import InputError

NUM_EXAMPLES = 3
"""Examples that one notice spells out."""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """States one finding about a dataset, with what to do.

    Attributes:
        kind: a stable name in kebab case, as in docs/troubleshooting.md.
        count: rows or files it is about.
        message: a sentence with the count, the cause and the remedy.
        examples: the first files or rows, as a user would name them.

    Example:
        ``Notice(kind="zero-one-masks", count=2, message="2 masks hold only the values 0 and 1; 1 is
        read as edit. Save masks as black and white.", examples=("a_mask.png", "b_mask.png"))``
    """

    kind: str
    count: int
    message: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Joins the message and its first examples in one line."""
        if not self.examples:
            return self.message
        more = ", ..." if self.count > len(self.examples[:NUM_EXAMPLES]) else ""
        return f"{self.message} (first: {', '.join(self.examples[:NUM_EXAMPLES])}{more})"


def require_none(notices: Sequence[Notice], *, source: str) -> None:
    """Turns notices into an error, for ``data.strict``.

    Raises:
        InputError: there is at least one; the message holds them all.
    """
    if notices:
        raise InputError(
            f"{source}: {'; '.join(map(str, notices))}. These are errors because of data.strict; "
            "correct them, or leave data.strict out to train on the other rows."
        )
