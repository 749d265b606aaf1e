"""What a submitted job takes along: its sources and the files that its command names."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from rl_edit.errors import InputError
from rl_edit.jobs import Package, package, packed
from rl_edit.provenance import SOURCES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A project's directory: settings, modules, photographs, a key, and a link to its parent."""
    folder = tmp_path / "project"
    for name in ("configs", "photos", "learner", "train", "my_package", "runs/demo/checkpoints"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(b"outside")
    (folder / "configs" / "photos.yaml").write_text(
        "name: photos\nrewards:\n  mine: {kind: python, function: 'my_rewards:score'}\n"
    )
    (folder / "my_rewards.py").write_text("import json, torch, beside\nfrom my_package import x\n")
    (folder / "beside.py").write_text("def broken(:\n")
    (folder / "my_package" / "__init__.py").write_text("from . import x\n")
    (folder / "my_package" / "x.py").write_text("")
    (folder / "my_package" / "weights.bin").write_bytes(b"x")
    (folder / "learner" / "__init__.py").write_text("")
    (folder / "photos" / "a.png").write_bytes(b"image")
    (folder / ".env").write_text("HF_TOKEN=secret\n")
    (folder / "up").symlink_to("..")
    return folder


def others(result: Package) -> list[str]:
    return [name for name in result.files if name.partition("/")[0] not in SOURCES]


def test_a_job_takes_its_settings_and_the_modules_that_they_name_and_nothing_else(
    here: Path,
) -> None:
    result = packed(["train", "configs/photos.yaml", "--run-dir", "/shared/runs/x"], here=here)
    assert others(result) == [
        "beside.py",
        "configs/photos.yaml",
        "my_package/__init__.py",
        "my_package/x.py",
        "my_rewards.py",
    ]
    assert result.arguments == ("train", "configs/photos.yaml", "--run-dir", "/shared/runs/x")
    # The project's own sources, not the folder of the same name in the current directory.
    assert result.files["learner/__init__.py"] == ROOT / "learner" / "__init__.py"
    first, left_out = result.lines()
    assert "5" not in first.split()[:4] and "my_rewards.py" in first and "MiB" in first
    assert "1 files" in left_out and "my_package" in left_out


def test_the_sources_are_those_that_the_project_ships(tmp_path: Path) -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = [pattern.replace("**", "*") for pattern in shipped["package-data"]["rl_edit"]]
    assert sorted(package.SHIPPED) == sorted(["*.py", *patterns])
    result = packed(["presets"], here=tmp_path)
    result.write(tmp_path / "job")
    for name in ("rl_edit/presets/tiny-rc-grpo.yaml", "rl_edit/report/page.html.j2"):
        assert (tmp_path / "job" / name).read_bytes() == (ROOT / name).read_bytes()
    written = [path for path in (tmp_path / "job").rglob("*") if path.is_file()]
    assert len(written) == len(result.files)
    assert not any("__pycache__" in path.parts for path in written)


def test_settings_of_another_folder_travel_under_a_name_of_their_own(here: Path) -> None:
    (here.parent / "above.yaml").write_text("name: above\n")
    result = packed(["train", "../above.yaml", "train.updates=2"], here=here)
    assert result.arguments == ("train", "given/above.yaml", "train.updates=2")
    assert result.files["given/above.yaml"].samefile(here.parent / "above.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "absent.yaml"], "no config file at absent.yaml"),
        (["train", "--preset", "x", "data.path=photos"], "--include photos"),
        (["train", "--preset", "x", "data={path: photos}"], "--include photos"),
        (["evaluate", "runs/demo"], "absolute path that every node can read"),
        (["edit", "photos/a.png", "--instruction", "x"], "--include photos/a.png"),
        (["judge", "test", "no.yaml"], "no config file at no.yaml"),
    ],
)
def test_a_path_that_the_job_would_miss_is_refused_by_name(
    here: Path, arguments: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        packed(arguments, here=here)


def test_a_relative_path_within_the_settings_is_refused_with_its_key(here: Path) -> None:
    (here / "data.yaml").write_text("data: {source: folder, path: photos}\n")
    with pytest.raises(InputError, match=r"data\.yaml names photos .*\(data\.path\)"):
        packed(["train", "data.yaml"], here=here)
    assert "photos/a.png" in packed(["train", "data.yaml"], here=here, include=["photos"]).files


def test_a_name_that_is_also_a_folder_is_no_path(here: Path) -> None:
    (here / "photos.d").mkdir()
    words = ["train", "--preset", "photos", "--name", "learner", "name=photos", "train.updates=2"]
    assert packed(words, here=here).arguments == tuple(words)


def test_an_included_folder_keeps_its_links_within_and_refuses_those_that_lead_out(
    here: Path,
) -> None:
    photos = here / "photos"
    (photos / ".cache").mkdir()
    (photos / "same.png").symlink_to("a.png")
    result = packed(["presets"], here=here, include=["photos"])
    assert others(result) == ["photos/a.png", "photos/same.png"]
    assert any("1 hidden" in line for line in result.lines())
    result.write(here.parent / "job")
    assert (here.parent / "job/photos/same.png").read_bytes() == b"image"
    assert not (here.parent / "job/photos/same.png").is_symlink()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("../../outside.png", "link to ../../outside.png"),
        ("..", "link to the folder .."),
        ("nowhere.png", "nowhere.png"),
    ],
)
def test_a_link_out_of_an_included_folder_to_its_parent_or_to_nothing_is_refused(
    here: Path, target: str, words: str
) -> None:
    (here / "photos" / "link").symlink_to(target)
    with pytest.raises(InputError) as refused:
        packed(["presets"], here=here, include=["photos"])
    assert str(here / "photos" / "link") in str(refused.value) and words in str(refused.value)


def test_a_pipe_in_an_included_folder_is_refused_and_not_waited_for(here: Path) -> None:
    os.mkfifo(here / "photos" / "pipe")
    with pytest.raises(InputError, match="no plain file"):
        packed(["presets"], here=here, include=["photos"])


@pytest.mark.parametrize(
    ("include", "words"),
    [
        ("learner", "the place of rl-edit's own learner"),
        (".", "all of the current directory"),
        ("absent", "no such file or folder"),
    ],
)
def test_an_include_that_cannot_be_meant_is_refused(here: Path, include: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        packed(["presets"], here=here, include=[include])


def test_two_files_of_one_name_are_refused(here: Path) -> None:
    for folder in ("one", "two"):
        (here.parent / folder).mkdir()
        (here.parent / folder / "list.txt").write_text(folder)
    with pytest.raises(InputError, match=r"would both be list\.txt"):
        packed(["presets"], here=here, include=["../one/list.txt", "../two/list.txt"])


def test_a_package_over_the_limit_is_refused_with_its_largest_files(here: Path) -> None:
    with (here / "photos" / "large.tif").open("wb") as file:
        file.truncate(200 * 2**20)
    with pytest.raises(InputError, match=r"photos/large\.tif \(200\.0 MiB\)"):
        packed(["presets"], here=here, include=["photos"])
    assert packed(["presets"], here=here, include=["photos"], limit_mib=300).num_bytes > 2**27
    with pytest.raises(InputError, match="1 to 512 MiB"):
        packed(["presets"], here=here, limit_mib=600)


def test_modules_on_the_search_path_are_found_and_installed_ones_are_not_taken(
    here: Path,
) -> None:
    (here.parent / "library").mkdir()
    (here.parent / "library" / "methods.py").write_text("import numpy\n")
    words = ["train", "--preset", "x", "algorithm.objective={kind: 'methods:Ratio'}"]
    result = packed(words, here=here, search=[here.parent / "library"])
    assert others(result) == ["methods.py"]
    assert others(packed([*words[:3], "a.kind=numpy:mean"], here=here)) == []
