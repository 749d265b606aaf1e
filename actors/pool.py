"""The Ray file: connecting, placing actors, dispatching with deadlines. Nothing else in the project applies Ray.

Blobs are task returns owned by the driver, so they outlive the actor that made them. GPU actors are not restarted by Ray:
work is idempotent, so a dead or hung actor is replaced here and its group run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlparse

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.types import WorkItem


class ClusterUnreachable(RuntimeError):
    """No Ray cluster answers at the given address. Exit code 5."""


class ResourcesInfeasible(RuntimeError):
    """The cluster can never place what the run asks for. Exit code 4."""


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
            num_cpus=os.cpu_count(),
            include_dashboard=config.actors.dashboard,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level="ERROR",
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
    cores = os.cpu_count() or 1
    if config.train.max_lag == 0:
        return max(1, cores // config.actors.num_rollout), cores
    return max(1, (cores // 2) // config.actors.num_rollout), max(1, cores - cores // 2)


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
        self._fields, self._rolled, self._event = fields, rolled, on_event
        rollout_threads, learner_threads = threads_per_actor(config)
        self._make_rollout = lambda: _remote(RolloutActor, config.actors.rollout_gpus).remote(config, rollout_threads)
        self._make_reward = lambda: _remote(RewardActor, config.actors.reward_gpus).remote(config, fields, 1)
        self._learner = _remote(learner_class, config.actors.learner_gpus).remote(config, learner_threads)
        self._rollouts = [self._make_rollout() for _ in range(config.actors.num_rollout)]
        self._rewards = [self._make_reward() for _ in range(config.actors.num_reward)]
        self._idle_rollouts = _slots(len(self._rollouts))
        self._idle_rewards = _slots(len(self._rewards))
        self._published: list[Any] = []

    async def rollout(self, item: WorkItem) -> Any:
        blob = wire.pack(item)

        async def call(actor: Any) -> Any:
            meta_ref, group_ref = actor.run.options(num_returns=2).remote(blob)
            meta = await self._within_deadline(meta_ref)
            return self._rolled(blob=group_ref, **meta)

        return await self._with_retries(f"rollout of group {item.work_id}", self._idle_rollouts, self._rollouts, self._replace_rollout, call)

    async def score(self, rolled: Any) -> np.ndarray:
        async def call(actor: Any) -> np.ndarray:
            table: np.ndarray = await self._within_deadline(actor.score.remote(rolled.blob))
            return table

        result: np.ndarray = await self._with_retries(
            f"scoring of group {rolled.work_id}", self._idle_rewards, self._rewards, self._replace_reward, call
        )
        return result

    async def publish(self, adapter: np.ndarray) -> None:
        reference = ray.put(adapter)
        self._published = [*self._published[-self.config.train.max_lag - 1 :], reference]
        for index, actor in enumerate(self._rollouts):
            try:
                await self._within_deadline(actor.load.remote(reference))
            except (RayActorError, TimeoutError) as error:
                self._event("actor_lost", role="rollout", during="publish", reason=type(error).__name__)
                await self._replace_rollout(index)

    async def learn(self, update: int, groups: Sequence[Any], tables: Sequence[np.ndarray]) -> Any:
        return await self._learner.learn.remote(update, list(tables), *(group.blob for group in groups))

    async def learner_state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = await self._learner.state.remote()
        return state

    async def restore_learner(self, state: dict[str, torch.Tensor], updates_done: int) -> None:
        await self._learner.restore.remote(state, updates_done)

    async def export(self) -> np.ndarray:
        blob: np.ndarray = await self._learner.export.remote()
        return blob

    def close(self) -> None:
        """Ends every actor this object started."""
        for actor in (*self._rollouts, *self._rewards, self._learner):
            with contextlib.suppress(Exception):
                ray.kill(actor)

    async def _within_deadline(self, reference: Any) -> Any:
        return await asyncio.wait_for(_resolve(reference), timeout=self.config.actors.deadline_s)

    async def _with_retries(
        self, what: str, idle: asyncio.Queue[int], actors: list[Any], replace: Callable[[int], Any], call: Callable[[Any], Any]
    ) -> Any:
        """Runs a call on the next idle actor; a dead or hung actor is replaced and the call repeated, up to the budget."""
        for attempt in range(1, self.config.actors.max_attempts + 1):
            index = await idle.get()
            try:
                return await call(actors[index])
            except (RayActorError, TimeoutError) as error:
                self._event("actor_lost", during=what, attempt=attempt, reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                await replace(index)
            finally:
                idle.put_nowait(index)
        raise RuntimeError(
            f"{what} lost its actor {self.config.actors.max_attempts} times (actors.max_attempts): see events.jsonl and the Ray logs; a smaller group "
            "or a longer actors.deadline_s may help"
        )

    async def _replace_rollout(self, index: int) -> None:
        ray.kill(self._rollouts[index])
        self._rollouts[index] = self._make_rollout()
        for reference in self._published:
            await self._rollouts[index].load.remote(reference)

    async def _replace_reward(self, index: int) -> None:
        ray.kill(self._rewards[index])
        self._rewards[index] = self._make_reward()


def _remote(plain: type, gpus: float) -> Any:
    """Ray applied to a plain class. CPU actors reserve no CPU, so that a small machine never deadlocks on placement, and see no GPU."""
    environment = {"OMP_NUM_THREADS": "", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}
    if gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    runtime_env = {"env_vars": {k: v for k, v in environment.items() if v or k == "CUDA_VISIBLE_DEVICES"}}
    return ray.remote(plain).options(num_cpus=0, num_gpus=gpus, max_restarts=0, max_task_retries=0, runtime_env=runtime_env)


async def _resolve(reference: Any) -> Any:
    return await reference


def _slots(count: int) -> asyncio.Queue[int]:
    queue: asyncio.Queue[int] = asyncio.Queue()
    for index in range(count):
        queue.put_nowait(index)
    return queue


def _probe(address: str) -> None:
    """Fails in seconds when nothing listens at a ``host:port`` address."""
    parsed = urlparse(address if "//" in address else f"//{address}")
    if parsed.hostname is None or parsed.port is None:
        return
    try:
        socket.create_connection((parsed.hostname, parsed.port), timeout=5).close()
    except OSError as error:
        raise _nobody_answers(address, error.strerror or str(error)) from error


def _nobody_answers(address: str, reason: str) -> ClusterUnreachable:
    return ClusterUnreachable(
        f"no Ray cluster answers at RAY_ADDRESS={address} ({reason}): start one (ray start --head), correct the address, or unset "
        "RAY_ADDRESS to run on this machine"
    )
