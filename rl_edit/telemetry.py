"""Metric names, their values from a finished update, and the append-only files they go to."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rl_edit.measures import reward_statistics
from rl_edit.types import RewardTable

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


class JsonlFile:
    """Append-only JSON lines, flushed line by line, so that a crash costs at most a torn last line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
            with path.open("a") as file:  # a torn last line must not swallow the next one
                file.write("\n")

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")

    def rewind(self, keep: int, *, key: str = "update") -> None:
        """Keeps lines whose ``key`` is below ``keep`` (all lines without the key): a resumed run writes the rest again."""
        lines = [line for line in read_jsonl(self.path) if key not in line or line[key] < keep]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(temporary, self.path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines of a file that may be missing or still being written; a torn last line is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class Events:
    """State changes worth knowing: one JSON object a line with the wall time."""

    def __init__(self, path: Path) -> None:
        self._file = JsonlFile(path)

    def rewind(self, update: int) -> None:
        """Drops events of updates that a resumed run will do again."""
        self._file.rewind(update)

    def __call__(self, event: str, **details: Any) -> None:
        try:
            self._file.append({"time": round(time.time(), 3), "event": event, **details})
        except OSError as error:  # a full disk costs the line, not the run: what matters is committed or fails by itself
            print(f"rl-edit: event {event} could not be written: {error}", file=sys.stderr)


def reward_metrics(
    tables: Sequence[RewardTable], *, normalise: reward_statistics.Normalisation = "minibatch"
) -> dict[str, float]:
    """Mean and within-group spread (population deviation, mean over groups) of every term, component and of the total.

    Beside them the statistics named in :mod:`rl_edit.measures.reward_statistics`; ``normalise`` is how the run's credit rule scales terms.
    Groups with an invalid term appear in the shares of statuses only, and are counted by the loop. "reward/total" is the weighted
    sum of raw terms.
    """
    metrics = {
        f"reward/{name}": share for name, share in reward_statistics.status_shares(tables).items()
    }
    sound = [table for table in tables if bool(table.valid.all())]
    if not sound:
        return metrics
    for index, name in enumerate(sound[0].names):
        _describe(metrics, f"reward/{name}", [table.values[:, index] for table in sound])
    _describe(
        metrics, "reward/total", [table.values @ torch.tensor(table.weights) for table in sound]
    )
    for name in sorted(set.intersection(*(set(table.components) for table in sound))):
        if not name.endswith(f".{reward_statistics.REPEAT}"):
            _describe(
                metrics,
                _component_key(name),
                [torch.tensor(table.components[name]) for table in sound],
            )
    metrics |= {
        f"reward/{name}/variance_share": v
        for name, v in reward_statistics.variance_shares(sound, normalise=normalise).items()
    }
    metrics |= {f"reward/{name}": value for name, value in reward_statistics.noise(sound).items()}
    metrics |= {
        f"change/{name}": value for name, value in reward_statistics.inside_share(sound).items()
    }
    return metrics


def _component_key(name: str) -> str:
    """Diagnostics (``background.psnr``, ``concentration``) have keys of their own; parts of a term live under ``component/``."""
    room, _, part = name.partition(".")
    return (
        f"{room}/{part}"
        if room in ("background", "change")
        else name
        if not part
        else f"component/{name}"
    )


def _describe(metrics: dict[str, float], key: str, groups: Iterable[torch.Tensor]) -> None:
    groups = [values.double() for values in groups]
    metrics[f"{key}/mean"] = float(torch.cat(groups).mean())
    metrics[f"{key}/spread"] = float(
        torch.stack([values.std(correction=0) for values in groups]).mean()
    )


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurred, most frequent first."""
    return dict(Counter(reasons).most_common())


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.12g}") if math.isfinite(value) else None
    return value
