"""Rewards that ask a language model: EditScore and the region judge, and that what cannot be read
is never a number."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fakes import Crash, Fault, faulty
from judge_server import (
    FAULTS,
    Answer,
    JudgeServer,
    completion,
    good_reply,
    images_of,
    parts_of,
    question_of,
    serving,
    words_of,
)
from learner.controller.placement import GroupCost
from learner.controller.supervisor import Supervisor
from rl_edit.data import shapes
from rl_edit.errors import InputError
from rl_edit.preparation import _capacity, require_judge_deadline
from rl_edit.rewards import score_candidates
from rl_edit.rewards.composite import Composite
from rl_edit.rewards.vlm.answers import Unreadable, scores_in
from rl_edit.rewards.vlm.backends import OpenAI, Token
from rl_edit.rewards.vlm.editscore import EditScore, overall
from rl_edit.rewards.vlm.expected_score import expected_scores
from rl_edit.rewards.vlm.prompts import pair_schema, quality_question, region_schema
from rl_edit.rewards.vlm.region_judge import RegionJudge, box_of
from rl_edit.types import Candidates, EditTask
from runs import metrics_of, run_inline, small_config

Serve = Callable[..., JudgeServer]


@pytest.fixture
def judge_server() -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda reply, **options: stack.enter_context(serving(reply, **options))


def plain_task(size: int = 16, instruction: str = "add a red circle") -> EditTask:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[2:8, 2:8] = True
    source = torch.randint(
        0, 256, (size, size, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8
    )
    return EditTask(
        task_id="plain", task_type="edit", source=source, instruction=instruction, edit_mask=mask
    )


def candidates(task: EditTask, images: Sequence[torch.Tensor]) -> Candidates:
    token_mask = torch.arange(16) < 4
    return Candidates(
        task=task,
        images=torch.stack(list(images)),
        attention=torch.full((len(images), 16), 1 / 16),
        token_mask=token_mask,
    )


def small_group(num: int = 3) -> Candidates:
    task = plain_task()
    return candidates(task, [torch.full_like(task.source, 40 * row) for row in range(num)])


LOCATION = (
    "base_url",
    "model",
    "family",
    "api_key_env",
    "api_key_file",
    "json_schema",
    "timeout_s",
    "concurrency",
)


def client(judge: JudgeServer, term: type[Any] = EditScore, **changes: Any) -> Any:
    """A term that asks this server; fields of the transport and of the term may be mixed."""
    transport = {"base_url": judge.url, "model": "judge-1", "timeout_s": 5.0}
    transport |= {name: changes.pop(name) for name in LOCATION if name in changes}
    return term(transport=transport, backoff_s=changes.pop("backoff_s", 0.0), **changes)


# --- EditScore
# --------------------------------------------------------------------------------------------------


def test_editscore_composes_scores_on_a_scale_of_ten(judge_server: Serve) -> None:
    table = score_candidates([client(judge_server(good_reply))], small_group(2), group_id="w")
    assert table.valid.all()
    assert table.values[:, 0].tolist() == pytest.approx([4.0, 4.0])
    expected = {
        "prompt_following": 8.0,
        "consistency": 2.0,
        "naturalness": 10.0,
        "artefacts": 8.0,
        "SC": 2.0,
        "PQ": 8.0,
    }
    components = table.components["editscore"]
    assert {name: values[0] for name, values in components.items()} == pytest.approx(expected)


def test_editscore_sends_source_then_edit_losslessly_before_the_text(judge_server: Serve) -> None:
    judge, group = judge_server(good_reply), small_group(1)
    client(judge).score(group)
    assert sorted(question_of(body) for body in judge.requests) == ["PQ", "SC"]
    for body in judge.requests:
        assert body["path"] == "/v1/chat/completions" and body["model"] == "judge-1"
        assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (
            0.7,
            0.9,
            20,
            512,
        )
        assert "response_format" not in body and "logprobs" not in body
        kinds = [piece["type"] for piece in parts_of(body)]
        pictures = images_of(body)
        if question_of(body) == "SC":
            assert kinds == ["image_url", "image_url", "text"]
            assert np.array_equal(pictures[0], group.task.source.numpy()) and np.array_equal(
                pictures[1], group.images[0].numpy()
            )
            assert group.task.instruction in words_of(body)
        else:
            assert kinds == ["image_url", "text"]
            assert np.array_equal(pictures[0], group.images[0].numpy())


def test_editscore_options_reach_the_request(judge_server: Serve) -> None:
    judge = judge_server(good_reply)
    client(judge, pq_images="both", top_k=None, json_schema=True, max_tokens=64).score(
        small_group(1)
    )
    for body in judge.requests:
        assert len(images_of(body)) == 2
        assert "top_k" not in body and body["max_tokens"] == 64
        assert (
            body["response_format"]["json_schema"]["schema"]["properties"]["score"]["minItems"] == 2
        )


def test_an_instruction_with_braces_is_asked_word_for_word(judge_server: Serve) -> None:
    judge, task = judge_server(good_reply), plain_task(instruction='write "{top} {0}" on the wall')
    client(judge).score(candidates(task, [task.source]))
    assert any(task.instruction in words_of(body) for body in judge.requests)


def test_passes_differ_by_seed_and_their_overall_scores_are_averaged(judge_server: Serve) -> None:
    def reply(body: dict[str, Any], number: int) -> Answer:
        score = (
            {42: [25, 25], 43: [0, 25], 44: [4, 9]}[body["seed"]]
            if question_of(body) == "SC"
            else [25, 25]
        )
        return 200, completion(json.dumps({"reasoning": "", "score": score}))

    judge = judge_server(reply)
    (score,) = client(judge, num_pass=3).score(small_group(1))
    assert sorted(body["seed"] for body in judge.requests if question_of(body) == "SC") == [
        42,
        43,
        44,
    ]
    assert score.value == pytest.approx((10 + 0 + math.sqrt(1.6 * 10)) / 3)


def test_questions_about_the_same_images_stand_together(judge_server: Serve) -> None:
    judge = judge_server(good_reply)
    client(judge, num_pass=2, concurrency=1).score(small_group(2))
    asked = [
        (int(images_of(body)[-1].max()), question_of(body), body["seed"]) for body in judge.requests
    ]
    assert asked == [
        (shade, name, seed) for shade in (0, 40) for name in ("SC", "PQ") for seed in (42, 43)
    ]


def test_no_more_requests_are_in_flight_than_the_cap_and_the_cap_is_used(
    judge_server: Serve,
) -> None:
    judge = judge_server(good_reply, delay_s=0.03)
    scores = client(judge, concurrency=3, num_pass=2).score(small_group(4))
    assert all(score.ok for score in scores) and len(judge.requests) == 16
    assert judge.busiest == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_makes_the_score_invalid_with_its_status_and_reason(
    fault: str, judge_server: Serve
) -> None:
    answer, status, reason = FAULTS[fault]
    judge = judge_server(
        lambda body, number: answer if question_of(body) == "PQ" else good_reply(body, number)
    )
    # Too short to wait for a judge that is busy.
    term = client(judge, retries=1, timeout_s=0.4 if fault == "too many requests" else 5.0)
    table = score_candidates([term], small_group(1), group_id="w")
    assert not table.valid.any() and math.isnan(table.values[0, 0].item()) and not table.components
    assert table.counts["editscore." + status] == 1
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(table.reasons[0])
    assert "PQ of pass 1" in table.reasons[0] and "after 2 attempts" in table.reasons[0]


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"too many requests"}))
def test_a_passing_fault_is_asked_again_with_a_new_seed(fault: str, judge_server: Serve) -> None:
    answer, _, _ = FAULTS[fault]
    judge = judge_server(
        lambda body, number: answer if body["seed"] < 44 else good_reply(body, number)
    )
    (score,) = client(judge, num_pass=2).score(small_group(1))
    assert score.value == pytest.approx(4.0)
    for question in ("SC", "PQ"):
        assert sorted(body["seed"] for body in judge.requests if question_of(body) == question) == [
            42,
            43,
            44,
            45,
        ]


def test_only_what_failed_is_asked_again(judge_server: Serve) -> None:
    judge = judge_server(
        lambda body, n: (
            (500, b"") if body["seed"] == 42 and question_of(body) == "PQ" else good_reply(body, n)
        )
    )
    assert client(judge).score(small_group(1))[0].ok
    assert sorted((question_of(body), body["seed"]) for body in judge.requests) == [
        ("PQ", 42),
        ("PQ", 43),
        ("SC", 42),
    ]


def test_a_judge_slower_than_the_timeout_is_a_timeout_and_not_waited_for(
    judge_server: Serve,
) -> None:
    judge = judge_server(good_reply, delay_s=30.0)
    began = time.perf_counter()
    (score,) = client(judge, timeout_s=0.1, retries=1).score(small_group(1))
    assert (
        score.value is None
        and score.status == "timeout"
        and "no answer within 0.1 s" in score.reason
    )
    assert time.perf_counter() - began < 25


def by_picture(body: dict[str, Any], number: int) -> Answer:
    """Scores that follow from the edited image alone."""
    score = [int(images_of(body)[-1].sum()) % 26, 20]
    return 200, completion(json.dumps({"reasoning": "", "score": score}))


def test_a_judge_that_never_answers_about_one_group_costs_that_group(
    small_editor: str, tmp_path: Path, judge_server: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience: list[float] = []

    class Watched(Supervisor):
        def __init__(self, *arguments: Any, judge_timeout_s: float, **more: Any) -> None:
            patience.append(judge_timeout_s)
            super().__init__(*arguments, judge_timeout_s=judge_timeout_s, **more)

    monkeypatch.setattr("learner.controller.loop.Supervisor", Watched)
    release, hung, waiting = threading.Event(), list[bytes](), list[int]()

    def reply(body: dict[str, Any], number: int) -> Answer:
        if question_of(body) == "SC":
            source = images_of(body)[0].tobytes()
            hung[:] = hung or [source]
            if source in hung:
                waiting.append(number)
                release.wait()
        return by_picture(body, number)

    transport = {
        "base_url": judge_server(reply).url,
        "model": "judge",
        "timeout_s": 1.5,
        "concurrency": 4,
    }
    rewards = {
        "editscore": {"kind": "editscore", "transport": transport, "retries": 1, "backoff_s": 0}
    }
    allowed = ("train.updates=2", "train.max_dropped_groups=1")
    try:
        outcome = run_inline(small_config(small_editor, *allowed, rewards=rewards), tmp_path)
        assert len(waiting) == 8 and not release.is_set(), (
            "every candidate was asked about twice, and none has been answered yet"
        )
    finally:
        release.set()
    lines = metrics_of(tmp_path)
    assert outcome.updates_done == 2
    assert [(line["groups/used"], line["groups/dropped"]) for line in lines] == [(1, 1), (2, 0)]
    assert [line["reward/editscore/timeout_share"] for line in lines] == [0.5, 0.0]
    (reason,) = lines[0]["groups/dropped_reasons"]["invalid"]
    assert "SC of pass 1: no answer within 1.5 s (after 2 attempts)" in reason
    assert [line["retries/infra"] for line in lines] == [0, 0], "no actor was lost to it"
    assert patience == [2 * 2 * 1.5], (
        "two attempts of two waves (8 questions, 4 at a time), which scoring is given at least"
    )


ELSEWHERE = {"base_url": "http://127.0.0.1:9/v1", "model": "judge", "timeout_s": 100.0}


def test_patience_counts_waves_passes_attempts_pauses_and_repeats() -> None:
    term = EditScore(transport=ELSEWHERE, retries=2, backoff_s=0.5)
    assert term.judge_timeout_s(8) == 3 * 100 + 1.5
    assert term.judge_timeout_s(17) == 3 * 2 * 100 + 1.5, "34 questions, 32 at a time"
    assert EditScore(transport=ELSEWHERE, num_pass=3).judge_timeout_s(8) == 3 * 2 * 100 + 1.5
    assert EditScore(transport=ELSEWHERE, repeat_every=5).judge_timeout_s(8) == 2 * (3 * 100 + 1.5)
    assert RegionJudge(transport=ELSEWHERE, retries=0).judge_timeout_s(33) == 200
    task, image = small_group(1).task, small_group(1).images[0]
    for kind in (EditScore, RegionJudge):
        assert len(kind(transport=ELSEWHERE).questions(task, image)) == kind.num_questions
    wrapped = Composite(of=term)
    assert (wrapped.judge_timeout_s(8), wrapped.remote) == (term.judge_timeout_s(8), True)
    local = EditScore(transport={"kind": "transformers", "path": "somewhere"})
    assert (local.judge_timeout_s(8), local.remote) == (0.0, False)


@pytest.mark.parametrize(
    ("runtime", "timeout_s", "fits"),
    [("ray", 199.0, True), ("ray", 200.0, False), ("inline", 200.0, True)],
)
def test_judges_may_not_be_waited_for_longer_than_their_actor_is_trusted(
    small_editor: str, runtime: str, timeout_s: float, fits: bool
) -> None:
    rewards = {"mine": {"kind": "editscore", "transport": {**ELSEWHERE, "timeout_s": timeout_s}}}
    config = small_config(small_editor, f"actors.runtime={runtime}", rewards=rewards)
    if fits:
        require_judge_deadline(config)
        assert config.judge_timeout_s() == 3 * timeout_s + 1.5
        return
    with pytest.raises(
        InputError,
        match=r"deadline_s 600 is not above the 601\.5 s that scoring may wait.*Raise deadline_s",
    ):
        require_judge_deadline(config)


def test_waiting_for_a_judge_elsewhere_occupies_no_device(small_editor: str) -> None:
    kept = {"preservation": {"kind": "preservation"}}
    gold = {"kind": "editscore", "transport": ELSEWHERE, "weight": 0}
    asked, local = (
        small_config(small_editor, rewards={**kept, "gold": gold}),
        small_config(small_editor, rewards=kept),
    )
    assert (_capacity(asked).reward, _capacity(local).reward) == (0, 1)
    cost = GroupCost(rollout_s=1.0, reward_s=30.0, learn_s=1.0)
    assert _capacity(asked).efficiency(cost, groups=4, measured_s=10.0) <= 1


def test_kept_scores_survive_a_crash_and_the_resumed_run_asks_only_about_new_images(
    small_editor: str, tmp_path: Path, judge_server: Serve
) -> None:
    judge = judge_server(by_picture)
    rewards = {
        "editscore": {
            "kind": "editscore",
            "transport": {"base_url": judge.url, "model": "judge", "concurrency": 4},
        }
    }
    config = small_config(
        small_editor,
        "train.updates=2",
        f"rewards.editscore.cache={tmp_path / 'scores'}",
        rewards=rewards,
    )
    with pytest.raises(Crash):
        run_inline(config, tmp_path / "run", executor=faulty(Fault("learner", "learn", 2, "crash")))
    asked = len(judge.requests)
    assert asked == 2 * 2 * 4 * 2, "updates, groups, candidates, questions"
    assert run_inline(config, tmp_path / "run", resume=True).updates_done == 2
    assert len(judge.requests) == asked
    assert [line["reward/editscore/cached_share"] for line in metrics_of(tmp_path / "run")] == [
        0.0,
        1.0,
    ]


def test_an_unreachable_judge_is_invalid() -> None:
    (score,) = EditScore(
        transport={"base_url": "http://127.0.0.1:9/v1", "model": "m"}, retries=0
    ).score(small_group(1))
    assert score.value is None and "no answer from the judge" in score.reason


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_a_request_the_judge_will_never_accept_is_not_repeated(
    status: int, judge_server: Serve
) -> None:
    judge = judge_server(
        lambda body, number: (status, b"no"),
        reply_headers={"Location": "http://127.0.0.1:9/elsewhere"},
    )
    (score,) = client(judge, retries=5).score(small_group(1))
    assert score.value is None and f"HTTP {status}" in score.reason
    assert len(judge.requests) == 2


def test_one_candidates_fault_leaves_the_others_valid(judge_server: Serve) -> None:
    def reply(body: dict[str, Any], number: int) -> Answer:
        return (500, b"") if images_of(body)[-1].max() == 40 else good_reply(body, number)

    table = score_candidates([client(judge_server(reply), retries=0)], small_group(3), group_id="w")
    assert table.valid[:, 0].tolist() == [True, False, True]
    consistency = table.components["editscore"]["SC"]
    assert math.isnan(consistency[1]) and consistency[2] == pytest.approx(2.0)


@settings(max_examples=8, deadline=None)
@given(st.sets(st.integers(0, 5)), st.sampled_from(sorted(FAULTS)))
def test_faults_of_some_candidates_never_move_the_scores_of_the_others(
    hit: set[int], fault: str
) -> None:
    def reply(body: dict[str, Any], number: int) -> Answer:
        shade = int(images_of(body)[-1].max())
        score = [shade // 10, 20] if question_of(body) == "SC" else [20, 20]
        return (
            FAULTS[fault][0]
            if shade // 40 in hit
            else (200, completion(json.dumps({"reasoning": "", "score": score})))
        )

    with serving(reply) as judge:
        term = client(judge, retries=0, timeout_s=0.4 if fault == "too many requests" else 5.0)
        table = score_candidates([term], small_group(6), group_id="w")
    assert table.valid[:, 0].tolist() == [row not in hit for row in range(6)]
    clean = [math.sqrt(row * 4 / 2.5 * 8) for row in range(6)]
    others = [row for row in range(6) if row not in hit]
    assert [table.values[row, 0].item() for row in others] == pytest.approx(
        [clean[row] for row in others]
    )


def test_retry_after_is_respected(judge_server: Serve) -> None:
    judge = judge_server(
        lambda body, n: (429, b"") if n < 2 else good_reply(body, n),
        reply_headers={"Retry-After": "0.3"},
    )
    began = time.perf_counter()
    (score,) = client(judge, retries=0).score(small_group(1))
    assert score.ok and time.perf_counter() - began >= 0.3


def test_the_key_comes_from_the_environment_and_appears_in_no_config_and_no_reason(
    judge_server: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-very-secret"
    judge = judge_server(lambda body, number: (401, f"bad key {secret}".encode()))
    term = client(judge, api_key_env="JUDGE_KEY_FOR_TEST")
    monkeypatch.delenv("JUDGE_KEY_FOR_TEST", raising=False)
    missing = score_candidates([term], small_group(1), group_id="w")
    assert (
        not missing.valid.any()
        and "JUDGE_KEY_FOR_TEST is not set" in missing.reasons[0]
        and not judge.requests
    )
    monkeypatch.setenv("JUDGE_KEY_FOR_TEST", secret)
    table = score_candidates([term], small_group(1), group_id="w")
    assert judge.headers[0]["Authorization"] == f"Bearer {secret}"
    assert (
        "HTTP 401" in table.reasons[0]
        and secret not in table.reasons[0]
        and secret not in term.model_dump_json()
    )


@pytest.mark.parametrize("field_name", ["api_key_env", "base_url"])
def test_a_secret_in_the_wrong_field_is_refused_without_repeating_it(field_name: str) -> None:
    secret = (
        "sk-very-secret" if field_name == "api_key_env" else "http://user:sk-very-secret@host/v1"
    )
    with pytest.raises(ValidationError) as caught:
        EditScore(transport={"base_url": "http://host/v1", "model": "m", field_name: secret})
    assert "sk-very-secret" not in str(caught.value)


def test_an_address_that_is_no_endpoint_is_refused_and_a_full_one_is_accepted() -> None:
    with pytest.raises(ValidationError, match="not an address"):
        OpenAI(base_url="localhost:8000", model="m")
    assert (
        OpenAI(base_url="http://host:8000/v1/chat/completions", model="m").base_url
        == "http://host:8000/v1"
    )


def test_a_transport_without_a_kind_is_over_http_and_offers_what_it_can() -> None:
    term = EditScore(transport={"base_url": "http://host/v1", "model": "m"})
    assert isinstance(term.transport, OpenAI) and EditScore(**term.model_dump()) == term
    with pytest.raises(ValidationError, match="does not give them"):
        EditScore(
            transport={"kind": "editscore", "backbone": "qwen3vl", "path": "p"},
            score_from="expected",
        )


# --- reading an answer
# ------------------------------------------------------------------------------------------------

pair = partial(scores_in, schema=pair_schema(25))


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
    assert pair(text) == (20.0, 5.5)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_prose_never_becomes_a_score(text: str) -> None:
    with pytest.raises(Unreadable):
        pair(f"Scores: {text}")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3), st.booleans()),
        max_size=3,
    )
)
def test_parsed_scores_are_the_two_numbers_of_the_answer_and_in_range(scores: list[Any]) -> None:
    try:
        parsed = pair(json.dumps({"reasoning": "", "score": scores}))
    except Unreadable:
        return
    # A quoted number counts as one.
    assert (
        parsed == tuple(map(float, scores))
        and all(0 <= score <= 25 for score in parsed)
        and not any(isinstance(s, bool) for s in scores)
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            {"regions": [[1, 2]], "background": 3, "overall": [4, 5]},
            'has no "reasoning": it has regions, background, overall',
        ),
        (
            {"reasoning": "", "regions": [[1, 2]], "background": 3, "overall": [4, 5]},
            '"regions" is not a list of 2',
        ),
        (
            {"reasoning": "", "regions": [[1, 2], [3]], "background": 3, "overall": [4, 5]},
            '"regions" is not a list of 2',
        ),
        (
            {"reasoning": "", "regions": [[1, 2], [3, 4]], "background": [3], "overall": [4, 5]},
            "is not a number",
        ),
        (
            {"reasoning": "", "background": 3, "regions": [[1, 2], [3, 4]], "overall": [4, 5]},
            "not in the order",
        ),
        (
            {"reasoning": [], "regions": [[1, 2], [3, 4]], "background": 3, "overall": [4, 5]},
            "is not text",
        ),
    ],
)
def test_an_answer_of_another_form_than_asked_for_is_unreadable(answer: Any, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        scores_in(json.dumps(answer), region_schema(2, 25))


# --- expected scores
# --------------------------------------------------------------------------------------------------


def spelled(*places: str | dict[str, float]) -> list[Token]:
    """Tokens; a dictionary holds the alternatives and their probabilities, what was said first."""
    listed = [{place: 1.0} if isinstance(place, str) else place for place in places]
    return [
        Token(
            text=next(iter(p)),
            alternatives=tuple((text, math.log(chance)) for text, chance in p.items()),
        )
        for p in listed
    ]


HEAD = ('{"reasoning": "', "1 of 2", '", "score": [')


def test_the_expected_score_weighs_every_number_by_its_probability() -> None:
    tokens = spelled(*HEAD, {"7": 0.5, "8": 0.3, "6": 0.1, "x": 0.1}, ", ", {"0": 1.0}, "]}")
    found = expected_scores(tokens, (7, 0), schema=pair_schema(9), top=9, min_mass=0.8)
    assert found.scores == pytest.approx(((7 * 0.5 + 8 * 0.3 + 6 * 0.1) / 0.9, 0.0))
    assert found.mass == pytest.approx(0.9)


def test_a_number_of_several_tokens_is_weighed_along_them() -> None:
    """At 2: 20 with 0.6, 21 with 0.3, 2 alone with 0.1. 3 stands for itself, as nothing from 30 on
    is on the scale."""
    tokens = spelled(
        *HEAD, {"2": 0.8, "3": 0.2}, {"0": 0.6, "1": 0.3, ",": 0.1}, ",", " ", {"4": 1.0}, "]}"
    )
    found = expected_scores(tokens, (20, 4), schema=pair_schema(25), top=25, min_mass=0.8)
    assert found.scores[0] == pytest.approx(0.8 * (20 * 0.6 + 21 * 0.3 + 2 * 0.1) + 0.2 * 3)
    assert found.mass == pytest.approx(1.0)


def test_tokens_that_hold_more_than_digits_are_understood() -> None:
    tokens = spelled(
        '{"reasoning": "", "score":', {" [20": 0.5, " [25": 0.5}, {", 5": 0.75, ", 15": 0.25}, "]}"
    )
    found = expected_scores(tokens, (20, 5), schema=pair_schema(25), top=25, min_mass=0.5)
    assert found.scores == pytest.approx((22.5, 7.5))


def test_a_beginning_that_was_not_chosen_is_left_open_and_too_much_of_it_is_refused() -> None:
    places = (*HEAD, {"2": 0.6, "1": 0.4}, {"0": 1.0}, ", ", {"4": 1.0}, "]}")
    assert expected_scores(
        spelled(*places), (20, 4), schema=pair_schema(25), top=25, min_mass=0.5
    ).scores == pytest.approx((20.0, 4.0))
    with pytest.raises(Unreadable, match=r"only 0\.60 of the probability"):
        expected_scores(spelled(*places), (20, 4), schema=pair_schema(25), top=25, min_mass=0.8)


def test_an_answer_without_probabilities_or_with_fractions_has_no_expectation() -> None:
    with pytest.raises(Unreadable, match="do not spell"):
        expected_scores([], (7, 0), schema=pair_schema(9), top=9, min_mass=0.8)
    with pytest.raises(Unreadable, match="do not spell"):
        expected_scores(
            spelled(*HEAD, "5", ".", "5", ", ", "4", "]}"),
            (5.5, 4),
            schema=pair_schema(9),
            top=9,
            min_mass=0.8,
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=10, max_size=10), st.integers(0, 9))
def test_an_expectation_lies_within_the_scale_and_is_certain_where_the_judge_is(
    weights: list[float], said: int
) -> None:
    chances = {str(said): weights[said], **{str(k): weight for k, weight in enumerate(weights)}}
    total = sum(chances.values())
    tokens = spelled(
        *HEAD, {text: chance / total for text, chance in chances.items()}, ", ", "3", "]}"
    )
    found = expected_scores(tokens, (said, 3), schema=pair_schema(9), top=9, min_mass=0.9)
    assert 0 <= found.scores[0] <= 9 and found.scores[0] == pytest.approx(
        sum(k * w for k, w in enumerate(weights)) / total
    )
    assert found.scores[1] == 3


def test_expected_scores_travel_from_the_endpoint_into_the_score(judge_server: Serve) -> None:
    text = '{"reasoning": "", "score": [8, 9]}'
    places = [
        {'{"reasoning": "", "score": [': 1.0},
        {"8": 0.5, "4": 0.5},
        {", ": 1.0},
        {"9": 1.0},
        {"]}": 1.0},
    ]
    judge = judge_server(lambda body, number: (200, completion(text, tokens=places)))
    (score,) = client(judge, score_range=9, score_from="expected").score(small_group(1))
    assert all(body["logprobs"] is True for body in judge.requests)
    assert score.value == pytest.approx(6 * 10 / 9) and score.components["mass"] == pytest.approx(
        1.0
    )
    assert score.components["consistency"] == pytest.approx(10.0)


def test_an_endpoint_that_withholds_probabilities_gives_no_expected_score(
    judge_server: Serve,
) -> None:
    (score,) = client(judge_server(good_reply), score_from="expected", retries=0).score(
        small_group(1)
    )
    assert score.value is None and "do not spell" in score.reason


# --- the region judge
# -------------------------------------------------------------------------------------------------

REGIONS = {"reasoning": "", "regions": [[20, 10], [25, 25]], "background": 5, "overall": [10, 15]}


def two_regions() -> Candidates:
    task = shapes.task("validation", 0, task_type="two_regions")
    return candidates(task, [task.target])


def said(answer: Any) -> Callable[[dict[str, Any], int], Answer]:
    return lambda body, number: (200, completion(json.dumps(answer)))


def test_all_regions_and_the_background_are_scored_in_one_request_by_equation_3(
    judge_server: Serve,
) -> None:
    judge = judge_server(said(REGIONS))
    (score,) = client(judge, RegionJudge).score(two_regions())
    assert len(judge.requests) == 1
    parts = [math.sqrt(phi * 10) / 25 for phi in (10, 25, 5)]
    assert score.regions is not None
    assert [*score.regions.areas, score.regions.background] == pytest.approx(parts)
    assert score.value == pytest.approx(sum(parts) / 3)
    assert score.components["region.0.success"] == pytest.approx(8.0) and score.components[
        "naturalness"
    ] == pytest.approx(4.0)


def test_a_perfect_answer_is_worth_one_and_a_ruined_image_nothing(judge_server: Serve) -> None:
    perfect = {"reasoning": "", "regions": [[25, 25]] * 2, "background": 25, "overall": [25, 25]}
    assert client(judge_server(said(perfect)), RegionJudge).score(two_regions())[
        0
    ].value == pytest.approx(1.0)
    assert (
        client(judge_server(said({**perfect, "overall": [25, 0]})), RegionJudge)
        .score(two_regions())[0]
        .value
        == 0.0
    )


def test_one_region_missing_from_the_answer_leaves_no_score(judge_server: Serve) -> None:
    (score,) = client(
        judge_server(said({**REGIONS, "regions": [[20, 10]]})), RegionJudge, retries=0
    ).score(two_regions())
    assert score.value is None and '"regions" is not a list of 2' in score.reason


@pytest.mark.parametrize("show", ["outlined", "boxed"])
def test_marks_are_drawn_on_a_third_image_and_the_judged_ones_are_untouched(
    show: str, judge_server: Serve
) -> None:
    judge, group = judge_server(said(REGIONS)), two_regions()
    client(judge, RegionJudge, show=show, json_schema=True).score(group)
    (body,) = judge.requests
    source, edited, marked = images_of(body)
    assert np.array_equal(source, group.task.source.numpy()) and np.array_equal(
        edited, group.images[0].numpy()
    )
    changed = torch.from_numpy((marked != source).any(axis=-1))
    for region in group.task.regions:
        left, top, right, bottom = box_of(region)
        assert changed[top:bottom, left:right].any()
        if show == "boxed":
            assert (
                changed[top:bottom, [left, right - 1]].all()
                and changed[[top, bottom - 1], left:right].all()
            )
    assert changed.float().mean() < 0.3
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["regions"]["minItems"] == 2 and "2 numbered regions" in words_of(
        body
    )


def test_an_outline_runs_around_a_region_at_the_images_border_and_leaves_its_inside_to_see() -> (
    None
):
    task = plain_task(size=64)
    task.edit_mask[:] = False
    task.edit_mask[0:40, 24:64] = True
    (asked,) = RegionJudge(transport={"base_url": "http://h/v1", "model": "m"}).questions(
        task, task.source
    )
    red = (asked.images[2] == torch.tensor([255, 0, 0])).all(dim=-1)
    assert red[[0, 39], 24:64].all() and red[0:40, [24, 63]].all()
    assert torch.equal(asked.images[2][20:38, 26:62], task.source[20:38, 26:62])


def test_regions_can_be_cut_out_of_both_images(judge_server: Serve) -> None:
    judge, group = judge_server(said(REGIONS)), two_regions()
    client(judge, RegionJudge, show="cropped").score(group)
    source, edited, *cuts = images_of(judge.requests[0])
    assert len(cuts) == 4 and "images 5 and 6 show region 2" in words_of(judge.requests[0])
    left, top, right, bottom = box_of(group.task.regions[0])
    by = math.ceil(0.25 * max(right - left, bottom - top))
    window = (slice(max(top - by, 0), bottom + by), slice(max(left - by, 0), right + by))
    assert np.array_equal(cuts[0], source[window]) and np.array_equal(cuts[1], edited[window])


def test_a_task_without_regions_has_its_mask_as_the_one_region(judge_server: Serve) -> None:
    judge = judge_server(said({**REGIONS, "regions": [[25, 25]]}))
    table = score_candidates([client(judge, RegionJudge)], small_group(2), group_id="w")
    assert table.valid.all() and table.regions["region_judge"].areas.shape == (2, 1)
    assert "the 1 numbered region is" in words_of(judge.requests[0])


# --- parity with the published package
# --------------------------------------------------------------------------------


@pytest.fixture
def published() -> Any:
    """The package itself. It is optional; what is compared here needs no GPU and no torchvision."""
    return pytest.importorskip(
        "editscore", reason="the optional package editscore is not installed"
    )


@pytest.mark.parametrize("num_pass", [1, 3])
def test_composition_is_the_published_packages_on_the_same_answers(
    num_pass: int, judge_server: Serve, published: Any
) -> None:
    from PIL import Image

    def reply(body: dict[str, Any], number: int) -> Answer:
        pictures = [part for part in parts_of(body) if part["type"] == "image_url"]
        score = [20, 5] if len(pictures) == 2 else [25, 20]
        return 200, completion(json.dumps({"reasoning": "as seen", "score": score}))

    judge, group = judge_server(reply), small_group(1)
    package = published.EditScore(
        backbone="openai",
        openai_url=f"{judge.url}/chat/completions",
        model_name_or_path="m",
        num_pass=num_pass,
    )
    pictures = [Image.fromarray(image.numpy()) for image in (group.task.source, group.images[0])]
    expected = package.evaluate(pictures, group.task.instruction)
    (score,) = client(judge, num_pass=num_pass, prompt="upstream").score(group)
    assert score.value == pytest.approx(expected["overall"]) == overall((8.0, 2.0), (10.0, 8.0))
    for ours, theirs in (
        ("prompt_following", "prompt_following"),
        ("consistency", "consistency"),
        ("PQ", "perceptual_quality"),
    ):
        assert score.components[ours] == pytest.approx(expected[theirs])


def test_the_upstream_prompt_is_the_packages_word_for_word(
    judge_server: Serve, published: Any
) -> None:
    judge, group = (
        judge_server(lambda body, number: (200, completion('{"reasoning": "", "score": [1, 2]}'))),
        small_group(1),
    )
    client(judge, prompt="upstream", concurrency=1).score(group)
    consistency, quality = (words_of(body) for body in judge.requests)
    package = published.EditScore(backbone="")
    assert consistency == package.SC_prompt.replace("<instruction>", group.task.instruction)
    assert quality == package.PQ_prompt and quality != quality_question(25, both=False)


def test_without_the_package_its_prompt_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, judge_server: Serve
) -> None:
    import sys

    from rl_edit.rewards.vlm.backends.editscore_package import upstream_prompts

    upstream_prompts.cache_clear()
    monkeypatch.setitem(sys.modules, "editscore", None)
    judge = judge_server(good_reply)
    table = score_candidates([client(judge, prompt="upstream")], small_group(1), group_id="w")
    assert (
        not table.valid.any()
        and "pip install --no-deps editscore" in table.reasons[0]
        and not judge.requests
    )


def test_a_task_replaced_by_another_instruction_is_asked_about_that_one(
    judge_server: Serve,
) -> None:
    judge, group = judge_server(good_reply), small_group(1)
    client(judge).score(replace(group, task=replace(group.task, instruction="remove the wall")))
    assert any("remove the wall" in words_of(body) for body in judge.requests)
