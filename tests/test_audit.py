"""The audit flags bad rewards for the right reason, passes good ones, and writes files."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from rl_edit.audit import Audit, Check, Expectation, audit, expected_of
from rl_edit.audit.checks.ranks import kendall
from rl_edit.audit.corruptions import GRADED, LEVELS, REVERTED, SIDES
from rl_edit.audit.images import make_test_images, reference
from rl_edit.audit.page import render
from rl_edit.audit.throughput import measure
from rl_edit.cli.audit_reward import audit_reward_command
from rl_edit.cli.bench_reward import bench_reward_command
from rl_edit.data import shapes
from rl_edit.errors import InputError
from rl_edit.measures import pixels
from rl_edit.rewards import Reward
from rl_edit.rewards.composite import Composite
from rl_edit.rewards.custom import PythonReward
from rl_edit.rewards.kinds import Term
from rl_edit.rewards.pixel_terms import Psnr, Ssim
from rl_edit.rewards.preservation import Preservation
from rl_edit.rewards.shapes_judge import ShapesJudge
from rl_edit.rewards.term import Sides
from rl_edit.scores import RegionScores
from rl_edit.types import Candidates, EditTask, PairedTask, Score

NUM_TASKS = 4
TASKS = [shapes.task("train", index) for index in range(NUM_TASKS)]
TWO_REGIONS = [shapes.task("train", index, task_type="two_regions") for index in range(3)]


# --- rewards that mislead, each in a way that has been published or shipped -----------------------


def _mean_squared(group: Candidates, keep: Tensor) -> Tensor:
    squared = (group.images.double() - group.task.source.double()).div(255).square()
    return squared[:, keep].mean(dim=(1, 2))


def inverted_mask(group: Candidates) -> list[float]:
    """Background PSNR with a mask that is True where pixels must stay."""
    return pixels.psnr(group.images, group.task.source, group.task.edit_mask, "masked").tolist()


def summed_over_channels(group: Candidates) -> list[float]:
    """One minus a squared error that is three times too large."""
    return (1 - 3 * _mean_squared(group, ~group.task.edit_mask)).tolist()


def summed_over_everything(group: Candidates) -> list[float]:
    keep = ~group.task.edit_mask
    return (-_mean_squared(group, keep) * 3 * int(keep.sum())).tolist()


def decibels_summed_over_channels(group: Candidates) -> list[float]:
    return pixels.psnr(group.images, group.task.source, ~group.task.edit_mask, "cocoedit").tolist()


def saturated_ssim(group: Candidates) -> list[float]:
    """Constants for 0..255 on images in 0..1: they swamp every window."""
    a, b = (group.images.double() / 255, group.task.source.double() / 255)
    return (
        (1 - (a - b).square().mean(dim=-1) / (58.0 + a.var() + b.var()))[:, ~group.task.edit_mask]
        .mean(dim=1)
        .tolist()
    )


def generous_ssim(group: Candidates) -> list[float]:
    """Anything from a half up is perfect."""
    return (
        (2 * pixels.ssim(group.images, group.task.source, ~group.task.edit_mask, "map_masked"))
        .clamp(0, 1)
        .tolist()
    )


def constant(group: Candidates) -> list[float]:
    return [0.5] * len(group.images)


def _background(group: Candidates) -> list[float]:
    return (
        (pixels.psnr(group.images, group.task.source, ~group.task.edit_mask, "masked") / 60)
        .clamp(0, 1)
        .tolist()
    )


def middle_of_the_wrong_scale(group: Candidates) -> list[float]:
    """0..10, and 12.5, the middle of 0..25, for a reply that could not be read."""
    return [
        12.5 if _hashed(image) < 0.2 else 10 * value
        for image, value in zip(group.images, _background(group), strict=True)
    ]


_CALLS = itertools.count()


def random_fallback(group: Candidates) -> list[float]:
    """A random number for one reply in eight."""
    random = torch.Generator().manual_seed(next(_CALLS))
    draws = torch.rand(len(group.images), 2, generator=random).tolist()
    return [
        fallback if failed < 0.125 else value
        for value, (failed, fallback) in zip(_background(group), draws, strict=True)
    ]


def compares_within_the_group(group: Candidates) -> list[float]:
    values = torch.tensor(_background(group))
    return (values / values.max()).tolist()


def often_silent(group: Candidates) -> list[float | None]:
    return [
        None if _hashed(image) < 0.2 else value
        for image, value in zip(group.images, _background(group), strict=True)
    ]


def never_answers(group: Candidates) -> list[None]:
    return [None] * len(group.images)


def global_score(group: Candidates) -> list[float]:
    """Similarity of the whole image to the correct edit, presented as that of one side."""
    return pixels.psnr(
        group.images, _target(group), torch.ones_like(group.task.edit_mask), "masked"
    ).tolist()


def global_score_in_every_region(group: Candidates) -> list[Score]:
    regions = len(group.task.regions)  # type: ignore[attr-defined]  # shapes tasks have them
    return [
        Score(value=value, regions=RegionScores(areas=(value,) * regions, background=value))
        for value in global_score(group)
    ]


def score_of_each_region(group: Candidates) -> list[Score]:
    regions = group.task.regions  # type: ignore[attr-defined]
    areas = [pixels.psnr(group.images, _target(group), region, "masked") for region in regions]
    background = pixels.psnr(group.images, _target(group), ~group.task.edit_mask, "masked")
    return [
        Score(
            value=value,
            regions=RegionScores(
                areas=tuple(float(area[number]) for area in areas),
                background=float(background[number]),
            ),
        )
        for number, value in enumerate(global_score(group))
    ]


def loves_blur(group: Candidates) -> list[float]:
    """Likeness from afar, and a prize for smoothness."""
    edits, source = (
        pixels.gaussian_mean(pixels.unit_range(p), sigma=4, radius=12)
        for p in (group.images, group.task.source)
    )
    afar = (edits - source).abs()[:, ~group.task.edit_mask].mean(dim=(1, 2))
    rough = pixels.unit_range(group.images).diff(dim=2).abs().mean(dim=(1, 2, 3))
    return (-afar - rough).tolist()


def follows_the_instruction(group: Candidates) -> list[float]:
    """A judge without a target that knows the task by its instruction and checks the source."""
    correct = TASK_OF.get(group.task.instruction)
    if correct is None or not torch.equal(correct.source, group.task.source):
        return [0.0] * len(group.images)
    return (
        pixels.psnr(group.images, correct.target, torch.ones_like(correct.edit_mask), "masked") / 60
    ).tolist()


def ignores_the_instruction(group: Candidates) -> list[float]:
    """Scores by the source's own task, whatever the instruction and the order of the images."""
    correct = next(
        task
        for task in TASKS
        if torch.equal(task.edit_mask, group.task.edit_mask[:: _scale(group), :: _scale(group)])
    )
    target = correct.target.repeat_interleave(_scale(group), 0).repeat_interleave(_scale(group), 1)
    return (
        pixels.psnr(group.images, target, torch.ones_like(group.task.edit_mask), "masked") / 60
    ).tolist()


TASK_OF = {task.instruction: task for task in TASKS}


def _scale(group: Candidates) -> int:
    return group.task.edit_mask.shape[0] // shapes.SIZE


def _target(group: Candidates) -> Tensor:
    assert isinstance(group.task, PairedTask)
    return group.task.target


def _hashed(image: Tensor) -> float:
    """Returns 0..1, as good as random and the same for the same image."""
    return hashlib.sha256(image.numpy().tobytes()).digest()[0] / 256


def bad(function: str, *, low: float = 0.0, high: float = 1.0, **changes: Any) -> PythonReward:
    return PythonReward(
        function=f"{__name__}:{function}", name=function, low=low, high=high, **changes
    )


@cache
def checks_of_function(function: str, expects: str, **options: Any) -> dict[str, Check]:
    return checks_of(
        bad(
            function,
            **{
                key: frozenset(value) if key == "requires" else value
                for key, value in options.items()
            },
        ),
        expects,
    )


def checks_of(
    term: Reward, expects: str | None = None, tasks: list[Any] = TASKS
) -> dict[str, Check]:
    (term_audit,) = audit([(term, expected_of(term, expects))], tasks, seed=0).terms
    return {check.name: check for check in term_audit.checks}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.verdict == "fail"}


def test_an_inverted_mask_fails_because_the_wrong_side_is_felt() -> None:
    checks = checks_of_function("inverted_mask", "outside", high=60.0)
    assert {"response", "localisation", "order of damages outside"} <= failed(checks)
    assert checks["localisation"].numbers["auroc_mean"] < 0.1
    assert "Inverted" in checks["localisation"].sentence


def test_a_squared_error_summed_over_channels_leaves_its_declared_range() -> None:
    checks = checks_of_function("summed_over_channels", "outside")
    assert "range" in failed(checks)
    assert "outside its declared range 0..1" in checks["range"].sentence


def test_a_squared_error_summed_over_pixels_grows_with_the_image() -> None:
    checks = checks_of_function("summed_over_everything", "outside", low=-math.inf, high=0.0)
    assert failed(checks) == {"image size"}
    assert checks["image size"].numbers["factor"] == pytest.approx(4.0, rel=0.01)


def test_a_psnr_of_summed_channels_is_recognised_by_its_offset() -> None:
    checks = checks_of_function("decibels_summed_over_channels", "outside", low=-5.0, high=60.0)
    assert checks["PSNR convention"].verdict == "warn"
    assert checks["PSNR convention"].numbers["offset_db"] == pytest.approx(-4.77, abs=0.02)


@pytest.mark.parametrize(
    ("function", "word"),
    [("saturated_ssim", "Flat"), ("generous_ssim", "Saturated"), ("constant", "Constant")],
)
def test_a_reward_that_cannot_distinguish_edits_fails_in_its_response(
    function: str, word: str
) -> None:
    checks = checks_of_function(function, "outside")
    assert "response" in failed(checks)
    assert checks["response"].sentence.startswith(word)


def test_a_made_up_score_beyond_the_scale_fails_the_range_and_counts_as_no_score() -> None:
    checks = checks_of_function("middle_of_the_wrong_scale", "outside", high=10.0)
    assert {"range", "valid"} <= failed(checks)
    assert "12.5" in checks["range"].sentence


def test_a_made_up_score_within_a_wider_scale_fails_where_it_beats_the_correct_edit() -> None:
    checks = checks_of_function("middle_of_the_wrong_scale", "outside", high=25.0)
    assert failed(checks)


def test_a_random_fallback_fails_the_repeats() -> None:
    checks = checks_of_function("random_fallback", "outside")
    assert "repeats" in failed(checks)
    assert checks["repeats"].numbers["jumps"] > 0.02


def test_a_score_that_depends_on_its_group_is_seen_in_the_repeats() -> None:
    checks = checks_of_function("compares_within_the_group", "outside")
    assert checks["repeats"].verdict in ("warn", "fail")
    assert checks["repeats"].numbers["largest_gap"] > 0.1


def test_missing_scores_are_counted_and_fail() -> None:
    checks = checks_of_function("often_silent", "outside")
    assert "valid" in failed(checks)
    assert 0.1 < checks["valid"].numbers["share"] < 0.3


@pytest.mark.parametrize("side", SIDES)
def test_a_global_score_declared_for_one_side_fails_the_localisation(side: str) -> None:
    checks = checks_of_function("global_score", side, high=60.0, requires=("target",))
    assert "localisation" in failed(checks)
    assert checks["localisation"].numbers["auroc_mean"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("tasks", [TASKS, TWO_REGIONS], ids=["one region", "two regions"])
def test_a_global_score_copied_into_every_region_fails_the_localisation_of_each(
    tasks: list[Any],
) -> None:
    checks = checks_of(
        bad("global_score_in_every_region", high=60.0, requires=frozenset({"target", "regions"})),
        "both",
        tasks,
    )
    parts = {name: check for name, check in checks.items() if name.startswith("localisation of ")}
    assert set(parts) >= {"localisation of background", "localisation of region.0"}
    assert set(parts) <= failed(checks)
    for part in parts.values():
        assert part.numbers["auroc_mean"] == pytest.approx(0.5, abs=0.1)


def test_scores_of_their_own_region_pass_the_localisation_of_each() -> None:
    checks = checks_of(
        bad("score_of_each_region", high=60.0, requires=frozenset({"target", "regions"})),
        "both",
        TWO_REGIONS,
    )
    for part in ("region.0", "region.1", "background"):
        assert checks[f"localisation of {part}"].verdict == "pass"
        assert checks[f"localisation of {part}"].numbers["auroc_mean"] == 1.0


def test_a_reward_that_one_corruption_raises_fails_and_the_corruption_is_named() -> None:
    checks = checks_of_function("loves_blur", "outside", low=-2.0)
    assert "order of damages outside" in failed(checks)
    assert "blur" in checks["order of damages outside"].sentence


def test_a_reward_blind_to_the_side_it_is_declared_for_fails_there() -> None:
    checks = checks_of(Preservation(), "both")
    assert "order of damages inside" in failed(checks)
    assert checks["order of damages outside"].verdict == "pass"


def test_a_judge_without_target_is_given_another_instruction_and_the_exchanged_pair() -> None:
    checks = checks_of_function("ignores_the_instruction", "both")
    assert failed(checks) == {"wrong instruction"}
    assert checks["wrong instruction"].numbers["auroc_mean"] == 0.5
    assert checks["image order"].verdict == "pass"
    follows = checks_of_function("follows_the_instruction", "both")
    assert follows["wrong instruction"].verdict == follows["image order"].verdict == "pass"


# --- rewards that are correct ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "term",
    [
        ShapesJudge(),
        ShapesJudge(coarse=True),
        Preservation(),
        Psnr(),
        Psnr(convention="zero_filled"),
        Ssim(),
        Composite(of=ShapesJudge()),
    ],
    ids=[
        "judge",
        "coarse judge",
        "preservation",
        "masked psnr",
        "zero-filled psnr",
        "ssim",
        "composite",
    ],
)
def test_the_built_in_pixel_rewards_pass_every_check(term: Reward) -> None:
    checks = checks_of(term)
    assert {
        name: check.sentence
        for name, check in checks.items()
        if check.verdict not in ("pass", "n/a")
    } == {}
    assert checks["response"].verdict == "pass"


def test_a_cache_does_not_hide_noise_from_the_repeats(tmp_path: Path) -> None:
    assert "repeats" in failed(
        checks_of(bad("random_fallback", cache=tmp_path / "scores"), "outside")
    )
    assert not (tmp_path / "scores").exists()


# --- the test images ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_corruption_stays_on_its_side_and_grows_with_its_level(side: str) -> None:
    test_images = make_test_images(reference(TASKS[0]), seed=0)
    other = ~test_images.task.edit_mask if side == "inside" else test_images.task.edit_mask
    for (corruption, where), images in test_images.graded.items():
        if where != side:
            continue
        errors = [
            float((image.double() - test_images.clean.double()).square().mean()) for image in images
        ]
        assert len(images) == LEVELS
        assert all(torch.equal(image[other], test_images.clean[other]) for image in images), (
            corruption
        )
        assert errors == sorted(errors) and errors[0] > 0, corruption


def test_every_corruption_exists_on_both_sides_and_only_the_edit_is_taken_back() -> None:
    test_images = make_test_images(reference(TASKS[0]), seed=0)
    assert set(test_images.graded) == {
        (corruption, side) for corruption in GRADED for side in SIDES
    } | {(REVERTED, "inside")}
    assert torch.equal(test_images.graded[REVERTED, "inside"][-1], test_images.task.source)


def test_patches_at_home_and_away_carry_exactly_the_same_squared_error() -> None:
    for pairs in make_test_images(reference(TWO_REGIONS[0]), seed=0).patches.values():
        for home, away in pairs:
            clean = TWO_REGIONS[0].target.double()
            assert float((home - clean).square().sum()) == float((away - clean).square().sum()) > 0


def test_an_edit_pasted_elsewhere_leaves_its_place_untouched_where_it_does_not_overlap() -> None:
    test_images = make_test_images(reference(TASKS[0]), seed=0)
    assert test_images.elsewhere is not None
    changed = (test_images.elsewhere != test_images.task.source).any(dim=-1)
    assert int((changed & test_images.task.edit_mask).sum()) < int(
        (changed & ~test_images.task.edit_mask).sum()
    )


def test_without_a_target_the_mask_is_painted_and_the_instruction_says_so() -> None:
    task = unpaired(TASKS[0])
    correct = reference(task)
    assert torch.equal(correct.edit[~task.edit_mask], task.source[~task.edit_mask])
    assert bool((correct.edit != task.source)[task.edit_mask].any())
    assert re.fullmatch(
        r"paint the area in the [a-z ]+ of the image (red|green|blue|yellow)",
        correct.task.instruction,
    )


def unpaired(task: PairedTask) -> EditTask:
    return EditTask(
        **{field.name: getattr(task, field.name) for field in dataclasses.fields(EditTask)}
    )


def test_preservation_passes_on_data_without_targets() -> None:
    checks = checks_of(Preservation(), tasks=[unpaired(task) for task in TASKS])
    assert {name for name, check in checks.items() if check.verdict not in ("pass", "n/a")} == set()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
@settings(max_examples=50, deadline=None)
def test_kendall_is_plus_one_for_falling_scores_and_changes_sign_when_reversed(
    scores: list[float],
) -> None:
    assert kendall(scores) == pytest.approx(-kendall(scores[::-1]))
    if len(set(scores)) == len(scores):
        assert kendall(sorted(scores, reverse=True)) == 1.0


def test_the_response_of_a_term_must_be_declared() -> None:
    with pytest.raises(InputError, match="--expects inside, outside or both"):
        expected_of(bad("constant"), None)
    with pytest.raises(InputError, match="--expects up is no side of the mask"):
        expected_of(Preservation(), "up")
    assert expected_of(Preservation(), None).sides == ("outside",)
    assert expected_of(ShapesJudge(), None).sides == SIDES
    assert expected_of(ShapesJudge(), "inside").sides == ("inside",)


def test_a_class_may_declare_its_response_and_the_command_line_goes_first() -> None:
    class Framing(PythonReward):
        responds_to: ClassVar[Sides] = "inside"
        reads_instruction: ClassVar[bool] = False

    term = Framing(function=f"{__name__}:constant", low=0, high=1)
    assert expected_of(term, None) == Expectation(sides=("inside",), reads_instruction=False)
    assert expected_of(term, "both", reads_instruction=True) == Expectation(
        sides=SIDES, reads_instruction=True
    )


def test_the_docs_say_what_the_built_in_rewards_respond_to() -> None:
    text = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    rows = re.findall(r"^\| `(inside|outside|both)` \| (.*) \|$", text, flags=re.MULTILINE)
    documented = {kind: side for side, kinds in rows for kind in re.findall(r"`(\w+)`", kinds)}
    classes = [*get_args(Term), Composite]
    assert documented == {
        str(term.model_fields["kind"].default): term.responds_to
        for term in classes
        if term.responds_to is not None
    }


def test_a_reward_without_a_score_for_the_correct_edit_is_not_scored_further() -> None:
    checks = checks_of_function("never_answers", "outside")
    assert checks["valid"].numbers["scored"] == NUM_TASKS
    assert failed(checks) == {"valid", "response"}


# --- the report -----------------------------------------------------------------------------------


@cache
def report() -> Audit:
    terms: list[Reward] = [Preservation(), bad("middle_of_the_wrong_scale", high=10.0)]
    return audit([(term, expected_of(term, "outside")) for term in terms], TASKS[:2], seed=3)


def test_the_same_seed_gives_the_same_json_but_for_times() -> None:
    term = Preservation()
    texts = [
        audit([(term, expected_of(term, None))], TASKS[:2], seed=3).to_json() for _ in range(2)
    ]
    first, second = (re.sub(r'"seconds": [^,]+', "", text) for text in texts)
    assert first == second


def test_the_json_has_a_schema_version_and_no_number_that_json_lacks() -> None:
    content = json.loads(
        report().to_json(run="r"), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert content["schema"] == "rl-edit/audit-reward/1"
    assert content["verdict"] == "fail"
    assert [term["verdict"] for term in content["terms"]] == ["pass", "fail"]
    assert {"noise", "blur", "JPEG", "shift", "recolour", "no edit"} == {
        curve["damage"] for curve in content["terms"][0]["curves"]
    }


def test_the_page_is_self_contained_and_shows_curves_and_corrupted_images() -> None:
    page = render(report(), title="<b>r</b>")
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert "<b>r</b>" not in page and "&lt;b&gt;r&lt;/b&gt;" in page
    assert page.count("<polyline") >= 11
    assert page.count("data:image/png") == 2 + 1 + 11 * LEVELS + 5
    assert "12.5" in page


app = typer.Typer()
app.command("audit-reward")(audit_reward_command)
app.command("bench-reward")(bench_reward_command)

RUN = ["--preset", "tiny-rc-grpo"]


def test_the_command_writes_both_files_and_exits_with_zero_for_correct_rewards(
    tmp_path: Path,
) -> None:
    result = CliRunner().invoke(
        app, ["audit-reward", *RUN, "--tasks", "2", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [term["name"] for term in content["terms"]] == ["judge", "preservation"]
    assert list(content["left_out"]) == ["attention"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "audit.html",
        "audit.json",
    ]


def test_the_command_exits_with_three_when_a_reward_would_mislead(tmp_path: Path) -> None:
    flat = f"rewards.flat={{kind: python, function: '{__name__}:constant', low: 0, high: 1}}"
    command = [
        "audit-reward",
        *RUN,
        flat,
        "--term",
        "flat",
        "--expects",
        "both",
        "--tasks",
        "1",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3, result.output
    assert "would mislead training: flat" in result.output


def test_the_command_names_the_rewards_there_are_when_another_is_requested() -> None:
    result = CliRunner().invoke(app, ["audit-reward", *RUN, "--term", "jugde"])
    assert isinstance(result.exception, InputError)
    assert "judge, preservation, attention" in str(result.exception)


def test_throughput_counts_calls_candidates_and_missing_scores() -> None:
    references = [reference(task) for task in TASKS]
    result = measure(
        bad("often_silent"), references, seconds=0.0, concurrency=2, group_size=8, seed=0
    )
    assert result.calls == 2
    assert result.candidates_per_s == pytest.approx(16 / result.seconds)
    assert 0 < result.p50_s <= result.p90_s <= result.p99_s <= result.max_s <= result.seconds
    assert 0 < result.invalid_share < 1
    assert "returned None" in result.reason


def test_bench_reward_writes_one_result_a_reward_and_concurrency(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    command = [
        "bench-reward",
        *RUN,
        "--seconds",
        "0.01",
        "--concurrency",
        "1",
        "--concurrency",
        "2",
        "--tasks",
        "1",
        "--out",
        str(file),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert content["schema"] == "rl-edit/bench-reward/1"
    assert [(row["term"], row["concurrency"]) for row in content["results"]] == [
        (name, number) for name in ("judge", "preservation") for number in (1, 2)
    ]
