"""Which class serves which role, with what: the table that every executor reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.colocated import Colocated
from actors.reward import RewardActor
from actors.rollout import RolloutActor
from rl_edit.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """How the workers of a role are made.

    Attributes:
        process: name of the kind of process; roles that share it share a process at each seat.
        make: the plain class, and what it is constructed with.
        gpus: GPUs of one process.
    """

    process: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...]
    gpus: float = 0


Roles = dict[str, WorkerSpec]
"""WorkerSpec by role."""


def crew(config: RunConfig, fields: frozenset[str], learner_class: Callable[..., Any]) -> Roles:
    """The posts of a run. The learner's class is an argument because actors know nothing of learning."""
    asked = config.actors
    rollout_threads, learner_threads = threads_per_actor(config)
    reward = WorkerSpec(
        process="reward", make=RewardActor, arguments=(config, fields, 1), gpus=asked.reward_gpus
    )
    if asked.placement == "colocated":
        both = WorkerSpec(
            process="colocated",
            make=Colocated,
            arguments=(config, rollout_threads, learner_class),
            gpus=asked.rollout_gpus,
        )
        return {"rollout": both, "reward": reward, "learner": both}
    return {
        "rollout": WorkerSpec(
            process="rollout",
            make=RolloutActor,
            arguments=(config, rollout_threads),
            gpus=asked.rollout_gpus,
        ),
        "reward": reward,
        "learner": WorkerSpec(
            process="learner",
            make=learner_class,
            arguments=(config, learner_threads),
            gpus=asked.learner_gpus,
        ),
    }


def threads_per_actor(config: RunConfig) -> tuple[int, int]:
    """CPU threads of (a rollout actor, a learner rank), so that processes busy at once never outnumber the cores.

    On-policy, rollouts and learner take turns and each may have every core; one step off, they share them. Two busy
    processes with two threads each on two cores run several times slower than with one (benchmarks/threads.py).
    """
    asked = config.actors
    if asked.threads is not None:
        return asked.threads, asked.threads
    cores = available_cores()
    if asked.runtime != "ray":
        return cores, cores
    if config.train.max_lag == 0 or asked.placement == "colocated":
        return max(1, cores // asked.num_rollout), max(1, cores // asked.num_learner)
    return max(1, (cores // 2) // asked.num_rollout), max(
        1, (cores - cores // 2) // asked.num_learner
    )


def available_cores() -> int:
    """Cores this process may use: its affinity, or less under a container's CPU quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
