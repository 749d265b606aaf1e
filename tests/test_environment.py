"""Runs start whatever surrounds them: uv, folders of the same names, a directory that is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ray.core.generated.common_pb2 import JobConfig

from actors import ray_access, ray_start
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


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_home_without_a_free_byte_does_not_take_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", home]).returncode:
        pytest.skip("this machine allows no mount")
    try:
        with contextlib.suppress(OSError), (home / "full").open("wb") as file:
            file.write(b"\0" * 2**20)
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, "")  # so that what is set ends with the test
        monkeypatch.setenv("HOME", str(home))
        notes: list[str] = []
        ray_access._keep_token(str(tmp_path), note=notes.append)
        assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent.parent == tmp_path and notes
    finally:
        subprocess.run(["umount", home], check=True)


def test_a_temporary_directory_that_the_locale_cannot_read_is_not_rays() -> None:
    # The bytes of "ü" as Python reads them in the locale C.
    assert "LC_ALL=C.UTF-8" in ray_start._problem("/tmp/\udcc3\udcbc")


@pytest.mark.parametrize(("level", "kept"), [("2", "1"), ("1", "1"), ("yes", "yes")])
def test_rays_processes_keep_the_docstrings_that_they_read(
    monkeypatch: pytest.MonkeyPatch, level: str, kept: str
) -> None:
    monkeypatch.setenv("PYTHONOPTIMIZE", level)
    notes: list[str] = []
    ray_start._keep_docstrings(note=notes.append)
    assert os.environ["PYTHONOPTIMIZE"] == kept and len(notes) == (level == "2")
