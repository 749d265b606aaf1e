"""``rl-edit judge test``: three questions to a judge before a GPU is reserved."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import Outcome, assert_refused
from judge_server import Answer, completion, images_of, question_of, serving
from rl_edit.audit.images import reference
from rl_edit.audit.judge_trial import judge_of, three_images
from rl_edit.data import shapes
from rl_edit.rewards.composite import Composite
from rl_edit.rewards.vlm.editscore import EditScore
from runs import command

Judge = Callable[..., Outcome]


@pytest.fixture
def judge_test(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Judge:
    """Runs the command on a judge at an address; further arguments follow."""

    def run(url: str, *arguments: Any) -> Outcome:
        where = f"rewards.mine.transport.base_url={url}"
        return command(monkeypatch, capsys, "judge", "test", *SETTINGS, where, *arguments)

    return run


SETTINGS = (
    "--preset",
    "tiny-rc-grpo",
    "rewards.mine.kind=editscore",
    "rewards.mine.transport.model=m",
    "rewards.mine.transport.timeout_s=5",
    "rewards.mine.retries=0",
)


def scores_of(body: dict[str, Any]) -> list[int]:
    """Sees whether anything was edited, and whether the result is noisy."""
    *sources, edited = (image.astype(int) for image in images_of(body))
    if question_of(body) == "SC":
        return [2 if np.array_equal(sources[0], edited) else 24, 20]
    noisy = np.abs(np.diff(edited, axis=0)).mean() > 20
    return [3 if noisy else 22, 20]


def seeing(body: dict[str, Any], number: int) -> Answer:
    answer = {"reasoning": f"question {number} looks so", "score": scores_of(body)}
    content = json.loads(completion(json.dumps(answer)))
    content["usage"] = {"prompt_tokens": 300, "completion_tokens": 50, "cost": 0.001}
    return 200, json.dumps(content).encode()


def constant(body: dict[str, Any], number: int) -> Answer:
    return 200, completion(json.dumps({"reasoning": "", "score": [20, 20]}))


def test_a_usable_judge_is_shown_with_scores_answers_latency_tokens_cost_and_noise(
    judge_test: Judge, tmp_path: Path
) -> None:
    file = tmp_path / "judge.json"
    with serving(seeing) as server:
        code, out, err = judge_test(server.url, "--repeats", 3, "--json", file)
    assert (code, list(err)) == (0, [])
    for words in (
        "mine: usable",
        "its target is the correct edit",
        "looks so",
        "18 questions",
        "between two scores of one image: 0",
        "300 tokens of prompt, 50 of answer, cost 0.001",
    ):
        assert words in out, words
    content = json.loads(file.read_text())
    assert content["schema"] == "rl-edit/judge-test/1"
    (judge,) = content["judges"]
    assert [image["image"] for image in judge["images"]] == [
        "correct edit",
        "untouched source",
        "noisy edit",
    ]
    good, untouched, noisy = (image["values"][0] for image in judge["images"])
    assert good == pytest.approx(8.0) and untouched < good > noisy
    assert len(judge["images"][0]["values"]) == 3 and len(server.requests) == 18
    assert judge["problem"] == "" and judge["noise"] == 0


def test_repeats_differ_by_seed_and_their_difference_is_the_noise(judge_test: Judge) -> None:
    def moody(body: dict[str, Any], number: int) -> Answer:
        score = [part - body["seed"] % 2 for part in scores_of(body)]
        return 200, completion(json.dumps({"reasoning": "", "score": score}))

    with serving(moody) as server:
        code, out, _ = judge_test(server.url)
    assert code == 0 and len({body["seed"] for body in server.requests}) == 2
    assert "largest difference between two scores of one image: 0." in out


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (constant, "same score, 8"),
        (lambda body, n: (200, completion("Nice edit, 20 of 25!")), "no JSON object"),
        (lambda body, n: (404, b'{"error": "model m does not exist"}'), "model m does not exist"),
        (
            lambda body, n: (
                200,
                completion(json.dumps({"reasoning": "", "score": [25 - scores_of(body)[0], 20]})),
            ),
            "does not prefer the correct edit",
        ),
    ],
)
def test_a_judge_of_no_use_ends_with_3_and_one_line_that_says_why(
    reply: Any, reason: str, judge_test: Judge
) -> None:
    with serving(reply) as server:
        code, out, err = judge_test(server.url)
    assert code == 3 and "mine: not usable" in out
    (line,) = err
    assert line.startswith("rl-edit: no usable judge: mine: it ") and reason in line


def test_a_judge_that_cannot_be_reached_is_not_asked_again_and_again(judge_test: Judge) -> None:
    with serving(lambda body, n: (503, b"loading")) as server:
        began = time.perf_counter()
        code, _, err = judge_test(server.url, "rewards.mine.transport.timeout_s=0.4")
    assert code == 3 and time.perf_counter() - began < 5
    assert "HTTP 503" in err[0] and len(server.requests) == 2


def no_seed(body: dict[str, Any], number: int) -> Answer:
    refused = (400, b'{"error": {"message": "unknown field seed", "param": "seed"}}')
    return refused if "seed" in body else seeing(body, number)


def test_what_a_server_does_not_take_is_a_note(judge_test: Judge) -> None:
    with serving(no_seed) as server:
        code, out, _ = judge_test(server.url)
    assert code == 0 and "note: seed is left out (the server says: unknown field seed)" in out


def test_a_benchmark_of_the_judge_shows_the_note_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    short = ("--term", "mine", "--seconds", "0.01", "--concurrency", "1", "--tasks", "1")
    with serving(no_seed) as server:
        where = f"rewards.mine.transport.base_url={server.url}"
        options = (*SETTINGS, where, *short, "--out", tmp_path / "bench.json")
        code, out, _ = command(monkeypatch, capsys, "bench-reward", *options)
    assert code == 0 and out.count("note: mine: seed is left out") == 1


def test_without_a_judge_or_a_row_the_command_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], judge_test: Judge
) -> None:
    outcome = command(monkeypatch, capsys, "judge", "test", "--preset", "tiny-rc-grpo")
    assert_refused(outcome, None, "no judge to test", "shapes_judge", "editscore or region_judge")
    assert_refused(judge_test("http://h/v1", "--term", "other"), None, "'other' is no judge")
    assert_refused(judge_test("http://h/v1", "--row", 100_000), None, "--row 100000 is beyond")


def test_no_editor_is_loaded_and_the_output_can_be_piped() -> None:
    """As a process of its own, whose modules are listed at its end."""
    program = (
        "import sys\nfrom rl_edit.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    loaded = {'diffusers', 'transformers', 'ray'} & set(sys.modules)\n"
        "    assert not loaded, loaded\n    raise\n"
    )
    with serving(seeing) as server:
        where = f"rewards.mine.transport.base_url={server.url}"
        ended = subprocess.run(
            [sys.executable, "-c", program, "judge", "test", *SETTINGS, where],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 0, ended.stderr
    assert "mine: usable" in ended.stdout and "\x1b" not in ended.stdout


def test_a_task_without_target_is_painted_and_a_pasting_term_has_the_judge_inside() -> None:
    correct = reference(shapes.task("train", 0))
    images = three_images(correct, seed=0)
    assert [*images] == ["correct edit", "untouched source", "noisy edit"]
    assert (images["noisy edit"].int() - images["correct edit"].int()).float().abs().mean() > 20
    judge = EditScore(transport={"base_url": "http://h/v1", "model": "m"})
    assert judge_of(Composite(of=judge)) == judge_of(judge) == judge
