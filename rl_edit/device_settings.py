"""Checks the settings of devices: what a run asks for against what its actors are given.

Under Ray an actor sees the GPUs that Ray assigns to it, and no others. So ``auto`` is right
everywhere, and an index can only contradict the assignment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from learner.controller.run import Observer
from rl_edit.config import RunConfig
from rl_edit.errors import InputError, ResourcesInfeasible

_HIDING = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")


def require_device(config: RunConfig, observer: Observer) -> None:
    """Refuses devices that do not exist, or that no actor of the run will have.

    Raises:
        InputError: naming the setting.
        ResourcesInfeasible: a variable of this machine hides every GPU of a run that needs some.
    """
    actors = config.actors
    editor_gpus = max(actors.rollout_gpus, actors.learner_gpus)
    settings = [("editor.device", config.editor.device, editor_gpus)]
    for name, term in config.rewards.items():
        named = _named(term.model_dump(mode="json"), f"rewards.{name}")
        settings += [
            (path, str(value), actors.reward_gpus)
            for path, value in named
            if path.endswith(".device")
        ]
    for path, value, gpus in settings:
        _require_one(path, value, gpus, runtime=actors.runtime)
    if actors.runtime == "ray":
        _require_shares(config)
        _require_visible(config)
        _say_unused(config, observer)


def _named(settings: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields all settings of a reward with their dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _named(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", value


def _require_one(path: str, value: str, gpus: float, *, runtime: str) -> None:
    if value == "auto":
        return
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise InputError(f"{path} {value!r} is no device: use auto, cpu, cuda or cuda:0") from error
    if device.type != "cuda":
        return
    if runtime != "ray":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= there:
            raise InputError(
                f"{path} is {value!r} and this machine has {there} GPUs that torch can use: set "
                f"{path}=auto, or cpu"
            )
        return
    section = "actors.reward_gpus" if path.startswith("rewards.") else "actors.rollout_gpus"
    if not gpus:
        raise InputError(
            f"{path} is {value!r} and {section} is 0, so its actors see no GPU: give them one, or "
            f"set {path}=auto"
        )
    if device.index:
        raise InputError(
            f"{path} is {value!r}, and Ray chooses the GPU of each actor, which sees it as cuda:0: "
            f"every actor would need the same one. Set {path}=auto; to leave out GPUs, set "
            "CUDA_VISIBLE_DEVICES before the cluster starts"
        )


def _require_shares(config: RunConfig) -> None:
    """Refuses judges that take more of their GPUs than their actor has."""
    gpus = config.actors.reward_gpus
    for name, term in config.rewards.items():
        for path, value in _named(term.model_dump(mode="json"), f"rewards.{name}"):
            if path.endswith(".gpu_memory_utilization") and 0 < gpus < 1 and value > gpus:
                raise InputError(
                    f"{path} is {value:g} of a GPU and actors.reward_gpus reserves {gpus:g} of it: "
                    "the actors that share the GPU would run out of memory. Lower the first or "
                    "raise the second"
                )
            if path.endswith(".tensor_parallel_size") and value > max(1, gpus):
                raise InputError(
                    f"{path} is {value} GPUs and actors.reward_gpus reserves {gpus:g}, so the "
                    f"judge would find too few: set actors.reward_gpus={value}"
                )


def _require_visible(config: RunConfig) -> None:
    """Refuses a machine that hides its GPUs from the cluster it is to start."""
    # A cluster elsewhere has an environment of its own.
    if os.environ.get("RAY_ADDRESS") not in (None, "", "local"):
        return
    needed = _reserved(config)
    for variable in _HIDING if needed else ():
        value = os.environ.get(variable)
        if value is not None and (value.strip() in ("", "none", "void") or value[:1] == "-"):
            raise ResourcesInfeasible(
                f"the run needs {needed:g} GPUs and {variable}={value!r} hides all GPUs of this "
                f"machine: unset {variable}, or set all of actors.*_gpus=0 to train on the CPU"
            )


def _reserved(config: RunConfig) -> float:
    """Counts the GPUs that all actors of a run reserve."""
    actors = config.actors
    learners = 0 if actors.placement == "colocated" else actors.num_learner * actors.learner_gpus
    return (
        actors.num_rollout * actors.rollout_gpus + actors.num_reward * actors.reward_gpus + learners
    )


def _say_unused(config: RunConfig, observer: Observer) -> None:
    """Says which GPUs the run reserves or sees without using them."""
    actors = config.actors
    for name, gpus in (("rollout", actors.rollout_gpus), ("learner", actors.learner_gpus)):
        if gpus > 1:
            observer.note(
                f"actors.{name}_gpus is {gpus:g}: an editor computes on one GPU, so the others of "
                f"each actor stand idle. Raise actors.num_{name} instead"
            )
    if config.editor.device == "cpu" and max(actors.rollout_gpus, actors.learner_gpus):
        observer.note(
            "editor.device is cpu: the GPUs of actors.rollout_gpus and learner_gpus stand idle"
        )
    if not _reserved(config) and config.editor.device == "auto" and torch.cuda.is_available():
        observer.note(
            f"this machine has {torch.cuda.device_count()} GPUs and no actor reserves one: the run "
            "trains on the CPU. To use them, set actors.rollout_gpus=1 and actors.learner_gpus=1"
        )
