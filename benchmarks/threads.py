"""How many CPU threads an actor should get: rollouts per second for processes x threads, as ratios in one run.

Oversubscribed OpenMP threads wait for each other inside every layer. ``actors/roles.py`` splits the cores by this table::

    python benchmarks/threads.py            # writes benchmarks/results/threads.md
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]
GROUPS = 6


def rollouts(threads: int, ready: Any, go: Any, times: Any) -> None:
    """One process: rolls out ``GROUPS`` groups of 8 candidates, 6 steps, and reports its seconds."""
    import torch

    from actors.rollout import RolloutActor
    from rl_edit import wire
    from rl_edit.config import load_config
    from rl_edit.data import open_dataset
    from rl_edit.types import WorkItem

    config = load_config(preset="tiny-rc-grpo", overrides=["data.num_train=16"])
    actor = RolloutActor(config, threads)
    from rl_edit.editors import lora

    weights = lora.export(actor.editor.transformer, step=0)
    actor.load(wire.pack(weights))
    dataset = open_dataset(config.data, "train")
    items = [
        WorkItem(
            group_id=str(i),
            chunk=(0, 8),
            task=dataset[i],
            epoch=0,
            update=0,
            num_candidates=8,
            run_seed=0,
            adapter=weights.id,
        )
        for i in range(GROUPS)
    ]
    actor.rollout(items[0])
    torch.set_num_threads(threads)
    ready.release()
    go.wait()
    start = time.perf_counter()
    for item in items:
        actor.rollout(item)
    times.put(time.perf_counter() - start)


def measure(processes: int, threads: int) -> float:
    """Groups per second of all processes together."""
    context = multiprocessing.get_context("spawn")
    ready, go, times = context.Semaphore(0), context.Event(), context.Queue()
    workers = [
        context.Process(target=rollouts, args=(threads, ready, go, times)) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    go.set()
    slowest = max(times.get() for _ in workers)
    for worker in workers:
        worker.join()
    return processes * GROUPS / slowest


def main() -> None:
    rates = {layout: measure(*layout) for layout in LAYOUTS}
    best = rates[(1, 1)]
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    lines = [
        "# Threads per rollout actor",
        "",
        f"Commit `{commit}`, {time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, {os.cpu_count()} cores. "
        "Command: `python benchmarks/threads.py`.",
        f"{GROUPS} groups of 8 candidates x 6 steps a process, built-in editor; ratios to one process with one thread.",
        "",
        "| processes x threads | groups/s together | ratio |",
        "|---|---|---|",
        *[f"| {p} x {t} | {rate:.2f} | {rate / best:.2f} |" for (p, t), rate in rates.items()],
        "",
    ]
    out = ROOT / "benchmarks" / "results" / "threads.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
