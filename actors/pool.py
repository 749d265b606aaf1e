"""The Ray file: connecting, placing actors, dispatching with deadlines. Nothing else in the project applies Ray.

Blobs are task returns owned by the driver, so they outlive the actor that made them. GPU actors are not restarted by Ray:
work is idempotent, so a dead or hung actor is replaced here and its group run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from rl_edit import wire
from rl_edit.config import ActorsConfig, RunConfig
from rl_edit.errors import ClusterUnreachable, InputError, ResourcesInfeasible
from rl_edit.types import WorkItem
from rl_edit.update import TrainingFailed

LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, ObjectLostError, TimeoutError)
"""Failures of processes and machines, after which the same call on another actor may well succeed."""


def connect(config: RunConfig) -> None:
    """Joins the cluster of ``RAY_ADDRESS`` (set by hand or inside ``ray job submit``), else starts one on loopback.

    ``ray.init`` blocks for minutes on a dead address, so the address is probed first.

    Raises:
        ClusterUnreachable: within seconds, naming the address.
        ResourcesInfeasible: naming what is asked for and what there is.
    """
    if not ray.is_initialized():
        _join_or_start(config)
    asked = config.actors
    wanted = asked.num_rollout * asked.rollout_gpus + asked.num_reward * asked.reward_gpus + asked.learner_gpus
    present = ray.cluster_resources().get("GPU", 0)
    if wanted > present:
        raise ResourcesInfeasible(
            f"the run needs {wanted:g} GPUs ({asked.num_rollout} rollout x {asked.rollout_gpus:g}, {asked.num_reward} reward x "
            f"{asked.reward_gpus:g}, learner {asked.learner_gpus:g}), the cluster has {present:g}: lower actors.* or add nodes."
        )


def _join_or_start(config: RunConfig) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        _probe(address)
        try:
            ray.init(log_to_driver=False)
        except ConnectionError as error:
            raise _nobody_answers(address, str(error)) from error
    else:
        ray.init(
            address="local",
            num_cpus=available_cores(),
            include_dashboard=config.actors.dashboard,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=512 * 1024 * 1024 if config.actors.rollout_gpus == 0 else None,
        )


def disconnect() -> None:
    """Leaves the cluster; a local one ends with it."""
    if ray.is_initialized():
        ray.shutdown()


def threads_per_actor(config: RunConfig) -> tuple[int, int]:
    """CPU threads of (a rollout actor, the learner), so that processes busy at once never outnumber the cores.

    On-policy, rollouts and learner take turns and each may have every core; one step off, they share them. Two busy
    processes with two threads each on two cores run several times slower than with one (benchmarks/threads.py).
    """
    if config.actors.threads is not None:
        return config.actors.threads, config.actors.threads
    cores = available_cores()
    if config.train.max_lag == 0:
        return max(1, cores // config.actors.num_rollout), cores
    return max(1, (cores // 2) // config.actors.num_rollout), max(1, cores - cores // 2)


def available_cores() -> int:
    """Cores this process may use: its affinity, or less under a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


class RayWorkers:
    """Rollout actors, reward actors and the learner on a Ray cluster, behind the loop's ``Workers`` protocol.

    Args:
        learner_class: the plain learner class; Ray is applied to it here so that no other file needs to.
        rolled: builds the loop's record of a finished group.
        on_event: told of every lost actor and retry.
    """

    def __init__(
        self,
        config: RunConfig,
        fields: frozenset[str],
        learner_class: type,
        rolled: Callable[..., Any],
        *,
        pixels_per_token: int,
        on_event: Callable[..., None],
    ) -> None:
        self.config, self.pixels_per_token = config, pixels_per_token
        self._rolled = rolled
        self._published: list[Any] = []
        asked = config.actors
        rollout_threads, learner_threads = threads_per_actor(config)
        self._learner = _remote(learner_class, asked.learner_gpus).remote(config, learner_threads)
        self._rollouts = _Roster(
            "rollout",
            asked.num_rollout,
            lambda: _remote(RolloutActor, asked.rollout_gpus).remote(config, rollout_threads),
            config=asked,
            on_event=on_event,
            prepare=self._hand_over,
        )
        self._rewards = _Roster(
            "reward",
            asked.num_reward,
            lambda: _remote(RewardActor, asked.reward_gpus).remote(config, fields, 1),
            config=asked,
            on_event=on_event,
        )

    async def start(self) -> None:
        """Waits until every actor has loaded its models, so that deadlines of work start when work starts.

        Raises:
            ResourcesInfeasible: when some actor could not be placed or did not load within ``actors.start_timeout_s``.
        """
        pending = [self._learner.ready.remote(), *self._rollouts.readiness(), *self._rewards.readiness()]
        try:
            await asyncio.wait_for(asyncio.gather(*(_resolve(reference) for reference in pending)), self.config.actors.start_timeout_s)
        except TimeoutError as error:
            raise ResourcesInfeasible(
                f"not all of {len(pending)} actors were running after {self.config.actors.start_timeout_s:g} s (actors.start_timeout_s): "
                f"free are {ray.available_resources()}. Lower actors.*, wait for other jobs, or allow more time for loading."
            ) from error

    async def rollout(self, item: WorkItem) -> Any:
        blob = wire.pack(item)

        async def invoke(actor: Any) -> Any:
            meta_ref, group_ref = actor.run.options(num_returns=2).remote(blob)
            return self._rolled(blob=group_ref, **await _resolve(meta_ref))

        return await self._rollouts.call(f"rollout of group {item.work_id}", invoke)

    async def score(self, rolled: Any) -> np.ndarray:
        table: np.ndarray = await self._rewards.call(
            f"scoring of group {rolled.work_id}", lambda actor: _resolve(actor.score.remote(rolled.blob))
        )
        return table

    async def publish(self, adapter: np.ndarray) -> None:
        self._published = [*self._published[-self.config.train.max_lag - 1 :], ray.put(adapter)]
        await self._rollouts.tell("publish", lambda actor: _resolve(actor.load.remote(self._published[-1])))

    async def learn(self, update: int, groups: Sequence[Any], tables: Sequence[np.ndarray]) -> Any:
        return await self._ask_learner(self._learner.learn.remote(update, list(tables), *(group.blob for group in groups)))

    async def learner_state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = await self._ask_learner(self._learner.state.remote())
        return state

    async def restore_learner(self, state: dict[str, torch.Tensor], updates_done: int) -> None:
        await self._ask_learner(self._learner.restore.remote(state, updates_done))

    async def export(self) -> np.ndarray:
        blob: np.ndarray = await self._ask_learner(self._learner.export.remote())
        return blob

    def close(self) -> None:
        """Ends every actor this object started."""
        for actor in (*self._rollouts.actors, *self._rewards.actors, self._learner):
            with contextlib.suppress(Exception):
                ray.kill(actor)

    async def _ask_learner(self, reference: Any) -> Any:
        try:
            return await asyncio.wait_for(_resolve(reference), self.config.actors.deadline_s)
        except LOST as error:
            raise TrainingFailed(
                f"the learner was lost ({type(error).__name__}): continue from the last checkpoint with --resume; "
                "if it was slow rather than dead, raise actors.deadline_s"
            ) from error

    async def _hand_over(self, actor: Any) -> None:
        """A new rollout actor gets the adapters in use."""
        for reference in self._published:
            await _resolve(actor.load.remote(reference))


class _Roster:
    """Interchangeable actors of one role: who is idle, deadlines, and a replacement for whoever is lost."""

    def __init__(
        self,
        role: str,
        count: int,
        make: Callable[[], Any],
        *,
        config: ActorsConfig,
        on_event: Callable[..., None],
        prepare: Callable[[Any], Awaitable[None]] | None = None,
    ) -> None:
        self.actors = [make() for _ in range(count)]
        self._role, self._make, self._config, self._event, self._prepare = role, make, config, on_event, prepare
        self._idle: asyncio.Queue[int] = asyncio.Queue()
        self._replacing = [asyncio.Lock() for _ in range(count)]
        for index in range(count):
            self._idle.put_nowait(index)

    def readiness(self) -> list[Any]:
        """References that resolve when each actor has been constructed."""
        return [actor.ready.remote() for actor in self.actors]

    async def call(self, what: str, invoke: Callable[[Any], Awaitable[Any]]) -> Any:
        """Runs a call on the next idle actor within its deadline; a lost actor is replaced and the call repeated.

        Raises:
            TrainingFailed: when the budget of attempts is spent.
        """
        for attempt in range(1, self._config.max_attempts + 1):
            index = await self._idle.get()
            actor = self.actors[index]
            try:
                return await asyncio.wait_for(invoke(actor), self._config.deadline_s)
            except LOST as error:
                self._event("actor_lost", role=self._role, during=what, attempt=attempt, reason=_first_line(error))
                await self._replace(index, actor)
            finally:
                self._idle.put_nowait(index)
        raise TrainingFailed(
            f"{what} lost its actor {self._config.max_attempts} times (actors.max_attempts): see events.jsonl and the Ray logs. "
            "A smaller group or a longer actors.deadline_s may help; continue with --resume."
        )

    async def tell(self, what: str, invoke: Callable[[Any], Awaitable[Any]]) -> None:
        """Runs a call on every actor at once; one that is lost meanwhile is replaced (and prepared) instead."""

        async def one(index: int) -> None:
            actor = self.actors[index]
            try:
                await asyncio.wait_for(invoke(actor), self._config.deadline_s)
            except LOST as error:
                self._event("actor_lost", role=self._role, during=what, reason=_first_line(error))
                await self._replace(index, actor)

        await asyncio.gather(*(one(index) for index in range(len(self.actors))))

    async def _replace(self, index: int, lost: Any) -> None:
        """A new actor in place of a lost one, loaded and prepared; nothing when somebody else has already replaced it."""
        async with self._replacing[index]:
            if self.actors[index] is not lost:
                return
            for attempt in range(1, self._config.max_attempts + 1):
                ray.kill(self.actors[index])
                self.actors[index] = self._make()
                try:
                    await asyncio.wait_for(_resolve(self.actors[index].ready.remote()), self._config.start_timeout_s)
                    if self._prepare is not None:
                        await asyncio.wait_for(self._prepare(self.actors[index]), self._config.deadline_s)
                    self._event("actor_replaced", role=self._role, index=index, attempt=attempt)
                    return
                except LOST as error:
                    self._event("actor_lost", role=self._role, during="replacement", attempt=attempt, reason=_first_line(error))
            raise TrainingFailed(
                f"a {self._role} actor could not be replaced in {self._config.max_attempts} attempts (actors.max_attempts): "
                "see events.jsonl and the Ray logs; continue with --resume"
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'deadline passed'}"


def _remote(plain: type, gpus: float) -> Any:
    """Ray applied to a plain class. CPU actors reserve no CPU, so that a small machine never deadlocks on placement, and see no GPU."""
    runtime_env = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}} if gpus == 0 else {}
    return ray.remote(plain).options(num_cpus=0, num_gpus=gpus, max_restarts=0, max_task_retries=0, runtime_env=runtime_env)


async def _resolve(reference: Any) -> Any:
    """The value of a reference. An actor whose constructor refused the user's settings would refuse them again: no retry."""
    try:
        return await reference
    except RayActorError as error:
        _, found, message = str(error).rpartition(f"{InputError.__module__}.{InputError.__name__}: ")
        if found and error.actor_init_failed:
            raise InputError(" ".join(message.split())) from error
        raise


def _probe(address: str) -> None:
    """Fails in seconds when nothing listens at a ``host:port`` address."""
    parsed = urlparse(address if "//" in address else f"//{address}")
    try:
        port = parsed.port
    except ValueError:
        port = None
    if parsed.scheme in ("http", "https") or (address != "auto" and (parsed.hostname is None or port is None)):
        raise _nobody_answers(address, "a driver joins at HOST:6379, or ray://HOST:10001; http://HOST:8265 is for submitting jobs")
    if parsed.hostname is None or port is None:
        return
    try:
        socket.create_connection((parsed.hostname, port), timeout=5).close()
    except OSError as error:
        raise _nobody_answers(address, error.strerror or str(error)) from error


def _nobody_answers(address: str, reason: str) -> ClusterUnreachable:
    return ClusterUnreachable(
        f"no Ray cluster answers at RAY_ADDRESS={address} ({reason}): start one (ray start --head), correct the address, or unset "
        "RAY_ADDRESS to run on this machine"
    )
