"""Two attempts in one run directory: the older one must end and touch nothing of the newer one.

The newer attempt is stopped while the older one ends, so that every byte of the directory can be
compared before and after. What an older attempt writes below a temporary name of its own is no
file of the other: a write that was under way when it was stopped goes on.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chaos_runs import APPLIED, UPDATES, Attempt, Launch, contents, status_of

FENCED = 75
REFUSED = ("actors.runtime=ray", "actors.rollout_gpus=1", "actors.wait_for_nodes_s=3")
"""Settings that no machine without a GPU can serve, which an attempt learns after it has begun."""

Start = Callable[[Launch, bool], Attempt]
"""Starts an attempt; its second argument says that it resumes."""


@dataclass(frozen=True, kw_only=True)
class Rivalry:
    """How two attempts met.

    Attributes:
        hit: both were there at the same time.
        ends: each attempt with the exit codes that it may have.
    """

    hit: bool
    problems: list[str]
    ends: list[tuple[Attempt, frozenset[int]]]


def compared(older: Attempt, newer: Attempt, run: Path, allowed: set[int]) -> Rivalry:
    """Lets the older one end while the newer one is stopped; then lets the newer one finish."""
    newer.halt()
    before, hit = contents(run), newer.alive and older.alive
    own = own_names(older, run)
    older.signal(signal.SIGCONT)
    code = older.end()
    after = contents(run)
    newer.signal(signal.SIGCONT)
    problems = []
    if hit and (changed := differing(before, after, own)):
        problems.append(f"the older attempt (exit {code}) changed {', '.join(changed)}")
    return Rivalry(
        hit=hit,
        problems=problems,
        ends=[(older, frozenset(allowed)), (newer, frozenset({0}))],
    )


def own_names(attempt: Attempt, run: Path) -> re.Pattern[str]:
    """Matches the temporary names of an attempt: they hold its epoch, or its process."""
    held = [
        path.name.removeprefix(".lease-")
        for path in run.glob(".lease-*")
        if path.stat().st_mtime < attempt.halted
    ]
    epochs = "|".join(held) or "none"
    return re.compile(rf"(.*/)?(\.tmp-({epochs})-.*|\..*\.{attempt.process.pid}-\w+\.tmp)")


def differing(
    before: Mapping[str, str], after: Mapping[str, str], own: re.Pattern[str]
) -> list[str]:
    """Names of files that were made, changed or removed, but for those of the attempt itself."""
    return sorted(
        name
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name) and not own.fullmatch(name)
    )


def second_attempt(start: Start, run: Path) -> Rivalry:
    """An attempt in the middle of its work is overtaken."""
    older = start(Launch(), False)
    older.wait_updates(2)
    older.halt()
    # On a fast machine it may have nothing left to do. Then nobody overtakes it: it ends with 0.
    over = not older.alive or status_of(run) == "done" or applied(older) == UPDATES
    newer = start(Launch(), True)
    if over:
        older.signal(signal.SIGCONT)
        ends = [(older, frozenset({FENCED, 0})), (newer, frozenset({0}))]
        return Rivalry(hit=False, problems=[], ends=ends)
    newer.wait_updates(1)
    return compared(older, newer, run, {FENCED})


def applied(attempt: Attempt) -> int:
    """Updates that an attempt has applied."""
    return len({line["update"] for line in attempt.events() if line["event"] == APPLIED})


def refused_beside_newer(start: Start, run: Path) -> Rivalry:
    """An attempt that waits for GPUs gives up when a newer one trains."""
    older = start(Launch(settings=REFUSED), False)
    older.wait_for((run / "config.yaml").is_file)
    older.halt()
    newer = start(Launch(), (run / "config.yaml").is_file())
    newer.wait_updates(2)
    return compared(older, newer, run, {4, FENCED})


def stopped_when_overtaken(start: Start, run: Path) -> Rivalry:
    """An overtaken attempt gets SIGTERM before its first state."""
    older = start(Launch(), False)
    older.wait_for((run / "config.yaml").is_file, poll_s=0.001)
    older.halt()
    newer = start(Launch(), (run / "config.yaml").is_file())
    newer.wait_updates(2)
    older.signal(signal.SIGTERM)
    return compared(older, newer, run, {143, FENCED})


def refused_in_a_running_one(start: Start, run: Path) -> Rivalry:
    """An attempt that cannot have its GPUs takes the directory of one that runs."""
    older = start(Launch(), False)
    older.wait_updates(2)
    older.halt()
    newer = start(Launch(settings=REFUSED), True)
    newer.wait_for(lambda: len(list(run.glob(".lease-*"))) > 1)
    hit = older.alive and newer.alive
    code = newer.end()
    before, own = contents(run), own_names(older, run)
    older.signal(signal.SIGCONT)
    older.end()
    changed = differing(before, contents(run), own)
    problems = [f"the fenced attempt changed {', '.join(changed)}"] if hit and changed else []
    if code == 4 and not (run / "checkpoints").is_dir():
        problems.append("the refused attempt removed the checkpoints of the other")
    return Rivalry(
        hit=hit,
        problems=problems,
        ends=[(older, frozenset({FENCED})), (newer, frozenset({4}))],
    )


def two_at_once(start: Start, run: Path) -> Rivalry:
    """A run that was killed is resumed twice in the same instant."""
    first = start(Launch(), False)
    hit = first.wait_updates(2) and first.signal(signal.SIGKILL)
    first.end()
    pair = [start(Launch(), True), start(Launch(), True)]
    codes = [attempt.end() for attempt in pair]
    # On a slow machine the first may be done before the second begins; both then end with 0.
    problems = [] if 0 in codes else [f"two attempts at once ended with {codes}"]
    ends = [(attempt, frozenset({0, FENCED})) for attempt in pair]
    return Rivalry(hit=hit, problems=problems, ends=[(first, frozenset({-9, 0})), *ends])


RIVALRIES: dict[str, Callable[[Start, Path], Rivalry]] = {
    "second-attempt": second_attempt,
    "refused-beside-newer": refused_beside_newer,
    "SIGTERM-when-overtaken": stopped_when_overtaken,
    "refused-in-a-running-one": refused_in_a_running_one,
    "two-at-once": two_at_once,
}
