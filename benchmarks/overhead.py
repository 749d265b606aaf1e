"""What the system costs: the demo's updates through Ray against the same tensor work in a plain
loop in one process.

Pairs alternate: after each update through Ray, while its actors are idle, the driver does the same
    update by itself, without
controller, wire and processes. The adapters of both are compared, so it is known whether they did
the same work::

    python benchmarks/overhead.py           # writes benchmarks/results/overhead.md

The controller's own time is that of a run whose workers answer at once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from actors.local_executor import LocalExecutor
from actors.reward import RewardActor
from actors.roles import Roles, worker_roles
from actors.rollout import RolloutActor
from learner.controller.executor import Executor
from learner.controller.work import WorkPlan
from learner.learner import Learner
from rl_edit import wire
from rl_edit.config import RunConfig, load_config
from rl_edit.data import Dataset, open_dataset
from rl_edit.editors import inspect_editor
from rl_edit.messages import LearnOrder, LearnSlot
from scaling import RESULTS, Stopwatch, control, report
from sleepers import Naps, sleeping_roles

WARM = 1
"""Pairs not counted: the first forwards of every process."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One comparison: settings of the run through Ray, and the threads that the bare process
    gets."""

    name: str
    overrides: tuple[str, ...]
    threads: int


BUDGETS = (
    Budget(
        name="1 rollout actor, 1 thread in every process; bare: 1 thread",
        overrides=("actors.num_rollout=1", "actors.threads=1"),
        threads=1,
    ),
    Budget(
        name="the demo: 2 rollout actors and 2 learner ranks x 1 thread; bare: 2 threads",
        overrides=("actors.threads=null",),
        threads=2,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Seconds of one update, both ways, and whether the adapters after it are equal to the last
    bit."""

    ray_s: float
    bare_s: float
    same: bool

    @property
    def ratio(self) -> float:
        return self.ray_s / self.bare_s


class Bare:
    """The work of an update in one process: every class once, called in turn."""

    def __init__(self, config: RunConfig, dataset: Dataset, threads: int) -> None:
        self.config = config
        self.rollout = RolloutActor(config, threads)
        self.reward = RewardActor(config, dataset.fields, threads)
        self.learner = Learner(config, threads)
        self.multiple = inspect_editor(config.editor).pixels_per_token
        self.plan = WorkPlan(config, dataset, pixels_per_token=self.multiple)
        report, blob, _, _ = self.learner.export()
        self.adapter = report.adapter
        self.rollout.load(blob)
        torch.set_num_threads(
            threads
        )  # of the process: constructing the others may have changed it

    def update(self, update: int) -> float:
        """Applies an update. Returns the seconds of its tensor work: packing what the learner takes
        packed is not in it."""
        slots, blobs, seconds = [], [], 0.0
        for slot in range(self.config.train.groups_per_update):
            item = self.plan.item(update, slot, self.adapter)
            began = time.perf_counter()
            group, _ = self.rollout.rollout(item)
            table = self.reward.table(group.candidates, group_id=group.group_id)
            seconds += time.perf_counter() - began
            blobs.append(wire.pack(group))
            slots.append(
                LearnSlot(
                    task_type=item.task.task_type, areas=group.areas, tables=(wire.pack(table),)
                )
            )
        began = time.perf_counter()
        answer, blob, _, _ = self.learner.learn(
            LearnOrder(update=update, plan=str(update), slots=tuple(slots)), *blobs
        )
        self.rollout.load(blob)
        self.adapter = answer.adapter
        return seconds + time.perf_counter() - began


@dataclass
class Alternating:
    """An observer that does each update once more, bare, before the controller goes on to the
    next."""

    bare: Bare
    pairs: list[Pair] = field(default_factory=list)
    went_on: float = 0.0

    def group_scored(self, update: int, done: int, total: int) -> None: ...

    def update_done(self, metrics: dict[str, Any]) -> None:
        # The first update began before this observer saw anything; it is not counted, so its own
        # measure will do.
        ray_s = time.perf_counter() - self.went_on if self.went_on else metrics["seconds/update"]
        bare_s = self.bare.update(metrics["update"])
        self.pairs.append(
            Pair(ray_s=ray_s, bare_s=bare_s, same=str(self.bare.adapter) == metrics["adapter"])
        )
        print(
            f"  update {metrics['update']}: Ray {ray_s:.2f} s, bare {bare_s:.2f} s, ratio "
            f"{self.pairs[-1].ratio:.3f}",
            flush=True,
        )
        self.went_on = time.perf_counter()

    def note(self, text: str) -> None:
        print(f"  {text}")


def demo(updates: int, *overrides: str) -> RunConfig:
    """The demo's settings; its only checkpoint is written after the last update."""
    changes = (f"train.updates={updates}", f"train.checkpoint_every={updates}", *overrides)
    return load_config(preset="tiny-rc-grpo", overrides=changes)


def on_ray(config: RunConfig, roles: Roles) -> Executor:
    from actors import ray_cluster, ray_executor

    ray_cluster.connect(config)
    return ray_executor.RayExecutor(roles)


def compared(budget: Budget, pairs: int, *overrides: str) -> list[Pair]:
    """So many pairs of steady updates. The last update, which writes a checkpoint, is left out."""
    config = demo(WARM + pairs + 1, *overrides, *budget.overrides)
    dataset = open_dataset(config.data, "train")
    watch = Alternating(Bare(config, dataset, budget.threads))
    control(
        config,
        dataset,
        on_ray(config, worker_roles(config, dataset.fields, Learner)),
        watch,
        pixels_per_token=watch.bare.multiple,
    )
    return watch.pairs[WARM:-1]


def own_ms(runtime: str, updates: int, *overrides: str) -> tuple[float, float]:
    """Milliseconds an item (by the clock, computed by the controller's thread) when workers answer
    at once."""
    config = demo(updates, *overrides, "actors.preflight=false")
    roles, dataset, watch = sleeping_roles(Naps()), open_dataset(config.data, "train"), Stopwatch()
    executor = (
        on_ray(config, roles)
        if runtime == "ray"
        else LocalExecutor(roles, threaded=runtime == "thread")
    )
    control(
        config,
        dataset,
        executor,
        watch,
        pixels_per_token=inspect_editor(config.editor).pixels_per_token,
    )
    items = config.train.groups_per_update * len(config.rollout.chunks)
    clock, busy = watch.per_update()
    return 1000 * clock / items, 1000 * busy / items


def summary(budget: Budget, pairs: Sequence[Pair]) -> str:
    ratios = [pair.ratio for pair in pairs]
    cells = [
        budget.name,
        f"{statistics.median(pair.ray_s for pair in pairs):.2f}",
        f"{statistics.median(pair.bare_s for pair in pairs):.2f}",
        f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]",
        " ".join(f"{ratio:.3f}" for ratio in ratios),
        f"{sum(pair.same for pair in pairs)} of {len(pairs)}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=8, help="of updates, for each budget; 1 or more"
    )
    parser.add_argument(
        "--empty-updates",
        type=int,
        default=40,
        help="of the runs whose workers answer at once; 7 or more",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.md")
    arguments = parser.parse_args()
    if arguments.pairs < 1 or arguments.empty_updates < 7:
        parser.error(
            f"--pairs {arguments.pairs} --empty-updates {arguments.empty_updates} leave nothing "
            "to count: give 1 and 7, or more"
        )
    rows = []
    for budget in BUDGETS:
        print(budget.name, flush=True)
        rows.append(summary(budget, compared(budget, arguments.pairs)))
    empty = []
    for runtime in ("inline", "thread", "ray"):
        clock, busy = own_ms(runtime, arguments.empty_updates)
        empty.append(f"| {runtime} | {clock:.2f} | {busy:.2f} |")
        print(empty[-1], flush=True)
    config = demo(1)
    lines = [
        "",
        f"Updates of the demo (`tiny-rc-grpo`: {config.train.groups_per_update} groups of "
        f"{config.rollout.group_size}) through Ray, each "
        "followed by the same update in one bare process;",
        f"{arguments.pairs} pairs after {WARM} to warm up, ratio as median [smallest, largest]. "
        "Checkpoints and start-up are not in it,",
        "nor is the wire in the bare process. Below 1, several processes gain more than the system "
        "costs.",
        "",
        "| threads | Ray, s an update | bare, s an update | Ray / bare | of each pair | same "
        "adapter |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "The same run on workers that answer at once:",
        "",
        "| workers | ms an item | computed by the controller's thread, ms an item |",
        "|---|---|---|",
        *empty,
        "",
        "Inline, the workers' own packing of masks and tables is in both columns.",
    ]
    report(arguments.out, "What the system costs", lines)


if __name__ == "__main__":
    main()
