"""A weighted reward that never differs within a group is reported, and ends the run in time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from judge_server import completion, serving
from learner.controller.silent import silences
from rl_edit.config import RunConfig
from rl_edit.measures.silence import silence
from rl_edit.method.update import TrainingFailed
from rl_edit.report import render_report
from rl_edit.training import Silent, train
from rl_edit.types import Candidates
from runs import command, events_of, metrics_of, read_json, run_of, small_config

PRESERVATION = {"kind": "preservation", "weight": 0.5}


def flat(group: Candidates) -> list[float]:
    return [0.5] * len(group.images)


def best(group: Candidates) -> list[float]:
    return [1.0] * len(group.images)


def silent_config(editor: str, *overrides: str, function: str = "flat", **term: Any) -> RunConfig:
    own = {"kind": "python", "function": f"{__name__}:{function}", "low": 0, "high": 1, **term}
    return small_config(editor, *overrides, rewards={"own": own, "preservation": PRESERVATION})


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def silent(self) -> list[str]:
        return [text for text in self.notes if "same score" in text]


def line(update: int, mean: float, spread: float | None, **more: float) -> dict[str, float]:
    scored = {} if spread is None else {"reward/own/mean": mean, "reward/own/spread": spread}
    return {"update": update, **scored, **more}


def test_a_silence_counts_the_last_updates_in_a_row_and_skips_those_without_a_score() -> None:
    lines = [line(0, 0.2, 0.1), line(1, 0.5, 0.0), line(2, 0, None), line(3, 0.5, 1e-17)]
    stands = silence(lines, "own")
    assert stands is not None
    assert (stands.updates, stands.varied_before, stands.low, stands.high) == (2, True, 0.5, 0.5)
    assert "'own'" in str(stands) and "2 updates in a row (always 0.5)" in str(stands)
    assert silence([*lines, line(4, 0.5, 0.01)], "own") is None
    assert silence(lines, "absent") is None


def test_a_reward_whose_regions_differ_is_not_silent_under_credit_by_region() -> None:
    lines = [
        line(
            0, 0.5, 0.0, **{"component/own.region.0/spread": 0.2, "component/own.region.0/mean": 1}
        )
    ]
    assert silence(lines, "own") is not None
    assert silence(lines, "own", parts=["component/own.region."]) is None


def test_a_silent_reward_ends_the_run_with_its_name_and_keeps_the_checkpoints(
    small_editor: str, tmp_path: Path
) -> None:
    config = silent_config(
        small_editor, "train.updates=6", "train.warn_silent=2", "train.max_silent=4"
    )
    observer = Notes()
    with pytest.raises(TrainingFailed, match=r"'own'.*4 updates in a row \(always 0.5\)"):
        train(config, tmp_path / "run", observer=observer)
    assert len(metrics_of(tmp_path / "run")) == 4
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    record = read_json(tmp_path / "run" / "run.json")
    assert record["status"] == "failed" and "reward 'own'" in record["reason"]
    (note,) = observer.silent
    assert "2 updates in a row" in note and "ends at 4 such updates" in note
    (event,) = events_of(tmp_path / "run", "silent_reward")
    assert (event["reward"], event["updates"], event["mean"]) == ("own", 2, [0.5, 0.5])
    page = render_report(tmp_path / "run").read_text()
    assert "Silent reward:" in page and "4 updates in a row (always 0.5)" in page


def test_a_resumed_run_counts_the_updates_before_and_may_be_allowed_to_go_on(
    small_editor: str, tmp_path: Path
) -> None:
    limits = ("train.warn_silent=2", "train.max_silent=3")
    with pytest.raises(TrainingFailed):
        train(silent_config(small_editor, "train.updates=6", *limits), tmp_path / "run")
    # One more update shows whether the reward has been mended; it has not.
    with pytest.raises(TrainingFailed, match="4 updates in a row"):
        train(
            silent_config(small_editor, "train.updates=6", *limits), tmp_path / "run", resume=True
        )
    off = silent_config(small_editor, "train.updates=5", "train.max_silent=null")
    assert train(off, tmp_path / "run", resume=True) is not None
    assert len(events_of(tmp_path / "run", "silent_reward")) == 1


def test_a_run_shorter_than_the_limit_does_not_end_well_when_a_reward_never_varied(
    small_editor: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingFailed, match=r"'own'.*3 updates in a row"):
        train(silent_config(small_editor, "train.updates=3"), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    observer = Notes()
    train(silent_config(small_editor, "train.updates=1"), tmp_path / "one", observer=observer)
    assert len(observer.silent) == 1, "too short to judge, but it is said"


def test_a_reward_of_weight_0_and_rewards_that_vary_raise_no_alarm(
    small_editor: str, tmp_path: Path
) -> None:
    observer = Notes()
    config = silent_config(small_editor, "train.updates=3", weight=0)
    assert train(config, tmp_path / "run", observer=observer) is not None
    assert observer.silent == []


def test_a_reward_that_was_learnt_only_warns_and_one_that_is_always_best_ends_the_run(
    small_editor: str, tmp_path: Path
) -> None:
    config = silent_config(small_editor, function="best")
    learnt = [line(0, 0.9, 0.1), *(line(update, 1.0, 0.0) for update in range(1, 12))]
    always = [line(update, 1.0, 0.0) for update in range(12)]
    from learner.controller import silent

    run = run_of(config, tmp_path)
    for lines in (learnt, always):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        assert [found.name for found in silences(lines, config)] == ["own"]
        if lines is always:
            with pytest.raises(TrainingFailed, match="best score there is"):
                silent.watch(run, events=lambda *a, **k: None, note=print)
        else:
            silent.watch(run, events=lambda *a, **k: None, note=print)
            silent.require_informative(tmp_path, config)


def test_a_judge_that_answers_the_same_for_all_ends_the_command_with_3(
    small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    same = completion(json.dumps({"reasoning": "nice", "score": [10, 10]}))
    with serving(lambda body, number: (200, same)) as server:
        judge = {
            "kind": "editscore",
            "transport": {"kind": "openai", "base_url": server.url, "model": "any"},
        }
        small_config(
            small_editor,
            "train.updates=12",
            "train.max_silent=4",
            rewards={"judge": judge, "preservation": PRESERVATION},
            directory=tmp_path,
        )
        overrides = ("train.updates=12", "train.max_silent=4")
        code, out, err = command(
            monkeypatch,
            capsys,
            *("train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run", *overrides),
        )
    assert code == 3
    assert "'judge'" in err[-1] and "max_silent=null" in err[-1]
    assert "gave all candidates of every group the same score in 3 updates" in out
