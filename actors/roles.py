"""Worker specs by role: the table that every executor reads to start processes.

A role (rollout, reward, learner) is an object with methods. A process holds one such object for
each role that it serves, in all executors alike.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from rl_edit.config import RunConfig
from rl_edit.editors import EditorConfig, editor_bytes, load_editor, lora
from rl_edit.errors import (
    InputError,
    WorkerLost,
    WorkerOutOfMemory,
    brief,
    lacks_memory,
    place,
)
from rl_edit.method.update import TrainingFailed
from rl_edit.rewards import available


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """A recipe for the workers of one role.

    Attributes:
        process: kind of process. Roles of one kind share a process in each worker slot.
        make: a plain class, or a function that returns the worker.
        arguments: positional arguments of ``make``.
        shared_editor: settings of the one editor that roles of this process share. It is loaded
            once and passed to ``make`` as ``editor``. None where a worker loads its own, or needs
            none.
        gpus: GPUs of one process.
        idle_gpus: True where the models run on the CPU all the same, so no GPU need be seen.
        weights: bytes of weights that it loads onto its GPU, by what they are. Known and read only
            where ``gpus`` is a fraction.
    """

    process: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    shared_editor: EditorConfig | None = None
    gpus: float = 0
    idle_gpus: bool = False
    weights: Mapping[str, int] = field(default_factory=dict)


Roles = dict[str, WorkerSpec]
"""Worker specs by role."""


def worker_roles(
    config: RunConfig, fields: frozenset[str], learner_class: Callable[..., Any]
) -> Roles:
    """Returns the worker specs of a run.

    Args:
        fields: names of the task fields that the data set provides, for rewards that need them.
        learner_class: the learner's class, an argument because actors know nothing of learning.
    """
    actors = config.actors
    rollout_threads, learner_threads = threads_per_actor(config)
    # Scoring is mostly waiting for a judge, or cheap: one thread.
    reward = WorkerSpec(
        process="reward",
        make=RewardActor,
        arguments=(config, fields, 1),
        gpus=actors.reward_gpus,
        weights=_reward_weights(config, fields) if 0 < actors.reward_gpus < 1 else {},
    )
    shares = (actors.rollout_gpus, actors.learner_gpus)
    of_editor: dict[str, Any] = {
        "idle_gpus": config.editor.device == "cpu",
        "weights": _editor_weights(config) if any(0 < share < 1 for share in shares) else {},
    }
    if actors.placement == "colocated":
        rollout = WorkerSpec(
            process="colocated",
            # On one base, rollouts need an adapter of their own: it may be older than the policy.
            make=partial(RolloutActor, adapter_name=lora.BEHAVIOUR),
            arguments=(config, rollout_threads),
            shared_editor=config.editor,
            gpus=actors.rollout_gpus,
            **of_editor,
        )
        learner = replace(rollout, make=learner_class)
    else:
        rollout = WorkerSpec(
            process="rollout",
            make=RolloutActor,
            arguments=(config, rollout_threads),
            gpus=actors.rollout_gpus,
            **of_editor,
        )
        learner = WorkerSpec(
            process="learner",
            make=learner_class,
            arguments=(config, learner_threads),
            gpus=actors.learner_gpus,
            **of_editor,
        )
    return {"rollout": rollout, "reward": reward, "learner": learner}


def _editor_weights(config: RunConfig) -> dict[str, int]:
    """Returns the size of the editor on a GPU; nothing where it is not known on this machine."""
    size = editor_bytes(config.editor)
    return {f"weights of {config.editor.path} in {config.editor.dtype}": size} if size else {}


def _reward_weights(config: RunConfig, fields: frozenset[str]) -> dict[str, int]:
    """Returns the sizes of the rewards' models on a GPU, as far as they are known here."""
    terms, _ = available(tuple(config.rewards.values()), fields)
    # By model: a process loads one once, however many terms ask it.
    return {name: size for term in terms for name, size in term.gpu_weights().items() if size}


def roles_of(roles: Roles, process: str) -> Roles:
    """Selects the roles of one kind of process."""
    return {role: spec for role, spec in roles.items() if spec.process == process}


def make_workers(roles: Roles) -> dict[str, Any]:
    """Makes the objects of a process, one per role.

    Called inside that process. An editor that several roles share is loaded once. Each role then
    switches its own adapter on before a forward, so the results are those of separate processes.

    Raises:
        InputError: a constructor refuses the settings.
        WorkerOutOfMemory: memory did not suffice.
        TrainingFailed: a constructor raised anything else.
    """
    shared = [spec.shared_editor for spec in roles.values() if spec.shared_editor is not None]
    with _refusals(" and ".join(roles)):
        editor = load_editor(shared[0]) if shared else None
    workers: dict[str, Any] = {}
    for role, spec in roles.items():
        more = {} if spec.shared_editor is None else {"editor": editor}
        with _refusals(role):
            workers[role] = spec.make(*spec.arguments, **more)
    return workers


@contextlib.contextmanager
def _refusals(who: str) -> Iterator[None]:
    """Turns what a constructor raises into an error that ends the run, or names missing memory.

    The same constructor would raise the same again, so another worker is no remedy. Memory is:
    the worker before may not have given its own back yet.
    """
    try:
        yield
    except (InputError, TrainingFailed, WorkerLost):
        raise
    except Exception as error:
        if lacks_memory(error):
            raise WorkerOutOfMemory(f"no memory to make the {who}: {brief(error)}") from error
        raise TrainingFailed(
            f"the {who} could not be made: {brief(error)} (in {place(error)})"
        ) from error


class Process(Protocol):
    """A process of an executor; False in ``alive`` once it was killed or found dead."""

    alive: bool


P = TypeVar("P", bound=Process)


class ProcessTable(Generic[P]):
    """Keeps the newest process of each worker slot.

    Args:
        start: starts a process of a kind (with its roles) in a worker slot.
    """

    def __init__(self, roles: Roles, start: Callable[[str, Roles, int], P]) -> None:
        self._roles, self._start = roles, start
        self._newest: dict[tuple[str, int], tuple[P, set[str]]] = {}

    def spawn(self, role: str, worker_slot: int) -> P:
        """Returns a process that this role has not had.

        Colocated roles ask one after the other. The second gets the process that the first
        started, and both move on together once that process is dead.
        """
        kind = self._roles[role].process
        process, served = self._newest.get((kind, worker_slot), (None, set[str]()))
        # A role that asks again has lost its process, even if that still looks alive.
        if process is None or not process.alive or role in served:
            process, served = self._start(kind, roles_of(self._roles, kind), worker_slot), set()
        self._newest[kind, worker_slot] = process, served | {role}
        return process

    def processes(self) -> list[P]:
        """Returns the newest processes."""
        return [process for process, _ in self._newest.values()]


def threads_per_actor(config: RunConfig) -> tuple[int, int]:
    """Splits the cores over rollout actors and learner ranks.

    Processes that are busy at once never get more threads than there are cores. On-policy,
    rollouts and learner take turns and each may have every core; one update off, they share them.
    Two busy processes with two threads each on two cores run several times slower than with one
    (benchmarks/threads.py).

    Returns:
        CPU threads of (a rollout actor, a learner rank).
    """
    actors = config.actors
    if actors.threads is not None:
        return actors.threads, actors.threads
    cores = available_cores()
    if actors.runtime != "ray":
        # In one process the roles take turns.
        return cores, cores
    if config.train.max_lag == 0 or actors.placement == "colocated":
        return max(1, cores // actors.num_rollout), max(1, cores // actors.num_learner)
    # One update off: half of the cores for either side, at least one thread for each process.
    rollout_cores = cores // 2
    return (
        max(1, rollout_cores // actors.num_rollout),
        max(1, (cores - rollout_cores) // actors.num_learner),
    )


def available_cores() -> int:
    """Returns the cores this process may use: its affinity, or a container's smaller CPU quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with contextlib.suppress(OSError, ValueError):
        # cgroup v2: "quota period" in microseconds, or "max period" without a limit.
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
