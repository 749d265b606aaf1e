"""Runs workers as actors of a Ray cluster.

Blobs are task returns owned by the driver, so they outlive the actor that made them. Ray restarts
and retries nothing: its own retries are silent. A dead actor is known in milliseconds and the
controller decides, because work is repeatable.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import (
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.metrics import Gauge
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import gpu_checks, ray_watch
from actors.devices import Device
from actors.ray_cluster import Places, place_lost
from actors.ray_queries import answered
from actors.roles import ProcessTable, Roles
from rl_edit.errors import (
    MESSAGE_LENGTH,
    BlobLost,
    ClusterLost,
    InputError,
    WorkerLost,
    WorkFailed,
    brief,
)
from rl_edit.method.update import TrainingFailed

POISONED = ("OutOfMemoryError", "AcceleratorError", "CudaError", "CUDA error")
"""Signs of errors after which a process with a GPU cannot be trusted: it is replaced."""


FETCH_S, PROBE_S = 120.0, 15.0
"""Longest wait for an array from another machine; and for one that a call may have waited for."""

PLACE_POLL_S, PLACE_LOST_S = 5.0, 30.0
"""Seconds between two looks at the place of a process, and without one until it is given up."""

GIVE_BACK_S = 5.0
"""Longest wait at the end of a run until Ray has taken its GPUs back."""

EVERY_CAUSE = " (?:There are some potential|Some common causes)"
"""Begins Ray's list of all reasons for which a process may end."""


def actor_class(kind: str) -> type:
    """Makes the class of an actor process; Ray shows the process as ``ray::KIND``.

    A class made here travels by value: a worker process can load it without importing anything of
    ours. Its constructor imports ``rl_edit`` first, which puts our packages before a user's own
    ``actors`` or ``learner`` (``rl_edit/__init__.py``). Then it claims its GPUs, before a library
    asks CUDA what there is. Only then does it fetch the roles, which name classes of those
    packages. They come inside a list, where Ray leaves a reference alone. Models are loaded by the
    first call of a role, so that the driver can compare GPUs before.
    """

    class Actor:
        def __init__(self, gpus: float, roles: list[Any]) -> None:
            self._refusal: Exception | None = None
            self._workers: dict[str, Any] | None = None
            try:
                import rl_edit  # noqa: F401 - imported for its effect, see above
                from actors.devices import claim

                context = ray.get_runtime_context()
                self._device = claim(
                    gpus,
                    context.get_accelerator_ids().get("GPU", ()),
                    node_id=context.get_node_id(),
                    address=ray.util.get_node_ip_address(),
                )
                self._roles = ray.get(roles[0])
            except RayError:
                raise  # a lost object says nothing about the settings
            except Exception as error:
                # Of an actor whose constructor raises, Ray passes on some text only. So the
                # process lives, and every call raises the error itself.
                self._refusal = error

        def device(self) -> Any:
            if self._refusal is not None:
                raise self._refusal
            return self._device

        def run(self, role: str, method: str, *args: Any) -> Any:
            if self._workers is None and self._refusal is None:
                from actors.roles import make_workers

                try:
                    self._workers = make_workers(self._roles)
                except Exception as error:
                    self._refusal = error
            if self._refusal is not None:
                raise self._refusal
            return getattr(self._workers[role], method)(*args)  # type: ignore[index]

    Actor.__name__ = Actor.__qualname__ = kind
    return Actor


def environment(gpus: float) -> dict[str, str]:
    """Returns environment variables of an actor process.

    Ray sets them before the process starts Python, hence before torch reads them.
    """
    # A thread that waits for others sleeps instead of spinning. Spinning threads of one process
    # hold the cores that the others need: twenty times slower beside one busy program.
    # A user's own policy is kept.
    variables = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    # Without this a CPU actor would take memory of a GPU that is not its own. Ray itself hides
    # nothing from actors without GPUs.
    return variables if gpus else {**variables, "CUDA_VISIBLE_DEVICES": ""}


class RayProcess:
    """One incarnation of an actor process.

    Args:
        place: its reserved bundle in a placement group; None where it has no GPU.

    Attributes:
        device: its GPUs, once it was asked for them; None before, and on the CPU.
    """

    def __init__(
        self, kind: str, slot: int, roles: Roles, place: tuple[PlacementGroup, int] | None
    ) -> None:
        self.name, self.roles = f"{kind}-{slot}", roles
        self.place = place
        self.gpus = gpus = max(spec.gpus for spec in roles.values())
        self.device: Device | None = None
        # CPU actors reserve no CPU, so that a small machine never deadlocks on placement.
        options: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": environment(gpus)},
        }
        if place is not None:
            group, bundle = place
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=bundle
            )
        remote: Any = ray.remote(actor_class(kind)).options(**options)
        # Kept here, or Ray could free the roles before the constructor has fetched them.
        self._roles = ray.put(roles)
        self.actor: Any = remote.remote(gpus, [self._roles])
        self.alive = True

    def kill(self) -> None:
        self.alive = False
        with contextlib.suppress(Exception):  # it may be dead already, or the cluster gone
            ray.kill(self.actor)


class RayWorker:
    """Calls one role of an actor process.

    Args:
        compare: called before the role is made; it raises where the process has no GPU of its own.
    """

    def __init__(
        self, process: RayProcess, role: str, compare: Callable[[RayProcess], Awaitable[None]]
    ) -> None:
        self._process, self._role, self._compare = process, role, compare

    async def call(self, method: str, *args: Any, blobs: int = 0) -> Any:
        if not self._process.alive:
            raise WorkerLost("the process was killed")
        if method == "ready":
            await self._compare(self._process)
        try:
            # Ray shows the name as the process's title while it runs, and in its task list.
            call = self._process.actor.run.options(
                name=f"{self._role}.{method}", num_returns=1 + blobs
            )
            refs = call.remote(self._role, method, *args)
            if blobs == 0:
                return await refs
            # The value is awaited, the arrays stay where they are.
            return (await refs[0], *refs[1:])
        except ObjectLostError as error:
            raise BlobLost(_first_line(error)) from error
        except RayTaskError as error:
            raise _of_method(error) from error
        except RayActorError as error:
            # All roles of the process learn it from the flag, and move on together.
            self._process.alive = False
            raise _of_actor(error) from error
        except (RayError, ConnectionError) as error:
            # Ray has many errors of machines and connections, and every version has others.
            raise WorkerLost(_first_line(error)) from error

    def kill(self) -> None:
        self._process.kill()


class RayExecutor:
    """Runs workers as actors of a Ray cluster. Refs are Ray's object references.

    Args:
        places: the reserved bundles of processes with GPUs (``ray_cluster.reserve``).
        report: called with the GPUs of each process that has some, before it loads models.
        wait_for_nodes_s: how long an autoscaler may take to replace a lost node.
    """

    def __init__(
        self,
        roles: Roles,
        places: Places | None = None,
        *,
        report: Callable[[Device], None] = lambda device: None,
        wait_for_nodes_s: float = 0.0,
    ) -> None:
        self._places, self._report = places or {}, report
        self._place_lost_s = max(PLACE_LOST_S, wait_for_nodes_s)
        self._processes = ProcessTable(
            roles,
            lambda kind, served, worker_slot: RayProcess(
                kind, worker_slot, served, self._places.get((kind, worker_slot))
            ),
        )
        self._gauges: dict[str, Gauge] = {}

    def spawn(self, role: str, worker_slot: int) -> RayWorker:
        return RayWorker(self._processes.spawn(role, worker_slot), role, self._compare)

    async def _compare(self, process: RayProcess) -> None:
        """Compares the GPUs of a new process with those of all others, before it loads models.

        Raises:
            ResourcesInfeasible: it sees none, shares one wrongly, or its share is too small.
            WorkerLost: the node with its GPUs was lost, and no other has them.
        """
        if not process.gpus or process.device is not None:
            return
        # Whatever ends the process is raised by the call that follows.
        with contextlib.suppress(RayError):
            seen = await self._first_answer(process)
            # Colocated roles ask at once. The first answer is taken.
            if process.device is None:
                process.device = replace(seen, worker=process.name)
                alive = [other for other in self._processes.processes() if other.alive]
                others = [other.device for other in alive if other is not process and other.device]
                gpu_checks.require(process.device, others, process.roles)
                self._report(process.device)

    async def _first_answer(self, process: RayProcess) -> Device:
        """Waits for a process as long as there is a node for it."""
        answer, without_s = asyncio.ensure_future(_awaited(process.actor.device.remote())), 0.0
        try:
            while not (await asyncio.wait({answer}, timeout=PLACE_POLL_S))[0]:
                place = process.place
                lost = place is not None and await asyncio.to_thread(_place_lost, *place)
                without_s = without_s + PLACE_POLL_S if lost else 0.0
                if without_s >= self._place_lost_s:
                    raise WorkerLost(
                        "the node with its GPUs was lost, and no other node has had them free for "
                        f"{without_s:g} s"
                    )
            seen: Device = answer.result()
            return seen
        finally:
            answer.cancel()

    def direct(self, role: str) -> None:
        """Returns None: every worker is a process of its own."""

    def put(self, blob: NDArray[np.uint8]) -> Any:
        return ray.put(blob)

    async def fetch(self, ref: Any) -> NDArray[np.uint8]:
        return await _fetch(ref, FETCH_S)

    async def keep(self, ref: Any) -> Any:
        # A copy of its own. What Ray fetched is a second copy, which it drops when it needs room.
        return ray.put(np.array(await _fetch(ref, FETCH_S)))

    async def require(self, arguments: Sequence[Any]) -> None:
        refs = [argument for argument in arguments if isinstance(argument, ray.ObjectRef)]
        await asyncio.gather(*(_fetch(ref, PROBE_S) for ref in refs))

    def store_bytes(self) -> float:
        there = answered("how large its object store is", ray.cluster_resources)
        return float(there.get("object_store_memory", 0))

    def free(self) -> str:
        try:
            free = answered("what is free", ray.available_resources)
        except ClusterLost as error:
            # It completes a message about another problem, which must not be lost.
            return f"unknown ({error})"
        amounts = {
            name: amount
            for name, amount in sorted(free.items())
            if name in ("CPU", "GPU", "memory")
        }
        return ", ".join(f"{name} {amount:g}" for name, amount in amounts.items()) or "nothing"

    def problem(self) -> str:
        return ray_watch.problem()

    def mirror(self, metrics: dict[str, Any]) -> None:
        """Shows numbers as gauges of Ray's metrics agent.

        Names begin with ``rl_edit_``.
        """
        with contextlib.suppress(Exception):  # monitoring must never stop the run
            for name, value in metrics.items():
                # A NaN differs from itself; a gauge of it would hide the last number.
                if not isinstance(value, int | float) or value != value:
                    continue
                gauge = "rl_edit_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
                if gauge not in self._gauges:
                    self._gauges[gauge] = Gauge(
                        gauge, description=f"{name} of the newest update (rl-edit)"
                    )
                self._gauges[gauge].set(float(value))

    async def close(self) -> None:
        if ray_watch.problem():
            return  # nothing is left to ask; what this process started ends with the cluster
        for process in self._processes.processes():
            process.kill()
        for group in {group.id: group for group, _ in self._places.values()}.values():
            with contextlib.suppress(Exception):  # the cluster may be gone
                answered(
                    "that GPUs are free",
                    partial(remove_placement_group, group),
                    limit_s=GIVE_BACK_S,
                )


async def _fetch(ref: Any, limit_s: float) -> NDArray[np.uint8]:
    """Returns an array, or raises BlobLost when its machine is gone or does not send it."""
    waiting = asyncio.ensure_future(_awaited(ref))
    try:
        array: NDArray[np.uint8] = await asyncio.wait_for(waiting, limit_s)
        return array
    except TimeoutError as error:
        raise BlobLost(f"its machine did not send it within {limit_s:g} s") from error
    except (RayError, ConnectionError) as error:
        raise BlobLost(_first_line(error)) from error


async def _awaited(ref: Any) -> Any:
    return await ref


def _place_lost(group: PlacementGroup, bundle: int) -> bool:
    try:
        return answered("where GPUs are", partial(place_lost, group, bundle))
    except Exception:  # of many kinds, when the cluster does not answer: that is noticed elsewhere
        return False


def _of_method(error: RayTaskError) -> Exception:
    """Translates a method's error into the controller's."""
    cause = error.cause
    if isinstance(cause, InputError | TrainingFailed | WorkerLost):
        return cause
    if isinstance(cause, ObjectLostError):
        return BlobLost(_first_line(cause))
    text = brief(cause)
    return WorkerLost(text) if any(sign in text for sign in POISONED) else WorkFailed(text)


def _of_actor(error: RayActorError) -> WorkerLost:
    """Translates the death of an actor's process, with Ray's reason for it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if error.actor_init_failed:
        # A traceback: its last line is the message.
        return WorkerLost(lines[-1][:MESSAGE_LENGTH])
    reason = next((line for line in lines if "exit detail" in line), lines[0] if lines else "")
    # Ray lists every cause there is, each time. The beginning is what it saw.
    seen = re.split(EVERY_CAUSE, reason.rpartition("exit detail: ")[2])[0]
    return WorkerLost(f"{type(error).__name__}: {seen}")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
