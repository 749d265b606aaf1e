"""The Ray file: connecting, and the executor that places plain classes as actors. Nothing else in the project applies Ray.

Blobs are task returns owned by the driver, so they outlive the actor that made them. Ray restarts and retries nothing: a
dead actor is known in milliseconds and the controller decides, because work is repeatable and Ray's own retries are silent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.metrics import Gauge
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from actors.roles import Roles, WorkerSpec, available_cores
from rl_edit.config import RunConfig
from rl_edit.errors import (
    BlobLost,
    ClusterUnreachable,
    InputError,
    ResourcesInfeasible,
    WorkerLost,
    WorkFailed,
)
from rl_edit.method.update import TrainingFailed
from rl_edit.provenance import differences, versions

LOST = (
    RayActorError,
    WorkerCrashedError,
    OutOfMemoryError,
    ObjectStoreFullError,
    OutOfDiskError,
    RaySystemError,
    GetTimeoutError,
)
"""Failures of processes and machines, after which the same call on another actor may well succeed."""

NODE_TIMEOUT_S = 120.0
RAY_JOB_STOP_DEFAULT_S = 3.0
"""Seconds from SIGTERM to SIGKILL of ``ray job stop`` unless the job's runtime_env says otherwise."""

PLACE_POLL_S, PLACE_SAY_S = 1, 15.0

Places = dict[tuple[str, int], tuple[PlacementGroup, int]]
"""Placement group and bundle of each process that has GPUs, by kind of process and seat."""

POISONED = ("OutOfMemoryError", "AcceleratorError", "CudaError", "CUDA error")
"""Errors after which a process with a GPU cannot be trusted any more: it is replaced rather than asked again."""


def connect(config: RunConfig) -> None:
    """Joins the cluster of ``RAY_ADDRESS`` (set by hand or inside ``ray job submit``), else starts one on loopback.

    ``ray.init`` blocks for minutes on a dead address, so the address is probed first.

    Raises:
        ClusterUnreachable: within seconds, naming the address.
    """
    if not ray.is_initialized():
        _join_or_start(config)


def probe() -> None:
    """Asks whether anybody listens at ``RAY_ADDRESS``, if one is set: before minutes or even seconds go into anything else.

    Raises:
        ClusterUnreachable: naming the address.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local" and not ray.is_initialized():
        _probe(address)


def reserve(config: RunConfig, crew: Roles, *, note: Callable[[str], None]) -> Places:
    """Reserves the GPUs of every process at once, so that a run never starts with half of its actors.

    Raises:
        ResourcesInfeasible: naming what is asked for and what there is; at once when the cluster can never place it, after
            ``actors.start_timeout_s`` when others hold it. An autoscaler gets ``actors.wait_for_nodes_s`` to bring nodes.
    """
    seats = {
        "rollout": config.actors.num_rollout,
        "reward": config.actors.num_reward,
        "learner": config.actors.num_learner,
    }
    processes = {post.process: (post, seats[role]) for role, post in crew.items()}
    wanted = [
        (name, seat, post.gpus)
        for name, (post, count) in processes.items()
        if post.gpus
        for seat in range(count)
    ]
    if not wanted:
        return {}
    total = sum(gpus for *_, gpus in wanted)
    each = ", ".join(f"{count} {name} x {post.gpus:g}" for name, (post, count) in processes.items())
    group = placement_group([{"GPU": gpus} for *_, gpus in wanted], strategy="PACK")
    began, said = time.monotonic(), 0.0
    while not group.wait(PLACE_POLL_S):
        waited = time.monotonic() - began
        present, free = (
            ray.cluster_resources().get("GPU", 0),
            ray.available_resources().get("GPU", 0),
        )
        # Ray calls infeasible what fits no single node; bundles that together exceed the cluster just wait.
        hopeless = (
            total > present
            or placement_group_table(group)["stats"]["scheduling_state"] == "INFEASIBLE"
        )
        limit = config.actors.wait_for_nodes_s if hopeless else config.actors.start_timeout_s
        if waited >= limit:
            remove_placement_group(group)
            raise ResourcesInfeasible(
                f"the run needs {total:g} GPUs ({each}), the cluster has {present:g}, {free:g} free: lower actors.*, add nodes, "
                "or, with an autoscaler, allow it time with actors.wait_for_nodes_s."
            )
        if waited - said >= PLACE_SAY_S:
            said = waited
            note(
                f"waiting for {total:g} GPUs ({each}) for {waited:.0f} s; {'no node has them yet' if hopeless else 'others hold them'}"
            )
    return {(name, seat): (group, bundle) for bundle, (name, seat, _) in enumerate(wanted)}


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
        # Ray writes the token of a local cluster readable by everyone.
        with contextlib.suppress(OSError):
            (Path.home() / ".ray" / "auth_token").chmod(0o600)


def check_nodes(*, allow_skew: bool, note: Callable[[str], None]) -> None:
    """Compares Python, packages and our own sources on every node with those here.

    Raises:
        InputError: naming each difference, unless ``allow_skew``.
    """
    probe = ray.remote(versions)
    asked = {
        node["NodeManagerAddress"]: probe.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        for node in ray.nodes()
        if node["Alive"]
    }
    answers = [node.remote() for node in asked.values()]
    try:
        found = dict(zip(asked, ray.get(answers, timeout=NODE_TIMEOUT_S), strict=True))
    except GetTimeoutError as error:
        raise ResourcesInfeasible(
            f"not every node of {len(asked)} started a worker within {NODE_TIMEOUT_S:g} s: see `ray status` and the nodes' logs"
        ) from error
    problems = differences(found, versions())
    if problems and not allow_skew:
        raise InputError(
            f"the nodes do not run the same code: {'; '.join(problems[:6])}. Use one image for head and workers, or --allow-version-skew."
        )
    for problem in problems:
        note(problem)


def check_stop_wait(grace_s: float, *, note: Callable[[str], None]) -> None:
    """Warns when ``ray job stop`` would kill the driver before its grace has passed."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    wait_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", RAY_JOB_STOP_DEFAULT_S))
    if wait_s < grace_s:
        note(
            f"ray job stop kills after {wait_s:g} s, train.grace_s is {grace_s:g}: a stopped job may lose the updates since its last "
            f"checkpoint. Submit with RAY_JOB_STOP_WAIT_TIME_S={grace_s + 10:g} in runtime_env.env_vars."
        )


def disconnect() -> None:
    """Leaves the cluster; a local one ends with it."""
    if ray.is_initialized():
        ray.shutdown()


class RayWorker:
    """One incarnation of an actor behind the executor's ``Worker``."""

    def __init__(self, post: WorkerSpec, place: tuple[PlacementGroup, int] | None) -> None:
        # CPU actors reserve no CPU, so that a small machine never deadlocks on placement, and see no GPU.
        runtime_env = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}} if post.gpus == 0 else {}
        options: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": post.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        if place is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                place[0], placement_group_bundle_index=place[1]
            )
        remote = ray.remote(post.make).options(runtime_env=runtime_env, **options)
        self._actor = remote.remote(*post.arguments)
        self.alive = True

    async def call(self, method: str, *args: Any, blobs: int = 0) -> Any:
        if not self.alive:
            raise WorkerLost("the process was killed")
        try:
            answers = getattr(self._actor, method).options(num_returns=1 + blobs).remote(*args)
            if blobs == 0:
                return await answers
            return (await answers[0], *answers[1:])
        except ObjectLostError as error:
            raise BlobLost(_first_line(error)) from error
        except RayTaskError as error:
            raise _raised(error) from error
        except RayActorError as error:
            self.alive = False
            # An actor whose constructor refused the user's settings would refuse them again.
            _, found, message = str(error).rpartition(
                f"{InputError.__module__}.{InputError.__name__}: "
            )
            if found and error.actor_init_failed:
                raise InputError(" ".join(message.split())) from error
            raise WorkerLost(_first_line(error)) from error
        except LOST as error:
            raise WorkerLost(_first_line(error)) from error

    def kill(self) -> None:
        self.alive = False
        with contextlib.suppress(Exception):  # it may be dead already, or the cluster gone
            ray.kill(self._actor)


class RayExecutor:
    """Workers as actors of a Ray cluster."""

    def __init__(self, crew: Roles, places: Places | None = None) -> None:
        self._crew, self._places = crew, places or {}
        self._workers: dict[tuple[str, int], RayWorker] = {}
        self._gauges: dict[str, Gauge] = {}

    def spawn(self, role: str, seat: int) -> RayWorker:
        post = self._crew[role]
        worker = self._workers.get((post.process, seat))
        if worker is None or not worker.alive or post.process == role:
            worker = self._workers[post.process, seat] = RayWorker(
                post, self._places.get((post.process, seat))
            )
        return worker

    def put(self, blob: np.ndarray) -> Any:
        return ray.put(blob)

    async def fetch(self, ref: Any) -> np.ndarray:
        try:
            array: np.ndarray = await ref
        except ObjectLostError as error:
            raise BlobLost(_first_line(error)) from error
        return array

    def store_bytes(self) -> float:
        return float(ray.cluster_resources().get("object_store_memory", 0))

    def free(self) -> str:
        kept = {
            name: amount
            for name, amount in ray.available_resources().items()
            if name in ("CPU", "GPU", "memory")
        }
        return ", ".join(f"{name} {amount:g}" for name, amount in sorted(kept.items())) or "nothing"

    def mirror(self, metrics: dict[str, Any]) -> None:
        """Numbers as gauges ``rl_edit_...`` of Ray's metrics agent."""
        with contextlib.suppress(Exception):  # watching must never stop what is watched
            for name, value in metrics.items():
                if isinstance(value, int | float) and value == value:
                    plain = "rl_edit_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
                    if plain not in self._gauges:
                        self._gauges[plain] = Gauge(
                            plain, description=f"{name} of the newest update (rl-edit)"
                        )
                    self._gauges[plain].set(float(value))

    async def close(self) -> None:
        for worker in self._workers.values():
            worker.kill()
        for group in {group.id: group for group, _ in self._places.values()}.values():
            with contextlib.suppress(Exception):
                remove_placement_group(group)


def _raised(error: RayTaskError) -> Exception:
    """What a method raised, as the controller knows it."""
    cause = error.cause
    if isinstance(cause, InputError | TrainingFailed | WorkerLost):
        return cause
    if isinstance(cause, ObjectLostError):
        return BlobLost(_first_line(cause))
    kind, text = type(cause).__name__, " ".join(str(cause).split())[:500]
    if any(sign in kind or sign in text for sign in POISONED):
        return WorkerLost(f"{kind}: {text}")
    return WorkFailed(f"{kind}: {text}")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _probe(address: str) -> None:
    """Fails in seconds when nothing listens at a ``host:port`` address."""
    parsed = urlparse(address if "//" in address else f"//{address}")
    try:
        port = parsed.port
    except ValueError:
        port = None
    if parsed.scheme in ("http", "https") or (
        address != "auto" and (parsed.hostname is None or port is None)
    ):
        raise _nobody_answers(
            address,
            "a driver joins at HOST:6379, or ray://HOST:10001; http://HOST:8265 is for submitting jobs",
        )
    if parsed.hostname is None or port is None:
        return
    try:
        socket.create_connection((parsed.hostname, port), timeout=5).close()
    except OSError as error:
        raise _nobody_answers(address, error.strerror or str(error)) from error


def _nobody_answers(address: str, reason: str) -> ClusterUnreachable:
    shown = re.sub(r"[^/@]*@", "", address)  # a user and a password belong in no message
    return ClusterUnreachable(
        f"no Ray cluster answers at RAY_ADDRESS={shown} ({reason}): start one (ray start --head), correct the address, or unset "
        "RAY_ADDRESS to run on this machine"
    )
