"""Rewards: the boundary that lets no invented number through, and what each term rewards."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from rl_edit.data import shapes
from rl_edit.errors import InputError
from rl_edit.evaluation.metrics import gaussian_mean, psnr
from rl_edit.rewards import Concentration, EditScore, Judge, Preservation, PythonReward, Reward, available, score_candidates
from rl_edit.rewards.composition import overall
from rl_edit.rewards.editscore import Unreadable, parse_scores
from rl_edit.rewards.judge import labelled_regions
from rl_edit.types import Candidates, EditTask, PairedTask

TASKS = [shapes.task("validation", index) for index in range(9)]


def as_bytes(image: torch.Tensor) -> torch.Tensor:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def candidates(task: EditTask, images: Sequence[torch.Tensor]) -> Candidates:
    token_mask = torch.zeros(16, dtype=torch.bool)
    token_mask[:4] = True
    return Candidates(task=task, images=torch.stack(list(images)), attention=torch.full((len(images), 16), 1 / 16), token_mask=token_mask)


def plain_task(size: int = 16, instruction: str = "add a red circle") -> EditTask:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[2:8, 2:8] = True
    source = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    return EditTask(task_id="plain", task_type="edit", source=source, instruction=instruction, edit_mask=mask)


def small_group(num: int = 3) -> Candidates:
    task = plain_task()
    images = [torch.full_like(task.source, 40 * row) for row in range(num)]
    return candidates(task, images)


# --- the boundary ---------------------------------------------------------------------------------------------------

ANSWERS: list[Any] = []
"""What ``told`` gives: the property test writes it, so that a reward can misbehave in any way."""


def told(group: Candidates) -> Any:
    return list(ANSWERS)


def broken(group: Candidates) -> list[float]:
    raise RuntimeError("no judge today")


def python_reward(function: str = "told", **changes: Any) -> PythonReward:
    return PythonReward(**{"function": f"{__name__}:{function}", "low": 0.0, "high": 1.0, **changes})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.floats(), st.none(), st.sampled_from(["0.5", [], 10**400, True])), min_size=0, max_size=6))
def test_an_invalid_value_never_appears_as_a_number_in_the_table(answers: list[Any]) -> None:
    ANSWERS[:] = answers
    table = score_candidates([python_reward()], small_group(4), group_id="w")
    assert table.values.shape == table.valid.shape == (4, 1)
    for row in range(4):
        acceptable = len(answers) == 4 and isinstance(answers[row], int | float) and 0 <= answers[row] <= 1
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
    assert table.reasons == ("mine: gave 12.5, outside its declared range 0..1", "mine: gave nan, which is not a finite number")


def test_a_term_that_raises_is_invalid_for_every_candidate_and_the_others_still_count() -> None:
    ANSWERS[:] = [0.1, 0.2, 0.3]
    table = score_candidates([python_reward("broken", name="bad"), python_reward(name="good", weight=2)], small_group(3), group_id="w")
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


def test_a_finite_double_that_single_precision_cannot_hold_is_invalid() -> None:
    ANSWERS[:] = [1e300]
    table = score_candidates([python_reward(high=math.inf)], small_group(1), group_id="w")
    assert not table.valid.any() and math.isnan(table.values[0, 0].item())


def test_components_are_kept_per_candidate_under_the_terms_name() -> None:
    task = TASKS[0]
    table = score_candidates([Judge(name="judge"), Preservation()], candidates(task, [task.target, task.source]), group_id="w7")
    assert table.group_id == "w7"
    assert table.components["judge.instruction"] == (10.0, 0.0)
    assert table.components["preservation.psnr"] == (60.0, 60.0)
    assert table.seconds > 0


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_that_is_negative_or_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(ValidationError, match="must be finite and not negative"):
        Preservation(weight=weight)


def test_a_misspelt_key_is_refused_and_a_term_is_named_after_its_kind() -> None:
    with pytest.raises(ValidationError, match="wieght"):
        Preservation(wieght=1)  # type: ignore[call-arg]
    parsed = TypeAdapter(Reward).validate_python({"kind": "shapes_judge", "weight": 2})
    assert isinstance(parsed, Judge) and parsed.name == "shapes_judge"
    assert TypeAdapter(Reward).validate_python(parsed.model_dump()) == parsed
    assert Judge(name="judge").name == "judge"


def test_two_terms_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="Two rewards are called 'preservation'"):
        score_candidates([Preservation(), Preservation(ceiling_db=35)], small_group(), group_id="w")
    with pytest.raises(InputError, match="Two rewards are called"):
        available([Preservation(), Preservation()], {"target"})


def test_a_term_whose_field_the_data_lacks_raises_or_is_left_out_as_it_says() -> None:
    with pytest.raises(InputError, match=r"'shapes_judge' needs the field target .* if_available"):
        available([Judge(), Preservation()], set())
    usable, left_out = available([Judge(when="if_available"), Preservation()], {"caption"})
    assert [term.name for term in usable] == ["preservation"]
    assert left_out == {"shapes_judge": "the data has no target"}
    assert available([Judge(), Preservation()], {"target"})[1] == {}


def test_no_reward_left_and_only_zero_weights_are_errors() -> None:
    with pytest.raises(InputError, match="No reward is left"):
        available([Judge(when="if_available")], set())
    with pytest.raises(InputError, match="none is configured"):
        available([], {"target"})
    with pytest.raises(InputError, match="weight 0"):
        available([Preservation(weight=0)], set())


# --- the judge ------------------------------------------------------------------------------------------------------


def judged(task: PairedTask, images: Sequence[torch.Tensor], **options: Any) -> list[float]:
    scores = Judge(**options).score(candidates(task, images))
    assert all(score.ok for score in scores)
    return [float(score.value) for score in scores if score.value is not None]


def part(task: PairedTask, images: Sequence[torch.Tensor], name: str) -> list[float]:
    return [score.components[name] for score in Judge().score(candidates(task, images))]


def unit(task: PairedTask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return task.source.double() / 255, task.target.double() / 255, task.edit_mask[..., None]


def white_noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 64, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


DAMAGES = [noise_inside, noise_outside, blur_everywhere, shift_inside, tint_inside, tint_outside, less_of_the_edit]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_more_damage_never_scores_higher(damage: Callable[[PairedTask, float], torch.Tensor]) -> None:
    for task in TASKS:
        values = judged(task, [task.target, *(damage(task, level) for level in (0.025, 0.05, 0.1))])
        assert strictly_falling(values), (task.task_id, values)


def test_the_instruction_part_is_the_share_of_the_way_from_source_to_target() -> None:
    for task in TASKS:
        source, target, _ = unit(task)
        steps = [as_bytes(source + share * (target - source)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
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


@pytest.mark.parametrize(("decibel", "low", "high"), [(40, 9.8, 9.95), (34, 9.0, 9.5), (25, 4.7, 5.3), (20, 1.5, 2.5)])
def test_not_over_edited_follows_background_psnr(decibel: float, low: float, high: float) -> None:
    task = TASKS[0]
    source = torch.full_like(task.source, 128)
    grey = replace(task, source=source, target=torch.where(task.edit_mask[..., None], task.target, source))
    noisy = as_bytes(grey.target.double() / 255 + ~task.edit_mask[..., None] * 10 ** (-decibel / 20) * white_noise())
    assert psnr(noisy, source, ~task.edit_mask, "masked").item() == pytest.approx(decibel, abs=0.3)
    assert low < part(grey, [noisy], "not_over_edited")[0] < high


def test_noise_inside_costs_clean_and_a_brightness_step_costs_artefacts() -> None:
    for task in TASKS:
        _, target, mask = unit(task)
        noisy, stepped = noise_inside(task, 0.08), as_bytes(target + mask * torch.where(target.mean() > 0.5, -0.08, 0.08))
        clean, artefacts = part(task, [noisy, stepped], "clean"), part(task, [noisy, stepped], "artefacts")
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
        for rough, fine in zip(Judge(coarse=True).score(candidates(task, group)), Judge().score(candidates(task, group)), strict=True):
            for name in ("instruction", "not_over_edited", "clean", "artefacts"):
                assert rough.components[name] * 2.5 == pytest.approx(round(rough.components[name] * 2.5), abs=1e-9)
                assert abs(rough.components[name] - fine.components[name]) <= 0.2 + 1e-9


def test_a_task_of_two_regions_edited_in_one_of_them_is_half_followed_with_or_without_listed_regions() -> None:
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


def test_the_judge_scores_a_larger_picture_like_the_same_small_one() -> None:
    task = TASKS[0]
    large = replace(
        TASKS[0],
        source=task.source.repeat_interleave(4, 0).repeat_interleave(4, 1),
        target=task.target.repeat_interleave(4, 0).repeat_interleave(4, 1),
        edit_mask=task.edit_mask.repeat_interleave(4, 0).repeat_interleave(4, 1),
        regions=task.regions.repeat_interleave(4, 1).repeat_interleave(4, 2),
    )
    edit = shift_inside(task, 2 / 40)
    small_parts = Judge().score(candidates(task, [edit]))[0].components
    large_parts = Judge().score(candidates(large, [edit.repeat_interleave(4, 0).repeat_interleave(4, 1)]))[0].components
    for name in ("instruction", "not_over_edited"):
        assert large_parts[name] == pytest.approx(small_parts[name], abs=0.5)


def test_a_target_that_changes_nothing_and_a_task_without_target_are_invalid() -> None:
    task = TASKS[0]
    idle = score_candidates([Judge()], candidates(replace(task, target=task.source), [task.source]), group_id="w")
    assert not idle.valid.any() and "progress is undefined" in idle.reasons[0]
    untargeted = score_candidates([Judge()], small_group(2), group_id="w")
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
    speckled = PairedTask(task_id="s", task_type="edit", source=task.source, instruction=task.instruction, edit_mask=mask, target=target)
    assert int(labelled_regions(mask).max()) > 20
    object_only = torch.where(task.edit_mask[..., None], task.target, task.source)
    assert part(speckled, [object_only], "instruction")[0] > 9.5


def test_overall_is_the_geometric_mean_of_minima_and_refuses_bad_numbers() -> None:
    assert overall((20.0, 5.0), (25.0, 20.0)) == pytest.approx(10.0)
    assert overall((0.0, 10.0), (10.0, 10.0)) == 0.0
    with pytest.raises(ValueError, match="finite and not negative"):
        overall((math.nan, 1.0), (1.0, 1.0))


# --- preservation, concentration, a user's function -----------------------------------------------------------------


def test_preservation_is_one_for_an_untouched_background_whatever_happens_inside() -> None:
    task = TASKS[0]
    inside = torch.where(task.edit_mask[..., None], 255 - task.source, task.source)
    quality = [score.components["psnr"] for score in Preservation().score(candidates(task, [inside, task.target]))]
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
    assert len({score.value for score in Preservation(ssim_weight=0).score(candidates(task, images))}) == 1
    assert len({score.value for score in Preservation(ssim_weight=0, ceiling_db=50).score(candidates(task, images))}) == 2


def attended(rows: list[list[float]], inside: int) -> Candidates:
    attention = torch.tensor(rows)
    task = plain_task()
    token_mask = torch.arange(attention.shape[1]) < inside
    return Candidates(task=task, images=torch.stack([task.source] * len(rows)), attention=attention, token_mask=token_mask)


def test_concentration_is_one_when_diffuse_and_area_ratio_when_all_inside() -> None:
    group = attended([[0.25] * 4, [1.0, 0, 0, 0], [0.0, 0.5, 0.25, 0.25], [0.5, 0.5, 0, 0]], inside=1)
    table = score_candidates([Concentration()], group, group_id="w")
    assert table.values[:, 0].tolist() == pytest.approx([1.0, 4.0, 0.0, 2.0], abs=1e-6)
    assert table.components["concentration.mass_inside"] == pytest.approx((0.25, 1.0, 0.0, 0.5), abs=1e-6)
    unit_table = score_candidates([Concentration(normalisation="unit")], group, group_id="w")
    assert unit_table.valid.all()
    assert unit_table.values[:, 0].tolist() == pytest.approx([0.0, 1.0, -1 / 3, 1 / 3], abs=1e-6)
    log_table = score_candidates([Concentration(normalisation="log")], group, group_id="w")
    assert log_table.valid[:, 0].tolist() == [True, True, False, True]
    assert log_table.values[1, 0].item() == pytest.approx(math.log(4), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.integers(0, 2**20))
def test_concentration_stays_in_its_declared_range_under_every_normalisation(inside: int, seed: int) -> None:
    mass = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed)) + 1e-3
    mass[0, inside:] = 0
    group = attended((mass / mass.sum(dim=1, keepdim=True)).tolist(), inside)
    for normalisation in ("paper", "log", "unit"):
        assert score_candidates([Concentration(normalisation=normalisation)], group, group_id="w").valid.all()


def test_concentration_over_every_token_is_undefined() -> None:
    table = score_candidates([Concentration(normalisation="unit")], attended([[0.5, 0.5]], inside=2), group_id="w")
    assert not table.valid.any() and "covers 2 of 2 tokens" in table.reasons[0]


def test_only_terms_that_read_attention_ask_for_it() -> None:
    assert Concentration().needs_attention and python_reward(needs_attention=True).needs_attention
    assert not any(term.needs_attention for term in (Judge(), Preservation(), python_reward()))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module_here:f", "cannot be imported"),
        (f"{__name__}:nothing", "does not exist"),
        (f"{__name__}:TASKS", "is not callable"),
        ("just_a_name", "package.module:name"),
    ],
)
def test_a_reward_function_that_cannot_be_called_is_refused_at_construction(function: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PythonReward(function=function, low=0, high=1)


def test_a_python_reward_declares_an_ordered_range_and_its_requirements() -> None:
    with pytest.raises(ValidationError, match="low < high"):
        python_reward(low=1.0, high=1.0)
    with pytest.raises(InputError, match="needs the field caption"):
        available([python_reward(requires={"caption"})], {"target"})


# --- EditScore over HTTP --------------------------------------------------------------------------------------------

GOOD = {"SC": [20, 5], "PQ": [25, 20]}


@dataclass
class JudgeServer:
    """An OpenAI-compatible endpoint on loopback. ``reply`` decides, from the request and its number, what is sent."""

    reply: Callable[[dict[str, Any], int], tuple[int, bytes | None]]
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    delay_s: float = 0.0
    reply_headers: dict[str, str] = field(default_factory=dict)
    busiest: int = 0
    url: str = ""
    _in_flight: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self._in_flight += 1
            self.busiest = max(self.busiest, self._in_flight)
            number = len(self.requests)
            self.requests.append({**body, "path": handler.path})
            self.headers.append(dict(handler.headers))
        time.sleep(self.delay_s)
        status, payload = self.reply(body, number)
        with self._lock:
            self._in_flight -= 1
        cut = payload is None
        payload = b'{"choices": [' if payload is None else payload
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(payload) + (1000 if cut else 0)))
        for name, value in self.reply_headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(payload)
        if cut:
            handler.close_connection = True


@pytest.fixture
def judge_server() -> Iterator[Callable[..., JudgeServer]]:
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(reply: Callable[[dict[str, Any], int], tuple[int, bytes | None]], **options: Any) -> JudgeServer:
        judge = JudgeServer(reply=reply, **options)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                try:
                    judge.handle(self)
                except (BrokenPipeError, ConnectionResetError):
                    # The client gave up first, which is what the timeout test is about.
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        running.append((server, thread))
        return judge

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def completion(content: Any, **message: Any) -> bytes:
    finish = message.pop("finish_reason", "stop")
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}]}).encode()


def images_of(body: dict[str, Any]) -> list[np.ndarray]:
    urls = [piece["image_url"]["url"] for piece in body["messages"][0]["content"] if piece["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


def question_of(body: dict[str, Any]) -> str:
    return "SC" if "<instruction>" in body["messages"][0]["content"][-1]["text"] else "PQ"


def good_reply(body: dict[str, Any], number: int) -> tuple[int, bytes]:
    return 200, completion(json.dumps({"reasoning": "fine", "score": GOOD[question_of(body)]}))


def client(judge: JudgeServer, **changes: Any) -> EditScore:
    return EditScore(**{"base_url": judge.url, "model": "judge-1", "backoff_s": 0.0, "timeout_s": 5.0, **changes})


def test_editscore_composes_scores_on_a_scale_of_ten(judge_server: Callable[..., JudgeServer]) -> None:
    table = score_candidates([client(judge_server(good_reply))], small_group(2), group_id="w")
    assert table.valid.all()
    assert table.values[:, 0].tolist() == pytest.approx([4.0, 4.0])
    expected = {"prompt_following": 8.0, "consistency": 2.0, "naturalness": 10.0, "artefacts": 8.0, "SC": 2.0, "PQ": 8.0}
    assert {name.removeprefix("editscore."): values[0] for name, values in table.components.items()} == pytest.approx(expected)


def test_editscore_sends_source_then_edit_losslessly_before_the_text(judge_server: Callable[..., JudgeServer]) -> None:
    judge, group = judge_server(good_reply), small_group(1)
    client(judge).score(group)
    assert sorted(question_of(body) for body in judge.requests) == ["PQ", "SC"]
    for body in judge.requests:
        assert body["path"] == "/v1/chat/completions" and body["model"] == "judge-1"
        assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (0.7, 0.9, 20, 512)
        assert "response_format" not in body
        kinds = [piece["type"] for piece in body["messages"][0]["content"]]
        pictures = images_of(body)
        if question_of(body) == "SC":
            assert kinds == ["image_url", "image_url", "text"]
            assert np.array_equal(pictures[0], group.task.source.numpy()) and np.array_equal(pictures[1], group.images[0].numpy())
            assert group.task.instruction in body["messages"][0]["content"][-1]["text"]
        else:
            assert kinds == ["image_url", "text"]
            assert np.array_equal(pictures[0], group.images[0].numpy())


def test_editscore_options_reach_the_request(judge_server: Callable[..., JudgeServer]) -> None:
    judge = judge_server(good_reply)
    client(judge, pq_images="both", top_k=None, json_schema=True, max_tokens=64).score(small_group(1))
    for body in judge.requests:
        assert len(images_of(body)) == 2
        assert "top_k" not in body and body["max_tokens"] == 64
        assert body["response_format"]["json_schema"]["schema"]["properties"]["score"]["minItems"] == 2


def test_an_instruction_with_braces_is_asked_word_for_word(judge_server: Callable[..., JudgeServer]) -> None:
    judge, task = judge_server(good_reply), plain_task(instruction='write "{top} {0}" on the wall')
    client(judge).score(candidates(task, [task.source]))
    texts = [body["messages"][0]["content"][-1]["text"] for body in judge.requests]
    assert any(task.instruction in text for text in texts)


def test_passes_differ_by_seed_and_their_overall_scores_are_averaged(judge_server: Callable[..., JudgeServer]) -> None:
    def reply(body: dict[str, Any], number: int) -> tuple[int, bytes]:
        score = {42: [25, 25], 43: [0, 25], 44: [4, 9]}[body["seed"]] if question_of(body) == "SC" else [25, 25]
        return 200, completion(json.dumps({"reasoning": "", "score": score}))

    judge = judge_server(reply)
    (score,) = client(judge, num_pass=3).score(small_group(1))
    assert sorted(body["seed"] for body in judge.requests if question_of(body) == "SC") == [42, 43, 44]
    assert score.value == pytest.approx((10 + 0 + math.sqrt(1.6 * 10)) / 3)


def test_no_more_requests_are_in_flight_than_the_cap_and_the_cap_is_used(judge_server: Callable[..., JudgeServer]) -> None:
    judge = judge_server(good_reply, delay_s=0.03)
    scores = client(judge, concurrency=3, num_pass=2).score(small_group(4))
    assert all(score.ok for score in scores) and len(judge.requests) == 16
    assert judge.busiest == 3


TWO = json.dumps({"reasoning": "ok", "score": [10, 10]})
FAULTS: dict[str, tuple[tuple[int, bytes | None], str]] = {
    "server error": ((500, b"boom"), "HTTP 500"),
    "too many requests": ((429, b"slow down"), "HTTP 429"),
    "cut connection": ((200, None), "no answer from the judge"),
    "not a completion": ((200, b"<html>hello</html>"), "no chat completion"),
    "no choices": ((200, b'{"choices": []}'), "no chat completion"),
    "truncated JSON": ((200, completion(TWO[:-4])), "no JSON object"),
    "stopped at max_tokens": ((200, completion(TWO, finish_reason="length")), "cut off at max_tokens"),
    "single score": ((200, completion('{"reasoning": "", "score": [10]}')), "two numbers"),
    "three scores": ((200, completion('{"reasoning": "", "score": [10, 1, 1]}')), "two numbers"),
    "out of range": ((200, completion('{"reasoning": "", "score": [10, 26]}')), r"26 is not a number in 0\.\.25"),
    "negative": ((200, completion('{"reasoning": "", "score": [-1, 2]}')), "-1 is not a number"),
    "NaN": ((200, completion('{"reasoning": "", "score": [NaN, 2]}')), "NaN is no number"),
    "infinite": ((200, completion('{"reasoning": "", "score": [1e999, 2]}')), "inf is not a number"),
    "text scores": ((200, completion('{"reasoning": "", "score": ["ten", "10"]}')), "is not a number"),
    "true": ((200, completion('{"reasoning": "", "score": [true, 2]}')), "True is not a number"),
    "prose": ((200, completion("I would give it 20 and 21 out of 25.")), "no JSON object"),
    "refusal in words": ((200, completion("I'm sorry, I can't help with that.")), "no JSON object"),
    "refusal field": ((200, completion(None, refusal="not allowed")), "refused: not allowed"),
    "empty": ((200, completion("  ")), "empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_makes_the_score_invalid_with_its_reason(fault: str, judge_server: Callable[..., JudgeServer]) -> None:
    answer, reason = FAULTS[fault]
    judge = judge_server(lambda body, number: answer if question_of(body) == "PQ" else good_reply(body, number))
    table = score_candidates([client(judge, retries=1)], small_group(1), group_id="w")
    assert not table.valid.any() and math.isnan(table.values[0, 0].item()) and not table.components
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(table.reasons[0])
    assert "PQ of pass 1" in table.reasons[0] and "after 2 attempts" in table.reasons[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_asked_again_with_a_new_seed(fault: str, judge_server: Callable[..., JudgeServer]) -> None:
    answer, _ = FAULTS[fault]
    judge = judge_server(lambda body, number: answer if body["seed"] < 44 else good_reply(body, number))
    (score,) = client(judge, num_pass=2).score(small_group(1))
    assert score.value == pytest.approx(4.0)
    for question in ("SC", "PQ"):
        assert sorted(body["seed"] for body in judge.requests if question_of(body) == question) == [42, 43, 44, 45]


def test_a_judge_slower_than_the_timeout_is_invalid_and_not_waited_for(judge_server: Callable[..., JudgeServer]) -> None:
    judge = judge_server(good_reply, delay_s=1.5)
    began = time.perf_counter()
    (score,) = client(judge, timeout_s=0.1, retries=1).score(small_group(1))
    assert score.value is None and "no answer within 0.1 s" in score.reason
    assert time.perf_counter() - began < 1.4


def test_an_unreachable_judge_is_invalid() -> None:
    (score,) = EditScore(base_url="http://127.0.0.1:9/v1", model="m", retries=0).score(small_group(1))
    assert score.value is None and "no answer from the judge" in score.reason


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_a_request_the_judge_will_never_accept_is_not_repeated(status: int, judge_server: Callable[..., JudgeServer]) -> None:
    judge = judge_server(lambda body, number: (status, b"no"), reply_headers={"Location": "http://127.0.0.1:9/elsewhere"})
    (score,) = client(judge, retries=5).score(small_group(1))
    assert score.value is None and f"HTTP {status}" in score.reason
    assert len(judge.requests) == 2


def test_one_candidates_fault_leaves_the_others_valid(judge_server: Callable[..., JudgeServer]) -> None:
    def reply(body: dict[str, Any], number: int) -> tuple[int, bytes]:
        return (500, b"") if images_of(body)[-1].max() == 40 else good_reply(body, number)

    table = score_candidates([client(judge_server(reply), retries=0)], small_group(3), group_id="w")
    assert table.valid[:, 0].tolist() == [True, False, True]
    assert math.isnan(table.components["editscore.SC"][1]) and table.components["editscore.SC"][2] == pytest.approx(2.0)


def test_retry_after_is_respected(judge_server: Callable[..., JudgeServer]) -> None:
    judge = judge_server(lambda body, n: (429, b"") if body["seed"] == 42 else good_reply(body, n), reply_headers={"Retry-After": "0.3"})
    began = time.perf_counter()
    (score,) = client(judge).score(small_group(1))
    assert score.ok and time.perf_counter() - began >= 0.3


def test_the_key_comes_from_the_environment_and_appears_in_no_config_and_no_reason(
    judge_server: Callable[..., JudgeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-very-secret"
    judge = judge_server(lambda body, number: (401, f"bad key {secret}".encode()))
    term = client(judge, api_key_env="JUDGE_KEY_FOR_TEST")
    monkeypatch.delenv("JUDGE_KEY_FOR_TEST", raising=False)
    missing = score_candidates([term], small_group(1), group_id="w")
    assert not missing.valid.any() and "JUDGE_KEY_FOR_TEST is not set" in missing.reasons[0] and not judge.requests
    monkeypatch.setenv("JUDGE_KEY_FOR_TEST", secret)
    table = score_candidates([term], small_group(1), group_id="w")
    assert judge.headers[0]["Authorization"] == f"Bearer {secret}"
    assert "HTTP 401" in table.reasons[0] and secret not in table.reasons[0] and secret not in term.model_dump_json()


@pytest.mark.parametrize("field_name", ["api_key_env", "base_url"])
def test_a_secret_in_the_wrong_field_is_refused_without_repeating_it(field_name: str) -> None:
    secret = "sk-very-secret" if field_name == "api_key_env" else "http://user:sk-very-secret@host/v1"
    with pytest.raises(ValidationError) as caught:
        EditScore(**{"base_url": "http://host/v1", "model": "m", field_name: secret})
    assert "sk-very-secret" not in str(caught.value)


def test_an_address_that_is_no_endpoint_is_refused_and_a_full_one_is_accepted() -> None:
    with pytest.raises(ValidationError, match="not an address"):
        EditScore(base_url="localhost:8000", model="m")
    assert EditScore(base_url="http://host:8000/v1/chat/completions", model="m").base_url == "http://host:8000/v1"


@pytest.mark.parametrize(
    "text",
    [
        '{"reasoning": "ok", "score": [20, 5.5]}',
        '```json\n{"reasoning": "ok", "score": [20, 5.5]}\n```',
        "{\u201creasoning\u201d: \u201cok\u201d, \u201cscore\u201d: [20, 5.5]}",
        '{"reasoning": "a \u201cred\u201d circle", "score": [20, 5.5]}',
        '\n {"score": [20, 5.5], "reasoning": "order does not matter"} ',
    ],
)
def test_fences_and_typographic_quotes_are_read(text: str) -> None:
    assert parse_scores(text, score_range=25) == (20.0, 5.5)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_prose_never_becomes_a_score(text: str) -> None:
    with pytest.raises(Unreadable):
        parse_scores(f"Scores: {text}", score_range=25)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3), st.booleans()), max_size=3))
def test_parsed_scores_are_the_two_numbers_of_the_answer_and_in_range(scores: list[Any]) -> None:
    try:
        parsed = parse_scores(json.dumps({"reasoning": "", "score": scores}), score_range=25)
    except Unreadable:
        return
    assert parsed == tuple(scores) and all(0 <= score <= 25 for score in parsed) and not any(isinstance(s, bool) for s in scores)
