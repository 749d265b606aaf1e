"""Stores scores on disk, so that a repeated or resumed run puts no question twice.

An entry is one small JSON file under the hash of everything its score follows from. It is written
completely or not at all; any number of processes may share a directory. No entry is ever removed:
delete the directory when it is no longer useful. Only scores that passed every check are stored: a
judge that failed is asked again.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from rl_edit.files import replace_file
from rl_edit.provenance import code_sha256
from rl_edit.scores import RegionScores
from rl_edit.types import Candidates, Score

# Fields of a task that no score follows from.
_NAMES = frozenset({"task_id", "task_type"})


class ScoreCache:
    """Stored scores of one term.

    A key covers the candidate, the task (source, instruction, mask, and target, caption and regions
    where there are any), attention if the term reads it, the term's fingerprint, and the sources of
    this package.
    """

    def __init__(
        self, directory: Path, fingerprint: dict[str, Any], *, reads_attention: bool
    ) -> None:
        self._directory, self._reads_attention = directory, reads_attention
        self._term = json.dumps([code_sha256(), fingerprint], sort_keys=True)

    def keys(self, candidates: Candidates) -> list[str]:
        """Hashes every candidate, in their order."""
        shared = hashlib.sha256()
        _update(shared, self._term)
        for field in fields(candidates.task):
            if field.name not in _NAMES:
                _update(shared, field.name)
                _update(shared, getattr(candidates.task, field.name))
        if self._reads_attention:
            _update(shared, candidates.token_mask)
        keys = []
        for row, image in enumerate(candidates.images):
            # The task is hashed once; each candidate continues from there.
            digest = shared.copy()
            _update(digest, image)
            if self._reads_attention:
                _update(digest, candidates.attention[row])
            keys.append(digest.hexdigest())
        return keys

    def get(self, key: str) -> Score | None:
        """Recalls a score; None when there is none that can be read."""
        try:
            entry = json.loads(self._path(key).read_text())
            regions = entry["regions"]
            return Score(
                value=float(entry["value"]),
                components={str(k): float(v) for k, v in entry["components"].items()},
                regions=None
                if regions is None
                else RegionScores(
                    areas=tuple(_read(area) for area in regions["areas"]),
                    background=_read(regions["background"]),
                ),
            )
        # A damaged entry costs another question, never a wrong score.
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, key: str, score: Score) -> bool:
        """Stores an ok score. Returns False when the disk does not take it."""
        path = self._path(key)
        regions = score.regions
        entry = {
            "value": score.value,
            "components": {
                name: part for name, part in score.components.items() if math.isfinite(part)
            },
            "regions": None
            if regions is None
            else {
                "areas": [_written(area) for area in regions.areas],
                "background": _written(regions.background),
            },
        }
        # A full disk must not end the run: the score is only requested again.
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(entry))
        except OSError:
            return False
        return True

    def _path(self, key: str) -> Path:
        return self._directory / key[:2] / f"{key}.json"


def _written(score: float) -> float | None:
    """Replaces what JSON has no number for."""
    return score if math.isfinite(score) else None


def _read(score: object) -> float:
    # A wrong type raises, which the caller takes for a damaged entry.
    return math.nan if score is None else float(score)  # type: ignore[arg-type]  # see above


def _update(digest: hashlib._Hash, value: object) -> None:
    """Adds a value with its type and length, so that neighbours cannot merge."""
    if isinstance(value, Tensor):
        content, kind = (
            value.detach().cpu().contiguous().numpy().tobytes(),
            f"{value.dtype}{tuple(value.shape)}",
        )
    else:
        content, kind = repr(value).encode(), type(value).__name__
    digest.update(f"{kind}:{len(content)}:".encode() + content)


@cache
def content_sha256(path: str) -> str:
    """Hashes a file, or the settings and weights of a model directory.

    Where nothing is there, as for a hub id, the name itself is hashed.
    """
    at, digest = Path(path), hashlib.sha256()
    files = [at] if at.is_file() else sorted([*at.glob("*.json"), *at.glob("*.safetensors")])
    for file in files:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    if not files:
        digest.update(path.encode())
    return digest.hexdigest()
