"""Rewards: the boundary that lets no invented number through, and what each term rewards."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from judge_server import FAULTS, Answer, completion, images_of, question_of, serving
from rl_edit.data import shapes
from rl_edit.errors import InputError
from rl_edit.measures.pixels import gaussian_mean, psnr
from rl_edit.method.advantages import CreditRule, Declined, GroupCredit, RegionCredit, SplitCredit
from rl_edit.method.regions import labelled_regions
from rl_edit.report import render_report
from rl_edit.rewards import Reward, available, score_candidates
from rl_edit.rewards.concentration import Concentration
from rl_edit.rewards.custom import PythonReward
from rl_edit.rewards.preservation import Preservation
from rl_edit.rewards.shapes_judge import ShapesJudge
from rl_edit.rewards.vlm.editscore import EditScore, overall
from rl_edit.scores import RegionScores
from rl_edit.types import Advantages, Candidates, EditTask, PairedTask, RewardTable, Score

TASKS = [shapes.task("validation", index) for index in range(9)]


def as_bytes(image: torch.Tensor) -> torch.Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def candidates(task: EditTask, images: Sequence[torch.Tensor]) -> Candidates:
    token_mask = torch.zeros(16, dtype=torch.bool)
    token_mask[:4] = True
    return Candidates(
        task=task,
        images=torch.stack(list(images)),
        attention=torch.full((len(images), 16), 1 / 16),
        token_mask=token_mask,
    )


def plain_task(size: int = 16, instruction: str = "add a red circle") -> EditTask:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[2:8, 2:8] = True
    source = torch.randint(
        0, 256, (size, size, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8
    )
    return EditTask(
        task_id="plain", task_type="edit", source=source, instruction=instruction, edit_mask=mask
    )


def small_group(num: int = 3) -> Candidates:
    task = plain_task()
    images = [torch.full_like(task.source, 40 * row) for row in range(num)]
    return candidates(task, images)


# --- the boundary
# --------------------------------------------------------------------------------------------------

ANSWERS: list[Any] = []
"""What ``told`` gives: the property test writes it, so that a reward can misbehave in any way."""


def told(group: Candidates) -> Any:
    return list(ANSWERS)


def broken(group: Candidates) -> list[float]:
    raise RuntimeError("no judge today")


def python_reward(function: str = "told", **changes: Any) -> PythonReward:
    return PythonReward(
        **{"function": f"{__name__}:{function}", "low": 0.0, "high": 1.0, **changes}
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.floats(), st.none(), st.sampled_from(["0.5", [], 10**400, True])),
        min_size=0,
        max_size=6,
    )
)
def test_an_invalid_value_never_appears_as_a_number_in_the_table(answers: list[Any]) -> None:
    ANSWERS[:] = answers
    table = score_candidates([python_reward()], small_group(4), group_id="w")
    assert table.values.shape == table.valid.shape == (4, 1)
    for row in range(4):
        acceptable = (
            len(answers) == 4 and isinstance(answers[row], int | float) and 0 <= answers[row] <= 1
        )
        assert table.valid[row, 0].item() == acceptable
        if acceptable:
            assert table.values[row, 0].item() == pytest.approx(float(answers[row]))
        else:
            assert math.isnan(table.values[row, 0].item())
    assert bool(table.reasons) == (not bool(table.valid.all()))
    assert all(reason.startswith("python: ") for reason in table.reasons)


def test_a_value_out_of_range_is_refused_with_a_reason_that_names_reward_value_and_range() -> None:
    ANSWERS[:] = [0.5, 12.5, math.nan]
    table = score_candidates([python_reward(name="mine")], small_group(3), group_id="w")
    assert table.valid[:, 0].tolist() == [True, False, False]
    assert table.reasons == (
        "mine: gave 12.5, outside its declared range 0..1",
        "mine: gave nan, which is not a finite number",
    )


def test_a_term_that_raises_is_invalid_for_every_candidate_and_the_others_still_count() -> None:
    ANSWERS[:] = [0.1, 0.2, 0.3]
    table = score_candidates(
        [python_reward("broken", name="bad"), python_reward(name="good", weight=2)],
        small_group(3),
        group_id="w",
    )
    assert table.names == ("bad", "good")
    assert table.weights == (1.0, 2.0)
    assert table.valid.tolist() == [[False, True]] * 3
    assert table.reasons == ("bad: raised RuntimeError: no judge today",)
    assert table.values[:, 1].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_wrong_number_of_scores_is_invalid_for_every_candidate() -> None:
    ANSWERS[:] = [0.1, 0.2]
    table = score_candidates([python_reward()], small_group(3), group_id="w")
    assert not table.valid.any()
    assert table.reasons == ("python: returned 2 scores for 3 candidates",)
    assert table.out_of_contract and table.counts == {"python.invalid": 3}


def test_a_finite_double_that_single_precision_cannot_hold_is_invalid() -> None:
    ANSWERS[:] = [1e300]
    table = score_candidates([python_reward(high=math.inf)], small_group(1), group_id="w")
    assert not table.valid.any() and math.isnan(table.values[0, 0].item())


def test_components_are_kept_per_candidate_under_the_terms_name() -> None:
    task = TASKS[0]
    table = score_candidates(
        [ShapesJudge(name="judge"), Preservation()],
        candidates(task, [task.target, task.source]),
        group_id="w7",
    )
    assert table.group_id == "w7"
    assert table.components["judge"]["instruction"] == (10.0, 0.0)
    assert table.components["preservation"]["psnr"] == (60.0, 60.0)
    assert table.seconds > 0


def late(group: Candidates) -> list[float]:
    raise TimeoutError("no answer within 3 s")


def test_every_score_is_counted_under_its_status_and_none_but_ok_has_a_number() -> None:
    ANSWERS[:] = [
        0.5,
        Score(value=None, reason="not that picture", status="refused"),
        Score(value=None, status="timeout"),
        7.0,
    ]
    table = score_candidates(
        [python_reward(name="mine"), python_reward("late", name="slow")],
        small_group(4),
        group_id="w",
    )
    assert table.valid.tolist() == [[True, False], [False, False], [False, False], [False, False]]
    assert table.counts == {
        "mine.ok": 1,
        "mine.refused": 1,
        "mine.timeout": 1,
        "mine.invalid": 1,
        "slow.timeout": 4,
    }
    assert (
        "mine: not that picture" in table.reasons
        and "slow: raised TimeoutError: no answer within 3 s" in table.reasons
    )


def test_a_score_is_ok_exactly_when_it_has_a_value() -> None:
    assert (
        Score(value=0.0).status,
        Score(value=None).status,
        Score(value=None, status="timeout").status,
    ) == ("ok", "invalid", "timeout")
    with pytest.raises(ValueError, match="invented"):
        Score(value=0.5, status="timeout")


def test_a_term_that_is_better_when_lower_is_checked_as_declared_and_negated_in_the_table() -> None:
    ANSWERS[:] = [0.25, 1.5, -0.25]
    table = score_candidates([python_reward(direction="lower")], small_group(3), group_id="w")
    assert table.values[0, 0].item() == -0.25
    assert table.valid[:, 0].tolist() == [True, False, False]
    assert table.reasons[0] == "python: gave 1.5, outside its declared range 0..1"


def test_a_function_may_name_parts_of_its_score() -> None:
    ANSWERS[:] = [Score(value=0.5, components={"sharp": 0.1}), 0.6]
    table = score_candidates([python_reward()], small_group(2), group_id="w")
    assert table.components == {"python": {"sharp": pytest.approx((0.1, math.nan), nan_ok=True)}}


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_that_is_negative_or_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(ValidationError, match="must be finite and not negative"):
        Preservation(weight=weight)


def test_a_misspelt_key_is_refused_and_a_term_is_named_after_its_kind() -> None:
    with pytest.raises(ValidationError, match="wieght"):
        Preservation(wieght=1)  # type: ignore[call-arg]
    parsed = TypeAdapter(Reward).validate_python({"kind": "shapes_judge", "weight": 2})
    assert isinstance(parsed, ShapesJudge) and parsed.name == "shapes_judge"
    assert TypeAdapter(Reward).validate_python(parsed.model_dump()) == parsed
    assert ShapesJudge(name="judge").name == "judge"


def test_two_terms_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="Two rewards are called 'preservation'"):
        score_candidates([Preservation(), Preservation(ceiling_db=35)], small_group(), group_id="w")
    with pytest.raises(InputError, match="Two rewards are called"):
        available([Preservation(), Preservation()], {"target"})


def test_a_term_whose_field_the_data_lacks_raises_or_is_left_out_as_it_says() -> None:
    with pytest.raises(InputError, match=r"'shapes_judge' needs the field target .* if_available"):
        available([ShapesJudge(), Preservation()], set())
    usable, left_out = available([ShapesJudge(when="if_available"), Preservation()], {"caption"})
    assert [term.name for term in usable] == ["preservation"]
    assert left_out == {"shapes_judge": "the data has no target"}
    assert available([ShapesJudge(), Preservation()], {"target"})[1] == {}


def test_no_reward_left_and_only_zero_weights_are_errors() -> None:
    with pytest.raises(InputError, match="No reward is left"):
        available([ShapesJudge(when="if_available")], set())
    with pytest.raises(InputError, match="none is configured"):
        available([], {"target"})
    with pytest.raises(InputError, match="weight 0"):
        available([Preservation(weight=0)], set())


# --- failures and credit
# ----------------------------------------------------------------------------------------------

NUM_GROUPS, NUM_CANDIDATES = 15, 4
FAILED_SHARE = 0.05
"""Of the judge's answers."""

OWN_STATISTICS: list[CreditRule] = [
    GroupCredit(normalise="group"),
    GroupCredit(normalise="none"),
    GroupCredit(normalise="group", quasi_norm=0.8),
    SplitCredit(normalise="group"),
    SplitCredit(normalise="none"),
]
"""Rules in which a group's advantages follow from its own rewards."""

POOLED_STATISTICS: list[CreditRule] = [
    GroupCredit(normalise="minibatch"),
    GroupCredit(normalise="minibatch", quasi_norm=0.8),
    GroupCredit(normalise="minibatch", deviation="batch"),
    GroupCredit(normalise="group", deviation="batch"),
    GroupCredit(normalise="none", deviation="batch"),
    SplitCredit(normalise="minibatch"),
]
"""Rules that scale by statistics over the groups of the update."""


def named(rule: CreditRule) -> str:
    return "-".join(
        f"{value}"
        for value in rule.model_dump(
            include={"kind", "normalise", "deviation", "quasi_norm"}
        ).values()
    )


def marked(index: int) -> Candidates:
    """A group whose first pixels say which candidate of which group a image is."""
    task = replace(TASKS[index % len(TASKS)], task_id=f"task-{index}")
    noise = torch.randn(
        NUM_CANDIDATES,
        64,
        64,
        3,
        generator=torch.Generator().manual_seed(index),
        dtype=torch.float64,
    )
    levels = torch.linspace(0.02, 0.06, NUM_CANDIDATES, dtype=torch.float64)
    images = as_bytes(task.target.double() / 255 + levels[:, None, None, None] * noise)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = index, torch.arange(NUM_CANDIDATES)
    return candidates(task, list(images))


def tables_of(failing: dict[tuple[int, int, str], str]) -> list[RewardTable]:
    """Every group scored by a judge behind HTTP and by pixel rewards; ``failing`` is the fault of
    (group, candidate, question)."""

    def reply(body: dict[str, Any], number: int) -> Answer:
        group, row = images_of(body)[-1][0, 0, :2].tolist()
        if (fault := failing.get((group, row, question_of(body)))) is not None:
            return FAULTS[fault][0]
        said = random.Random(f"{group} {row} {question_of(body)}")
        return 200, completion(
            json.dumps({"reasoning": "", "score": [said.randint(1, 25), said.randint(1, 25)]})
        )

    with serving(reply) as judge:
        # The server's queue holds five connections: one more would wait a second for its second
        # try.
        judged = EditScore(
            transport={"base_url": judge.url, "model": "judge", "concurrency": 4}, retries=0
        )
        terms = [judged, ShapesJudge(weight=0.5), Preservation(weight=0.6)]
        return [
            score_candidates(terms, marked(index), group_id=str(index))
            for index in range(NUM_GROUPS)
        ]


@pytest.fixture(scope="module")
def clean_and_failing() -> tuple[list[RewardTable], list[RewardTable]]:
    """The same groups scored without a fault, and with 5 % of the judge's answers failing in every
    way there is."""
    questions = [
        (group, row, name)
        for group in range(NUM_GROUPS)
        for row in range(NUM_CANDIDATES)
        for name in ("SC", "PQ")
    ]
    hit = random.Random(0).sample(questions, round(FAILED_SHARE * len(questions)))
    failing = dict(zip(hit, itertools.cycle(FAULTS), strict=False))
    clean, faulty = tables_of({}), tables_of(failing)
    assert all(bool(table.valid.all()) for table in clean)
    lost = {group for group, _, _ in failing}
    assert [not bool(table.valid.all()) for table in faulty] == [
        index in lost for index in range(NUM_GROUPS)
    ]
    assert 0 < len(lost) < NUM_GROUPS
    return clean, faulty


def credited(rule: CreditRule, tables: Sequence[RewardTable]) -> list[Advantages | Declined]:
    return rule(tables, [torch.arange(16).reshape(1, 4, 4) < 4] * len(tables))


def survivors(rule: CreditRule, tables: Sequence[RewardTable]) -> dict[int, torch.Tensor]:
    """Advantages of the groups that are trained, by the group's place; the others must be those
    without a score."""
    results = credited(rule, tables)
    for table, result in zip(tables, results, strict=True):
        assert isinstance(result, Advantages) == bool(table.valid.all())
        assert isinstance(result, Advantages) or result.kind == "invalid"
    return {
        index: result.values
        for index, result in enumerate(results)
        if isinstance(result, Advantages)
    }


@pytest.mark.parametrize("rule", OWN_STATISTICS, ids=named)
def test_five_percent_injected_failures_leave_the_advantages_of_survivors_as_they_are(
    rule: CreditRule, clean_and_failing: tuple[list[RewardTable], list[RewardTable]]
) -> None:
    clean, failing = (survivors(rule, tables) for tables in clean_and_failing)
    assert len(clean) == NUM_GROUPS
    for index, values in failing.items():
        assert torch.equal(values, clean[index])


@pytest.mark.parametrize("rule", POOLED_STATISTICS, ids=named)
def test_under_pooled_statistics_survivors_of_failures_are_credited_as_in_a_clean_run(
    rule: CreditRule, clean_and_failing: tuple[list[RewardTable], list[RewardTable]]
) -> None:
    """What a lost group would have scored is unknown, so it has no share in the scale: that may
    differ from the whole clean run's."""
    clean, failing = clean_and_failing
    found = survivors(rule, failing)
    alone = survivors(rule, [clean[index] for index in found])
    for values, expected in zip(found.values(), alone.values(), strict=True):
        assert torch.equal(values, expected)
    whole = survivors(rule, clean)
    assert any(not torch.equal(values, whole[index]) for index, values in found.items())


@pytest.mark.parametrize("normalise", ["group", "none"])
def test_under_a_batch_deviation_failures_change_the_advantages_of_all_survivors(
    normalise: Any, clean_and_failing: tuple[list[RewardTable], list[RewardTable]]
) -> None:
    clean, failing = (
        survivors(GroupCredit(normalise=normalise, deviation="batch"), tables)
        for tables in clean_and_failing
    )
    factors = torch.cat([(values / clean[index]).flatten() for index, values in failing.items()])
    assert factors == pytest.approx(factors[0].item(), rel=1e-4)


def test_a_single_term_has_the_clean_runs_advantages_under_minibatch_statistics_too_up_to_rounding(
    clean_and_failing: tuple[list[RewardTable], list[RewardTable]],
) -> None:
    """Pooled mean and deviation of one term cancel in its group; of several terms the deviations
    decide the mixture."""
    only = [
        [replace(table, weights=(1.0, 0.0, 0.0)) for table in tables]
        for tables in clean_and_failing
    ]
    clean, failing = (survivors(GroupCredit(normalise="minibatch"), tables) for tables in only)
    for index, values in failing.items():
        assert values == pytest.approx(clean[index], abs=1e-6)


UNUSABLE: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(["invalid", "timeout", "refused"]).map(
        lambda status: Score(value=None, reason="no answer", status=status)
    ),
    st.sampled_from(
        [math.nan, math.inf, -math.inf, 12.5, -0.001, 1.0001, 1e300, 10**400, None, "0.5", []]
    ),
    st.floats(min_value=1.0, exclude_min=True) | st.floats(max_value=0.0, exclude_max=True),
)
USABLE = st.floats(0, 1, width=32)
ANSWER_LISTS = st.one_of(
    st.lists(USABLE, min_size=3, max_size=3),
    st.lists(USABLE | UNUSABLE, min_size=3, max_size=3),
    st.lists(USABLE, max_size=5),  # too few, too many
)


def in_turn(group: Candidates) -> Any:
    """Each term says what stands first; numbers stand for their regions too."""
    return [
        Score(value=said, regions=RegionScores(areas=(said,), background=1 - said))
        if isinstance(said, float)
        else said
        for said in ANSWERS.pop(0)
    ]


def unwatched(table: RewardTable) -> RewardTable:
    """The table of a run without its last term."""
    return replace(
        table,
        names=table.names[:-1],
        weights=table.weights[:-1],
        values=table.values[:, :-1],
        valid=table.valid[:, :-1],
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ANSWER_LISTS, ANSWER_LISTS, ANSWER_LISTS), min_size=1, max_size=4))
def test_no_invalid_value_ever_reaches_an_advantage(
    updates: list[tuple[list[Any], list[Any], list[Any]]],
) -> None:
    """Whatever stands where a score should: its group is declined, and every other group is
    credited as if that one had not been.

    The third term has weight 0: it is measured, and may fail as it likes.
    """
    weights = {"judge": 1.0, "preservation": 0.5, "watched": 0.0}
    terms = [python_reward("in_turn", name=name, weight=weight) for name, weight in weights.items()]
    tables = []
    for group in updates:
        ANSWERS[:] = group
        tables.append(score_candidates(terms, small_group(3), group_id="w"))
    usable = [
        all(
            len(said) == 3 and all(isinstance(s, float) and 0 <= s <= 1 for s in said)
            for said in group[:2]
        )
        for group in updates
    ]
    for rule in (*OWN_STATISTICS, *POOLED_STATISTICS, RegionCredit(term="judge")):
        results = credited(rule, tables)
        assert all(
            fit or isinstance(result, Declined) for fit, result in zip(usable, results, strict=True)
        )
        kept = [index for index, fit in enumerate(usable) if fit]
        for index, alone in zip(
            kept, credited(rule, [unwatched(tables[index]) for index in kept]), strict=True
        ):
            result = results[index]
            assert type(result) is type(alone)
            if isinstance(result, Advantages) and isinstance(alone, Advantages):
                assert bool(result.values.isfinite().all()) and torch.equal(
                    result.values, alone.values
                )


# --- in the report
# --------------------------------------------------------------------------------------------------


def test_the_report_draws_what_drives_the_reward_with_one_line_a_term(tmp_path: Path) -> None:
    names = [f"term{number}" for number in range(9)]
    row = {
        f"reward/{name}/{what}": 0.1
        for name in names
        for what in ("variance_share", "invalid_share", "timeout_share")
    }
    rows = [
        {
            "update": update,
            **row,
            "reward/term0/noise_to_spread": 0.5,
            "change/variance_inside_share": 0.7,
        }
        for update in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = render_report(tmp_path).read_text()
    assert "<h3>What drives the reward" in page and "<h3>Other numbers" not in page
    titles = {
        "Share of the total&#39;s variance": 2,
        "Scores that are invalid": 2,
        "Scores that came too late": 2,
    }
    titles |= {
        "Noise over spread: term0": 1,
        "Share of the pixels&#39; variance inside the mask": 1,
    }
    for title, charts in titles.items():
        assert page.count(f'aria-label="{title}"') == charts, title
    assert all(page.count(f"</i>{name} <small>") == 3 for name in names[:8]), (
        "eight lines a chart, and the ninth in one of its own"
    )


# --- the judge
# --------------------------------------------------------------------------------------------------


def judged(task: PairedTask, images: Sequence[torch.Tensor], **options: Any) -> list[float]:
    scores = ShapesJudge(**options).score(candidates(task, images))
    assert all(score.ok for score in scores)
    return [float(score.value) for score in scores if score.value is not None]


def part(task: PairedTask, images: Sequence[torch.Tensor], name: str) -> list[float]:
    return [score.components[name] for score in ShapesJudge().score(candidates(task, images))]


def unit(task: PairedTask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return task.source.double() / 255, task.target.double() / 255, task.edit_mask[..., None]


def white_noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(
        64, 64, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def strictly_falling(values: Sequence[float]) -> bool:
    return all(first > second for first, second in itertools.pairwise(values))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.task_id}-{task.task_type}")
def test_the_exact_target_scores_ten_and_no_edit_scores_zero(task: PairedTask) -> None:
    assert judged(task, [task.target, task.source]) == [10.0, 0.0]


def noise_inside(task: PairedTask, level: float) -> torch.Tensor:
    _, target, mask = unit(task)
    return as_bytes(target + mask * level * white_noise())


def noise_outside(task: PairedTask, level: float) -> torch.Tensor:
    _, target, mask = unit(task)
    return as_bytes(target + ~mask * level * white_noise())


def blur_everywhere(task: PairedTask, level: float) -> torch.Tensor:
    return as_bytes(gaussian_mean(unit(task)[1], sigma=level * 20, radius=8))


def shift_inside(task: PairedTask, level: float) -> torch.Tensor:
    source, target, mask = unit(task)
    return as_bytes(torch.where(mask, torch.roll(target, round(level * 40), dims=1), source))


def tint_inside(task: PairedTask, level: float) -> torch.Tensor:
    _, target, mask = unit(task)
    return as_bytes(target + mask * torch.where(target > 0.5, -level, level))


def tint_outside(task: PairedTask, level: float) -> torch.Tensor:
    _, target, mask = unit(task)
    return as_bytes(target + ~mask * torch.where(target > 0.5, -level, level))


def less_of_the_edit(task: PairedTask, level: float) -> torch.Tensor:
    source, target, _ = unit(task)
    return as_bytes(target + 8 * level * (source - target))


DAMAGES = [
    noise_inside,
    noise_outside,
    blur_everywhere,
    shift_inside,
    tint_inside,
    tint_outside,
    less_of_the_edit,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_more_damage_never_scores_higher(
    damage: Callable[[PairedTask, float], torch.Tensor],
) -> None:
    for task in TASKS:
        values = judged(task, [task.target, *(damage(task, level) for level in (0.025, 0.05, 0.1))])
        assert strictly_falling(values), (task.task_id, values)


def test_the_instruction_part_is_the_share_of_the_way_from_source_to_target() -> None:
    for task in TASKS:
        source, target, _ = unit(task)
        steps = [
            as_bytes(source + share * (target - source)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        assert part(task, steps, "instruction") == pytest.approx([0, 2.5, 5, 7.5, 10], abs=0.1)


def test_an_object_added_one_pixel_off_costs_little_and_in_the_wrong_place_most() -> None:
    for task in (shapes.task("validation", index, task_type="add") for index in range(8)):
        values = judged(task, [shift_inside(task, 1 / 40), shift_inside(task, 12 / 40)])
        assert values[0] > 7.5
        assert values[1] < 4.5


def test_a_wrong_colour_scores_below_half() -> None:
    for task in (shapes.task("validation", index, task_type="add") for index in range(8)):
        source, target, mask = unit(task)
        assert judged(task, [as_bytes(torch.where(mask, target[..., [1, 2, 0]], source))])[0] < 5.0


@pytest.mark.parametrize(
    ("decibel", "low", "high"), [(40, 9.8, 9.95), (34, 9.0, 9.5), (25, 4.7, 5.3), (20, 1.5, 2.5)]
)
def test_not_over_edited_follows_background_psnr(decibel: float, low: float, high: float) -> None:
    task = TASKS[0]
    source = torch.full_like(task.source, 128)
    grey = replace(
        task, source=source, target=torch.where(task.edit_mask[..., None], task.target, source)
    )
    noisy = as_bytes(
        grey.target.double() / 255
        + ~task.edit_mask[..., None] * 10 ** (-decibel / 20) * white_noise()
    )
    assert psnr(noisy, source, ~task.edit_mask, "masked").item() == pytest.approx(decibel, abs=0.3)
    assert low < part(grey, [noisy], "not_over_edited")[0] < high


def test_noise_inside_costs_clean_and_a_brightness_step_costs_artefacts() -> None:
    for task in TASKS:
        _, target, mask = unit(task)
        noisy, stepped = (
            noise_inside(task, 0.08),
            as_bytes(target + mask * torch.where(target.mean() > 0.5, -0.08, 0.08)),
        )
        clean, artefacts = (
            part(task, [noisy, stepped], "clean"),
            part(task, [noisy, stepped], "artefacts"),
        )
        assert clean[0] < 8.5 < 9.0 < clean[1]
        assert artefacts[1] < 5.0 < artefacts[0]


def test_slightly_different_edits_get_different_scores() -> None:
    for task in TASKS:
        _, target, _ = unit(task)
        group = [as_bytes(target + 0.02 * white_noise(seed)) for seed in range(12)]
        values = judged(task, group)
        assert len(set(values)) == 12
        assert 0 < np.std(values) < 0.5


def test_the_coarse_judge_answers_in_steps_of_a_25_point_scale_and_stays_close() -> None:
    for task in TASKS[:4]:
        _, target, _ = unit(task)
        group = [as_bytes(target + 0.04 * white_noise(seed)) for seed in range(6)]
        for rough, fine in zip(
            ShapesJudge(coarse=True).score(candidates(task, group)),
            ShapesJudge().score(candidates(task, group)),
            strict=True,
        ):
            for name in ("instruction", "not_over_edited", "clean", "artefacts"):
                assert rough.components[name] * 2.5 == pytest.approx(
                    round(rough.components[name] * 2.5), abs=1e-9
                )
                assert abs(rough.components[name] - fine.components[name]) <= 0.2 + 1e-9


def test_a_task_of_two_regions_edited_in_one_of_them_is_half_followed() -> None:
    listed = shapes.task("validation", 0, task_type="two_regions")
    first = listed.regions[0]
    half = torch.where(first[..., None], listed.target, listed.source)
    unlisted = PairedTask(
        task_id="u",
        task_type="two_regions",
        source=listed.source,
        instruction=listed.instruction,
        edit_mask=listed.edit_mask,
        target=listed.target,
    )
    for task in (listed, unlisted):
        assert part(task, [half], "instruction")[0] == pytest.approx(5.0, abs=0.05)


def test_the_judge_scores_a_larger_image_like_the_same_small_one() -> None:
    task = TASKS[0]
    large = replace(
        TASKS[0],
        source=task.source.repeat_interleave(4, 0).repeat_interleave(4, 1),
        target=task.target.repeat_interleave(4, 0).repeat_interleave(4, 1),
        edit_mask=task.edit_mask.repeat_interleave(4, 0).repeat_interleave(4, 1),
        regions=task.regions.repeat_interleave(4, 1).repeat_interleave(4, 2),
    )
    edit = shift_inside(task, 2 / 40)
    small_parts = ShapesJudge().score(candidates(task, [edit]))[0].components
    large_parts = (
        ShapesJudge()
        .score(candidates(large, [edit.repeat_interleave(4, 0).repeat_interleave(4, 1)]))[0]
        .components
    )
    for name in ("instruction", "not_over_edited"):
        assert large_parts[name] == pytest.approx(small_parts[name], abs=0.5)


def test_a_target_that_changes_nothing_and_a_task_without_target_are_invalid() -> None:
    task = TASKS[0]
    idle = score_candidates(
        [ShapesJudge()], candidates(replace(task, target=task.source), [task.source]), group_id="w"
    )
    assert not idle.valid.any() and "progress is undefined" in idle.reasons[0]
    untargeted = score_candidates([ShapesJudge()], small_group(2), group_id="w")
    assert not untargeted.valid.any() and "has no target" in untargeted.reasons[0]


def test_labelled_regions_join_diagonals_and_u_shapes_and_keep_the_rest_apart() -> None:
    picture = """
        X.X..X
        X.X.X.
        XXX...
        ....XX
    """
    mask = torch.tensor([[pixel == "X" for pixel in line.strip()] for line in picture.split()])
    labels = labelled_regions(mask)
    assert torch.equal(labels > 0, mask)
    assert torch.bincount(labels.flatten())[1:].tolist() == [7, 2, 2]


def test_specks_of_a_mask_do_not_count_as_places() -> None:
    task = TASKS[0]
    outside = (~task.edit_mask).nonzero()[::97]
    target, mask = task.target.clone(), task.edit_mask.clone()
    for row, column in outside.tolist():
        mask[row, column] = True
        target[row, column] = 255 - task.source[row, column] // 2
    speckled = PairedTask(
        task_id="s",
        task_type="edit",
        source=task.source,
        instruction=task.instruction,
        edit_mask=mask,
        target=target,
    )
    assert int(labelled_regions(mask).max()) > 20
    object_only = torch.where(task.edit_mask[..., None], task.target, task.source)
    assert part(speckled, [object_only], "instruction")[0] > 9.5


def test_overall_is_the_geometric_mean_of_minima_and_refuses_bad_numbers() -> None:
    assert overall((20.0, 5.0), (25.0, 20.0)) == pytest.approx(10.0)
    assert overall((0.0, 10.0), (10.0, 10.0)) == 0.0
    with pytest.raises(ValueError, match="finite and not negative"):
        overall((math.nan, 1.0), (1.0, 1.0))


# --- preservation, concentration, a user's function
# -----------------------------------------------------------------


def test_preservation_is_one_for_an_untouched_background_whatever_happens_inside() -> None:
    task = TASKS[0]
    inside = torch.where(task.edit_mask[..., None], 255 - task.source, task.source)
    quality = [
        score.components["psnr"]
        for score in Preservation().score(candidates(task, [inside, task.target]))
    ]
    assert quality == [60.0, 60.0]
    assert Preservation().score(candidates(task, [task.source]))[0].value == pytest.approx(1.0)


def test_preservation_is_the_stated_mixture_and_falls_with_damage() -> None:
    task = TASKS[0]
    images = [noise_outside(task, level) for level in (0.02, 0.05, 0.1)]
    scores = Preservation(ssim_weight=0.35).score(candidates(task, images))
    for score in scores:
        expected = 0.65 * min(score.components["psnr"] / 40, 1) + 0.35 * score.components["ssim"]
        assert score.value == pytest.approx(expected)
    assert strictly_falling([score.value or 0 for score in scores])


def test_the_psnr_part_of_preservation_saturates_at_its_ceiling() -> None:
    task = TASKS[0]
    images = [noise_outside(task, 10 ** (-db / 20)) for db in (42, 46)]
    assert (
        len({score.value for score in Preservation(ssim_weight=0).score(candidates(task, images))})
        == 1
    )
    assert (
        len(
            {
                score.value
                for score in Preservation(ssim_weight=0, ceiling_db=50).score(
                    candidates(task, images)
                )
            }
        )
        == 2
    )


def attended(rows: list[list[float]], inside: int) -> Candidates:
    attention = torch.tensor(rows)
    task = plain_task()
    token_mask = torch.arange(attention.shape[1]) < inside
    return Candidates(
        task=task,
        images=torch.stack([task.source] * len(rows)),
        attention=attention,
        token_mask=token_mask,
    )


def test_concentration_is_one_when_diffuse_and_area_ratio_when_all_inside() -> None:
    group = attended(
        [[0.25] * 4, [1.0, 0, 0, 0], [0.0, 0.5, 0.25, 0.25], [0.5, 0.5, 0, 0]], inside=1
    )
    table = score_candidates([Concentration()], group, group_id="w")
    assert table.values[:, 0].tolist() == pytest.approx([1.0, 4.0, 0.0, 2.0], abs=1e-6)
    assert table.components["concentration"]["mass_inside"] == pytest.approx(
        (0.25, 1.0, 0.0, 0.5), abs=1e-6
    )
    unit_table = score_candidates([Concentration(normalisation="unit")], group, group_id="w")
    assert unit_table.valid.all()
    assert unit_table.values[:, 0].tolist() == pytest.approx([0.0, 1.0, -1 / 3, 1 / 3], abs=1e-6)
    log_table = score_candidates([Concentration(normalisation="log")], group, group_id="w")
    assert log_table.valid[:, 0].tolist() == [True, True, False, True]
    assert log_table.values[1, 0].item() == pytest.approx(math.log(4), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.integers(0, 2**20))
def test_concentration_stays_in_its_declared_range_under_every_normalisation(
    inside: int, seed: int
) -> None:
    mass = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed)) + 1e-3
    mass[0, inside:] = 0
    group = attended((mass / mass.sum(dim=1, keepdim=True)).tolist(), inside)
    for normalisation in ("paper", "log", "unit"):
        assert score_candidates(
            [Concentration(normalisation=normalisation)], group, group_id="w"
        ).valid.all()


def test_concentration_over_every_token_is_undefined() -> None:
    table = score_candidates(
        [Concentration(normalisation="unit")], attended([[0.5, 0.5]], inside=2), group_id="w"
    )
    assert not table.valid.any() and "covers 2 of 2 tokens" in table.reasons[0]


def test_only_terms_that_read_attention_ask_for_it() -> None:
    assert Concentration().needs_attention and python_reward(needs_attention=True).needs_attention
    assert not any(
        term.needs_attention for term in (ShapesJudge(), Preservation(), python_reward())
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module_here:f", "cannot be imported"),
        (f"{__name__}:nothing", "does not exist"),
        (f"{__name__}:TASKS", "is not callable"),
        ("just_a_name", "package.module:name"),
    ],
)
def test_a_reward_function_that_cannot_be_called_is_refused_at_construction(
    function: str, message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        PythonReward(function=function, low=0, high=1)


def test_a_python_reward_declares_an_ordered_range_and_its_requirements() -> None:
    with pytest.raises(ValidationError, match="low < high"):
        python_reward(low=1.0, high=1.0)
    with pytest.raises(InputError, match="needs the field caption"):
        available([python_reward(requires={"caption"})], {"target"})


def test_a_renamed_setting_changes_no_stored_hash() -> None:
    """Evaluations of the version before name this reward by this hash."""
    transport = {"base_url": "http://h/v1", "model": "m"}
    assert EditScore(transport=transport).sha256().startswith("2db668cb8f9de808")
