"""Faults of a cluster of two nodes: the worker node is cut off, slowed, healed or killed."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cable import ADDRESSES
from chaos_rivals import Rivalry, Start
from chaos_runs import ROOT, Attempt, Launch
from two_nodes import PLACES, PORT, TwoNodes

ON_NODES = ("actors.runtime=ray", "actors.num_rollout=2", "actors.deadline_s=30")
WORKERS = ("rollout-0", "reward-0", "rollout-0,rollout-1")
"""Slots whose first process is on the worker node."""


def struck(
    strike: Callable[[TwoNodes, Attempt], object], start: Start, run: Path, draw: random.Random
) -> Rivalry:
    """A run on two nodes; the worker node is hit after one or two updates."""
    with TwoNodes() as nodes:
        launch = Launch(
            settings=ON_NODES,
            environment={
                **{name: value for name, value in nodes.environment.items() if "RAY" in name},
                "RAY_ADDRESS": f"{ADDRESSES[0]}:{PORT}",
                PLACES: draw.choice(WORKERS),
            },
            program=tuple(
                nodes.command(0, sys.executable, ROOT / "benchmarks" / "two_nodes.py", "train")
            ),
        )
        attempt = start(launch, False)
        hit = attempt.wait_updates(draw.randint(1, 2))
        if hit:
            strike(nodes, attempt)
        attempt.end()
    return Rivalry(hit=hit, problems=[], ends=[(attempt, frozenset({0, 3}))])


def cut_and_heal(nodes: TwoNodes, attempt: Attempt) -> None:
    """Cuts the node off for longer than the cluster waits for it, or for less."""
    nodes.cut()
    time.sleep(4)
    nodes.heal()


def slow(nodes: TwoNodes, attempt: Attempt) -> None:
    nodes.slow(delay_s=0.15, loss=0.02)


NODE_FAULTS: dict[str, Callable[[Start, Path, random.Random], Rivalry]] = {
    "cut-node": partial(struck, lambda nodes, attempt: nodes.cut()),
    "cut-and-heal-node": partial(struck, cut_and_heal),
    "slow-node": partial(struck, slow),
    "kill-node": partial(struck, lambda nodes, attempt: nodes.kill_worker()),
}
