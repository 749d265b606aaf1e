"""``rl-edit evaluate``: the same tasks for both editors, the same numbers twice, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import Command, assert_refused
from learner.learner import Learner
from rl_edit import wire
from rl_edit.editors import lora
from runs import PRESERVATION, read_json, small_config

HEADLINE = ("reward", "background_psnr_masked", "background_psnr_zero_filled", "background_ssim")


def test_evaluate_compares_base_and_trained_on_the_same_tasks(
    rl_edit: Command, trained: Path
) -> None:
    code, out, err = rl_edit("evaluate", trained)
    assert (code, list(err)) == (0, [])
    assert "evaluation.json" in "".join(out.split())
    result = read_json(trained / "evaluation.json")
    for side in ("base", "trained", "delta"):
        for metric in HEADLINE:
            interval = result[side][metric]
            assert set(interval) == {"mean", "low", "high", "n"}
            assert interval["n"] == 3
            assert interval["low"] <= interval["mean"] <= interval["high"]
    for metric in HEADLINE:
        difference = result["trained"][metric]["mean"] - result["base"][metric]["mean"]
        assert result["delta"][metric]["mean"] == pytest.approx(difference, abs=1e-6)
    assert result["delta"]["background_psnr_masked"]["mean"] != 0.0
    images = {path.stem for path in trained.glob("evaluation/images/*/*.png")}
    assert images == {
        "source",
        "mask",
        "target",
        "base",
        "trained",
        "attention_base",
        "attention_trained",
    }
    assert not list(trained.glob(".*.tmp"))


def test_an_evaluation_put_elsewhere_leaves_the_runs_own_as_it_is(
    rl_edit: Command, trained: Path, tmp_path: Path
) -> None:
    assert rl_edit("evaluate", trained)[0] == 0
    before = (trained / "evaluation.json").read_bytes()
    code, out, _ = rl_edit("evaluate", trained, "--out", tmp_path / "other", "data.seed=9")
    assert code == 0 and "rl-edit report" not in out
    elsewhere = read_json(tmp_path / "other" / "evaluation.json")
    assert elsewhere["meta"]["tasks"] != read_json(trained / "evaluation.json")["meta"]["tasks"]
    assert (tmp_path / "other" / "evaluation" / "images").is_dir()
    assert (trained / "evaluation.json").read_bytes() == before
    assert_refused(
        rl_edit("evaluate", trained, "--out", trained / "run.json"), None, "run.json is a file"
    )


def test_evaluate_gives_the_same_numbers_twice(rl_edit: Command, trained: Path) -> None:
    results = []
    for _ in range(2):
        assert rl_edit("evaluate", trained)[0] == 0
        results.append((trained / "evaluation.json").read_bytes())
    assert results[0] == results[1]


def test_an_adapter_of_no_update_differs_from_the_base_by_exactly_zero(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    config = small_config(small_editor)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml())
    lora.save(run / "adapter", wire.unpack(Learner(config, threads=1).export()[1]), config.lora)
    assert rl_edit("evaluate", run)[0] == 0
    delta = read_json(run / "evaluation.json")["delta"]
    assert set(HEADLINE) <= set(delta)
    assert {(value["mean"], value["low"], value["high"]) for value in delta.values()} == {
        (0.0, 0.0, 0.0)
    }


@pytest.mark.parametrize("judges", [("judge",), ("second", "first"), ()])
def test_the_instruction_score_is_that_of_the_first_judge_and_absent_without_one(
    rl_edit: Command, small_editor: str, tmp_path: Path, judges: tuple[str, ...]
) -> None:
    terms = {
        name: {"kind": "shapes_judge", "weight": 1.0, "coarse": index > 0}
        for index, name in enumerate(judges)
    }
    config = small_config(
        small_editor, "evaluation.examples=0", rewards={**terms, "preservation": PRESERVATION}
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    lora.save(
        tmp_path / "adapter", wire.unpack(Learner(config, threads=1).export()[1]), config.lora
    )
    _, out, _ = rl_edit("evaluate", tmp_path)
    base = read_json(tmp_path / "evaluation.json")["base"]
    assert "held-out tasks: 3;" in " ".join(out.split())
    assert ("instruction score" in out) == bool(judges)
    assert base.get("instruction") == (base[f"{judges[0]}.instruction"] if judges else None)


def test_evaluate_needs_a_run_and_its_adapter(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    assert_refused(
        rl_edit("evaluate", tmp_path / "none"), None, str(tmp_path / "none"), "rl-edit train"
    )
    (tmp_path / "config.yaml").write_text(small_config(small_editor).to_yaml())
    assert_refused(rl_edit("evaluate", tmp_path), None, "no adapter at", "RUN/adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_an_altered_adapter_is_refused(rl_edit: Command, trained: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (trained / "adapter").iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            content[-1] ^= 1
        (adapter / path.name).write_bytes(content)
    assert_refused(
        rl_edit("evaluate", trained, "--adapter", adapter), None, "the adapter was altered"
    )
