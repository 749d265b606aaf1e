"""Random faults on small real runs, for as long as you like; every run must end as if there had
been none.

A drill is ``rl-edit train`` on the built-in editor, in one process or on a Ray cluster of its own,
with faults that a seed decides: which, at which moment of the run (by its events, never by the
clock), in which process or byte. After every attempt the exit code, ``run.json``, the output, the
processes and the listening sockets are examined; after at most one ``--resume`` the adapter must
have the bytes of the run without a fault. Finished drills are kept under ``--work``::

    python benchmarks/chaos.py --hours 1 --seed 0     # writes benchmarks/results/chaos.md
    python benchmarks/chaos.py --seed 0 --only 17     # repeats a drill
    python benchmarks/chaos.py --minutes 5 --kinds kill-rollout,SIGTERM
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import two_nodes
from chaos_drill import ALONE, AT_LEASE, KINDS, Drill, Fault, Plan, Result
from chaos_nodes import NODE_FAULTS
from chaos_runs import ROOT, UPDATES, Attempt, Launch, adapter_of
from chaos_strikes import root_and_mounts
from commit import commit_name

LAST_MOMENT = UPDATES - 2
"""Updates after which a fault still finds the run at work."""
EARLY = ("SIGTERM", "SIGHUP", "SIGINT", "kill-driver", "two-signals")
"""Kinds that may also hit before the first update."""
SECOND = 99


def plan_of(seed: int, number: int, names: Sequence[str], runtimes: Sequence[str]) -> Plan:
    """The plan of a drill. Its first kind is dealt from a shuffled deck, so that all kinds come."""
    round_, place = divmod(number, len(names))
    deck = sorted(names)
    random.Random(f"{seed}/deck/{round_}").shuffle(deck)
    draw, primary = random.Random(f"{seed}/{number}"), deck[place]
    if primary in ALONE:
        runtime = "two nodes" if primary in NODE_FAULTS else "inline"
        return Plan(number=number, runtime=runtime, rivalry=primary)
    kind = KINDS[primary]
    runtime = draw.choice([name for name in kind.runtimes if name in runtimes])
    if kind.alone:
        fault = drawn(draw, primary, after=draw.randint(1, LAST_MOMENT - 1))
        return Plan(number=number, runtime=runtime, first=(fault,))
    fitting = [
        name
        for name in sorted(set(names) & KINDS.keys())
        if name != primary and runtime in KINDS[name].runtimes and not KINDS[name].alone
    ]
    return composed(draw, number, runtime, primary, fitting)


def composed(
    draw: random.Random, number: int, runtime: str, primary: str, fitting: Sequence[str]
) -> Plan:
    """Puts faults around the first one: others that the run survives, an end, damaged files."""

    def some(when: str, most: int) -> list[str]:
        pool = [name for name in fitting if KINDS[name].when == when]
        ours = [primary] * (KINDS[primary].when == when)
        more = draw.sample(pool, min(len(pool), draw.randint(0, most)))
        return [*ours, *more][: max(most, 1)]

    during, between = some("during", 2), some("between", 2)
    ends, around = some("end", 1), some("launch", 1)
    if between and not ends:
        ends = [draw.choice(("kill-driver", "SIGTERM"))]
    # A pipe that is to be closed is an output too: an attempt has one.
    if any(name.startswith("closed-pipe") for name in during):
        around = []
    moments = sorted(draw.randint(0, LAST_MOMENT - 1) for _ in during)
    first = [drawn(draw, name, after=SECOND) for name in around]
    first += [drawn(draw, name, after=at) for name, at in zip(during, moments, strict=True)]
    for name in ends:
        early = name in EARLY and not during and not between and draw.random() < 0.3
        at = AT_LEASE if early else draw.randint(max([2, *moments]), LAST_MOMENT)
        first.append(drawn(draw, name, after=at))
    again = some("during", 1) if ends else []
    return Plan(
        number=number,
        runtime=runtime,
        first=tuple(first),
        between=tuple(drawn(draw, name, after=SECOND) for name in between),
        second=tuple(drawn(draw, name, after=0) for name in again if name != primary),
    )


def drawn(draw: random.Random, name: str, *, after: int) -> Fault:
    return Fault(kind=name, after=after, draw=draw.randrange(1 << 30))


def without_faults(work: Path) -> str:
    """The adapter of the run that nothing disturbs."""
    retained = work / "golden.txt"
    if not retained.is_file():
        folder = work / "golden"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        short = Path(tempfile.mkdtemp(prefix="ch-", dir="/tmp"))
        attempt = Attempt(
            folder, folder / "run", Launch(), name="golden", short=short, resume=False
        )
        if attempt.end() != 0:
            sys.exit(f"the run without a fault failed: see {folder}")
        retained.write_text(adapter_of(folder / "run"))
        shutil.rmtree(short)
    return retained.read_text()


class Session:
    """Drills until the time is over; their results are kept line by line."""

    def __init__(self, arguments: argparse.Namespace, names: Sequence[str]) -> None:
        self.arguments, self.names = arguments, names
        self.work: Path = arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.lines = self.work / "drills.jsonl"
        self.results = [
            Result(**json.loads(line))
            for line in (self.lines.read_text().splitlines() if self.lines.is_file() else [])
        ]
        self.before = max((result.spent for result in self.results), default=0.0)
        self.began, self.lock = time.monotonic(), threading.Lock()
        self.golden = without_faults(self.work)
        self.numbers = iter(range(10**9))

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.began

    def run(self) -> None:
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            for worker in [pool.submit(self._work) for _ in range(self.arguments.jobs)]:
                worker.result()

    def _work(self) -> None:
        limit = 3600 * self.arguments.hours
        while self.spent < limit:
            with self.lock:
                done = {result.number for result in self.results}
                number = next(number for number in self.numbers if number not in done)
            self.drill(number)

    def drill(self, number: int) -> Result:
        """Runs one drill and keeps what came of it."""
        plan = plan_of(self.arguments.seed, number, self.names, self.arguments.runtimes)
        result = Drill(plan, self.work, self.golden)()
        result.spent = round(self.spent, 1)
        with self.lock:
            self.results.append(result)
            with self.lines.open("a") as file:
                file.write(json.dumps(result.record()) + "\n")
            self._say(result)
        return result

    def _say(self, result: Result) -> None:
        hits = sum(len(other.hit) for other in self.results)
        codes = ", ".join(map(str, result.codes))
        late = f"; came too late: {', '.join(result.missed)}" if result.missed else ""
        verdict = "BROKEN" if result.problems else "ok"
        print(
            f"{self.spent:5.0f} s  {hits:4d} faults  {verdict:6s} {result.plan}  [{codes}]"
            f" {result.seconds:.0f} s{late}",
            flush=True,
        )
        for problem in result.problems:
            print(f"        - {problem}", flush=True)
        if result.problems:
            print(f"        files: {self.work}/drill-{result.number:04d}", flush=True)
            print(f"        again: {self.command} --only {result.number}", flush=True)

    @property
    def command(self) -> str:
        chosen, kinds = self.arguments, ""
        if chosen.kinds:
            kinds += f" --kinds {chosen.kinds}"
        if len(chosen.runtimes) == 1:
            kinds += f" --runtimes {chosen.runtimes[0]}"
        return f"python benchmarks/chaos.py --seed {chosen.seed}{kinds}"


def never_hit(results: Sequence[Result]) -> list[str]:
    """Kinds that were tried three times or more and never hit: their faults do nothing."""
    hits = {name for result in results for name in result.hit}
    missed = Counter(name for result in results for name in result.missed)
    return sorted(name for name, number in missed.items() if number >= 3 and name not in hits)


def table(session: Session) -> str:
    """The page of results."""
    results, hits = session.results, Counter[str]()
    missed, broken, seconds = Counter[str](), Counter[str](), dict[str, list[float]]()
    for result in results:
        hits.update(result.hit)
        missed.update(result.missed)
        for name in set(result.hit):
            broken[name] += bool(result.problems)
            seconds.setdefault(name, []).append(result.seconds)
    commit = commit_name()
    wrong = [result for result in results if result.problems]
    rows = [
        f"| {name} | {hits[name]} | {missed[name]} | {len(seconds.get(name, []))} | {broken[name]} "
        f"| {statistics.median(seconds.get(name, [0])):.0f} |"
        for name in session.names
    ]
    failures = [f"- {result.plan}: {'; '.join(result.problems)}" for result in wrong]
    idle = never_hit(results)
    skipped = "; ".join(filter(None, (root_and_mounts(), two_nodes.reason())))
    return "\n".join(
        [
            "# Faults at random, the same bytes",
            "",
            f"Commit `{commit}`, {time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, "
            f"{os.cpu_count()} cores, no GPU. Command: `{session.command} --hours "
            f"{session.arguments.hours:g} --jobs {session.arguments.jobs}`.",
            "",
            f"**{sum(hits.values())} faults of {len(hits)} kinds hit {len(results)} runs in "
            f"{max((result.spent for result in results), default=0) / 60:.0f} minutes; "
            f"{sum(missed.values())} more came when there was nothing left to hit and are not "
            f"counted. {sum(result.resumes for result in results)} runs needed `--resume`, each "
            f"once. {len(results) - len(wrong)} runs ended with the adapter of the run without a "
            f"fault (`{session.golden[:12]}`), the promised exit codes and records, no traceback, "
            f"no process, no socket that listens beyond this machine; {len(wrong)} did not.**",
            "",
            "| kind | faults | too late | runs | runs with a failure | median seconds of a run |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            *([f"Left out: faults of disks or nodes ({skipped}).", ""] if skipped else []),
            *([f"Tried, and never hit: {', '.join(idle)}.", ""] if idle else []),
            *(["Failures:", "", *failures, ""] if failures else []),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, help="instead of --hours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--only", type=int, help="the number of one drill, to repeat it")
    parser.add_argument("--kinds", default="", help="only these, separated by commas")
    parser.add_argument(
        "--runtimes", nargs="+", choices=("ray", "inline"), default=["ray", "inline"]
    )
    parser.add_argument(
        "--work", type=Path, help="where drills are kept (default: runs/chaos-SEED)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chaos.md")
    parser.add_argument("--plan", type=int, help="only print the plans of so many drills")
    arguments = parser.parse_args()
    if arguments.minutes is not None:
        arguments.hours = arguments.minutes / 60
    names = known_names(arguments.kinds, arguments.runtimes, parser)
    if arguments.plan:
        for number in range(arguments.plan):
            print(plan_of(arguments.seed, number, names, arguments.runtimes))
        return 0
    arguments.work = (arguments.work or ROOT / "runs" / f"chaos-{arguments.seed}").absolute()
    session = Session(arguments, names)
    if arguments.only is not None:
        return int(bool(session.drill(arguments.only).problems))
    session.run()
    page = table(session)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page)
    print(page)
    broken = any(result.problems for result in session.results)
    return int(broken or bool(never_hit(session.results)))


def known_names(chosen: str, runtimes: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The kinds of a session, in their order in the table."""
    every = [name for name, kind in KINDS.items() if set(kind.runtimes) & set(runtimes)]
    every += ALONE
    if root_and_mounts():
        every = [name for name in every if name in ALONE or not KINDS[name].mount]
    if "ray" not in runtimes or two_nodes.reason():
        every = [name for name in every if name not in NODE_FAULTS]
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    if unknown := sorted(set(names) - set(every)):
        parser.error(f"no such kind here: {', '.join(unknown)}; there are {', '.join(every)}")
    return [name for name in every if name in names] if names else every


if __name__ == "__main__":
    sys.exit(main())
