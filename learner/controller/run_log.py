"""The event log of a run: state changes worth knowing, one JSON object a line."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rl_edit.files import JsonLines


class Events:
    """Appends events with their wall time to ``events.jsonl``."""

    def __init__(self, path: Path) -> None:
        self._file = JsonLines(path)

    def rewind(self, update: int) -> None:
        """Drops events of updates that a resumed run will do again."""
        self._file.rewind(update)

    def __call__(self, event: str, **details: Any) -> None:
        """Writes one event. A full disk costs the line, not the run: what matters is committed, or fails by itself."""
        try:
            self._file.append({"time": round(time.time(), 3), "event": event, **details})
        except OSError as error:
            print(f"rl-edit: event {event} could not be written: {error}", file=sys.stderr)
