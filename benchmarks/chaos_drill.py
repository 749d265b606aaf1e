"""One drill: a run, its faults, at most one ``--resume``, and what must hold afterwards."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chaos_faults import GOES_ON, STATUS, kinds
from chaos_nodes import NODE_FAULTS
from chaos_rivals import RIVALRIES, Rivalry
from chaos_runs import (
    AGENTS_GONE_S,
    APPLIED,
    GONE_S,
    TRACES,
    UPDATES,
    Attempt,
    Launch,
    adapter_of,
    event_lines,
    status_of,
)
from chaos_strikes import Scene

KINDS = kinds()
ALONE = (*RIVALRIES, *NODE_FAULTS)
"""Kinds that are a whole drill."""
ON_RAY = ("actors.runtime=ray", "actors.infra_retries=10", "actors.quarantine_after=10")
AT_LEASE = -1
"""The moment of a fault that hits as soon as the attempt has the directory."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of a plan.

    Attributes:
        after: applied updates of the attempt that come before it.
        draw: seed of the fault's own random numbers.
    """

    kind: str
    after: int
    draw: int

    def __str__(self) -> str:
        at = {AT_LEASE: "at the lease", 0: "at the start"}.get(self.after, f"after {self.after}")
        return f"{self.kind} {at}" if self.after != 99 else self.kind


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens in a drill: faults of the first attempt, of the files between, of the second."""

    number: int
    runtime: str
    rivalry: str = ""
    first: tuple[Fault, ...] = ()
    between: tuple[Fault, ...] = ()
    second: tuple[Fault, ...] = ()

    @property
    def faults(self) -> list[str]:
        names = [fault.kind for fault in (*self.first, *self.between, *self.second)]
        return [*names, *([self.rivalry] if self.rivalry else [])]

    def __str__(self) -> str:
        parts = [self.rivalry] if self.rivalry else []
        parts += [", ".join(map(str, self.first))] if self.first else []
        parts += [f"then {', '.join(fault.kind for fault in self.between)}"] * bool(self.between)
        parts += [f"resumed: {', '.join(map(str, self.second))}"] * bool(self.second)
        return f"drill {self.number} ({self.runtime}): {'; '.join(parts)}"


@dataclass(kw_only=True)
class Result:
    """What came of a drill.

    Attributes:
        hit: kinds that hit a living run, in order; ``missed``: those that came too late.
        codes: exit code of each attempt.
        late: tags of attempts whose agents of Ray are still to end.
    """

    number: int
    plan: str
    runtime: str
    hit: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    codes: list[int | None] = field(default_factory=list)
    resumes: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    spent: float = 0.0

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Drill:
    """Runs a plan in a folder of its own, which stays when anything is wrong."""

    def __init__(self, plan: Plan, work: Path, golden: str) -> None:
        self.plan, self.golden = plan, golden
        self.folder = work / f"drill-{plan.number:04d}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        # Ray's sockets live below it, and a socket's path has at most 107 characters.
        self.short = Path(tempfile.mkdtemp(prefix="ch-", dir="/tmp"))
        (self.short / "home").mkdir()
        self.run = self.folder / "disk" / "run"
        self.run.parent.mkdir()
        self.attempts: list[Attempt] = []
        self.mounted = False
        self.hidden = set[str]()
        self.result = Result(number=plan.number, plan=str(plan), runtime=plan.runtime)

    def __call__(self) -> Result:
        began = time.monotonic()
        try:
            if self.plan.rivalry:
                self._rivals()
            else:
                self._attempts()
            self._judge_run()
        finally:
            for attempt in self.attempts:
                attempt.destroy()
            if self.mounted:
                subprocess.run(["umount", "-l", str(self.run.parent)], check=False)
            self.result.seconds = round(time.monotonic() - began, 1)
            if not self.result.problems:
                shutil.rmtree(self.folder, ignore_errors=True)
                shutil.rmtree(self.short, ignore_errors=True)
        return self.result

    def _start(self, launch: Launch, resume: bool) -> Attempt:
        name = f"attempt-{len(self.attempts) + 1}"
        attempt = Attempt(self.folder, self.run, launch, name=name, short=self.short, resume=resume)
        self.attempts.append(attempt)
        return attempt

    def _rivals(self) -> None:
        name, draw = self.plan.rivalry, random.Random(self.plan.number)
        rivalry: Rivalry = (
            NODE_FAULTS[name](self._start, self.run, draw)
            if name in NODE_FAULTS
            else RIVALRIES[name](self._start, self.run)
        )
        self.result.problems += rivalry.problems
        (self.result.hit if rivalry.hit else self.result.missed).append(self.plan.rivalry)
        for attempt, codes in rivalry.ends:
            self._judge_end(attempt, attempt.end(), codes, frozenset())
        if self.result.codes[-1] != 0 and 0 not in self.result.codes[-2:]:
            self._resume()

    def _attempts(self) -> None:
        mount = max(KINDS[name].mount for name in self.plan.faults)
        if mount:
            size = ["-o", f"size={mount}m", "chaos", str(self.run.parent)]
            subprocess.run(["mount", "-t", "tmpfs", *size], check=True)
            self.mounted = True
        if self._faulty(self.plan.first, resume=False) == 0:
            missed = (*self.plan.between, *self.plan.second)
            self.result.missed += [fault.kind for fault in missed]
            return
        for fault in self.plan.between:
            self._count(fault, KINDS[fault.kind].strike(self._scene(fault, self.attempts[-1])))
        self._resume()

    def _resume(self) -> None:
        resume = (self.run / "config.yaml").is_file()
        self.result.resumes += 1
        code = self._faulty(self.plan.second, resume=resume)
        if code != 0:
            self.result.problems.append(f"after one --resume it ended with {code}")

    def _scene(self, fault: Fault, attempt: Attempt) -> Scene:
        return Scene(
            folder=self.folder,
            run=self.run,
            short=self.short,
            draw=random.Random(fault.draw),
            attempt=attempt,
            problems=self.result.problems,
        )

    def _launch(self, faults: tuple[Fault, ...]) -> Launch:
        """The settings and surroundings that these faults need, together."""
        settings = list(ON_RAY) if self.plan.runtime == "ray" else []
        fields: dict[str, Any] = {}
        around: dict[str, str] = {}
        for fault in faults:
            kind = KINDS[fault.kind]
            settings += [name for name in kind.settings if name not in settings]
            more: Mapping[str, Any] = kind.launch(self._scene(fault, None))  # type: ignore[arg-type]
            around.update(more.get("environment", {}))
            fields.update(more)
        return Launch(**{**fields, "environment": around, "settings": tuple(settings)})

    def _faulty(self, faults: tuple[Fault, ...], *, resume: bool) -> int | None:
        """One attempt with its faults; judges its end and returns its exit code."""
        attempt = self._start(self._launch(faults), resume)
        codes, statuses, undo = GOES_ON, frozenset[str](), list[Any]()
        for fault in faults:
            kind, scene = KINDS[fault.kind], self._scene(fault, attempt)
            hit = self._reached(attempt, fault) and kind.strike(scene)
            self._count(fault, hit)
            undo += scene.undo
            if hit and kind.when == "end":
                codes, statuses = kind.codes, kind.statuses
                if fault.after == AT_LEASE:
                    statuses = frozenset({"none", "failed", "running", "stopped", "done"})
        code = attempt.end()
        for action in undo:
            action()
        if code == 0:
            self._came_too_late(faults)
        self._judge_end(attempt, code, codes, statuses)
        return code

    def _came_too_late(self, faults: tuple[Fault, ...]) -> None:
        """Counts no fault that was to end an attempt which was done, or did not notice."""
        for fault in faults:
            if KINDS[fault.kind].when == "end" and fault.kind in self.result.hit:
                self.result.hit.remove(fault.kind)
                self.result.missed.append(fault.kind)

    def _reached(self, attempt: Attempt, fault: Fault) -> bool:
        if KINDS[fault.kind].when == "launch":
            return True
        if fault.after == AT_LEASE:
            there = attempt.wait_for(lambda: list(self.run.glob(".lease-*")), poll_s=0.001)
            return bool(there) and attempt.alive
        if not attempt.wait_updates(fault.after):
            return False
        attempt.look_at_sockets()
        return attempt.alive

    def _count(self, fault: Fault, hit: bool) -> None:
        (self.result.hit if hit else self.result.missed).append(fault.kind)
        if hit:
            self.hidden |= KINDS[fault.kind].hides

    def _judge_end(
        self,
        attempt: Attempt,
        code: int | None,
        codes: frozenset[int],
        statuses: frozenset[str],
    ) -> None:
        """Notes what is wrong with the end of an attempt: code, record, words, processes, ports."""
        add, name = self.result.problems.append, attempt.name
        self.result.codes.append(code)
        if code not in codes:
            add(f"{name} ended with {code} instead of {', '.join(map(str, sorted(codes)))}")
        allowed = statuses or STATUS.get(code or 0, {"failed"})
        if not self.plan.rivalry and status_of(self.run) not in allowed:
            add(f"{name}: run.json says {status_of(self.run)} after exit {code}")
        for path in attempt.files:
            if problem := wrong_words(path, joined=self.plan.runtime == "two nodes"):
                add(f"{name}: {problem}")
        traces = {*self.run.glob(TRACES), *self.short.glob(TRACES)} - attempt.traces
        if traces:
            add(f"{name} left {traces.pop()}")
        if left := attempt.remaining(GONE_S):
            add(f"{name} left {len(left)} processes: {left[0][:80]}")
        if attempt.unsafe:
            add(f"{name}: {sorted(attempt.unsafe)[0]} ({len(attempt.unsafe)} in all)")
        if still := attempt.still_listening():
            add(f"{name}: {len(still)} sockets still listen")

    def _judge_run(self) -> None:
        """Notes what is wrong with the run at its end: the adapter, its updates, agents of Ray."""
        add = self.result.problems.append
        if (adapter := adapter_of(self.run)) != self.golden:
            add(f"the final adapter is {adapter[:12] or 'missing'}, not {self.golden[:12]}")
        if status_of(self.run) != "done":
            add(f"at the end run.json says {status_of(self.run)}")
        applied = [
            line["update"]
            for line in event_lines(self.run / "events.jsonl")
            if line["event"] == APPLIED
        ]
        if len(set(applied)) != len(applied):
            add(f"updates in events.jsonl: {applied}")
        if "events" not in self.hidden and sorted(applied) != list(range(UPDATES)):
            add(f"updates in events.jsonl: {applied}")
        deadline = time.monotonic() + AGENTS_GONE_S
        while left := [pid for attempt in self.attempts for pid in attempt.processes()]:
            if time.monotonic() > deadline:
                add(f"{len(left)} of Ray's agents did not end within {AGENTS_GONE_S:.0f} s")
                return
            time.sleep(0.2)


OURS = r"rl-edit: |\[.*core_worker.cc:\d+: :info_message: "
OR_RAYS = OURS + r"|[\d-]{10} .*\sINFO worker.py|\[[\d-]{10} .*\.cc:"


def wrong_words(path: Path, *, joined: bool) -> str:
    """What should not stand in an output: a traceback, or a line that is not ours on stderr.

    Ray's own log lines may stand there where a run has ``joined`` a cluster that is not its own.
    """
    text = path.read_bytes().decode(errors="replace")
    if "Traceback (most recent call last)" in text:
        return f"a traceback in {path.name}"
    lines = [line for line in text.splitlines() if line.strip()]
    strange = [line for line in lines if not re.match(OR_RAYS if joined else OURS, line)]
    if path.suffix == ".err" and strange:
        return f"{len(strange)} lines on stderr that are not ours: {strange[0][:120]}"
    return ""
