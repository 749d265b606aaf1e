"""Behaviours of the OpenAI-compatible servers that people have: usable ones give the right score,
the others none, with a reason that names what was seen."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from judge_server import (
    GOOD,
    Answer,
    JudgeServer,
    completion,
    images_of,
    parts_of,
    question_of,
    serving,
    words_of,
)
from learner.controller.run import Observer
from rl_edit.rewards import score_candidates
from rl_edit.rewards.composite import Composite
from rl_edit.rewards.vlm.answers import Unreadable, scores_in
from rl_edit.rewards.vlm.backends.completion import completion_of, error_in, read_error
from rl_edit.rewards.vlm.editscore import EditScore
from rl_edit.rewards.vlm.prompts import pair_schema
from rl_edit.rewards.vlm.region_judge import RegionJudge
from rl_edit.types import Candidates, EditTask, RewardTable
from runs import events_of, run_inline, small_config

Reply = Callable[[dict[str, Any], int], Answer]
ONE_BY_ONE = {"timeout_s": 5.0, "concurrency": 1}


def group(num: int = 1) -> Candidates:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[2:8, 2:8] = True
    source = torch.randint(
        0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8
    )
    task = EditTask(
        task_id="t", task_type="edit", source=source, instruction="add a circle", edit_mask=mask
    )
    return Candidates(
        task=task,
        images=torch.stack([torch.full_like(source, 40 * row) for row in range(num)]),
        attention=torch.full((num, 16), 1 / 16),
        token_mask=torch.arange(16) < 4,
    )


def judge_at(server: JudgeServer, *, kind: type[Any] = EditScore, **transport: Any) -> Any:
    settings = {name: transport.pop(name) for name in TERM if name in transport}
    where = {"base_url": server.url, "model": "judge-1", **ONE_BY_ONE, **transport}
    return kind(transport=where, **{"backoff_s": 0.0, "retries": 0, **settings})


TERM = ("retries", "backoff_s", "score_from", "min_mass", "score_range", "max_tokens", "num_pass")


def right(body: dict[str, Any]) -> str:
    """The answer that composes to 4."""
    return json.dumps({"reasoning": "fine", "score": GOOD[question_of(body)]})


DRAFT = json.dumps({"reasoning": "a first guess", "score": [1, 1]})


def written(form: str) -> Reply:
    """Sends the answer inside a text; DRAFT and ANSWER stand for themselves."""
    return lambda body, number: (
        200,
        completion(form.replace("DRAFT", DRAFT).replace("ANSWER", right(body))),
    )


def message(**fields: Any) -> Reply:
    """Sends a message with these fields; ANSWER in a text stands for the answer."""

    def reply(body: dict[str, Any], number: int) -> Answer:
        quoted = json.dumps(right(body))[1:-1]
        filled = json.loads(json.dumps(fields).replace("ANSWER", quoted))
        return 200, completion(filled.pop("content", None), **filled)

    return reply


def refusing(status: int, error: Any, *names: str) -> Reply:
    """Refuses requests with one of these fields."""

    def reply(body: dict[str, Any], number: int) -> Answer:
        if any(name in body for name in names):
            return status, json.dumps(error).encode()
        return 200, completion(right(body))

    return reply


def openai_error(text: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": text, "type": "invalid_request_error", **more}}


def no_system(body: dict[str, Any], number: int) -> Answer:
    if body["messages"][0]["role"] == "system":
        return 400, json.dumps({"error": "System role not supported"}).encode()
    assert words_of(body).startswith("You are a helpful assistant.")
    return 200, completion(right(body))


def one_image(body: dict[str, Any], number: int) -> Answer:
    if len(images_of(body)) > 1:
        text = "At most 1 image(s) may be provided in one prompt."
        return 400, json.dumps({"object": "error", "message": text, "code": 400}).encode()
    return 200, completion(right(body))


def few_images(text: str, **more: Any) -> Reply:
    """Refuses more than one image in these words."""
    return lambda body, number: (
        (400, json.dumps(openai_error(text, **more)).encode())
        if len(images_of(body)) > 1
        else (200, completion(right(body)))
    )


def busy_at_first(status: int, error: Any, headers: Callable[[], dict[str, str]]) -> Reply:
    """Is busy for its first two requests."""

    def reply(body: dict[str, Any], number: int) -> Answer:
        if number < 2:
            return status, json.dumps(error).encode(), headers()
        return 200, completion(right(body))

    return reply


def always(status: int, payload: Any, content_type: str = "application/json") -> Reply:
    content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return lambda body, number: (status, content, {"Content-Type": content_type})


HTML = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
CALL = {"id": "c", "type": "function", "function": {"name": "score", "arguments": "ANSWER"}}
LATER = {"Retry-After": "0.2"}


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """A server, and what comes of asking it.

    Attributes:
        reason: pattern of the reason for no score; "" where the score is right.
        note: pattern of the note to the user; "" where there is none.
    """

    reply: Reply
    reason: str = ""
    note: str = ""
    transport: dict[str, Any] = field(default_factory=dict)


def usable(reply: Reply, note: str = "", **transport: Any) -> Behaviour:
    return Behaviour(reply=reply, note=note, transport=transport)


def unusable(reply: Reply, reason: str, **transport: Any) -> Behaviour:
    return Behaviour(reply=reply, reason=reason, transport=transport)


UNSUPPORTED_MAX = openai_error(
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.",
    param="max_tokens",
)
UNKNOWN_SEED = [
    {
        "error": {
            "code": 400,
            "message": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.',
            "status": "INVALID_ARGUMENT",
        }
    }
]
FORBIDDEN_TOP_K = {
    "detail": [
        {"loc": ["body", "top_k"], "msg": "extra fields not permitted", "type": "value_error.extra"}
    ]
}
ONLY_DEFAULT = openai_error(
    "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) "
    "value is supported.",
    param="temperature",
)

BEHAVIOURS: dict[str, Behaviour] = {
    # Where the answer stands.
    "plain": usable(written("ANSWER")),
    "thinking before": usable(written("<think>\nperhaps DRAFT\n</think>\n\nANSWER")),
    "thinking that the template opened": usable(written("perhaps DRAFT\n</think>\nANSWER")),
    "reasoning_content only": usable(message(content=None, reasoning_content="So: ANSWER")),
    "reasoning only": usable(message(content="", reasoning="It looks right.\nANSWER")),
    "thinking in its own field": usable(message(content="ANSWER", reasoning_content=DRAFT)),
    "channels": usable(
        written("<|channel|>analysis<|message|>DRAFT<|end|><|channel|>final<|message|>ANSWER")
    ),
    "content in parts": usable(message(content=[{"type": "text", "text": "ANSWER"}])),
    "thinking part": usable(
        message(content=[{"type": "thinking", "text": DRAFT}, {"type": "text", "text": "ANSWER"}])
    ),
    "fence": usable(written("```json\nANSWER\n```")),
    "fence without newline": usable(written("```jsonANSWER```")),
    "greeting and trailing words": usable(written("Here it is:\nANSWER\nAsk me for more.")),
    "one more key": usable(
        lambda body, number: (
            200,
            completion(json.dumps({**json.loads(right(body)), "confidence": 0.9})),
        )
    ),
    "tool call": usable(message(content=None, tool_calls=[CALL], finish_reason="tool_calls")),
    "twice the same": usable(written("ANSWER\nAs said: ANSWER")),
    "a comma too many": usable(
        lambda body, number: (200, completion(right(body).replace("]}", ",],}")))
    ),
    "numbers in quotes": usable(
        lambda body, number: (200, completion(re.sub(r"(\d+)", r'"\1"', right(body))))
    ),
    "byte order mark": usable(
        lambda body, number: (200, b"\xef\xbb\xbf" + completion(right(body)))
    ),
    # What the server refuses.
    "max_completion_tokens": usable(
        refusing(400, UNSUPPORTED_MAX, "max_tokens"), "max_tokens is sent as max_completion_tokens"
    ),
    "no seed": usable(refusing(400, UNKNOWN_SEED, "seed"), "seed is left out.*Unknown name.*noise"),
    "no top_k": usable(refusing(422, FORBIDDEN_TOP_K, "top_k"), "top_k is left out.*not permitted"),
    "no temperature": usable(refusing(400, ONLY_DEFAULT, "temperature"), "temperature is left out"),
    "no response_format": usable(
        refusing(400, openai_error("guided_json is not supported"), "response_format"),
        "response_format is left out",
        json_schema=True,
    ),
    "no json_schema": usable(
        refusing(400, openai_error("Invalid value: 'json_schema'. Use 'text'."), "response_format"),
        "response_format is left out",
        json_schema=True,
    ),
    "unknown max_tokens": usable(
        refusing(
            422,
            {
                "detail": [
                    {"loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted"},
                ]
            },
            "max_tokens",
        ),
        "max_tokens is sent as max_completion_tokens",
    ),
    "no system role": usable(
        no_system, "the system text stands before the question", model="EditScore-7B"
    ),
    "one image": usable(one_image, "joined side by side.*At most 1 image"),
    "no several images": usable(
        few_images("Multiple images are not supported by this model"), "joined side by side"
    ),
    "one image, please": usable(few_images("You may only provide 1 image"), "joined side by side"),
    "one image behind a gateway": usable(
        few_images("Provider returned error", metadata={"raw": "Too many images in request"}),
        "joined side by side.*Too many images",
    ),
    "short context": unusable(
        always(400, openai_error("This model's maximum context length is 4096 tokens.")),
        "Lower the term's max_tokens",
    ),
    "a field that is missing": unusable(
        always(400, openai_error("reasoning_effort is required for this model")),
        "transport.extra_body adds some",
    ),
    # Waiting.
    "busy, then well": usable(busy_at_first(429, openai_error("Rate limit"), lambda: LATER)),
    "busy until a date": usable(
        busy_at_first(
            429,
            openai_error("Rate limit"),
            lambda: {"Retry-After": formatdate(time.time() + 1.0, usegmt=True)},
        )
    ),
    "loading": usable(busy_at_first(503, openai_error("Loading model"), dict)),
    "busy within HTTP 200": usable(
        busy_at_first(200, {"error": {"message": "slow down", "code": 429}}, lambda: LATER)
    ),
    # What gives no score.
    "two different": unusable(written("ANSWER\nNo, rather DRAFT"), "2 JSON objects with different"),
    "draft, then prose": unusable(written("<think>DRAFT</think>I cannot say."), "no JSON object"),
    "thinking cut off": unusable(
        message(content=None, reasoning="Let me see. " * 30, finish_reason="length"),
        r"cut off at max_tokens\(512\).*thinking used up. Raise max_tokens",
    ),
    "unclosed thinking cut off": unusable(
        lambda body, number: (200, completion("<think>hm", finish_reason="length")),
        r"cut off at max_tokens\(512\).*enable_thinking: false",
    ),
    "cut off in another API's words": unusable(
        lambda body, number: (200, completion('{"reasoning": "', finish_reason="MAX_TOKENS")),
        r"cut off at max_tokens\(512\). Raise max_tokens",
    ),
    "error beside the answer": unusable(
        always(200, {"choices": [{"error": {"message": "engine died"}, "message": None}]}),
        "error in the answer: engine died",
    ),
    "redirect": unusable(
        lambda body, number: (301, b"", {"Location": "https://other/v1/chat/completions"}),
        "HTTP 301 .*redirects to https://other/v1.*Correct base_url",
    ),
    "error with HTTP 200": unusable(
        always(200, {"error": {"message": "Provider returned error", "code": 502}}),
        "HTTP 200 with an error of code 502 from the judge: Provider returned error",
    ),
    "busy for good": unusable(
        always(429, openai_error("Rate limit")),
        "HTTP 429.*Rate limit.*busy.*transport.timeout_s 0.4",
        timeout_s=0.4,
    ),
    "no credit": unusable(
        always(429, openai_error("You exceeded your current quota")), "exceeded your current quota"
    ),
    "another model": unusable(
        always(404, {"message": "The model `judge-1` does not exist.", "code": 404}),
        "judge-1` does not exist.*It serves qwen-vl, other; correct transport.model",
    ),
    "another address": unusable(
        always(404, {"detail": "Not Found"}), "HTTP 404.*Not Found.*usually in /v1"
    ),
    "HTML error page": unusable(
        always(502, HTML, "text/html"), r"HTTP 502 .*an HTML page \(502 Bad Gateway\)"
    ),
    "HTML instead of an answer": unusable(
        always(200, HTML, "text/html"), "no chat completion but an HTML page .*is base_url right"
    ),
    "empty body": unusable(always(200, b""), "no chat completion but an empty body"),
    "stream": unusable(
        always(200, b'data: {"choices": []}\n\n', "text/event-stream"), "a stream of events"
    ),
    "another type": unusable(always(200, b"ok", "text/plain"), "text/plain: ok"),
    "no images": unusable(
        always(400, openai_error("judge-1 is not a multimodal model")), "Its model sees no images"
    ),
    "unknown wish": unusable(
        always(400, openai_error("Bad request")), "Bad request. Sent were .*seed.*transport.omit"
    ),
    "a value out of range": unusable(
        always(400, openai_error("temperature must be at most 0.5")), "must be at most 0.5"
    ),
}


def asked(server: JudgeServer, **transport: Any) -> RewardTable:
    return score_candidates([judge_at(server, **transport)], group(), group_id="g")


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_usable_server_gives_the_right_score_and_any_other_a_reason_that_says_what_was_seen(
    name: str,
) -> None:
    behaviour = BEHAVIOURS[name]
    with serving(behaviour.reply, models=("qwen-vl", "other")) as server:
        table = asked(server, **behaviour.transport)
    if behaviour.reason:
        assert not table.valid.any() and table.values.isnan().all()
        assert re.search(behaviour.reason, table.reasons[0], re.IGNORECASE), table.reasons[0]
        assert table.counts == {"editscore.invalid": 1}
    else:
        assert table.reasons == ()
        assert table.values[0, 0].item() == pytest.approx(4.0)
    assert len(table.notes) == bool(behaviour.note)
    if behaviour.note:
        assert re.search("editscore: .*" + behaviour.note, table.notes[0]), table.notes[0]


# --- learning
# --------------------------------------------------------------------------------------------------


def test_what_a_server_refuses_is_learnt_once_and_stays_left_out() -> None:
    def reply(body: dict[str, Any], number: int) -> Answer:
        for name in ("seed", "top_k", "max_tokens"):
            if name in body:
                words = "use max_completion_tokens" if name == "max_tokens" else "unknown field"
                return 400, json.dumps(openai_error(f"{words}: {name}", param=name)).encode()
        return 200, completion(right(body))

    with serving(reply) as server:
        judge = judge_at(server)
        first = score_candidates([judge], group(2), group_id="a")
        asked_first = len(server.requests)
        second = score_candidates([judge], group(2), group_id="b")
    assert asked_first == 4 + 3, "four questions, and one refusal for each of three fields"
    assert len(server.requests) == asked_first + 4
    assert first.notes == second.notes and len(first.notes) == 3
    assert server.requests[-1]["max_completion_tokens"] == 512
    assert Composite(of=judge).notes() == judge.notes()


def test_an_unsupported_field_is_not_taken_for_one_of_those_that_are_supported() -> None:
    text = "Unknown parameter 'top_k'. Supported parameters: model, messages, seed, temperature."
    with serving(refusing(400, openai_error(text), "top_k")) as server:
        table = asked(server)
    assert table.valid.all()
    assert {"seed", "temperature"} <= server.requests[-1].keys()
    assert len(server.requests) == 3


def test_max_tokens_that_do_not_fit_are_refused_and_not_renamed() -> None:
    text = "'max_tokens' or 'max_completion_tokens' is too large: 512. The context length is 400."
    with serving(always(400, openai_error(text, param="max_tokens"))) as server:
        table = asked(server)
    assert not table.valid.any() and "too large: 512" in table.reasons[0] and not table.notes


def test_omit_and_extra_body_shape_every_request() -> None:
    more = {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 0}
    with serving(lambda body, number: (200, completion(right(body)))) as server:
        table = asked(server, omit=["seed", "top_p"], extra_body=more)
    assert table.valid.all() and not table.notes
    for body in server.requests:
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        assert body["temperature"] == 0 and not {"seed", "top_p"} & body.keys()


def test_a_refused_field_of_extra_body_is_not_left_out_silently() -> None:
    with serving(refusing(400, UNKNOWN_SEED, "seed")) as server:
        table = asked(server, extra_body={"seed": 1})
    assert not table.valid.any() and 'Unknown name "seed"' in table.reasons[0]


@pytest.mark.parametrize("settings", [{"extra_body": {"messages": []}}, {"omit": ["model"]}])
def test_the_question_itself_can_be_neither_replaced_nor_left_out(settings: Any) -> None:
    with pytest.raises(ValidationError, match="questions and the reading of answers rest on it"):
        EditScore(transport={"base_url": "http://h/v1", "model": "m", **settings})


def test_new_settings_at_their_defaults_leave_the_identity_of_a_run_as_it_was() -> None:
    where = {"base_url": "http://h/v1", "model": "m"}
    assert not {"extra_body", "omit", "max_images"} & set(
        EditScore(transport=where).fingerprint()["transport"]
    )
    changed = EditScore(transport={**where, "omit": ["seed"]})
    assert changed.fingerprint()["transport"]["omit"] == ["seed"]
    assert changed.sha256() != EditScore(transport=where).sha256()


def test_a_run_says_once_what_a_judge_does_not_take(small_editor: str, tmp_path: Path) -> None:
    def reply(body: dict[str, Any], number: int) -> Answer:
        if "seed" in body:
            return 400, json.dumps(UNKNOWN_SEED).encode()
        score = [int(images_of(body)[-1].sum()) % 26, 20]
        return 200, completion(json.dumps({"reasoning": "", "score": score}))

    class Notes(Observer):
        """Keeps the notes that a terminal would show."""

        shown: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.shown.append(text)

    with serving(reply) as server:
        rewards = {
            "mine": {"kind": "editscore", "transport": {"base_url": server.url, "model": "m"}}
        }
        config = small_config(small_editor, "train.updates=2", rewards=rewards)
        run_inline(config, tmp_path, observer=Notes())
    (event,) = events_of(tmp_path, "reward_note")
    assert event["note"].startswith("mine: seed is left out")
    assert Notes.shown.count(event["note"]) == 1


@pytest.mark.parametrize("declared", [True, False])
def test_joined_images_stand_in_the_order_that_the_text_names(declared: bool) -> None:
    with serving(one_image) as server:
        table = asked(server, max_images=1 if declared else None)
    assert table.valid.all() and len(table.notes) == (not declared)
    (body,) = [
        body for body in server.requests if question_of(body) == "SC" and len(images_of(body)) == 1
    ]
    (joined,) = images_of(body)
    candidates = group()
    assert np.array_equal(joined[:, :16], candidates.task.source.numpy())
    assert np.array_equal(joined[:, -16:], candidates.images[0].numpy())
    assert (joined[:, 16:-16] == 255).all()
    assert "left = image 1, the original" in words_of(body)
    assert "right = image 2, the edited image" in words_of(body)


def test_a_limit_of_two_images_joins_only_questions_with_more() -> None:
    answer = {"reasoning": "", "regions": [[25, 25]], "background": 25, "overall": [25, 25]}

    def reply(body: dict[str, Any], number: int) -> Answer:
        if len(images_of(body)) > 2:
            return 400, json.dumps(openai_error("At most 2 image(s) may be provided")).encode()
        regions = "regions" in words_of(body)
        return 200, completion(json.dumps(answer) if regions else right(body))

    with serving(reply) as server:
        assert score_candidates([judge_at(server)], group(), group_id="a").valid.all()
        table = score_candidates([judge_at(server, kind=RegionJudge)], group(), group_id="b")
    assert table.values.item() == pytest.approx(1.0) and len(table.notes) == 1
    assert [len(images_of(body)) for body in server.requests] == [2, 1, 3, 1]
    assert "part 3 = image 3, the original with numbered regions" in words_of(server.requests[-1])


# --- waiting
# --------------------------------------------------------------------------------------------------


def test_a_long_pause_is_taken_from_attempts_that_ended_early() -> None:
    """The pause is longer than a request may take, and shorter than all of them."""

    def reply(body: dict[str, Any], number: int) -> Answer:
        ready = time.perf_counter() - began > 0.7
        good = (200, completion(right(body)))
        return good if ready else (429, b"", {"Retry-After": "0.8"})

    with serving(reply) as server:
        judge = judge_at(server, timeout_s=0.5, retries=2, concurrency=2)
        began = time.perf_counter()
        (score,) = judge.score(group())
        spent = time.perf_counter() - began
    assert score.ok and 0.8 <= spent <= judge.judge_timeout_s(1)


def test_a_pause_beyond_the_deadline_is_not_waited_for() -> None:
    with serving(lambda body, number: (429, b"", {"Retry-After": "3600"})) as server:
        began = time.perf_counter()
        (score,) = judge_at(server, timeout_s=5.0, retries=2, concurrency=2).score(group())
    assert time.perf_counter() - began < 2
    assert "no time to wait another 3600 s" in score.reason and len(server.requests) == 2


@pytest.mark.parametrize("status", [429, 503])
def test_waiting_stays_within_the_time_that_deadlines_are_checked_against(status: int) -> None:
    with serving(lambda body, number: (status, b"busy", {"Retry-After": "0.1"})) as server:
        judge = judge_at(server, timeout_s=0.3, retries=1, concurrency=1)
        began = time.perf_counter()
        score, _ = judge.score(group(2))
    assert time.perf_counter() - began <= judge.judge_timeout_s(2) == 2 * 4 * 0.3
    assert score.status == "invalid" and f"HTTP {status}" in score.reason


def test_an_answer_that_comes_too_late_after_a_wait_says_what_was_waited_for() -> None:
    def reply(body: dict[str, Any], number: int) -> Answer:
        if number == 0:
            return 503, b'{"error": "Loading model"}', {"Retry-After": "0.1"}
        time.sleep(0.8)
        return 200, completion(right(body))

    with serving(reply) as server:
        (score,) = judge_at(server, timeout_s=0.5).score(group())
    assert score.status == "timeout" and "waiting for HTTP 503" in score.reason


# --- reading
# --------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 25), min_size=2, max_size=2),
    st.text(alphabet=st.characters(exclude_characters='{}<[◁"'), max_size=40),
    st.sampled_from(["THINK", "{}", "```json{}```", "[{}]", '{"result": {}}', "a {} b"]),
)
def test_an_answer_is_read_alike_wherever_it_stands(
    scores: list[int], words: str, place: str
) -> None:
    answer = json.dumps({"reasoning": words, "score": scores})
    text = f"<think>{DRAFT}</think>{answer}" if place == "THINK" else place.replace("{}", answer)
    assert scores_in(f"{words}\n{text}\n{words}", pair_schema(25)) == tuple(scores)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"reasoning": "it says ANSWER", "score": [0, 0]}', "one of 2"),
        ('{"score": [3, 3]} ANSWER', 'no "reasoning"'),
        ('{"reasoning": "", "score": [26, 3]} ANSWER', "26 is not a number"),
        ("[20, 5]", "no JSON object"),
        ('{"a":' * 5000, "no JSON object"),
    ],
)
def test_a_quotation_or_a_correction_makes_an_answer_ambiguous(text: str, reason: str) -> None:
    answer = '{"reasoning": "fine", "score": [20, 5]}'
    with pytest.raises(Unreadable, match=reason):
        scores_in(text.replace("ANSWER", answer), pair_schema(25))


NAMES = st.sampled_from(
    ["error", "message", "detail", "choices", "content", "loc", "code", "param", "logprobs"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(ANYTHING, st.sampled_from([200, 400, 422, 429, 500]))
def test_no_body_of_a_server_is_more_than_an_error_or_an_answer_without_scores(
    body: Any, status: int
) -> None:
    for content in (body, {"choices": [{"message": body}]}, {"error": body}, {"detail": [body]}):
        text = json.dumps(content)
        assert read_error(status, text, "application/json").status == status
        error_in(text, "application/json")
        with pytest.raises(Unreadable):
            scores_in(completion_of(text, "application/json").words, pair_schema(25))


# --- probabilities
# --------------------------------------------------------------------------------------------------

PLACES = [
    {'{"reasoning": "", "score": [': 1.0},
    {"8": 0.5, "4": 0.5},
    {", ": 1.0},
    {"9": 1.0},
    {"]}": 1.0},
]
EIGHT = '{"reasoning": "", "score": [8, 9]}'


@pytest.mark.parametrize("apart", [True, False])
def test_expected_scores_are_those_of_the_answer_and_not_of_the_thinking(apart: bool) -> None:
    """Tokens are all that was sampled, whether or not the server sends the thinking apart."""
    thinking = '7 of 9? {"reasoning": "", "score": [1, 1]}'
    tokens = [{"<think>": 1.0}, {thinking: 1.0}, {"</think>": 1.0}, {"\n": 1.0}, *PLACES]
    text = EIGHT if apart else f"<think>{thinking}</think>\n{EIGHT}"
    more = {"reasoning_content": thinking} if apart else {}
    with serving(lambda body, n: (200, completion(text, tokens=tokens, **more))) as server:
        judge = judge_at(server, score_range=9, score_from="expected")
        (score,) = judge.score(group())
    assert score.value == pytest.approx(6 * 10 / 9)


def test_a_server_without_probabilities_is_refused_for_expected_scores_and_not_read_as_text() -> (
    None
):
    error = openai_error("logprobs are not supported by this model", param="logprobs")
    with serving(refusing(400, error, "logprobs")) as server:
        (score,) = judge_at(server, score_from="expected", retries=2).score(group())
    assert score.value is None and "use 'score_from: text'" in score.reason
    assert len(server.requests) == 2, "not repeated"


def test_a_question_about_one_image_has_no_word_of_joining() -> None:
    with serving(one_image) as server:
        asked(server, max_images=1)
    quality = [body for body in server.requests if question_of(body) == "PQ"]
    assert all("side by side" not in words_of(body) for body in quality)
    assert all(len(parts_of(body)) == 2 for body in quality)
