"""One fault anywhere, and the same bytes at the end: every crash point times every way to die,
against a run without a fault.

Each cell is ``rl-edit train`` on a Ray cluster of its own that fails once, at one point of one
update; where the driver ends before its work is done, the same command is given again with
``--resume``. Required of every cell: the same adapter file, the same chain of groups trained on,
every update exactly once in ``events.jsonl``, and no process left but Ray's own agents, which look
for their parent once a minute. Finished cells are kept under ``--work`` and never repeated::

    python benchmarks/golden.py            # writes benchmarks/results/golden.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commit import commit_name

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from crashing import POINTS, WORKER_POINTS, Fault, Launched  # noqa: E402 - the tests are no package: found by the path above

UPDATE = 3
"""The update with the fault, from 0. Checkpoints are made every 2 updates, so a driver that dies in
it has an update to repeat."""

RUN = (
    *(
        "train",
        "--preset",
        "tiny-rc-grpo",
        "train.updates=6",
        "train.groups_per_update=2",
        "train.checkpoint_every=2",
    ),
    *("rollout.chunk=4", "data.num_train=16", "actors.num_rollout=1", "actors.threads=1"),
)
KINDS = ("SIGKILL", "SIGTERM", "exception")
MOST_ATTEMPTS = 3
ROUTINE = frozenset(
    {
        "started",
        "preflight",
        "update_applied",
        "checkpoint",
        "finished",
        "placement_advice",
        "groups_dropped",
    }
)
"""Events that say nothing about a fault."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one run ended with.

    Attributes:
        adapter: sha256 of the adapter file; ``chain``: of the groups trained on; ``updates``: every
            ``update_applied`` event.
        codes: exit codes of the attempts; ``struck``: whether the fault happened; ``left``:
            processes that outlived an attempt.
    """

    adapter: str
    chain: str
    updates: list[dict[str, Any]]
    codes: list[int]
    events: dict[str, int]
    seconds: float
    struck: bool
    left: list[str]


def run_cell(work: Path, point: str, kind: str) -> Cell:
    """The run with a fault (without one when ``point`` is ""), resumed until it is done; kept in
    ``work``."""
    name = f"{point}-{kind}" if point else "golden"
    retained, folder = work / f"{name}.json", work / name
    if retained.is_file():
        return Cell(**json.loads(retained.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, fault = (
        folder / "run",
        Fault(point=point, kind=kind, update=UPDATE, marker=folder / "struck") if point else None,
    )
    codes: list[int] = []
    seconds, left = 0.0, list[str]()
    while len(codes) < MOST_ATTEMPTS and codes[-1:] != [0]:
        resume = ("--resume",) if (run / "config.yaml").is_file() else ()
        with Launched(*RUN, "--run-dir", run, *resume, fault=fault, logs=folder) as attempt:
            ended = attempt.ended(timeout_s=900)
        codes.append(ended.code)
        seconds, left = seconds + ended.seconds, left + [title[:80] for title in ended.left]
    cell = Cell(
        **outcome(run),
        codes=codes,
        seconds=round(seconds, 1),
        struck=fault is not None and fault.marker.is_file(),
        left=left,
    )
    retained.write_text(json.dumps(asdict(cell), indent=2) + "\n")
    return cell


def outcome(run: Path) -> dict[str, Any]:
    """What a run directory holds at the end; empty texts where it holds none."""
    files = sorted((run / "adapter").glob("*.safetensors"))
    states = sorted((run / "checkpoints").glob("step_*/state.json"))
    lines = (
        (run / "events.jsonl").read_text().splitlines() if (run / "events.jsonl").is_file() else []
    )
    events = [json.loads(line) for line in lines]
    return {
        "adapter": hashlib.sha256(files[0].read_bytes()).hexdigest() if files else "",
        "chain": json.loads(states[-1].read_text())["ledger"]["chain"] if states else "",
        "updates": [
            {k: v for k, v in event.items() if k != "time"}
            for event in events
            if event["event"] == "update_applied"
        ],
        "events": dict(
            Counter(event["event"] for event in events if event["event"] not in ROUTINE)
        ),
    }


def problems(cell: Cell, golden: Cell) -> list[str]:
    """In words, what is not as it was without a fault."""
    match = {
        "the fault did not happen": not cell.struck,
        f"it ended with {cell.codes[-1]}": cell.codes[-1] != 0,
        "another adapter": cell.adapter != golden.adapter,
        "another chain": cell.chain != golden.chain,
        "other updates": cell.updates != golden.updates,
        f"{len(cell.left)} processes left": bool(cell.left),
    }
    return [words for words, seen in match.items() if seen]


def row(point: str, kind: str, cell: Cell, golden: Cell) -> str:
    where = WORKER_POINTS.get(point, "driver")
    codes = ", ".join(map(str, cell.codes))
    events = ", ".join(f"{name} {count}" for name, count in sorted(cell.events.items())) or "-"
    verdict = "; ".join(problems(cell, golden)) or "same"
    return (
        f"| {point} | {where} | {kind} | `{cell.adapter[:12]}` | {verdict} | {codes} | {events} "
        f"| {cell.seconds:.0f} |"
    )


def table(golden: Cell, cells: dict[tuple[str, str], Cell]) -> str:
    commit = commit_name()
    equal = sum(not problems(cell, golden) for cell in cells.values())
    return "\n".join(
        [
            "# One fault, the same bytes",
            "",
            f"Commit `{commit}`, {time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, "
            f"{os.cpu_count()} cores, no GPU. "
            "Command: `python benchmarks/golden.py`.",
            f"Run: `rl-edit {' '.join(RUN)}`. Each row fails once, in update {UPDATE} (from 0); "
            "where the driver ended, the command is "
            "given again with `--resume`.",
            "",
            f"Without a fault: adapter `{golden.adapter}`, chain `{golden.chain}`, "
            f"{len(golden.updates)} updates, {golden.seconds:.0f} s.",
            "",
            f"**{equal} of {len(cells)} cells end with the same adapter file, the same chain, and "
            "every update exactly once, with no "
            "process left.**",
            "",
            "| point | process | fault | adapter | against the golden run | exit codes | events | "
            "seconds |",
            "|---|---|---|---|---|---|---|---|",
            *[row(point, kind, cell, golden) for (point, kind), cell in cells.items()],
            "",
            "Exit codes: -9 and 143 are the driver's own end by SIGKILL and SIGTERM, 1 an error "
            "nobody expected, 3 a failed learner; "
            "a negative or nonzero code is followed by the attempt that resumes.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs" / "golden",
        help="where cells are kept; delete it to start over",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "golden.md")
    parser.add_argument("--points", nargs="+", choices=POINTS, default=POINTS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    golden = run_cell(arguments.work, "", "")
    print(f"golden: adapter {golden.adapter[:12]}, {golden.seconds:.0f} s", flush=True)
    if golden.codes != [0]:
        print(
            f"the run without a fault ended with {golden.codes}: see {arguments.work / 'golden'}",
            file=sys.stderr,
        )
        return 1
    cells = {}
    for point in arguments.points:
        for kind in arguments.kinds:
            cells[point, kind] = run_cell(arguments.work, point, kind)
            print(row(point, kind, cells[point, kind], golden), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(table(golden, cells))
    print(arguments.out.read_text())
    return int(any(problems(cell, golden) for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
