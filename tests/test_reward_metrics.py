"""Metrics are what their names say, and their files survive a crash."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from learner.controller.run_log import Events
from rl_edit.data import shapes
from rl_edit.files import JsonLines, read_json_lines
from rl_edit.measures import reward_statistics
from rl_edit.measures.reward_metrics import count_reasons, reward_metrics
from rl_edit.measures.reward_statistics import Normalisation
from rl_edit.method.advantages import GroupCredit, standardise
from rl_edit.scores import ChangeVariance, Measures
from rl_edit.types import Advantages, Candidates, RewardTable


def table(
    values: list[list[float]],
    *,
    components: dict[str, dict[str, tuple[float, ...]]] | None = None,
    repeats: dict[str, tuple[float, ...]] | None = None,
    measures: Measures | None = None,
    counts: dict[str, int] | None = None,
    weights: tuple[float, ...] = (1.0, 0.5),
) -> RewardTable:
    tensor = torch.tensor(values)
    return RewardTable(
        group_id="w",
        names=("a", "b"),
        weights=weights,
        values=tensor,
        valid=~tensor.isnan(),
        components=components or {},
        repeats=repeats or {},
        measures=measures,
        counts=counts or {},
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
    assert reward_metrics([sound, table([[math.nan, 100.0], [1.0, 100.0]])]) == reward_metrics(
        [sound]
    )
    assert reward_metrics([table([[math.nan, 1.0]])]) == {}


def test_a_term_without_weight_that_fails_costs_only_its_own_numbers() -> None:
    scored = table([[1.0, 4.0], [3.0, 8.0]], weights=(1.0, 0.0))
    failed = table(
        [[5.0, math.nan], [7.0, math.nan]], weights=(1.0, 0.0), repeats={"b": (2.0, math.nan)}
    )
    metrics = reward_metrics([scored, failed])
    assert metrics["reward/a/mean"] == metrics["reward/total/mean"] == 4.0
    assert metrics["reward/total/spread"] == 1.0 and metrics["reward/a/variance_share"] == 1.0
    assert metrics["reward/b/mean"] == 6.0 and math.isfinite(metrics["reward/b/noise_to_spread"])
    isolated = reward_metrics([failed])
    assert isolated["reward/total/mean"] == 6.0 and "reward/b/mean" not in isolated
    assert "reward/b/noise_to_spread" not in isolated


def test_diagnostics_have_keys_of_their_own_and_parts_of_a_term_live_under_component() -> None:
    measures = Measures(
        background={"psnr": (20.0, 30.0)},
        change_inside=(0.1, 0.3),
        concentration=(1.0, 3.0),
        variance=None,
    )
    parts = {"a": {"instruction": (0.0, 1.0)}}
    metrics = reward_metrics([table([[0.0, 0.0], [1.0, 1.0]], components=parts, measures=measures)])
    assert metrics["background/psnr/mean"] == pytest.approx(25.0)
    assert metrics["background/psnr/spread"] == pytest.approx(5.0)
    assert metrics["change/inside/mean"] == pytest.approx(0.2)
    assert metrics["concentration/spread"] == pytest.approx(1.0)
    assert metrics["component/a.instruction/mean"] == pytest.approx(0.5)


def test_shares_of_statuses_count_groups_that_are_dropped_too() -> None:
    sound = table(
        [[0.0, 4.0], [2.0, 4.0]], counts={"a.ok": 2, "b.ok": 2, "b.cached": 1, "b.uncached": 0}
    )
    torn = table(
        [[math.nan, 1.0], [math.nan, 2.0]],
        counts={"a.timeout": 1, "a.refused": 1, "b.ok": 2, "b.cached": 2, "b.uncached": 0},
    )
    metrics = reward_metrics([sound, torn])
    assert (
        metrics["reward/a/timeout_share"],
        metrics["reward/a/refused_share"],
        metrics["reward/a/invalid_share"],
    ) == (0.25, 0.25, 0.0)
    assert (metrics["reward/b/timeout_share"], metrics["reward/b/cached_share"]) == (0.0, 0.75)
    assert "reward/a/cached_share" not in metrics and metrics["reward/a/mean"] == 1.0
    assert reward_metrics([torn])["reward/a/timeout_share"] == 0.5


def test_shares_of_the_totals_variance_add_up_to_one() -> None:
    apart = table([[0.0, 4.0], [2.0, 0.0], [4.0, 0.0], [2.0, 4.0]])
    metrics = reward_metrics([apart], normalise="none")
    total = apart.values.double() @ torch.tensor([1.0, 0.5], dtype=torch.float64)
    expected = torch.cov(torch.stack([apart.values[:, 0].double(), total]), correction=0)[
        0, 1
    ] / total.var(correction=0)
    assert metrics["reward/a/variance_share"] == pytest.approx(float(expected))
    assert metrics["reward/a/variance_share"] + metrics["reward/b/variance_share"] == pytest.approx(
        1.0
    )
    against = table([[0.0, 1.0], [2.0, 0.0]])
    assert reward_metrics([against], normalise="none")["reward/b/variance_share"] < 0


@pytest.mark.parametrize("kind", ["minibatch", "group", "none"])
def test_terms_are_normalised_as_the_credit_rule_does(kind: Normalisation) -> None:
    generator = torch.Generator().manual_seed(3)
    tables = [
        table((torch.randn(5, 2, generator=generator) * torch.tensor([1.0, 20.0])).tolist())
        for _ in range(3)
    ]
    tables.append(table([[0.1, 7.0], [0.3, 7.0], [0.2, 7.0]]))
    areas = [torch.ones(1, 1, 4, dtype=torch.bool)] * len(tables)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    parts = reward_statistics.normalised([t.values.double().T for t in tables], kind)
    for part, credit in zip(parts, GroupCredit(normalise=kind)(tables, areas), strict=True):
        assert isinstance(credit, Advantages)
        assert credit.values[:, 0].tolist() == pytest.approx(
            standardise(weights @ part).tolist(), abs=1e-5
        )


def test_a_term_without_weight_or_without_differences_has_no_share() -> None:
    measured = dataclasses.replace(table([[0.0, 1.0], [1.0, 5.0]]), weights=(1.0, 0.0))
    metrics = reward_metrics([measured])
    assert (
        metrics["reward/a/variance_share"] == pytest.approx(1.0)
        and "reward/b/variance_share" not in metrics
    )
    assert "reward/a/variance_share" not in reward_metrics([table([[1.0, 1.0], [1.0, 1.0]])])


def test_a_judges_noise_is_estimated_from_candidates_scored_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = []
    for _ in range(400):
        first, second = (2.0 + 0.3 * torch.randn(4, 2, generator=generator) for _ in range(2))
        first = first + torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]
        difference = float(second[0, 0] - first[0, 0])
        tables.append(
            table(
                first.tolist(),
                repeats={"a": (difference, math.nan, math.nan, math.nan)},
            )
        )
    metrics = reward_metrics(tables)
    assert metrics["reward/a/noise"] == pytest.approx(0.3, rel=0.1)
    assert metrics["reward/a/noise_to_spread"] == pytest.approx(
        0.3 / math.sqrt(1.25 + 0.09), rel=0.1
    )
    assert "reward/b/noise" not in metrics and not any("repeat" in key for key in metrics)


def pictures(num: int, inside: float, outside: float) -> Candidates:
    task = shapes.task("validation", 0)
    drawn = torch.randn(num, *task.source.shape, generator=torch.Generator().manual_seed(0))
    level = torch.where(task.edit_mask[..., None], inside, outside)
    images = (128 + 255 * level * drawn).round().clamp(0, 255).to(torch.uint8)
    return Candidates(
        task=task,
        images=images,
        attention=torch.ones(num, 1),
        token_mask=torch.ones(1, dtype=torch.bool),
    )


def varying(variance: ChangeVariance | None) -> Measures:
    unchanged = (0.0, 0.0)
    return Measures(
        background={}, change_inside=unchanged, concentration=unchanged, variance=variance
    )


def inside_variance(group: Candidates) -> tuple[float, ...]:
    variance = reward_statistics.change_variance(group)
    assert variance is not None
    return variance.inside


def test_the_share_of_pixel_variance_inside_the_mask_is_that_of_the_candidates_differences() -> (
    None
):
    group = pictures(64, inside=0.1, outside=0.05)
    measures = varying(reward_statistics.change_variance(group))
    share = group.task.edit_mask.float().mean().item()
    expected = share * 0.01 / (share * 0.01 + (1 - share) * 0.0025)
    metrics = reward_metrics([table([[0.0, 0.0]] * 64, measures=measures)])
    assert metrics["change/variance_inside_share"] == pytest.approx(expected, rel=0.05)
    assert metrics["change/variance_outside/mean"] == pytest.approx((1 - share) * 0.0025, rel=0.05)


def test_pixel_variance_of_a_group_in_chunks_is_that_of_the_whole() -> None:
    group = pictures(64, inside=0.1, outside=0.05)
    whole = inside_variance(group)
    chunks = [
        dataclasses.replace(
            group, images=group.images[i : i + 4], attention=group.attention[i : i + 4]
        )
        for i in range(0, 64, 4)
    ]
    pieces = [value for chunk in chunks for value in inside_variance(chunk)]
    assert sum(pieces) / 64 == pytest.approx(sum(whole) / 64, rel=0.02)
    assert reward_statistics.change_variance(pictures(1, 0.1, 0.1)) is None


def test_identical_candidates_have_no_share_of_variance() -> None:
    same = reward_statistics.change_variance(pictures(3, 0.0, 0.0))
    assert same is not None and set(same.inside) == {0.0}
    assert "change/variance_inside_share" not in reward_metrics(
        [table([[0.0, 0.0]] * 3, measures=varying(same))]
    )


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"a": math.nan, "b": math.inf, "c": 0.1})
    assert json.loads(file.path.read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": None,
        "c": 0.1,
    }


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).append({"update": 0})
    with path.open("a") as file:
        file.write('{"update": 1, "lo')
    assert read_json_lines(path) == [{"update": 0}]
    JsonLines(path).append({"update": 2})
    assert read_json_lines(path) == [{"update": 0}, {"update": 2}]


def test_rewinding_keeps_what_came_before(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    for update in range(4):
        file.append({"update": update})
    file.rewind(2)
    file.append({"update": 2, "again": True})
    assert read_json_lines(file.path) == [
        {"update": 0},
        {"update": 1},
        {"update": 2, "again": True},
    ]


def test_an_event_says_when_and_what(tmp_path: Path) -> None:
    Events(tmp_path / "events.jsonl")("actor_lost", role="rollout")
    (event,) = read_json_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["role"]) == ("actor_lost", "rollout")
    assert event["time"] > 1_600_000_000


def test_reasons_are_counted_most_frequent_first() -> None:
    assert list(count_reasons(["a", "b", "b"]).items()) == [("b", 2), ("a", 1)]


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "none.jsonl") == []
