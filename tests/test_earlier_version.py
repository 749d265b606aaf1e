"""Configurations, checkpoints and run directories of the version before are still read.

``fixtures/earlier_version/`` was written by the version before settings were renamed. ``run.yaml``
is the configuration, ``run/`` holds 2 of its 4 updates with an evaluation, ``final/`` the adapter
of its uninterrupted 4 updates.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rl_edit.cli.find_masks import mask_finder as _mask_finder
from rl_edit.config import load_config, modern, renamed
from rl_edit.errors import InputError
from runs import command, read_json

EARLIER = Path(__file__).parent / "fixtures" / "earlier_version"
WEIGHTS = "adapter/pytorch_lora_weights.safetensors"
FINAL_SHA256 = "9988e4a0a0c2b344a853d9a4a1f425bcdf9b9f8cecf0be1b30d8e6bc78aeaa12"
"""Of the adapter after 4 updates, by the earlier version."""

HINTS = (
    "train.rows is now train.states_per_forward",
    "train.passes is now train.inner_epochs",
    "algorithm.credit.limit is now algorithm.credit.advantage_clip",
    "algorithm.initial_noise.start.locality is now algorithm.initial_noise.start.background_pull",
    "algorithm.initial_noise.least is now algorithm.initial_noise.min_spread",
    "algorithm.initial_noise.most is now algorithm.initial_noise.max_spread",
    "algorithm.objective.kind background_anchored is now background_regularised",
)
"""In ``run.yaml`` and ``run/config.yaml``."""


@pytest.fixture(autouse=True)
def nothing_printed_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "_printed", set())


@pytest.fixture
def earlier_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EARLIER / "run", tmp_path / "run"))


def hints_of(lines: Any) -> list[str]:
    return [line.removeprefix("rl-edit: ").partition(";")[0] for line in lines]


def adapter_of(directory: Path) -> str:
    return str(read_json(directory / "adapter" / "adapter.json")["sha256"])


def test_a_configuration_of_the_version_before_is_the_same_run_under_present_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(EARLIER / "run.yaml")
    assert sorted(hints_of(capsys.readouterr().err.splitlines())) == sorted(HINTS)
    assert (config.train.inner_epochs, config.train.states_per_forward) == (2, 4)
    assert config.algorithm.credit.advantage_clip == 4.0
    noise = config.algorithm.initial_noise
    assert (noise.min_spread, noise.max_spread, noise.start.background_pull) == (0.1, 0.9, 0.25)
    assert config.algorithm.objective.kind == "background_regularised"
    (tmp_path / "modern.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "modern.yaml") == config
    assert capsys.readouterr().err == ""


def test_a_hint_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        load_config(EARLIER / "run.yaml", overrides=["train.rows=8"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) == len(HINTS)


@pytest.mark.parametrize(
    ("override", "hint", "value"),
    [
        ("train.rows=8", HINTS[0], ("train", "states_per_forward", 8)),
        ("train={passes: 3, updates: 2}", HINTS[1], ("train", "inner_epochs", 3)),
        ("algorithm.credit.limit=2", HINTS[2], ("algorithm", "credit", "advantage_clip", 2.0)),
        (
            "algorithm.initial_noise.locality=0.5",
            "algorithm.initial_noise.locality is now algorithm.initial_noise.background_pull",
            ("algorithm", "initial_noise", "background_pull", 0.5),
        ),
        (
            "algorithm={name: diffusion-nft, acting: {most: 0.7}}",
            "algorithm.acting.most is now algorithm.acting.max_decay",
            ("algorithm", "acting", "max_decay", 0.7),
        ),
        (
            "algorithm.objective.kind=background_anchored",
            HINTS[6],
            ("algorithm", "objective", "kind", "background_regularised"),
        ),
    ],
)
def test_an_override_under_an_old_name_sets_the_present_one(
    override: str, hint: str, value: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    node: Any = load_config(preset="tiny-rc-grpo", overrides=[override])
    assert hints_of(capsys.readouterr().err.splitlines()) == [hint]
    *path, expected = value
    for part in path:
        node = getattr(node, part)
    assert node == expected


def test_an_override_takes_the_place_of_the_file_s_old_name() -> None:
    config = load_config(EARLIER / "run.yaml", overrides=["train.states_per_forward=8"])
    assert config.train.states_per_forward == 8
    later = load_config(preset="tiny-rc-grpo", overrides=["train.rows=4", "train.rows=8"])
    assert later.train.states_per_forward == 8


def test_an_old_and_a_present_name_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rewards: {keep: {kind: psnr}}\ntrain: {rows: 1, states_per_forward: 1}\n")
    both = "train.rows is now train.states_per_forward, and both are given"
    with pytest.raises(InputError, match=both):
        load_config(path)
    with pytest.raises(InputError, match=both):
        load_config(preset="tiny-rc-grpo", overrides=["train.rows=4", "train.states_per_forward=4"])


def test_settings_of_find_masks_are_read_under_their_old_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    finder = _mask_finder(["mask.most=3", "mask.smallest=0.01", "mask.largest=0.5"], None)
    assert (finder.max_regions, finder.min_area, finder.max_area) == (3, 0.01, 0.5)
    assert hints_of(capsys.readouterr().err.splitlines()) == [
        "mask.most is now mask.max_regions",
        "mask.smallest is now mask.min_area",
        "mask.largest is now mask.max_area",
    ]
    with pytest.raises(InputError, match=r"both are given: keep mask\.max_regions"):
        _mask_finder(["mask.most=3", "mask.max_regions=4"], None)


def test_the_keys_of_a_plugin_are_its_own() -> None:
    settings = {"algorithm": {"credit": {"kind": "mine:Credit", "limit": 3}}}
    assert modern(settings) == settings
    assert modern({"algorithm": {"credit": {"limit": 3}}}, context=settings) == {
        "algorithm": {"credit": {"limit": 3}}
    }


def test_a_run_of_the_version_before_ends_as_it_would_have_ended(
    earlier_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    half = adapter_of(earlier_run)
    code, _, err = command(
        monkeypatch, capsys, "train", "--run-dir", earlier_run, "--resume", "train.updates=4"
    )
    assert (code, sorted(hints_of(err))) == (0, sorted(HINTS))
    # Another processor may round otherwise than the one that wrote the fixture. Only where the
    # first half, trained again here, has the same bits can the second half be held to them.
    again = tmp_path / "again"
    assert command(
        monkeypatch, capsys, "train", EARLIER / "run.yaml", "--run-dir", again, "train.updates=2"
    )[::2] == (0, [])
    if adapter_of(again) == half:
        assert adapter_of(earlier_run) == FINAL_SHA256
    resumed = load_file(earlier_run / WEIGHTS)
    expected = load_file(EARLIER / "final" / "pytorch_lora_weights.safetensors")
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_setting_that_was_renamed_is_still_compared(
    earlier_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ["train", "--run-dir", earlier_run, "--resume", "train.updates=3", "train.rows=2"]
    code, _, err = command(monkeypatch, capsys, *resume)
    assert code == 2
    assert "train.states_per_forward: 4 there, 2 here" in err[-1]
    code, _, _ = command(monkeypatch, capsys, *resume, "--allow-config-drift", "train.rows")
    assert code == 0


def test_a_run_of_the_version_before_is_evaluated_as_before(
    earlier_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_json(earlier_run / "evaluation.json")
    assert command(monkeypatch, capsys, "evaluate", earlier_run)[0] == 0
    after = read_json(earlier_run / "evaluation.json")
    assert after["meta"].items() >= before["meta"].items()
    for side in ("base", "trained", "delta"):
        assert after[side].keys() >= before[side].keys()
        for metric, interval in before[side].items():
            assert after[side][metric] == pytest.approx(interval, rel=1e-4, abs=1e-4), metric


def test_a_run_of_the_version_before_is_reported_and_compared(
    earlier_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, capsys, "report", earlier_run)[0] == 0
    page = (earlier_run / "report.html").read_text()
    assert [text for text in ("before-renames", "gold, held-out: 3.196") if text not in page] == []
    other = Path(shutil.copytree(EARLIER / "run", tmp_path / "other"))
    written = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**written, "seed": 4}))
    code, out, _ = command(
        monkeypatch, capsys, "compare", earlier_run, other, "--json", tmp_path / "comparison.json"
    )
    assert code == 0, out
    comparison = read_json(tmp_path / "comparison.json")
    (arm,) = comparison["arms"]
    assert arm["seeds"] == [3, 4]
    # Neither is its evaluation thought to be of other rewards, nor of another adapter.
    assert [note for note in comparison["notes"] if "rl-edit evaluate" in note] == []
    assert "not in the total" not in " ".join(comparison["notes"])
    delta = json.loads((EARLIER / "run" / "evaluation.json").read_text())["delta"]["reward"]
    assert arm["gain"]["reward"]["mean"] == pytest.approx(delta["mean"])


def test_a_reward_s_setting_that_was_renamed_is_the_same_run() -> None:
    present = load_config(preset="kontext-rc-grpo").identity()
    stored = json.loads(json.dumps(present).replace('"score_from"', '"readout"'))
    assert stored != present
    assert modern(stored) == present


def test_a_renamed_setting_of_every_reward_is_found_under_its_old_name() -> None:
    term = {"kind": "editscore", "readout": "expected"}
    settings = {"rewards": {"a": term, "b": {"kind": "composite", "of": term}, "c": None}}
    renamed_term = {"kind": "editscore", "score_from": "expected"}
    assert modern(settings) == {
        "rewards": {
            "a": renamed_term,
            "b": {"kind": "composite", "of": renamed_term},
            "c": None,
        }
    }
    # A class of the user's has keys of its own.
    own = {"rewards": {"a": {"kind": "my_rewards:Term", "readout": "x"}}}
    assert modern(own) == own
