"""Whether the controller keeps up: its seconds per update, over workers that sleep, against the
cost model of the same run.

The controller, its checks, its files and its executors are the real ones. Workers sleep the seconds
of ``profiles.py``, shrunk so that the model's update takes ``--seconds``. The controller's own work
does not shrink, so the shares are worse than in real time::

    python benchmarks/scaling.py            # writes benchmarks/results/scaling.md; some ten minutes
    python benchmarks/scaling.py --profile kontext-1024-28-64-lag1     # where the controller's time
    goes in one case
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import platform
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from actors.local_executor import LocalExecutor
from commit import commit_name
from learner.controller.executor import Executor
from learner.controller.lease import Lease
from learner.controller.loop import TrainingLoop
from learner.controller.placement import (
    GroupCost,
    WorkerCounts,
    colocated_seconds,
    iteration_seconds,
    recommend,
)
from learner.controller.run import Run
from learner.controller.run_log import Events
from profiles import CANDIDATES, PROFILES, tokens
from rl_edit.config import RunConfig, load_config
from rl_edit.files import EVENTS
from rl_edit.types import EditTask
from sleepers import Naps, sleeping_roles

RESULTS = Path(__file__).resolve().parent / "results"
PIXELS_PER_TOKEN = 16
CHUNKS = 3
ROLLOUT_ACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FILL = 2
"""Updates at the start, while the pipeline fills, and at the end, while it empties, that are not
counted."""
FEWEST_UPDATES = 2 * FILL + 3

TARGET_SHARE, TARGET_MS = 0.9, 5.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run to be timed: a profile of ``profiles.py`` on a number of workers.

    Attributes:
        colocated: every worker plays all three roles by turns.
        ray: workers are Ray actors, else threads of this process.
    """

    name: str
    profile: str
    counts: WorkerCounts
    groups: int
    max_lag: int
    colocated: bool = False
    ray: bool = False

    @property
    def cost(self) -> GroupCost:
        return PROFILES[self.profile].cost

    @property
    def items(self) -> int:
        """Work items of an update."""
        return self.groups * CHUNKS

    @property
    def model_s(self) -> float:
        """An update in real time, as the cost model has it."""
        if self.colocated:
            return colocated_seconds(self.cost, self.counts.rollout, self.groups, 0, CHUNKS)
        return iteration_seconds(self.cost, self.counts, self.groups, self.max_lag, CHUNKS)

    @property
    def pixels(self) -> int:
        return PROFILES[self.profile].pixels


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a case, per update: as the shrunken model has it, as measured, and what the
    controller's thread computed."""

    case: Case
    model_s: float
    measured_s: float
    busy_s: float

    @property
    def share(self) -> float:
        return self.model_s / self.measured_s

    @property
    def overhead_ms(self) -> float:
        """Per work item."""
        return 1000 * (self.measured_s - self.model_s) / self.case.items

    @property
    def real_share(self) -> float:
        """The share in real time, if what was lost here is a constant."""
        return self.case.model_s / (self.case.model_s + self.measured_s - self.model_s)


class OneTask:
    """A dataset of one picture of the real size, in memory, over and over."""

    fields: frozenset[str] = frozenset()
    fingerprint = ""
    skipped = 0

    def __init__(self, pixels: int) -> None:
        mask = torch.zeros(pixels, pixels, dtype=torch.bool)
        mask[: pixels // 2] = True
        source = torch.zeros(pixels, pixels, 3, dtype=torch.uint8)
        self._task = EditTask(
            task_id="", task_type="edit", source=source, instruction="make it blue", edit_mask=mask
        )

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> EditTask:
        return replace(self._task, task_id=f"task-{index}")


@dataclass
class Stopwatch:
    """An observer that notes when each update ended: by the clock, and in seconds that this thread
    had computed by then."""

    ended: list[tuple[float, float]] = field(default_factory=list)

    def group_scored(self, update: int, done: int, total: int) -> None: ...

    def update_done(self, metrics: dict[str, Any]) -> None:
        self.ended.append((time.perf_counter(), time.thread_time()))

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def per_update(self) -> tuple[float, float]:
        """Median (seconds, computing seconds) of the steady updates, each with its successor: one
        step off they alternate."""
        steady = self.ended[FILL - 1 : len(self.ended) - FILL]
        pairs = list(zip(steady, steady[2:], strict=False))
        clock, busy = (
            statistics.median((later[i] - sooner[i]) / 2 for sooner, later in pairs) for i in (0, 1)
        )
        return clock, busy


def cases() -> list[Case]:
    """FLUX.1 Kontext on 8 and 64 GPUs, a sweep of rollout actors, and as many Ray actors as a small
    machine holds."""
    listed = []
    for profile in ("kontext-512-6", "kontext-1024-28"):
        for gpus in (8, 64):
            groups = 2 * gpus
            for max_lag in (0, 1):
                counts = recommend(PROFILES[profile].cost, gpus, groups, max_lag, CHUNKS).counts
                listed.append(
                    Case(
                        name=f"{profile}-{gpus}-lag{max_lag}",
                        profile=profile,
                        counts=counts,
                        groups=groups,
                        max_lag=max_lag,
                    )
                )
            counts = WorkerCounts(rollout=gpus, reward=gpus, learner=gpus)
            listed.append(
                Case(
                    name=f"{profile}-{gpus}-colocated",
                    profile=profile,
                    counts=counts,
                    groups=groups,
                    max_lag=0,
                    colocated=True,
                )
            )
    listed += [swept(rollout) for rollout in ROLLOUT_ACTORS]
    counts = recommend(PROFILES["kontext-512-6"].cost, 8, 16, 1, CHUNKS).counts
    listed += [
        Case(
            name=f"ray-8-lag{max_lag}",
            profile="kontext-512-6",
            counts=counts,
            groups=16,
            max_lag=max_lag,
            ray=True,
        )
        for max_lag in (0, 1)
    ]
    return listed


def swept(rollout: int) -> Case:
    """So many rollout actors, two groups for each, and of the other roles as many as keep up with
    them."""
    cost = PROFILES["kontext-1024-28"].cost
    reward, learner = (
        max(1, round(rollout * seconds / cost.rollout_s))
        for seconds in (cost.reward_s, cost.learn_s)
    )
    counts = WorkerCounts(rollout=rollout, reward=reward, learner=learner)
    return Case(
        name=f"sweep-{rollout}",
        profile="kontext-1024-28",
        counts=counts,
        groups=2 * rollout,
        max_lag=1,
    )


def config_of(case: Case, updates: int) -> RunConfig:
    """The controller's settings. Only the caller of the loop reads ``actors.runtime``; its default
    allows any number of ranks."""
    return load_config(
        preset="tiny-rc-grpo",
        overrides=[
            f"editor.resolution={case.pixels}",
            f"rollout={{group_size: {CANDIDATES}, num_steps: 6, chunk: {CANDIDATES // CHUNKS}}}",
            f"train.groups_per_update={case.groups}",
            f"train.max_lag={case.max_lag}",
            f"train.updates={updates}",
            f"train.checkpoint_every={updates}",
            f"actors.placement={'colocated' if case.colocated else 'disaggregated'}",
            f"actors.num_rollout={case.counts.rollout}",
            f"actors.num_reward={case.counts.reward}",
            f"actors.num_learner={case.counts.learner}",
            "actors.preflight=false",
        ],
    )


def naps_of(case: Case, scale: float) -> Naps:
    cost = case.cost
    return Naps(
        rollout_s=scale * cost.rollout_s / CHUNKS,
        reward_s=scale * cost.reward_s / CHUNKS,
        learn_s=scale * cost.learn_s / CHUNKS,
        step_s=scale * cost.step_s,
        publish_s=scale * cost.publish_s,
        tokens=tokens(case.pixels),
    )


def timed(case: Case, *, seconds: float, updates: int) -> Timing:
    """Runs a case, shrunk so that the model's update takes ``seconds``."""
    scale = seconds / case.model_s
    config = config_of(case, updates)
    roles = sleeping_roles(naps_of(case, scale), colocated=case.colocated)
    if case.ray:
        from actors import ray_cluster, ray_executor

        ray_cluster.connect(config)
        executor: Executor = ray_executor.RayExecutor(roles)
    else:
        executor = LocalExecutor(roles, threaded=True)
    watch = Stopwatch()
    control(config, OneTask(case.pixels), executor, watch)
    measured_s, busy_s = watch.per_update()
    return Timing(case=case, model_s=seconds, measured_s=measured_s, busy_s=busy_s)


def control(
    config: RunConfig,
    dataset: Any,
    executor: Executor,
    observer: Any,
    *,
    pixels_per_token: int = PIXELS_PER_TOKEN,
) -> None:
    """The real loop from its first update to its last, in a directory that is thrown away."""

    async def full(directory: Path) -> None:
        run = Run(
            config=config,
            dataset=dataset,
            directory=directory,
            settings={},
            pixels_per_token=pixels_per_token,
        )
        events = Events(directory / EVENTS)
        try:
            await TrainingLoop(
                run, executor, lease=Lease.take(directory), events=events, observer=observer
            ).run(resume=False)
        finally:
            await executor.close()

    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(full(Path(temporary)))


def profiled(case: Case, *, seconds: float, updates: int, top: int = 25) -> None:
    """Prints where the controller's thread spends its time."""
    profile = cProfile.Profile(time.thread_time)
    timing = profile.runcall(timed, case, seconds=seconds, updates=updates)
    print(row(timing))
    pstats.Stats(profile).sort_stats("tottime").print_stats(top)


HEADER = [
    "| case | rollout:reward:learner | items | model, s | measured, s | model / measured | lost, "
    "ms an item "
    "| controller computes, ms an item | model / measured in real time |",
    "|---|---|---|---|---|---|---|---|---|",
]


def row(timing: Timing) -> str:
    case = timing.case
    cells = [
        case.name,
        f"{case.counts.rollout} in all roles" if case.colocated else str(case.counts),
        str(case.items),
        f"{timing.model_s:.2f}",
        f"{timing.measured_s:.2f}",
        f"{timing.share:.3f}",
        f"{timing.overhead_ms:.2f}",
        f"{1000 * timing.busy_s / case.items:.2f}",
        f"{timing.real_share:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def verdict(timings: Sequence[Timing]) -> list[str]:
    """The worst numbers beside what was aimed at."""
    slowest = min(timings, key=lambda timing: timing.share)
    dearest = max(timings, key=lambda timing: timing.overhead_ms)
    return [
        f"Worst share: {slowest.share:.3f} ({slowest.case.name}); aimed at {TARGET_SHARE} or more "
        "at 64 actors.",
        f"Most lost: {dearest.overhead_ms:.2f} ms an item ({dearest.case.name}); aimed at "
        f"{TARGET_MS:g} ms or less.",
    ]


def report(path: Path, title: str, lines: Iterable[str]) -> None:
    """Writes a results file that says where its numbers come from."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    origin = (
        f"Commit `{commit_name()}`, {time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, "
        f"{os.cpu_count()} cores. Command: `{command}`."
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"# {title}", "", origin, *lines, ""]))
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of an update in the shrunken model"
    )
    parser.add_argument(
        "--updates", type=int, default=10, help=f"of each case; {FEWEST_UPDATES} or more"
    )
    parser.add_argument(
        "--cases", nargs="*", default=[], help="only cases whose name contains one of these"
    )
    parser.add_argument(
        "--profile", help="profile the controller in this case instead of writing results"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.md")
    arguments = parser.parse_args()
    if arguments.updates < FEWEST_UPDATES:
        parser.error(
            f"--updates {arguments.updates} leaves no steady pair of updates: give "
            f"{FEWEST_UPDATES} or more"
        )
    words = [arguments.profile] if arguments.profile else arguments.cases
    chosen = [case for case in cases() if not words or any(word in case.name for word in words)]
    if not chosen:
        parser.error(f"no case contains {words}: {', '.join(case.name for case in cases())}")
    if arguments.profile:
        profiled(chosen[0], seconds=arguments.seconds, updates=arguments.updates)
        return
    print("\n".join(HEADER))
    timings = []
    for case in chosen:
        timings.append(timed(case, seconds=arguments.seconds, updates=arguments.updates))
        print(row(timings[-1]), flush=True)
    lines = [
        "",
        "The real training loop over workers that sleep (assumed seconds of `profiles.py`, shrunk "
        "until the model's update takes "
        f"{arguments.seconds:g} s). Median of {arguments.updates - 2 * FILL} steady updates; "
        "checkpoints are not in it. Threads of one process,",
        "except for the cases named ray. An item is a third of a group of 12; its task carries a "
        "picture of the profile's size.",
        "",
        *HEADER,
        *[row(timing) for timing in timings],
        "",
        *verdict(timings),
        "",
        '"Lost" is what the model does not know of: the controller, the executor, and waiting that '
        'the model leaves out. "In real time"',
        "takes what was lost for constant. The sweep has two groups for each rollout actor, and "
        "other roles in proportion to their work.",
    ]
    report(arguments.out, "The controller against the cost model", lines)


if __name__ == "__main__":
    main()
