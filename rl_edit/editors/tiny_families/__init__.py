"""Tiny editors of each family: the real classes with small numbers and random weights.

A family's file here has the name of its ``kind`` and one function ``write``. The directory that it
writes loads as a real editor of the family does, in milliseconds a forward, and edits nothing
sensibly: it is for trying settings, data and rewards before real weights are loaded.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from rl_edit.errors import InputError, did_you_mean

KINDS = tuple(
    sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem[0] != "_")
)
"""Families that have a tiny editor."""


def write_tiny(kind: str, directory: Path, *, seed: int = 0) -> None:
    """Writes the tiny editor of a family as ``save_pretrained`` writes a real one.

    Raises:
        InputError: there is no such family.
    """
    if kind not in KINDS:
        raise InputError(
            f"no family {kind!r}{did_you_mean(kind, KINDS)} (known: {', '.join(KINDS)})"
        )
    from transformers.utils import logging

    # Files of a second need no bars.
    logging.disable_progress_bar()
    import_module(f"{__name__}.{kind}").write(directory, seed=seed)
