"""Small whole runs for tests: the real loop, learner and rollout actor in this process, on 32-pixel
tasks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from actors.local_executor import LocalExecutor
from actors.roles import Roles, make_workers, roles_of, worker_roles
from actors.rollout import RolloutActor
from learner.controller.lease import Lease
from learner.controller.loop import TrainingLoop
from learner.controller.run import Outcome, Run
from learner.controller.run_log import Events
from learner.controller.stop import Stop
from learner.learner import Learner
from rl_edit.config import RunConfig, load_config
from rl_edit.data import open_dataset
from rl_edit.editors import inspect_editor
from rl_edit.files import EVENTS, METRICS, read_json_lines

PRESERVATION: dict[str, Any] = {"kind": "preservation", "weight": 1.0}
ATTENTION: dict[str, Any] = {"kind": "concentration", "weight": 0.3}


class SilentObserver:
    """An observer that looks away."""

    def group_scored(self, update: int, done: int, total: int) -> None:
        pass

    def update_done(self, metrics: dict[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def small_config(
    editor: str | Mapping[str, Any],
    *overrides: str,
    rewards: dict[str, Any] | None = None,
    directory: Path | None = None,
) -> RunConfig:
    """RC-GRPO at its smallest: 2 groups of 4 candidates, 3 solver steps, 32 pixels. ``editor`` is
    the path of a small built-in editor, or all settings of another; ``directory`` is where to
    leave the configuration as YAML."""
    if isinstance(editor, str):
        editor = {
            "path": editor,
            "resolution": 32,
            "max_text_tokens": 16,
            "micro_batch": 4,
            "attention_layers": 1,
            "device": "cpu",
        }
    raw = {
        "name": "small",
        "editor": dict(editor),
        "lora": {"rank": 4, "alpha": 8},
        "data": {"num_train": 8, "num_heldout": 4},
        "algorithm": {
            "name": "rc-grpo",
            "initial_noise": {"inside": 0.7, "outside": 0.05},
            "credit": {"normalise": "group"},
            "objective": {"num_anchors": 2, "num_steps": 1},
        },
        "rollout": {"group_size": 4, "num_steps": 3},
        "rewards": rewards or {"preservation": PRESERVATION, "attention": ATTENTION},
        "train": {
            "updates": 3,
            "groups_per_update": 2,
            "learning_rate": 5.0e-3,
            "ratio_tolerance": 0.0,
            "checkpoint_every": 1,
            # Preservation and attention do not ask for the edit; the loop does not care.
            "allow_unrewarded_edit": True,
        },
        "actors": {"runtime": "inline", "threads": 1, "backoff_s": 0, "preflight": False},
        "evaluation": {"num_tasks": 3, "examples": 1, "num_steps": 2},
    }
    return written(raw, *overrides, directory=directory)


def written(raw: dict[str, Any], *overrides: str, directory: Path | None) -> RunConfig:
    """The run of a raw mapping, read from a file like any other."""
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        path = (directory or Path(temporary)) / "run.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        return load_config(path, overrides=overrides)


def replaced(role: str, make: Callable[..., Any]) -> Callable[[Roles], Roles]:
    """Another class for a role."""
    return lambda roles: {**roles, role: replace(roles[role], make=make)}


def colocated(config: RunConfig) -> tuple[RolloutActor, Learner]:
    """The rollout actor and the learner of one process, which share an editor."""
    places = config.actors.model_copy(update={"placement": "colocated"})
    roles = worker_roles(config.model_copy(update={"actors": places}), frozenset(), Learner)
    workers = make_workers(roles_of(roles, "colocated"))
    return workers["rollout"], workers["learner"]


class StopAfter(SilentObserver):
    """Asks the run to stop once so many updates are done."""

    def __init__(self, updates: int) -> None:
        self.stop, self.updates = Stop(), updates

    def update_done(self, metrics: dict[str, Any]) -> None:
        if metrics["update"] + 1 == self.updates:
            self.stop.request()


def run_of(config: RunConfig, directory: Path, **more: Any) -> Run:
    """What ``rl-edit train`` would say about the run, with the settings alone as its identity."""
    unit = inspect_editor(config.editor).pixels_per_token
    dataset = open_dataset(config.data, "train")
    return Run(
        config=config,
        dataset=dataset,
        directory=directory,
        settings=config.identity(),
        pixels_per_token=unit,
        **more,
    )


def run_inline(
    config: RunConfig,
    directory: Path,
    *,
    resume: bool = False,
    stop_after: int = 0,
    observer: Any = None,
    change: Callable[[Roles], Roles] = lambda roles: roles,
    executor: Callable[[Any], Any] = lambda executor: executor,
) -> Outcome:
    """A run in this process. ``change`` may give roles to other classes, ``executor`` may wrap what
    runs them."""
    run = run_of(config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    roles = change(worker_roles(config, run.dataset.fields, Learner))
    stopper = StopAfter(stop_after)
    loop = TrainingLoop(
        run,
        executor(LocalExecutor(roles, threaded=config.actors.runtime == "thread")),
        lease=Lease.take(directory),
        events=Events(directory / EVENTS),
        observer=observer or stopper,
        stop=stopper.stop,
    )
    return asyncio.run(loop.run(resume=resume))


def adapter_bytes(outcome: Outcome) -> dict[str, bytes]:
    """The adapter as bytes by tensor name: equal exactly when the adapters are."""
    assert outcome.adapter is not None
    return {
        name: np.ascontiguousarray(tensor.numpy()).tobytes()
        for name, tensor in outcome.adapter.tensors.items()
    }


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    return read_json_lines(directory / METRICS)


def events_of(directory: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in read_json_lines(directory / EVENTS) if record["event"] == event]


def command(monkeypatch: Any, capsys: Any, *arguments: Any) -> tuple[int, str, Sequence[str]]:
    """Runs ``rl-edit ARGUMENTS`` in this process: exit code, stdout, and the lines of stderr."""
    from rl_edit.cli import main

    monkeypatch.setattr("sys.argv", ["rl-edit", *map(str, arguments)])
    capsys.readouterr()
    try:
        main()
        code: Any = 0
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return int(code or 0), out, err.splitlines()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
