"""Times the demo's training alone and beside other busy programs.

The same command runs alone and beside programs that never wait, one after the other::

    python benchmarks/busy.py                  # writes benchmarks/results/busy.md; about 15 minutes
    python benchmarks/busy.py --earlier        # also with threads that spin, at Ray's low priority

Two programs on two cores leave the run half of the machine, so about twice the time is the least.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rl_edit.files import METRICS, read_json_lines  # noqa: E402 - found by the path above
from scaling import RESULTS, report  # noqa: E402

PROMISE = 3.0
"""Largest ratio that is promised for the present settings beside two programs."""

BUSY_PROGRAM = "while True: pass"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One way to run the demo: overrides of the config, and environment variables."""

    name: str
    overrides: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


PRESENT = Settings(name="as shipped: ranks of one thread, waiting threads sleep, normal priority")
EARLIER = Settings(
    name="earlier: one rank of two threads, waiting threads spin, nice 15",
    overrides=("actors.num_learner=1",),
    # The default of GNU OpenMP where no policy is set, which the command line would set.
    environment=(("GOMP_SPINCOUNT", "300000"), ("RAY_worker_niceness", "15")),
)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one run.

    Attributes:
        total_s: of the complete command, start-up included.
        update_s: median over the updates but the first, which warms up.
        adapter: name of the adapter it made.
    """

    total_s: float
    update_s: float
    adapter: str


@contextlib.contextmanager
def busy_programs(number: int) -> Iterator[None]:
    """Runs programs that compute without end beside the block."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY_PROGRAM]) for _ in range(number)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def timed(settings: Settings, updates: int, extra: tuple[str, ...]) -> Timing:
    """Trains the demo for some updates in a process and a Ray cluster of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        command = [sys.executable, "-m", "rl_edit", "train", "--preset", "tiny-rc-grpo"]
        command += ["--run-dir", str(run), f"train.updates={updates}", *settings.overrides, *extra]
        outside = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        began = time.monotonic()
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env={**outside, **dict(settings.environment)},
            capture_output=True,
            text=True,
            check=False,
        )
        total_s = time.monotonic() - began
        if ended.returncode:
            raise SystemExit(
                f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-2000:]}"
            )
        lines = read_json_lines(run / METRICS)
    return Timing(
        total_s=total_s,
        update_s=median(line["seconds/update"] for line in lines[1:]),
        adapter=lines[-1]["adapter"],
    )


def row(settings: Settings, quiet: Timing, busy: Timing) -> str:
    cells = [
        settings.name,
        f"{quiet.total_s:.0f}",
        f"{busy.total_s:.0f}",
        f"**{busy.total_s / quiet.total_s:.2f}**",
        f"{quiet.update_s:.2f}",
        f"{busy.update_s:.2f}",
        f"{busy.update_s / quiet.update_s:.2f}",
        "same" if quiet.adapter == busy.adapter else "others",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=30, help="of each run; 2 or more")
    parser.add_argument("--programs", type=int, default=2, help="that are busy beside the run")
    parser.add_argument("--earlier", action="store_true", help="also time the settings of before")
    parser.add_argument("--out", type=Path, default=RESULTS / "busy.md")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. data.num_train=64")
    arguments = parser.parse_args()
    if arguments.updates < 2 or arguments.programs < 1:
        parser.error(
            "give 2 or more updates, since the first is not counted, and 1 or more programs"
        )
    rows = []
    for settings in (PRESENT, EARLIER) if arguments.earlier else (PRESENT,):
        overrides = tuple(arguments.overrides)
        quiet = timed(settings, arguments.updates, overrides)
        with busy_programs(arguments.programs):
            busy = timed(settings, arguments.updates, overrides)
        rows.append(row(settings, quiet, busy))
        print(rows[-1], flush=True)
    lines = [
        "",
        f"`rl-edit train --preset tiny-rc-grpo` for {arguments.updates} updates, alone and beside "
        f"{arguments.programs} programs that never wait (`{BUSY_PROGRAM}`), in one run of this "
        "benchmark.",
        f"Promised beside two programs, as shipped: at most {PROMISE:g} times the quiet time.",
        "",
        "| settings | alone, s | busy, s | busy / alone | an update alone, s | busy, s "
        "| busy / alone | adapters |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    report(arguments.out, "The demo beside busy programs", lines)


if __name__ == "__main__":
    main()
