"""Runs of ``rl-edit`` that fail at a named point, once: workers and a driver with a fault in them,
and the process that holds the run.

::

    python tests/crashing.py POINT KIND UPDATE MARKER train --preset tiny-rc-grpo --run-dir DIR ...

is ``rl-edit train ...`` that fails at POINT of update UPDATE. The marker file says that it has
failed, so that the next worker or the next attempt passes the same point unharmed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

import actors.roles
import learner.controller.loop
from actors.reward import RewardActor
from actors.roles import Roles
from actors.rollout import RolloutActor
from learner.controller import checkpoint
from learner.controller.lease import Lease
from learner.controller.supervisor import Supervisor
from learner.learner import Learner
from rl_edit import wire
from rl_edit.messages import LearnOrder
from rl_edit.method.update import Collective
from rl_edit.types import AdapterId, RolloutGroup, WorkItem

ROOT = Path(__file__).resolve().parent.parent

WORKER_POINTS = {
    "rollout": "rollout",
    "reward": "reward",
    "mid-accumulate": "learner",
    "post-step": "learner",
    "post-export": "learner",
}
"""Points in a worker, and whose worker it is."""
DRIVER_POINTS = ("mid-commit", "post-rename", "pre-publish")
POINTS = (*WORKER_POINTS, *DRIVER_POINTS)
KINDS = ("SIGKILL", "SIGTERM", "SIGSTOP", "exception")

MIDWAY = 2
"""Solver steps that an interrupted rollout has behind it."""

TAG = "RL_EDIT_TEST_RUN"
"""Environment variable that every process of a launched run inherits, whoever adopts it when its
parent dies."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What fails: ``kind`` is a signal that the process sends to itself, or "exception"."""

    point: str
    kind: str
    update: int
    marker: Path

    def strike(self, point: str, update: int) -> None:
        """Fails, if this is the place and nobody has failed there yet."""
        if (point, update) != (self.point, self.update):
            return
        try:
            with self.marker.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return
        if self.kind == "exception":
            raise RuntimeError(f"a fault at {point} of update {update}, on purpose")
        os.kill(os.getpid(), signal.Signals[self.kind])

    @property
    def rollouts(self) -> Path:
        """Where rollout actors write every item that they begin."""
        return self.marker.with_suffix(".rollouts")


class CrashingRollout(RolloutActor):
    """Fails in the middle of denoising."""

    def __init__(self, fault: Fault, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.fault = fault

    def rollout(self, item: WorkItem) -> tuple[RolloutGroup, dict[str, float]]:
        with self.fault.rollouts.open("a") as file:
            file.write(f"{item.work_id}\n")
        calls, velocity = itertools.count(), self.editor.velocity

        def interrupted(*given: Any) -> Tensor:
            if next(calls) == MIDWAY:
                self.fault.strike("rollout", item.update)
            return velocity(*given)

        with patch.object(self.editor, "velocity", interrupted):
            return super().rollout(item)


class DeafRollout(RolloutActor):
    """Takes the first update's weights, answers with their name, and goes on with those from
    before; once."""

    def __init__(self, marker: Path, *given: Any) -> None:
        super().__init__(*given)
        self.marker = marker

    def load(self, blob: np.ndarray) -> AdapterId:
        before = list(self._published.values())
        name = super().load(blob)
        if name.step == 1 and not self.marker.exists():
            self.marker.touch()
            self._published[name] = replace(before[-1], id=name)
        return name


class CrashingReward(RewardActor):
    """Fails before it scores. A group says which weights it is of; on-policy, that is its
    update."""

    def __init__(self, fault: Fault, *given: Any) -> None:
        super().__init__(*given)
        self.fault = fault

    def score(self, blob: np.ndarray) -> np.ndarray:
        self.fault.strike("reward", wire.unpack(blob).adapter.step)
        return super().score(blob)


class CrashingLearner(Learner):
    """Fails between the gradients of two groups, after the optimizer's step, or with the answer in
    its hands."""

    def __init__(self, fault: Fault, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.fault = fault
        self.ranks = Interrupted(self.ranks, self._accumulated)
        self.policy.optimizer.register_step_post_hook(
            lambda *_: fault.strike("post-step", self.policy.updates_done)
        )

    def join(self, rank: int, world: int, address: str) -> None:
        super().join(rank, world, address)
        self.ranks = Interrupted(self.ranks, self._accumulated)

    def learn(self, order: LearnOrder, *blobs: np.ndarray) -> Any:
        answer = super().learn(order, *blobs)
        self.fault.strike("post-export", order.update)
        return answer

    def _accumulated(self) -> None:
        self.fault.strike("mid-accumulate", self.policy.updates_done)


class Interrupted:
    """A collective that says when a group's gradient is about to be added."""

    def __init__(self, inner: Collective, accumulated: Callable[[], None]) -> None:
        self.inner, self.accumulated = inner, accumulated
        self.rank, self.world = inner.rank, inner.world

    def broadcast(self, value: Tensor, source: int) -> Tensor:
        self.accumulated()
        return self.inner.broadcast(value, source)

    def total(self, value: Tensor) -> Tensor:
        return self.inner.total(value)

    def exchange(self, text: str) -> list[str]:
        return self.inner.exchange(text)


CLASSES: dict[str, Callable[..., Any]] = {
    "rollout": CrashingRollout,
    "reward": CrashingReward,
    "learner": CrashingLearner,
}


def crashing(roles: Roles, *faults: Fault) -> Roles:
    """Worker specs of separate processes, where the worker with a fault's point crashes; at most
    one fault of a role."""
    changed = dict(roles)
    for fault in faults:
        role = WORKER_POINTS[fault.point]
        spec = roles[role]
        changed[role] = replace(spec, make=CLASSES[role], arguments=(fault, *spec.arguments))
    return changed


def inject(fault: Fault) -> None:
    """Puts a fault into the run that this process is about to drive."""
    specs, put, write = actors.roles.worker_roles, checkpoint.write_new, checkpoint.write
    if fault.point in WORKER_POINTS:
        actors.roles.worker_roles = lambda *arguments: crashing(specs(*arguments), fault)

    def half_written(path: Path, content: Any) -> None:
        if path.name == checkpoint.STATE:
            fault.strike("mid-commit", int(path.parent.name.rpartition("_")[2]) - 1)
        put(path, content)

    def renamed(directory: Path, checkpoint: checkpoint.Checkpoint, *, lease: Lease) -> Path:
        path = write(directory, checkpoint, lease=lease)
        fault.strike("post-rename", checkpoint.updates_done - 1)
        return path

    class CrashingSupervisor(Supervisor):
        def broadcast_when_idle(self, role: str, what: str, method: str, *args: Any) -> None:
            fault.strike("pre-publish", int(what.removeprefix("publishing ").partition(":")[0]) - 1)
            super().broadcast_when_idle(role, what, method, *args)

    checkpoint.write_new, checkpoint.write = half_written, renamed
    learner.controller.loop.Supervisor = CrashingSupervisor  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a launched run ended, and the processes of it that were left, by command line."""

    code: int
    out: str
    err: str
    seconds: float
    left: list[str]


class Launched:
    """``rl-edit ARGUMENTS`` in a process of its own, with a cluster of its own, and maybe a fault.
    Ends with the ``with`` block."""

    def __init__(
        self,
        *arguments: object,
        fault: Fault | None = None,
        logs: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.tag = uuid.uuid4().hex
        faulty = (
            [__file__, fault.point, fault.kind, fault.update, fault.marker]
            if fault
            else ["-m", "rl_edit"]
        )
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
        }
        quiet = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
        }
        shown = {
            "SPT_NOENV": "1"
        }  # Ray's workers rename themselves, by default over the environment that they show
        self.out, self.err = logs / f"{self.tag}.out", logs / f"{self.tag}.err"
        self.began = time.monotonic()
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, faulty), *map(str, arguments)],
                cwd=ROOT,
                env={
                    **inherited,
                    **quiet,
                    **shown,
                    "HF_HUB_OFFLINE": "1",
                    "PYTHONUNBUFFERED": "1",
                    **(environment or {}),
                    TAG: self.tag,
                },
                stdout=out,
                stderr=err,
                # A process group, as a shell makes one: Ctrl-C is a signal to all of it.
                start_new_session=True,
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for pid, _words in _tagged(self.tag):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def living(self) -> dict[int, str]:
        """Command line of every process of this run, the driver's among them."""
        return dict(_tagged(self.tag))

    def ended(self, timeout_s: float = 300, judge_timeout_s: float = 10) -> Ended:
        """Waits for the end of the driver, and then a while for that of every other process."""
        code = self.process.wait(timeout_s)
        seconds = time.monotonic() - self.began
        deadline = time.monotonic() + judge_timeout_s
        while (left := self.living()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return Ended(
            code=code,
            out=self.out.read_text(),
            err=self.err.read_text(),
            seconds=seconds,
            left=sorted(left.values()),
        )


def _tagged(tag: str) -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process that inherited a tag and is not a zombie."""
    expected = f"{TAG}={tag}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and expected in (entry / "environ").read_bytes().split(b"\0"):
                    yield (
                        int(entry.name),
                        (entry / "cmdline").read_text().replace("\0", " ").strip(),
                    )


def main() -> None:
    """``rl-edit`` with a fault."""
    point, kind, update, marker, *arguments = sys.argv[1:]
    inject(Fault(point=point, kind=kind, update=int(update), marker=Path(marker)))
    sys.argv = ["rl-edit", *arguments]
    from rl_edit.cli import main as rl_edit

    rl_edit()


if __name__ == "__main__":
    main()
