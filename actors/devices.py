"""The GPU of an actor's process: taken from Ray's assignment, and described for the controller.

Ray hides the other GPUs by itself, unless the cluster sets
``RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES``. Here the same is done for our own processes, before
anything asks CUDA. So ``cuda``, with and without an index, is the assigned GPU in every thread, in
every library and in processes that a judge starts. ``torch.cuda.set_device`` would hold for one
thread only.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

CONTEXT_BYTES = 512 << 20
"""Allowance for what CUDA itself takes of a GPU in each process. It is not in torch's account."""

NOSET = "RAY_EXPERIMENTAL_NOSET_{}"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as torch sees it.

    Attributes:
        uuid: the same in every process that uses it.
        nbytes: its memory.

    Example:
        ``Gpu(uuid="GPU-5f2c81d0-...", name="NVIDIA A100-SXM4-80GB", nbytes=85_029_158_912)``
    """

    uuid: str
    name: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Device:
    """The GPUs of one process.

    Attributes:
        worker: name of the process; the driver knows it.
        node: host and address of its machine.
        node_id: Ray's id of its node; a machine may hold several.
        share: GPUs that it reserved; below 1 it shares one.
        assigned: Ray's ids of its GPUs.
        variable, visible: the variable that hides GPUs, and its value before it was narrowed; None
            where it was not set.
        positions: places of the assigned GPUs among the visible ones, which are torch's indices.
        noset: True where the environment forbids Ray to set the variable.
        gpus: what torch sees now. Empty where it sees none.
    """

    node: str
    node_id: str
    share: float
    assigned: tuple[str, ...]
    variable: str
    visible: str | None
    positions: tuple[int, ...]
    noset: bool
    gpus: tuple[Gpu, ...]
    worker: str = ""


def listed(visible: str) -> list[str]:
    """Splits the value of a variable that hides GPUs; CUDA reads no further than a negative one."""
    entries: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        if not entry or entry.startswith("-"):
            break
        entries.append(entry)
    return entries


def positions(assigned: Sequence[str], visible: str | None) -> tuple[int, ...]:
    """Finds assigned GPUs among the visible ones; ids that are not there are left out.

    Args:
        assigned: Ray's ids: indices, ``GPU-...`` or ``MIG-...``, in any order.
        visible: value of the variable that hides GPUs; None where all are seen.

    Example:
        ``positions(["3"], "2,3") == (1,)``; ``positions(["3"], None) == (3,)``
    """
    if visible is None:
        return tuple(sorted(int(gpu) for gpu in assigned if gpu.isdigit()))
    return tuple(
        place
        for place, entry in enumerate(listed(visible))
        if any(entry == gpu or _abbreviates(entry, gpu) for gpu in assigned)
    )


def _abbreviates(entry: str, gpu: str) -> bool:
    # CUDA takes any beginning of a UUID that only one GPU has.
    return entry.startswith("GPU-") and gpu.startswith(entry)


def claim(share: float, assigned: Sequence[str], *, node_id: str, address: str) -> Device | None:
    """Takes the GPUs that Ray assigned to this process; None for one of the CPU.

    To be called before anything asks CUDA for its devices.

    Args:
        share: GPUs that the process reserved.
        assigned: Ray's ids of them.
        address: of the machine.
    """
    if not share:
        return None
    import torch

    variable = "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
    visible = os.environ.get(variable)
    # Ray may name more than were reserved where a job's environment narrows what is visible.
    taken = positions(assigned, visible)[: math.ceil(share)]
    entries = listed(visible) if visible is not None else []
    names = [entries[place] if entries else str(place) for place in taken]
    if names:
        os.environ[variable] = ",".join(names)
    gpus = _gpus(names)
    if gpus:
        torch.cuda.set_device(0)
    if gpus and share < 1:
        _limit_memory(share, gpus[0].nbytes)
    return Device(
        node_id=node_id,
        node=f"{socket.gethostname()} ({address})",
        share=share,
        assigned=tuple(assigned),
        variable=variable,
        visible=visible,
        positions=taken,
        noset=os.environ.get(NOSET.format(variable), "").lower() in ("1", "true"),
        gpus=gpus,
    )


def _gpus(names: Sequence[str]) -> tuple[Gpu, ...]:
    """Describes the GPUs that torch sees, as many as there are names."""
    import torch

    if not torch.cuda.is_available():
        return ()
    gpus = []
    for index, name in enumerate(names[: torch.cuda.device_count()]):
        properties = torch.cuda.get_device_properties(index)
        # Slices of one GPU may carry its UUID, and are no less apart.
        uuid = name if name.startswith("MIG-") else f"GPU-{properties.uuid}"
        gpus.append(Gpu(uuid=uuid, name=properties.name, nbytes=properties.total_memory))
    return tuple(gpus)


def _limit_memory(share: float, nbytes: int) -> None:
    """Keeps torch within the process's share, so that it takes nothing of the others'."""
    import torch

    limit = max(0.0, share * nbytes - CONTEXT_BYTES)
    torch.cuda.set_per_process_memory_fraction(limit / nbytes, 0)
