"""Progress of pretraining: bars on a terminal, a line every ``log_every`` steps elsewhere."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class PretrainProgress:
    """Shows each stage's steps, smoothed loss and time left. A context manager."""

    def __init__(self, console: Console, log_every: int) -> None:
        self._console = console
        self._log_every = log_every
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )
        self._bars: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._mean = math.nan

    def __enter__(self) -> PretrainProgress:
        # Elsewhere than on a terminal, bars would fill a log with escape codes.
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        self._console.print(text, highlight=False)

    def step(self, stage: str, done: int, total: int, loss: float = math.nan) -> None:
        """Shows a step of a stage.

        Args:
            loss: enters a moving mean; NaN for work that has none.
        """
        if stage not in self._began:
            # A resumed stage begins in the middle: only steps of this process are timed.
            self._began[stage] = (time.monotonic(), done - 1)
            self._bars[stage] = self._progress.add_task(stage, total=total, loss="")
            self._mean = loss
        # Over about 50 steps: a single loss says mostly which noise levels were drawn.
        self._mean += 0.02 * (loss - self._mean)
        shown = "" if math.isnan(self._mean) else f"loss {self._mean:.4f}"
        self._progress.update(self._bars[stage], completed=done, loss=shown)
        if not self._console.is_terminal and (done % self._log_every == 0 or done == total):
            since, first = self._began[stage]
            seconds = (time.monotonic() - since) / (done - first)
            self.say(
                f"{stage} {done}/{total}  {shown}  {seconds:.3f} s a step, "
                f"{seconds * (total - done) / 60:.1f} min left"
            )
