"""A run whose weighted sum of rewards does not ask for the edit is refused, or says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_files import write_folder
from judge_server import completion, images_of, serving
from rl_edit.audit import audit_total
from rl_edit.audit.total import examine
from rl_edit.config import load_config
from rl_edit.data import shapes
from rl_edit.report import render_report
from rl_edit.rewards import Reward
from rl_edit.rewards.composite import Composite
from rl_edit.rewards.concentration import Concentration
from rl_edit.rewards.custom import PythonReward
from rl_edit.rewards.preservation import Preservation, Similarity
from rl_edit.rewards.purpose import asks_for_edit
from rl_edit.rewards.shapes_judge import ShapesJudge
from rl_edit.run_record import read_run_record
from rl_edit.training import Silent, train
from runs import command, read_json

TASKS = [shapes.task("train", index) for index in range(4)]
PRESET = ("--preset", "tiny-rc-grpo")


def verdicts(terms: list[Reward], **options: Any) -> dict[str, str]:
    total = audit_total(terms, TASKS, seed=0, left_out={}, **options)
    return {check.name: check.verdict for check in total.checks} | {"all": total.verdict}


def test_the_sum_of_a_judge_and_preservation_prefers_the_edit_to_everything_else() -> None:
    assert verdicts([ShapesJudge(), Preservation(weight=0.5)]) == {
        "asks for the edit": "pass",
        "no edit": "pass",
        "wrong instruction": "pass",
        "blank image": "pass",
        "all": "pass",
    }


def test_preservation_alone_prefers_no_edit_and_fails_although_it_passes_by_itself() -> None:
    found = verdicts([Preservation(), Similarity(), Concentration()])
    assert (found["asks for the edit"], found["no edit"], found["all"]) == ("fail", "fail", "fail")
    assert verdicts([Preservation()], allowed=True)["all"] == "warn"


def test_a_judge_outweighed_by_preservation_fails_on_the_sum() -> None:
    """The judge asks for the edit; the targets of this data also change the background."""
    from dataclasses import replace

    drifted = [
        replace(task, target=(task.target.int() * 9 // 10).to(task.target.dtype)) for task in TASKS
    ]
    sums = [
        audit_total([ShapesJudge(weight=weight), Preservation()], drifted, seed=0, left_out={})
        for weight in (0.001, 10)
    ]
    assert [total.verdict for total in sums] == ["fail", "pass"]
    assert "untouched source" in sums[0].problem


def test_a_composite_and_a_python_function_ask_for_what_they_wrap_or_are_unknown() -> None:
    own = PythonReward(function="math:fsum", low=0, high=1)
    assert asks_for_edit(ShapesJudge()) is True
    assert asks_for_edit(Composite(of=Preservation())) is False
    assert asks_for_edit(Composite(of=ShapesJudge())) is True
    assert asks_for_edit(Concentration()) is False
    assert asks_for_edit(own) is None
    before = examine([own], lambda: TASKS, left_out={}, has_targets=True, seed=0)
    assert before.problem == "" and "nothing declares whether python asks" in before.unknown


def test_nothing_is_scored_before_training_where_a_reward_may_need_a_model() -> None:
    config = load_config(preset="kontext-rc-grpo")

    def never() -> list[Any]:
        raise AssertionError("tasks were read")

    terms = tuple(config.rewards.values())
    before = examine(terms, never, left_out={}, has_targets=True, seed=0)
    assert before.problem == ""
    assert "editscore may need a model" in before.unknown and "audit-reward" in before.unknown


# --- photographs without targets ------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photographs", num_rows=4)


def small(photographs: Path, editor: str) -> tuple[str, ...]:
    return (
        f"data.path={photographs}",
        f"editor.path={editor}",
        "editor.resolution=32",
        "rollout.group_size=4",
        "rollout.num_steps=3",
        "train.updates=1",
        "train.groups_per_update=1",
        "actors.runtime=inline",
        "actors.num_rollout=1",
        "algorithm.objective.inner.num_anchors=2",
    )


@pytest.mark.parametrize("option", ["--dry-run", None])
def test_photographs_without_targets_are_refused_with_what_is_left_out_and_the_remedy(
    option: str | None,
    photographs: Path,
    small_editor: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    arguments = ["train", *PRESET, "--run-dir", tmp_path / "run", *small(photographs, small_editor)]
    code, _, err = command(monkeypatch, capsys, *arguments, *([option] if option else []))
    assert code == 2
    for words in (
        "nothing in this run's rewards asks for the edit: preservation, attention",
        "judge is left out: the data has no target",
        "editscore or region_judge",
        "train.allow_unrewarded_edit=true",
    ):
        assert words in err[-1]
    assert not (tmp_path / "run").exists()


def test_an_allowed_run_says_so_on_the_terminal_in_its_record_and_first_in_the_report(
    photographs: Path, small_editor: str, tmp_path: Path
) -> None:
    class Notes(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    overrides = [*small(photographs, small_editor), "train.allow_unrewarded_edit=true"]
    observer = Notes()
    train(
        load_config(preset="tiny-rc-grpo", overrides=overrides), tmp_path / "run", observer=observer
    )
    assert any("asks for the edit" in note and "nevertheless" in note for note in observer.notes)
    record = read_run_record(tmp_path / "run")
    assert record is not None and record.status == "done"
    assert "judge is left out" in record.unrewarded_edit
    body = render_report(tmp_path / "run").read_text().partition("<main>")[2]
    assert body.lstrip().startswith('<p class="notice"><b>The rewards of this run do not ask')


def test_a_run_that_had_begun_goes_on_and_says_so(
    photographs: Path, small_editor: str, tmp_path: Path
) -> None:
    """Runs of earlier versions have no such setting."""
    overrides = [*small(photographs, small_editor), "train.updates=2"]
    allowed = [*overrides, "train.updates=1", "train.allow_unrewarded_edit=true"]
    train(load_config(preset="tiny-rc-grpo", overrides=allowed), tmp_path / "run")
    config = load_config(preset="tiny-rc-grpo", overrides=overrides)
    assert train(config, tmp_path / "run", resume=True) is not None
    record = read_run_record(tmp_path / "run")
    assert record is not None and "asks for the edit" in record.unrewarded_edit


def test_the_audit_of_photographs_ends_with_3_because_of_the_sum(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = (
        *("audit-reward", *PRESET, f"data.path={photographs}", "--tasks", 2),
        *("--out", tmp_path, "editor.resolution=64"),
    )
    code, out, _ = command(monkeypatch, capsys, *arguments)
    assert code == 3 and "would mislead training: the weighted sum" in out
    content = read_json(tmp_path / "audit.json")
    assert [term["verdict"] for term in content["terms"]] != ["fail"]
    assert content["total"]["verdict"] == content["verdict"] == "fail"
    assert content["total"]["weights"] == {"preservation": 0.5}
    assert list(content["total"]["unseen"]) == ["attention"]
    assert "Weighted sum" in (tmp_path / "audit.html").read_text()
    code, *_ = command(monkeypatch, capsys, *arguments, "train.allow_unrewarded_edit=true")
    assert (code, read_json(tmp_path / "audit.json")["total"]["verdict"]) == (0, "warn")


@pytest.mark.parametrize(("looks", "verdict"), [(True, "pass"), (False, "fail")])
def test_the_audit_measures_the_sum_with_the_run_s_own_judge(
    looks: bool,
    verdict: str,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    def reply(body: dict[str, Any], number: int) -> tuple[int, bytes]:
        images = images_of(body)
        changed = len(images) < 2 or float(abs(images[0].astype(int) - images[-1]).mean()) > 0
        score = [20, 20] if changed and looks else [5, 5]
        return 200, completion(json.dumps({"reasoning": "seen", "score": score}))

    with serving(reply) as server:
        transport = f"{{kind: openai, base_url: '{server.url}', model: any}}"
        command(
            monkeypatch,
            capsys,
            *("audit-reward", *PRESET, f"data.path={photographs}", "--tasks", 2),
            f"rewards.judge={{kind: editscore, transport: {transport}}}",
            *("--out", tmp_path, "editor.resolution=64"),
        )
    (check,) = (
        check
        for check in read_json(tmp_path / "audit.json")["total"]["checks"]
        if check["name"] == "no edit"
    )
    assert check["verdict"] == verdict
