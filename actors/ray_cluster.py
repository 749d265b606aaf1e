"""The Ray cluster of a run: joining or starting one, comparing its nodes, reserving its GPUs.

What runs on the cluster is in ``ray_executor.py``.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlparse

import ray
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import ray_start, ray_watch
from actors.ray_queries import answered
from actors.roles import Roles, available_cores
from rl_edit.config import RunConfig
from rl_edit.errors import ClusterUnreachable, InputError, ResourcesInfeasible, brief
from rl_edit.provenance import differences, node_versions, versions

NODE_TIMEOUT_S = 120.0
RAY_JOB_STOP_DEFAULT_S = 3.0
"""Seconds from SIGTERM to SIGKILL of ``ray job stop``, unless the job's runtime_env sets them."""

RESERVE_POLL_S, RESERVE_NOTE_S = 1, 15.0
"""Seconds between two looks at a reservation, and between two notes about it."""

CPU_OBJECT_STORE_BYTES = 512 * 1024 * 1024

Places = dict[tuple[str, int], tuple[PlacementGroup, int]]
"""Placement group and bundle of each process with GPUs, by kind of process and worker slot."""


def connect(config: RunConfig, *, note: Callable[[str], None] = print) -> None:
    """Joins the cluster of ``RAY_ADDRESS``, or starts one.

    The variable is set by hand or by ``ray job submit``. Without it a cluster of this machine
    listens on loopback only and ends with this process. ``ray.init`` blocks for minutes on a dead
    address, so the address is probed first.

    Raises:
        ClusterUnreachable: within seconds, naming the address; or Ray did not start.
        ResourcesInfeasible: this machine has no room for a cluster.
    """
    if not ray.is_initialized():
        join_or_start(config, note=note)
        ray_watch.begin()


def probe() -> None:
    """Checks that something listens at ``RAY_ADDRESS``.

    Does nothing where it is unset. Called before minutes or even seconds go into anything else.

    Raises:
        ClusterUnreachable: naming the address.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local" and not ray.is_initialized():
        _probe(address)


def join_or_start(config: RunConfig, *, note: Callable[[str], None] = print) -> None:
    """Connects a process that is not connected yet."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    # "local" is Ray's word for a new cluster.
    if address and address != "local":
        _probe(address)
        try:
            with (
                ray_start.own_signals(),
                ray_start.quiet(),
                ray_start.this_environment(note=note),
            ):
                # Ray's client sends its settings to a server that need not have our modules.
                job: Any = None if address.startswith("ray://") else ray_start.Job()
                # At its usual level Ray prints three lines about where it connects to.
                ray.init(log_to_driver=False, logging_level=logging.ERROR, job_config=job)
        except Exception as error:  # of several kinds: a refused token, other versions, no answer
            raise _unreachable(address, brief(error)) from error
        return
    # Ray runs workers at nice 15. Beside one busy program they would wait for every core, and the
    # run would take many times as long (benchmarks/busy.py). The raylet reads this at its start.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray_start.start(
        note=note,
        address="local",
        num_cpus=available_cores(),
        include_dashboard=config.actors.dashboard,
        dashboard_host="127.0.0.1",
        # Workers log to files of the session; the driver's terminal shows progress only.
        log_to_driver=False,
        logging_level=logging.ERROR,
        # By default Ray takes 30 % of the memory. Groups of the built-in editor are small.
        object_store_memory=CPU_OBJECT_STORE_BYTES if config.actors.rollout_gpus == 0 else None,
    )


def disconnect() -> None:
    """Leaves the cluster. A local one ends with it, and every process of it."""
    ray_watch.leave()


@ray_watch.watched()
def reserve(
    config: RunConfig,
    roles: Roles,
    *,
    note: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> Places:
    """Reserves the GPUs of every process at once.

    A run therefore never starts with half of its actors.

    Args:
        check: called while waiting; it raises when the run is to end.

    Raises:
        ResourcesInfeasible: naming what is requested and what there is. It is raised at once when
            the cluster can never place it, and after ``actors.start_timeout_s`` when others hold
            the GPUs. An autoscaler gets ``actors.wait_for_nodes_s`` to bring nodes.
        ClusterLost: Ray does not answer.
    """
    counts = {
        "rollout": config.actors.num_rollout,
        "reward": config.actors.num_reward,
        "learner": config.actors.num_learner,
    }
    # Colocated roles are one kind of process, so its GPUs are counted once.
    kinds = {spec.process: (spec, counts[role]) for role, spec in roles.items()}
    bundles = [
        (kind, worker_slot, spec.gpus)
        for kind, (spec, count) in kinds.items()
        if spec.gpus
        for worker_slot in range(count)
    ]
    if not bundles:
        return {}
    request = ", ".join(f"{count} {kind} x {spec.gpus:g}" for kind, (spec, count) in kinds.items())
    # One bundle per process. PACK fills a node before the next: adapters and groups move less.
    gpus_of_each = [{"GPU": gpus} for *_, gpus in bundles]
    group: PlacementGroup = answered(
        "that it reserves GPUs", partial(placement_group, gpus_of_each, strategy="PACK")
    )
    _wait_for(group, sum(gpus for *_, gpus in bundles), request, config, note=note, check=check)
    return {
        (kind, worker_slot): (group, bundle)
        for bundle, (kind, worker_slot, _) in enumerate(bundles)
    }


def place_lost(group: PlacementGroup, bundle: int) -> bool:
    """Returns whether a bundle is on no living node: its own was lost, and no other took it."""
    # Ray empties the node of a bundle when it notices that the node is lost.
    node = placement_group_table(group).get("bundles_to_node_id", {}).get(bundle, "")
    return node not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _wait_for(
    group: PlacementGroup,
    total: float,
    request: str,
    config: RunConfig,
    *,
    note: Callable[[str], None],
    check: Callable[[], None],
) -> None:
    """Waits until a placement group has its GPUs; gives it back when it cannot get them."""
    began, noted = time.monotonic(), 0.0
    # Ray's own limit of this wait does not hold while its control service is away.
    while not answered("whether GPUs are reserved", partial(group.wait, RESERVE_POLL_S)):
        check()
        ray_watch.check()
        waited = time.monotonic() - began
        present, free, state = answered("which GPUs it has", partial(_gpus, group))
        # Ray calls infeasible what fits no single node. Bundles that together exceed the cluster
        # merely wait, so the total is compared here.
        hopeless = total > present or state == "INFEASIBLE"
        limit = config.actors.wait_for_nodes_s if hopeless else config.actors.start_timeout_s
        if waited >= limit:
            answered("that GPUs are free again", partial(remove_placement_group, group))
            raise ResourcesInfeasible(
                f"the run needs {total:g} GPUs ({request}), the cluster has {present:g}, "
                f"{free:g} free: lower actors.*, add nodes, or, with an autoscaler, allow it time "
                "with actors.wait_for_nodes_s."
            )
        if waited - noted >= RESERVE_NOTE_S:
            noted = waited
            reason = "no node has them yet" if hopeless else "others hold them"
            note(f"waiting for {total:g} GPUs ({request}) for {waited:.0f} s; {reason}")


def _gpus(group: PlacementGroup) -> tuple[float, float, str]:
    """Returns the GPUs of the cluster, those that are free, and what becomes of a reservation."""
    # Asked together: every question costs a thread, and this is asked each second.
    return (
        ray.cluster_resources().get("GPU", 0),
        ray.available_resources().get("GPU", 0),
        placement_group_table(group)["stats"]["scheduling_state"],
    )


@ray_watch.watched()
def check_nodes(*, allow_skew: bool, note: Callable[[str], None]) -> None:
    """Compares packages and sources of every node with ours.

    Raises:
        InputError: naming each difference, unless ``allow_skew``.
        ResourcesInfeasible: a node started no worker in time.
    """
    # A task pinned to each node, without a CPU: it runs where all CPUs are taken.
    remote_versions = ray.remote(node_versions)
    requests = {
        node["NodeManagerAddress"]: remote_versions.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote()
        for node in answered("which nodes it has", ray.nodes)
        if node["Alive"]
    }
    try:
        responses = _responses(list(requests.values()))
    except RayTaskError as error:
        raise InputError(
            f"a node cannot import rl-edit ({brief(error.cause)}): install it on every node, or "
            "submit the run with deploy/submit.sh, which takes it along."
        ) from error
    except GetTimeoutError as error:
        raise ResourcesInfeasible(
            f"not every node of {len(requests)} started a worker within {NODE_TIMEOUT_S:g} s: see "
            "`ray status` and the nodes' logs"
        ) from error
    problems = differences(dict(zip(requests, responses, strict=True)), versions())
    if problems and not allow_skew:
        raise InputError(
            f"the nodes do not run the same code: {'; '.join(problems[:6])}. Use one image for "
            "head and workers, or --allow-version-skew."
        )
    for problem in problems:
        note(problem)


def _responses(requests: list[Any]) -> list[Any]:
    """Waits for tasks, as long as there is a cluster to run them."""
    began = time.monotonic()
    while ray.wait(requests, num_returns=len(requests), timeout=RESERVE_POLL_S)[1]:
        ray_watch.check()
        if time.monotonic() - began >= NODE_TIMEOUT_S:
            raise GetTimeoutError(f"no answer within {NODE_TIMEOUT_S:g} s")
    responses: list[Any] = ray.get(requests)
    return responses


def check_stop_wait(grace_s: float, *, note: Callable[[str], None]) -> None:
    """Warns when ``ray job stop`` kills before ``train.grace_s``."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return  # not a submitted job
    wait_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", RAY_JOB_STOP_DEFAULT_S))
    if wait_s < grace_s:
        note(
            f"ray job stop kills after {wait_s:g} s, train.grace_s is {grace_s:g}: a stopped job "
            "may lose the updates since its last checkpoint. Submit with "
            f"RAY_JOB_STOP_WAIT_TIME_S={grace_s + 10:g} in runtime_env.env_vars."
        )


def _probe(address: str) -> None:
    """Fails in seconds when nothing listens at ``host:port``."""
    parsed = urlparse(address if "//" in address else f"//{address}")
    try:
        port = parsed.port
    except ValueError:  # not a number
        port = None
    no_port = parsed.hostname is None or port is None
    if parsed.scheme in ("http", "https") or (address != "auto" and no_port):
        raise _unreachable(
            address,
            "a driver joins at HOST:6379, or ray://HOST:10001; http://HOST:8265 is for submitting "
            "jobs",
        )
    if parsed.hostname is None or port is None:
        return  # "auto": Ray finds a cluster of this machine
    try:
        socket.create_connection((parsed.hostname, port), timeout=5).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error


def _unreachable(address: str, reason: str) -> ClusterUnreachable:
    # A user and a password belong in no message.
    shown, reason = (re.sub(r"[^\s/@]*@", "", text) for text in (address, reason))
    return ClusterUnreachable(
        f"no Ray cluster answers at RAY_ADDRESS={shown} ({reason}): start one (ray start --head), "
        "correct the address, or unset RAY_ADDRESS to run on this machine"
    )
