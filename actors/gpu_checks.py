"""Compares the GPUs of all processes of a run, on the driver.

Every function is about records (:class:`~actors.devices.Device`). It refuses what would train on a
wrong GPU, on none, or on one without room, before models are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.devices import CONTEXT_BYTES, NOSET, Device
from actors.roles import Roles
from rl_edit.errors import ResourcesInfeasible

SETTINGS = {
    "rollout": "actors.rollout_gpus",
    "colocated": "actors.rollout_gpus",
    "reward": "actors.reward_gpus",
    "learner": "actors.learner_gpus",
}
"""Settings that give a kind of process its GPUs."""

_ROUNDING = 1e-6
_GIB = 2**30


def require(device: Device, others: Sequence[Device], roles: Roles) -> None:
    """Makes all checks of a process.

    Args:
        others: of the processes that are alive beside it.
        roles: its own.

    Raises:
        ResourcesInfeasible: it must not train there.
    """
    if not all(spec.idle_gpus for spec in roles.values()):
        require_seen(device)
    require_alone(device, others)
    weights = {what: size for spec in roles.values() for what, size in spec.weights.items()}
    require_room(device, weights)


def require_seen(device: Device) -> None:
    """Refuses a process that cannot use the GPUs it reserved.

    Raises:
        ResourcesInfeasible: naming process, node, ids and the variable.
    """
    if len(device.gpus) >= math.ceil(device.share):
        return
    ids = ", ".join(device.assigned) or "none"
    seen = f"torch sees {len(device.gpus)} there" if device.gpus else "torch sees none there"
    raise ResourcesInfeasible(
        f"{device.worker} on node {device.node} reserved {device.share:g} GPUs, Ray assigned id "
        f"{ids}, and {seen} ({_shown(device)}): it would train on the CPU, or not at all. Check "
        f"nvidia-smi and torch's build on that node, the --num-gpus of its ray start, and what "
        f"sets {device.variable}"
    )


def require_alone(device: Device, others: Sequence[Device]) -> None:
    """Refuses processes that together hold more of a GPU than there is.

    Raises:
        ResourcesInfeasible: naming processes, GPU, node and the variable that causes it.
    """
    for gpu in device.gpus:
        holders = [
            holder
            for holder in (*others, device)
            if any(seen.uuid == gpu.uuid for seen in holder.gpus)
        ]
        total = sum(min(1.0, holder.share) for holder in holders)
        if total <= 1 + _ROUNDING:
            continue
        names = ", ".join(
            f"{holder.worker} ({min(1.0, holder.share):g}, Ray's id {', '.join(holder.assigned)})"
            for holder in holders
        )
        raise ResourcesInfeasible(
            f"{names} use one GPU and hold {total:g} of it together: {gpu.uuid} ({gpu.name}) on "
            f"node {device.node}, while others stand idle. {_cause(holders)}"
        )


def _cause(holders: Sequence[Device]) -> str:
    device = holders[-1]
    variable, noset = device.variable, NOSET.format(device.variable)
    if len({holder.node_id for holder in holders}) > 1:
        return (
            "Two Ray nodes offer this GPU: start each with GPUs of its own, by another "
            f"{variable} before ray start, or one node for the machine"
        )
    if device.noset:
        return (
            f"{noset} is set there ({_shown(device)}), so Ray does not set {variable}: unset it "
            "where ray start runs and in the job's runtime_env"
        )
    return (
        f"{_shown(device)} there: leave {variable} out of the job's runtime_env.env_vars and of "
        "worker_process_setup_hook, so that Ray sets it for each process"
    )


def require_room(device: Device, needs: Mapping[str, int]) -> None:
    """Refuses a share of a GPU in which the weights of its process cannot lie.

    Shares of one GPU never exceed it, so what fits its share fits beside the others. The needs are
    a lower bound: adapters, optimizer and activations come on top, and models whose size is not
    known here are not counted.

    Args:
        needs: bytes of weights by what they are.

    Raises:
        ResourcesInfeasible: with the sum.
    """
    if device.share >= 1 or not needs or not device.gpus:
        return
    gpu, kind = device.gpus[0], device.worker.rpartition("-")[0]
    room, needed = device.share * gpu.nbytes, sum(needs.values()) + CONTEXT_BYTES
    if needed <= room:
        return
    parts = " + ".join(f"{_gib(size)} {what}" for what, size in needs.items())
    enough = math.ceil(100 * needed / gpu.nbytes) / 100
    remedy = f"Raise {SETTINGS[kind]} above {enough:.2f}" if enough < 1 else "Give it a larger GPU"
    raise ResourcesInfeasible(
        f"{device.worker} has {device.share:g} of {gpu.uuid} ({gpu.name}, {_gib(gpu.nbytes)} GiB, "
        f"node {device.node}), which is {_gib(room)} GiB, and needs at least {_gib(needed)}: "
        f"{parts} + {_gib(CONTEXT_BYTES)} for CUDA; adapter, optimizer and activations come on "
        f"top. {remedy}, or a smaller editor.dtype, or another machine for the judge"
    )


@dataclass(frozen=True, kw_only=True)
class Report:
    """Makes known which process has which GPU.

    Attributes:
        event: writes an event.
        say: shows a line.
        hardware: the description of hardware in ``run.json``.
    """

    event: Callable[..., None]
    say: Callable[[str], None]
    hardware: dict[str, Any]

    def __call__(self, device: Device) -> None:
        self.event("device", **record(device))
        self.say(line(device))
        self.hardware.setdefault("actors", []).append(line(device))


def line(device: Device) -> str:
    """Describes the GPUs of a process in a line.

    Example:
        ``"rollout-0: GPU 1 of node n7 (10.0.0.7), NVIDIA A100, 79.2 GiB, GPU-5f2c..., half of it"``
    """
    share = f", {device.share:g} of it" if device.share < 1 else ""
    seen = "; ".join(f"{gpu.name}, {_gib(gpu.nbytes)} GiB, {gpu.uuid}" for gpu in device.gpus)
    ids = ", ".join(device.assigned)
    return f"{device.worker}: GPU {ids} of node {device.node}, {seen or 'not used'}{share}"


def record(device: Device) -> dict[str, Any]:
    """Returns the fields of a process's event."""
    return {
        "worker": device.worker,
        "node": device.node,
        "share": device.share,
        "assigned": list(device.assigned),
        "gpus": [
            {"uuid": gpu.uuid, "name": gpu.name, "memory_gib": round(gpu.nbytes / _GIB, 1)}
            for gpu in device.gpus
        ],
    }


def _gib(nbytes: float) -> str:
    return f"{nbytes / _GIB:.1f}"


def _shown(device: Device) -> str:
    value = "not set" if device.visible is None else device.visible or '""'
    noset = f", {NOSET.format(device.variable)}=1" if device.noset else ""
    return f"{device.variable} is {value}{noset}"
