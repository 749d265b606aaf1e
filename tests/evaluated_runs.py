"""Run directories as training and evaluation leave them, with made-up measurements."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_edit.config import RunConfig, load_config

Values = dict[str, float]

META = {
    "num_tasks": 4,
    "num_noises": 1,
    "seed": 1_000_003,
    "num_steps": 6,
    "guidance": 2.5,
    "true_cfg": 1.0,
    "negative_prompt": "",
    "dtype": "float32",
    "max_text_tokens": 32,
    "tasks": "a" * 64,
    "editor": "b" * 64,
    "adapter": "50:cafe",
}
BASE = {
    "reward": 7.0,
    "reward/judge": 6.7,
    "reward/preservation": 0.8,
    "instruction": 6.0,
    "background_psnr_masked": 30.0,
}
HARD = (-3.0, 0.0, 1.0, 2.0)
"""By how much tasks differ for every editor."""


def rows(
    gains: Sequence[float],
    *,
    metric: str = "instruction",
    noises: int = 1,
    base: Values | None = None,
) -> list[dict[str, Any]]:
    """A row a task and noise: the trained editor is better by the task's gain in one metric."""
    written_rows = []
    for noise in range(noises):
        for task, gain in enumerate(gains):
            before = {
                name: value + HARD[task % len(HARD)] / 10 for name, value in (base or BASE).items()
            }
            after = {**before, metric: before[metric] + gain + noise}
            kind = "two_regions" if task == 0 else "add"
            written_rows.append(
                {
                    "task_id": f"t{task}",
                    "task_type": kind,
                    "values": {"base": before, "trained": after},
                }
            )
    return written_rows


def evaluated(
    directory: Path,
    *overrides: str,
    measured: list[dict[str, Any]] | None = None,
    preset: str = "tiny-flow-grpo",
    **meta: Any,
) -> Path:
    """A run directory as training and evaluation leave it."""
    config = load_config(preset=preset, overrides=overrides)
    return written(directory, config, rows([1.0] * 4) if measured is None else measured, **meta)


def written(
    directory: Path, config: RunConfig, measured: list[dict[str, Any]], **meta: Any
) -> Path:
    (directory / "evaluation").mkdir(parents=True)
    (directory / "config.yaml").write_text(config.to_yaml())
    (directory / "evaluation" / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in measured)
    )
    (directory / "evaluation.json").write_text(json.dumps({"meta": {**META, **meta}}))
    (directory / "run.json").write_text(
        json.dumps({"status": "done", "adapter": "50:cafe", "data_fingerprint": "d"})
    )
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps({"update": u, "seconds/update": u + 1.0}) + "\n" for u in range(3))
    )
    return directory
