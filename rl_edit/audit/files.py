"""Writing a file whole or not at all: a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path

from rl_edit.errors import InputError


def write_whole(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``, making its directory.

    Raises:
        InputError: it cannot be written there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}), so the result would be lost. Give a writable --out."
        ) from error
    finally:
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)
