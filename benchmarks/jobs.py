"""Training runs of a benchmark: a process each, side by side on the cores, finished ones never
repeated.

A job trains in a run directory of its own (inline runtime, one thread) and evaluates it there, so
that every ``rl-edit`` command reads it. What a directory stands for is written beside it before it
is begun; another meaning of the same place is refused, not reported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from commit import commit_name
from rl_edit.config import RunConfig
from rl_edit.editors import editor_identity
from rl_edit.errors import InputError, Interrupted
from rl_edit.evaluation.arms import Arm
from rl_edit.evaluation.effort import effort
from rl_edit.evaluation.evaluated_run import read_runs, require_alike
from rl_edit.files import METRICS, read_json_lines
from rl_edit.measures.intervals import Interval
from rl_edit.method.update import TrainingFailed
from rl_edit.run_record import read_run_record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

TOTAL_WEIGHTS = {"judge": 0.1, "preservation": 1.0}
"""Of the total reward: both terms on 0..1, the same for every row, whatever it trained with."""

TELL_EVERY_S = 60.0

OWN = (
    "seed",
    "name",
    "train.updates",
    "evaluation.num_tasks",
    "data.num_heldout",
    "data.path",
    "data.heldout_path",
)
"""Settings that tell the runs of a benchmark apart, or that its options give."""


@dataclass(frozen=True)
class Job:
    """One training run: a row of the table under one seed."""

    row: str
    directory: Path
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.config.seed}"

    @cached_property
    def evaluations(self) -> int:
        """Model evaluations of the whole run."""
        return self.config.train.updates * effort(self.config).total

    @property
    def stamp_file(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.json")

    @cached_property
    def stamp(self) -> str:
        """Names what the finished run stands for."""
        settings = {
            "settings": self.config.sha256(),
            "updates": self.config.train.updates,
            "evaluation": self.config.evaluation.model_dump(mode="json"),
            "heldout": self.config.data.num_heldout,
            "editor": editor_identity(self.config.editor),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def finished(self) -> bool:
        """Whether there is nothing left to do; a directory of another meaning ends the command."""
        if not self.stamp_file.is_file():
            return False
        if json.loads(self.stamp_file.read_text())["stamp"] != self.stamp:
            sys.exit(
                f"{self.directory} was made with other settings or editor weights: give another "
                "--work or remove it"
            )
        return (self.directory / "evaluation.json").is_file()

    def trained(self) -> bool:
        """Whether training came to its end. A run that was stopped leaves an adapter too, of the
        updates it had done."""
        record = read_run_record(self.directory)
        return record is not None and record.status in ("done", "done early")

    def done(self) -> float:
        """Model evaluations done so far."""
        if self.finished():
            return self.evaluations
        lines = read_json_lines(self.directory / METRICS)
        return min(len(lines) / self.config.train.updates, 1.0) * self.evaluations

    def run(self) -> None:
        """Trains, or resumes, and evaluates. Ends the process with an exit code of ``rl-edit``
        where that goes wrong."""
        import torch
        from rich.console import Console

        from rl_edit.cli.evaluate import evaluate_run
        from rl_edit.training import train

        torch.set_num_threads(1)
        self.stamp_file.parent.mkdir(parents=True, exist_ok=True)
        self.stamp_file.write_text(
            json.dumps({"row": self.row, "stamp": self.stamp, "commit": commit_name()}) + "\n"
        )
        try:
            if not self.trained():
                train(
                    self.config,
                    self.directory,
                    resume=self.directory.is_dir() and any(self.directory.iterdir()),
                )
            evaluate_run(
                self.config, self.directory / "adapter", self.directory, console=Console(quiet=True)
            )
        except Interrupted as stopped:
            sys.exit(128 + stopped.number)
        except KeyboardInterrupt:
            sys.exit(130)
        except (InputError, TrainingFailed) as error:
            sys.exit(f"{self.name}: {error}")


def overrides(*, seed: int, tasks: int) -> list[str]:
    """What every job has in common: one thread in one process, and the same held-out tasks."""
    return [
        f"seed={seed}",
        f"evaluation.num_tasks={tasks}",
        f"data.num_heldout={tasks}",
        "actors.runtime=inline",
        "actors.threads=1",
    ]


def slug(row: str) -> str:
    """A row's name as one folder name."""
    return "".join(c if c.isalnum() else "-" for c in row)


def arguments(parser: argparse.ArgumentParser, *, name: str) -> None:
    """The options that benchmarks of training runs share."""
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", type=positive, default=256, help="held-out tasks")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides for every run")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / name, help="where runs are kept"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / f"{name}.md",
        help="the table; its numbers go beside it as .json",
    )
    parser.add_argument(
        "--side-by-side",
        type=positive,
        default=os.cpu_count() or 1,
        help="runs at a time, one thread each",
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)


def command(main: Callable[[], None]) -> None:
    """Runs a benchmark. Settings that cannot be are one line and exit code 2, as everywhere."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def positive(text: str) -> int:
    """A count on the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def require_sound(options: argparse.Namespace) -> None:
    """Raises InputError for options that would make two runs one: a seed given twice, or set for
    all."""
    if len(set(options.seeds)) != len(options.seeds):
        raise InputError(
            f"--seeds {' '.join(map(str, options.seeds))} names one twice: a run of its own would "
            "not tell anything new"
        )
    for change in options.set:
        if change.partition("=")[0] in OWN:
            raise InputError(
                f"--set {change}: the benchmark sets that itself for every run; use its options "
                "(--seeds, --tasks, --updates)"
            )


def run_all(jobs: Sequence[Job], *, side_by_side: int) -> int:
    """Runs what is left, each job in a process of its own that is this command with ``--one``.
    Returns how many failed.

    A failed run is named and the others go on. Ctrl-C reaches the runs too: they commit, and the
    same command goes on with them.
    """
    todo = [index for index, job in enumerate(jobs) if not job.finished()]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} already done", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
    queue, failed, progress = list(todo), 0, _Progress([jobs[index] for index in todo])
    try:
        while queue or running:
            while queue and len(running) < side_by_side:
                index = queue.pop(0)
                running[index] = (
                    subprocess.Popen(
                        [sys.executable, *sys.argv, "--one", str(index)], env=environment
                    ),
                    time.time(),
                )
            time.sleep(1)
            for index in [i for i, (process, _) in running.items() if process.poll() is not None]:
                process, start = running.pop(index)
                failed += process.returncode != 0
                state = "done" if process.returncode == 0 else f"FAILED ({process.returncode})"
                progress.over += 1
                progress.tell(f"{jobs[index].name}: {state} in {time.time() - start:.0f} s")
            if running and time.time() - progress.told > TELL_EVERY_S:
                progress.tell("; ".join(jobs[index].name for index in running))
    except KeyboardInterrupt:
        for process, _ in running.values():
            process.wait()
        print("stopped; run the same command to go on", flush=True)
        sys.exit(130)
    return failed


class _Progress:
    """How far the runs are, by model evaluations: updates of different methods cost differently."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs, self._began = jobs, time.time()
        self._total = sum(job.evaluations for job in jobs)
        self._before = sum(job.done() for job in jobs)
        self.over = 0
        self.told = time.time()

    def tell(self, what: str) -> None:
        done = sum(job.done() for job in self._jobs)
        spent, gained = time.time() - self._began, done - self._before
        left = (
            f"about {spent / gained * (self._total - done) / 60:.0f} min left"
            if gained
            else "time left unknown yet"
        )
        print(
            f"[{self.over}/{len(self._jobs)} runs, {done / self._total:.0%} of the evaluations, "
            f"{left}] {what}",
            flush=True,
        )
        self.told = time.time()


def arm(row: str, jobs: Sequence[Job]) -> Arm | None:
    """The finished runs of a row; None when there are none."""
    done = [job.directory for job in jobs if job.row == row and job.finished()]
    if not done:
        return None
    runs = read_runs(done)
    require_alike(runs)
    return Arm(label=row, runs=tuple(runs), weights=TOTAL_WEIGHTS)


def cell(interval: Interval | None, digits: int) -> str:
    """A difference with its interval."""
    if interval is None:
        return ""
    ends = (
        f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
        if math.isfinite(interval.low)
        else "(one task)"
    )
    return f"{interval.mean:+.{digits}f} {ends}"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]


def write(out: Path, lines: Sequence[str]) -> None:
    """The table. What a person wrote below it under "## Reading" stays: it is not the command's to
    delete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _, heading, reading = (
        out.read_text().partition("\n## Reading\n") if out.is_file() else ("", "", "")
    )
    out.write_text("\n".join(lines) + heading + reading)
    print("\n".join(lines))


def provenance(script: str) -> list[str]:
    """Where numbers come from: commit, machine and command."""
    command = " ".join(["python", f"benchmarks/{script}", *(_quoted(word) for word in settings())])
    return [
        f"Commit `{commit_name()}`, {time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, "
        f"{os.cpu_count()} cores, torch {version('torch')}.",
        "",
        f"Command: `{command}`",
        "",
    ]


def settings() -> list[str]:
    """The command line without the places of files, which change nothing."""
    words = sys.argv[1:]
    places = {i for i, word in enumerate(words) if word in ("--work", "--out")}
    return [word for i, word in enumerate(words) if i not in places and i - 1 not in places]


def _quoted(argument: str) -> str:
    return f"'{argument}'" if " " in argument else argument
