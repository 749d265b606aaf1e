"""The record of a run, ``run.json``: its identity, its surroundings, and how it ended.

Training writes it; the report, the comparison and the benchmarks read it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rl_edit.errors import lacks_space
from rl_edit.files import overwrite_file, replace_file, validated
from rl_edit.lease_holder import read_holder

RUN_FILE = "run.json"

UNRECORDED = "ended without a record"
"""Status that a report shows of a run whose record says that it is running, and which is not."""


class RunRecord(BaseModel):
    """The content of ``run.json``.

    Attributes:
        editor: path or repository of the base editor; ``editor_identity`` names its weights.
        status: running, stopped, done, done early or failed. A run whose end could not be recorded
            keeps "running"; :meth:`seen_in` knows better.
        updates: planned, not done.
        left_out_rewards: ``NAME: REASON`` of each reward term that the data cannot feed.
        canvases: size, canvas and number of the images on disk, by size; empty for built-in scenes,
            which are drawn on their canvas.
        unrewarded_edit: why the rewards do not ask for the edit, of a run that was trained
            nevertheless (``train.allow_unrewarded_edit``); "" of any other.
        hardware: of the machine that started the run; ``actors`` lists who had which GPU.
        started, finished: seconds since the epoch; ``seconds`` is their difference.
        adapter: id of the trained adapter; None when no update was done.
        reason: cause of a failure.

    Example:
        ``{"name": "tiny-rc-grpo", "method": "rc-grpo", "seed": 0, "status": "done", ...}``
    """

    # Unknown keys are ignored, and every field has a default: a record of another version, or of a
    # run that has just begun, is read for what it has.
    model_config = ConfigDict(frozen=True, extra="ignore")

    # The order is that of the file.
    name: str = ""
    method: str | None = None
    editor: str | None = None
    seed: int | None = None
    status: str = "unknown"
    updates: int | None = None
    config_sha256: str = ""
    data_fingerprint: str = ""
    editor_identity: str = ""
    left_out_rewards: tuple[str, ...] = ()
    unrewarded_edit: str = ""
    canvases: tuple[dict[str, Any], ...] = ()
    versions: Mapping[str, str] = {}
    hardware: dict[str, Any] = {}
    command: str = ""
    started: float | None = None
    adapter: str | None = None
    reason: str = ""
    finished: float | None = None
    seconds: float | None = None

    def write(self, directory: Path, *, check: Callable[[], None] = lambda: None) -> None:
        """Replaces ``run.json``; fields that were never set are left out.

        Args:
            check: called right before the new content takes its place; it raises where that is
                another attempt's.
        """
        content = self.model_dump(mode="json", exclude_unset=True)
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        try:
            replace_file(directory / RUN_FILE, text, check=check)
        except OSError as error:
            if not lacks_space(error) or self.status == "running":
                raise
            # A record of a full disk must not say "running" for ever.
            overwrite_file(directory / RUN_FILE, text)

    def seen_in(self, directory: Path) -> RunRecord:
        """Returns the record as its directory proves it: a run may end without a word in it.

        A killed driver and a disk that became read-only leave "running" behind.
        """
        if self.status != "running":
            return self
        holder = read_holder(directory)
        # Without its lease an attempt writes nothing more.
        if holder is not None and not holder.has_ended():
            return self
        return self.model_copy(update={"status": UNRECORDED})


def read_run_record(directory: Path) -> RunRecord | None:
    """Reads ``run.json``; None where a directory has none.

    Raises:
        ValueError: it is no JSON, or a field is wrong.
    """
    path = directory / RUN_FILE
    return validated(RunRecord, json.loads(path.read_text())) if path.is_file() else None
