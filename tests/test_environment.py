"""Runs start whatever surrounds them: uv, folders of the same names, a directory that is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ray.core.generated.common_pb2 import JobConfig

from actors import ray_start
from rl_edit.provenance import PLACE, differences, node_versions, versions

ROOT = Path(__file__).resolve().parent.parent
SHADOWS = ("rl_edit", "learner", "actors", "torch", "ray")


def ran(
    *command: str | Path, here: Path, timeout_s: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    outside.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(word) for word in command],
        cwd=here,
        env={**outside, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A directory with folders that are called like packages of ours and of the libraries."""
    for name in SHADOWS:
        (tmp_path / "project" / name).mkdir(parents=True)
        (tmp_path / "project" / name / "__init__.py").write_text("")
    return tmp_path / "project"


def test_workers_search_the_current_directory_only_where_this_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched, here = tmp_path / "searched", tmp_path / "here"
    searched.mkdir()
    here.mkdir()
    monkeypatch.setattr(sys, "path", [str(searched), *sys.path])
    job = ray_start.Job(_py_driver_sys_path=[str(searched), str(here)])
    assert list(JobConfig.FromString(job._serialize()).py_driver_sys_path) == [str(searched)]
    # ``python -m`` has the current directory on its path, as "".
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert list(JobConfig.FromString(job._serialize()).py_driver_sys_path) == [str(searched)]
    job = ray_start.Job(_py_driver_sys_path=[str(here)])
    assert list(JobConfig.FromString(job._serialize()).py_driver_sys_path) == [str(here)]


PROGRAM = """
import ray  # before ours, as a program of the user's does
from actors import ray_cluster
from rl_edit.config import load_config
try:
    ray_cluster.connect(load_config(preset="tiny-rc-grpo"))
    ray_cluster.check_nodes(allow_skew=False, note=print)
    names = ray.remote(lambda: (__import__("torch").__file__, __import__("sys").executable))
    print(*ray.get(names.remote()))
finally:
    ray_cluster.disconnect()
"""

RUNS_A_COMMAND = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)\n"


@pytest.mark.ray
def test_below_uv_run_and_beside_folders_of_the_same_names_the_workers_are_ours(
    crowded: Path,
) -> None:
    import torch

    (crowded.parent / "program.py").write_text(PROGRAM)
    (crowded / "run").write_text(RUNS_A_COMMAND)
    # Ray knows uv by the first two words of a parent's command line.
    bash = 'exec -a uv "$@"'
    below_uv = ["bash", "-c", bash, "-", sys._base_executable, "run"]  # type: ignore[attr-defined]
    done = ran(
        *below_uv,
        *(sys.executable, crowded.parent / "program.py"),
        here=crowded,
        timeout_s=300,
        PYTHONPATH=str(ROOT),
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="1",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    note, found = done.stdout.splitlines()
    assert "RAY_ENABLE_UV_RUN_RUNTIME_ENV is not followed" in note
    assert found == f"{torch.__file__} {sys.executable}"


def test_a_run_beside_a_folder_called_ray_names_it_in_one_line(crowded: Path) -> None:
    for name in SHADOWS[:-1]:
        shutil.rmtree(crowded / name)
    # As ``python -m rl_edit``, which searches the current directory first.
    program = "import sys; sys.path[1:1] = [sys.argv.pop(1)]; from rl_edit.cli import main; main()"
    run = ["train", "--preset", "tiny-rc-grpo", "--run-dir", str(crowded / "runs" / "x")]
    done = ran(sys.executable, "-c", program, ROOT, *run, here=crowded)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"{crowded / 'ray'} comes before the installed package" in line
    assert "the command rl-edit in place of python -m rl_edit" in line
    assert not (crowded / "runs").exists()


def test_a_current_directory_that_is_gone_is_said_in_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f'cd "{gone}" && rmdir "{gone}" && exec "{sys.executable}" -c "$PROGRAM" presets'
    program = "from rl_edit.cli import main; main()"
    done = ran("bash", "-c", command, here=tmp_path, PYTHONPATH=str(ROOT), PROGRAM=program)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("rl-edit: the current directory is gone")


def test_other_sources_of_a_node_are_named_with_their_folder() -> None:
    there = {**node_versions(), PLACE: "/home/me/project", "rl-edit sources": "0" * 12}
    (problem,) = differences({"10.0.0.1": there}, versions())
    assert "has rl-edit sources 000000000000 in /home/me/project, here is " in problem
    assert differences({"10.0.0.1": node_versions()}, versions()) == []
