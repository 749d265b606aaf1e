"""Processes of the project import the project's packages, and their threads wait without spinning.

A user's own modules may be called ``actors`` or ``learner``, on PYTHONPATH or beside the config.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from actors.roles import ProcessTable, Roles, WorkerSpec
from runs import read_json, small_config

ROOT = Path(__file__).parent.parent
NAMES = ("actors", "learner")


def write_modules(folder: Path) -> None:
    for name in NAMES:
        (folder / f"{name}.py").write_text("raise RuntimeError('the module of the user')\n")


def write_packages(folder: Path) -> None:
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the package of the user')")


def trained_beside(folder: Path, editor: str, *overrides: str) -> str:
    """Trains with ``folder`` as working directory and first on PYTHONPATH; returns the status."""
    small_config(editor, *overrides, directory=folder)
    path = os.pathsep.join([str(folder), str(ROOT)])
    ended = subprocess.run(
        [sys.executable, "-m", "rl_edit", "train", "run.yaml", "--run-dir", "run", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    status: str = read_json(folder / "run" / "run.json")["status"]
    return status


@pytest.mark.parametrize("write", [write_modules, write_packages], ids=["modules", "packages"])
def test_training_in_one_process_uses_the_projects_packages(
    tmp_path: Path, small_editor: str, write: object
) -> None:
    assert callable(write)
    write(tmp_path)
    assert trained_beside(tmp_path, small_editor, "train.updates=1") == "done"


@pytest.mark.ray
def test_workers_on_ray_use_the_projects_packages(tmp_path: Path, small_editor: str) -> None:
    write_modules(tmp_path)
    # Two processes that each play every role import as much as four of one role.
    together = ("actors.placement=colocated", "actors.num_rollout=2", "actors.num_learner=2")
    overrides = ("train.updates=1", "actors.runtime=ray", *together)
    assert trained_beside(tmp_path, small_editor, *overrides) == "done"


def test_sources_are_hashed_of_the_projects_packages(tmp_path: Path) -> None:
    write_modules(tmp_path)
    command = "from rl_edit.provenance import code_sha256; print(code_sha256())"
    hashes = {
        subprocess.run(
            [sys.executable, "-c", command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for folder in (tmp_path, ROOT)
    }
    assert len(hashes) == 1


def test_the_command_line_sets_how_threads_wait_before_torch_is_imported() -> None:
    """OpenMP reads the variable when torch loads it, and never again."""
    command = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'torch': print(os.environ.get('OMP_WAIT_POLICY'))\n"
        "sys.meta_path.insert(0, Finder)\n"
        "import rl_edit.cli.verbs"
    )
    outside = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    shown = subprocess.run(
        [sys.executable, "-c", command],
        cwd=ROOT,
        env={**outside, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert shown == "PASSIVE\n"


@dataclass(eq=False)
class Started:
    """A process of a test's executor."""

    roles: Roles
    alive: bool = True


def table(processes: dict[str, str]) -> ProcessTable[Started]:
    """The processes of roles, by role and kind of process."""
    roles = {role: WorkerSpec(process=kind, make=object) for role, kind in processes.items()}
    return ProcessTable(roles, lambda kind, served, worker_slot: Started(served))


def test_each_role_has_a_process_of_its_own_and_a_new_one_each_time_it_asks() -> None:
    processes = table({"rollout": "rollout", "learner": "learner"})
    first, other, learner = (
        processes.spawn("rollout", 0),
        processes.spawn("rollout", 1),
        processes.spawn("learner", 0),
    )
    again = processes.spawn("rollout", 0)
    assert len({id(process) for process in (first, other, learner, again)}) == 4
    assert processes.processes() == [again, other, learner]
    assert [set(process.roles) for process in (first, learner)] == [{"rollout"}, {"learner"}]


def test_colocated_roles_share_a_process_and_move_on_together_when_it_is_dead() -> None:
    processes = table({"rollout": "colocated", "learner": "colocated", "reward": "reward"})
    shared = processes.spawn("rollout", 0)
    assert processes.spawn("learner", 0) is shared and set(shared.roles) == {"rollout", "learner"}
    assert processes.spawn("reward", 0) is not shared is not processes.spawn("rollout", 1)
    shared.alive = False
    following = processes.spawn("learner", 0)
    assert following is not shared and processes.spawn("rollout", 0) is following
