"""Metrics are what their names say, and their files survive a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rl_edit.telemetry import Events, JsonlFile, count_reasons, read_jsonl, reward_metrics
from rl_edit.types import RewardTable


def table(values: list[list[float]], *, components: dict[str, tuple[float, ...]] | None = None) -> RewardTable:
    tensor = torch.tensor(values)
    return RewardTable(
        group_id="w", names=("a", "b"), weights=(1.0, 0.5), values=tensor, valid=~tensor.isnan(), components=components or {}
    )


def test_means_are_over_all_candidates_and_spreads_within_groups() -> None:
    metrics = reward_metrics([table([[0.0, 4.0], [2.0, 4.0]]), table([[5.0, 0.0], [5.0, 8.0]])])
    assert metrics["reward/a/mean"] == pytest.approx(3.0)
    assert metrics["reward/a/spread"] == pytest.approx((1.0 + 0.0) / 2)
    assert metrics["reward/b/spread"] == pytest.approx((0.0 + 4.0) / 2)
    assert metrics["reward/total/mean"] == pytest.approx(3.0 + 0.5 * 4.0)
    assert metrics["reward/total/spread"] == pytest.approx((1.0 + 2.0) / 2)


def test_a_group_with_an_invalid_term_is_in_no_mean() -> None:
    sound = table([[0.0, 4.0], [2.0, 4.0]])
    assert reward_metrics([sound, table([[math.nan, 100.0], [1.0, 100.0]])]) == reward_metrics([sound])
    assert reward_metrics([table([[math.nan, 1.0]])]) == {}


def test_diagnostics_have_keys_of_their_own_and_parts_of_a_term_live_under_component() -> None:
    parts = {"background.psnr": (20.0, 30.0), "change.inside": (0.1, 0.3), "concentration": (1.0, 3.0), "judge.instruction": (0.0, 1.0)}
    metrics = reward_metrics([table([[0.0, 0.0], [1.0, 1.0]], components=parts)])
    assert metrics["background/psnr/mean"] == pytest.approx(25.0)
    assert metrics["background/psnr/spread"] == pytest.approx(5.0)
    assert metrics["change/inside/mean"] == pytest.approx(0.2)
    assert metrics["concentration/spread"] == pytest.approx(1.0)
    assert metrics["component/judge.instruction/mean"] == pytest.approx(0.5)


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    file = JsonlFile(tmp_path / "metrics.jsonl")
    file.append({"a": math.nan, "b": math.inf, "c": 0.1})
    assert json.loads(file.path.read_text(), parse_constant=pytest.fail) == {"a": None, "b": None, "c": 0.1}


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlFile(path).append({"update": 0})
    with path.open("a") as file:
        file.write('{"update": 1, "lo')
    assert read_jsonl(path) == [{"update": 0}]
    JsonlFile(path).append({"update": 2})
    assert read_jsonl(path) == [{"update": 0}, {"update": 2}]


def test_rewinding_keeps_what_came_before(tmp_path: Path) -> None:
    file = JsonlFile(tmp_path / "metrics.jsonl")
    for update in range(4):
        file.append({"update": update})
    file.rewind(2)
    file.append({"update": 2, "again": True})
    assert read_jsonl(file.path) == [{"update": 0}, {"update": 1}, {"update": 2, "again": True}]


def test_an_event_says_when_and_what(tmp_path: Path) -> None:
    Events(tmp_path / "events.jsonl")("actor_lost", role="rollout")
    (event,) = read_jsonl(tmp_path / "events.jsonl")
    assert (event["event"], event["role"]) == ("actor_lost", "rollout")
    assert event["time"] > 1_600_000_000


def test_reasons_are_counted_most_frequent_first() -> None:
    assert list(count_reasons(["a", "b", "b"]).items()) == [("b", 2), ("a", 1)]


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "none.jsonl") == []
