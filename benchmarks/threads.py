"""Measures rollouts per second for several numbers of processes and CPU threads.

Oversubscribed OpenMP threads wait for each other inside every layer. ``actors/roles.py`` splits the
cores by this table, whose ratios come from one run::

    python benchmarks/threads.py            # writes benchmarks/results/threads.md
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scaling import RESULTS, report  # noqa: E402 - imports the project by the path above

LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]
"""(processes, threads of each)."""

GROUPS = 6


def rollouts(threads: int, ready: Any, start: Any, seconds: Any) -> None:
    """Rolls out ``GROUPS`` groups in one process, and reports its seconds.

    Args:
        ready: a semaphore to release after the warm-up.
        start: an event to wait for.
        seconds: a queue for the result.
    """
    # Imported here, in the process that computes.
    import torch

    from actors.rollout import RolloutActor
    from learner.controller.work import WorkPlan
    from rl_edit import wire
    from rl_edit.config import load_config
    from rl_edit.data import open_dataset
    from rl_edit.editors import lora

    config = load_config(preset="tiny-rc-grpo", overrides=["data.num_train=16"])
    actor = RolloutActor(config, threads)
    weights = lora.export(actor.editor.transformer, step=0)
    actor.load(wire.pack(weights))
    pixels = actor.editor.pixels_per_token
    plan = WorkPlan(config, open_dataset(config.data, "train"), pixels_per_token=pixels)
    items = [plan.item(0, slot, weights.id) for slot in range(GROUPS)]
    actor.rollout(items[0])  # the first forward allocates and chooses kernels
    torch.set_num_threads(threads)
    ready.release()
    start.wait()
    began = time.perf_counter()
    for item in items:
        actor.rollout(item)
    seconds.put(time.perf_counter() - began)


def measure(processes: int, threads: int) -> float:
    """Returns groups per second of all processes together."""
    context = multiprocessing.get_context("spawn")
    ready, start, seconds = context.Semaphore(0), context.Event(), context.Queue()
    workers = [
        context.Process(target=rollouts, args=(threads, ready, start, seconds))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    # All begin at once: a process that still loads would take cores from the others.
    for _ in workers:
        ready.acquire()
    start.set()
    slowest = max(seconds.get() for _ in workers)
    for worker in workers:
        worker.join()
    return processes * GROUPS / slowest


def main() -> None:
    rates = {layout: measure(*layout) for layout in LAYOUTS}
    single = rates[(1, 1)]
    lines = [
        f"{GROUPS} groups of 8 candidates x 6 steps a process, built-in editor; ratios to one "
        "process with one thread.",
        "",
        "| processes x threads | groups/s together | ratio |",
        "|---|---|---|",
        *[f"| {p} x {t} | {rate:.2f} | {rate / single:.2f} |" for (p, t), rate in rates.items()],
    ]
    report(RESULTS / "threads.md", "Threads per rollout actor", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
