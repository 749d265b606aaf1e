"""Held-out tasks during training: they change nothing that is learnt, survive what a run survives,
and raise the alarm when gold falls."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runs
from actors.local_executor import LocalExecutor
from fakes import Crash, FakeReward, FakeRollout, Fault, as_array, as_content, fake_roles, faulty
from learner.controller import checkpoint, heldout
from learner.controller.alarm import Evaluation, alarm
from learner.controller.heldout import BEST, read_best
from learner.controller.run import Outcome
from learner.controller.supervisor import Supervisor
from rl_edit import wire
from rl_edit.config import ActorsConfig, RunConfig
from rl_edit.editors import lora
from rl_edit.errors import InputError
from rl_edit.files import HELDOUT, read_json_lines
from rl_edit.report import render_report
from rl_edit.report.charts import Mark, Series, twin_chart
from rl_edit.rewards import available
from rl_edit.types import Candidates, RewardTable, WorkItem
from runs import (
    ATTENTION,
    PRESERVATION,
    SilentObserver,
    adapter_bytes,
    command,
    events_of,
    metrics_of,
    read_json,
    run_inline,
    small_config,
)

EDITOR = "builtin:tiny-kontext"
EVERY = ("evaluation.every=1", "evaluation.probe_tasks=3", "train.updates=4")


@pytest.fixture(autouse=True)
def _probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the tests look at what ``rl-edit train`` would look at."""
    real = runs.run_of

    def with_probes(config: RunConfig, directory: Path, **more: Any) -> Any:
        run = real(config, directory, **more)
        terms, _ = available(tuple(config.rewards.values()), run.dataset.fields)
        return replace(
            run, probes=heldout.probes(config, terms, pixels_per_token=run.pixels_per_token)
        )

    monkeypatch.setattr(runs, "run_of", with_probes)


def fakes(directory: Path, *overrides: str, faults: tuple[Fault, ...] = (), **more: Any) -> Outcome:
    classes = {role: more.pop(role) for role in ("rollout", "reward", "learner") if role in more}
    config = small_config(EDITOR, "editor.resolution=64", *EVERY, *overrides)
    return run_inline(
        config, directory, change=fake_roles(**classes), executor=faulty(*faults), **more
    )


def lines(directory: Path) -> list[dict[str, Any]]:
    """heldout.jsonl, but for the time that it took."""
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_json_lines(directory / HELDOUT)
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Adapter and evaluations of a run without faults, by its overrides."""
    known: dict[tuple[str, ...], Any] = {}

    def spoken(*overrides: str) -> Any:
        if overrides not in known:
            directory = tmp_path_factory.mktemp("undisturbed")
            known[overrides] = adapter_bytes(fakes(directory, *overrides)), lines(directory)
        return known[overrides]

    return spoken


class Notes(SilentObserver):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# --- when the alarm is raised ---------------------------------------------------------------------


def history(*pairs: tuple[float | None, float]) -> list[Evaluation]:
    """Evaluations from (training, gold)."""
    blank = {"total": 0.0, "n": 3, "background_psnr": None, "seconds": 0.0, "protocol": "p"}
    return [
        Evaluation(update=number, training=training, gold=value, **blank)
        for number, (training, value) in enumerate(pairs)
    ]


DIVERGING = ((0.1, 0.9), (0.2, 0.8), (0.3, 0.7), (0.4, 0.6))


def test_the_alarm_is_raised_after_so_many_evaluations_in_a_row_and_tells_both_ends() -> None:
    assert alarm(history(*DIVERGING[:3]), 3) is None
    raised = alarm(history(*DIVERGING), 3)
    assert raised is not None and (raised.before.update, raised.last.update, raised.in_a_row) == (
        0,
        3,
        3,
    )
    assert "rose from 0.1 to 0.4" in str(
        raised
    ) and "fell from 0.9 to 0.6, 3 evaluations in a row (updates 1 to 4)" in str(raised)


def test_the_alarm_tells_numbers_apart_that_differ_far_behind_the_point() -> None:
    raised = alarm(history((0.5, 5.27312), (0.50001, 5.27301)), 1)
    assert "rose from 0.5 to 0.50001" in str(raised) and "fell from 5.2731 to 5.273, 1" in str(
        raised
    )


@pytest.mark.parametrize(
    "otherwise",
    [(0.3, 0.85), (0.3, 0.8), (0.2, 0.7), (0.1, 0.7), (None, 0.7)],
    ids=["gold up", "gold equal", "training equal", "training down", "training unknown"],
)
def test_one_evaluation_that_does_not_diverge_starts_the_count_again(
    otherwise: tuple[float | None, float],
) -> None:
    broken = history(*DIVERGING[:2], otherwise, (0.5, 0.6), (0.6, 0.5))
    assert alarm(broken, 3) is None
    assert alarm(history(), 1) is None and alarm(history((0.1, 0.9)), 1) is None


# Drawing is quick; on a machine that others keep busy it takes long by the clock.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=8), st.integers(1, 4))
def test_an_alarm_stands_exactly_when_the_last_steps_all_diverge(
    pairs: list[tuple[float, float]], patience: int
) -> None:
    steps = [b[0] > a[0] and b[1] < a[1] for a, b in itertools.pairwise(pairs)]
    expected = len(steps) >= patience and all(steps[-patience:])
    assert (alarm(history(*pairs), patience) is not None) == expected


# --- nothing that is learnt changes ---------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1])
def test_evaluations_do_not_change_the_adapter(tmp_path: Path, lag: int) -> None:
    looked = fakes(tmp_path / "looked", f"train.max_lag={lag}")
    blind = fakes(tmp_path / "blind", f"train.max_lag={lag}", "evaluation.every=0")
    assert adapter_bytes(looked) == adapter_bytes(blind)
    consumed = [
        [e["consumed"] for e in events_of(tmp_path / name, "update_applied")]
        for name in ("looked", "blind")
    ]
    assert consumed[0] == consumed[1]
    assert (
        len(lines(tmp_path / "looked")) == 4
        and not (tmp_path / "blind" / HELDOUT).exists()
        and not (tmp_path / "blind" / BEST).exists()
    )


def test_evaluations_of_a_real_editor_do_not_change_its_adapter_and_say_the_same_twice(
    small_editor: str, tmp_path: Path
) -> None:
    overrides = ("train.updates=2", "evaluation.probe_tasks=2")
    blind = run_inline(small_config(small_editor, *overrides), tmp_path / "blind")
    looked = [
        run_inline(small_config(small_editor, *overrides, "evaluation.every=1"), tmp_path / name)
        for name in ("one", "two")
    ]
    assert adapter_bytes(blind) == adapter_bytes(looked[0]) == adapter_bytes(looked[1])
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    first, second = lines(tmp_path / "one")
    assert (first["update"], second["update"], first["n"]) == (0, 1, 2)
    assert first["gold"] != second["gold"], "the weights changed between them"
    assert first["background_psnr"] > 0
    assert first["training"] == metrics_of(tmp_path / "one")[0]["reward/total/mean"]


def test_evaluation_settings_are_not_part_of_a_runs_identity() -> None:
    settings = (
        "evaluation.gold=attention",
        "evaluation.patience=9",
        "evaluation.stop_on_alarm=true",
        "evaluation.probe_tasks=7",
    )
    assert (
        small_config(EDITOR, "evaluation.every=5", *settings).identity()
        == small_config(EDITOR).identity()
    )


def test_every_evaluation_has_the_same_tasks_and_noise_and_the_newest_weights(
    tmp_path: Path,
) -> None:
    seen: list[WorkItem] = []

    class Witness(FakeRollout):
        def run(self, blob: np.ndarray) -> Any:
            seen.append(wire.unpack(blob))
            return super().run(blob)

    fakes(tmp_path, "evaluation.every=2", "train.max_lag=1", rollout=Witness)
    probes = [item for item in seen if item.chunk == (0, 1)]
    assert [item.adapter.step for item in probes] == [2, 2, 2, 4, 4, 4]
    noises = [
        (item.task.task_id, item.run_seed, item.epoch, item.num_candidates) for item in probes
    ]
    assert noises[:3] == noises[3:] and len(set(noises)) == 3
    assert not {item.task.task_id for item in probes} & {
        item.task.task_id for item in seen if item.chunk != (0, 1)
    }


def test_training_reward_is_the_mean_of_the_updates_since_the_evaluation_before(
    tmp_path: Path,
) -> None:
    fakes(tmp_path, "evaluation.every=2")
    totals = [line["reward/total/mean"] for line in metrics_of(tmp_path)]
    assert [line["training"] for line in lines(tmp_path)] == pytest.approx(
        [sum(totals[:2]) / 2, sum(totals[2:]) / 2]
    )


# --- what a run survives --------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("nth", [3, 5, 9])
@pytest.mark.parametrize("every", [1, 2])
def test_a_run_that_crashes_in_training_or_in_an_evaluation_resumes_to_the_same_lines(
    tmp_path: Path, undisturbed: Callable[..., Any], nth: int, lag: int, every: int
) -> None:
    overrides = (f"train.max_lag={lag}",)
    commits = f"train.checkpoint_every={every}"
    with pytest.raises(Crash):
        fakes(tmp_path, *overrides, commits, faults=(Fault("reward", "score", nth, "crash"),))
    outcome = fakes(tmp_path, *overrides, commits, resume=True)
    assert (adapter_bytes(outcome), lines(tmp_path)) == undisturbed(*overrides)


def test_damaged_evaluations_are_counted_by_the_report_and_set_aside_on_resume(
    tmp_path: Path, undisturbed: Callable[..., Any]
) -> None:
    fakes(tmp_path, stop_after=2)
    bad = [b'{"update": \xff}\n', b"\0" * 4096 + b"\n", b'{"update": 0}\n']
    with (tmp_path / HELDOUT).open("ab") as file:
        file.writelines(bad)
    assert "2 lines of heldout.jsonl could not be read" in render_report(tmp_path).read_text()
    notes = Notes()
    outcome = fakes(tmp_path, resume=True, observer=notes)
    aside = tmp_path / f"{HELDOUT}.unreadable"
    (said,) = [note for note in notes.notes if HELDOUT in note]
    assert said.startswith(f"3 lines of {HELDOUT} cannot be read") and str(aside) in said
    assert aside.read_bytes() == b"".join(bad)
    assert (adapter_bytes(outcome), lines(tmp_path)) == undisturbed()


def test_a_stopped_run_does_the_evaluation_it_did_not_get_to_on_resume(
    tmp_path: Path, undisturbed: Callable[..., Any]
) -> None:
    fakes(tmp_path, stop_after=2)
    assert [line["update"] for line in lines(tmp_path)] == [0]
    outcome = fakes(tmp_path, resume=True)
    assert (adapter_bytes(outcome), lines(tmp_path)) == undisturbed()


@pytest.mark.parametrize("kind", ["lose", "raise", "lose_blob", "die_after"])
def test_a_lost_probe_is_retried(
    tmp_path: Path, undisturbed: Callable[..., Any], kind: Any
) -> None:
    outcome = fakes(tmp_path, faults=(Fault("reward", "score", 4, kind),))
    assert (adapter_bytes(outcome), lines(tmp_path)) == undisturbed()


def test_an_evaluation_whose_probe_is_given_up_is_skipped_with_an_event_and_nothing_else_changes(
    tmp_path: Path, undisturbed: Callable[..., Any]
) -> None:
    outcome = fakes(
        tmp_path, "actors.data_retries=0", faults=(Fault("reward", "score", 4, "raise"),)
    )
    adapter, all_lines = undisturbed()
    assert adapter_bytes(outcome) == adapter
    (skipped,) = events_of(tmp_path, "evaluation_skipped")
    assert skipped["update"] == 0 and "failed 1 times (actors.data_retries 0)" in skipped["reason"]
    assert [line["gold"] for line in lines(tmp_path)] == [line["gold"] for line in all_lines[1:]]


class Unsure(FakeReward):
    """Has no score for what a probe shows, or for one in three of them."""

    always = False
    requested = 0

    def score(self, blob: np.ndarray) -> np.ndarray:
        table: RewardTable = wire.unpack(super().score(blob))
        if len(table.values) > 1:
            return wire.pack(table)
        type(self).requested += 1
        if not self.always and self.requested % 3:
            return wire.pack(table)
        values = torch.full_like(table.values, float("nan"))
        return wire.pack(
            replace(table, values=values, valid=values.isfinite(), reasons=("no answer",))
        )


def test_a_task_without_a_score_is_left_out_and_an_evaluation_without_any_is_skipped(
    tmp_path: Path,
) -> None:
    fakes(tmp_path / "some", reward=type("Some", (Unsure,), {}))
    assert [line["n"] for line in lines(tmp_path / "some")] == [2] * 4
    fakes(tmp_path / "none", reward=type("None_", (Unsure,), {"always": True}))
    assert lines(tmp_path / "none") == [] and not (tmp_path / "none" / BEST).exists()
    skipped = events_of(tmp_path / "none", "evaluation_skipped")
    assert [e["update"] for e in skipped] == [0, 1, 2, 3] and "no answer" in skipped[0]["reason"]


def test_how_long_a_probe_takes_says_nothing_about_the_deadline_of_a_group() -> None:
    """Five times the usual duration of one candidate may be less than a group of them takes."""

    class Quick:
        def run(self) -> int:
            return 0

    async def deadlines() -> tuple[float, float]:
        executor = LocalExecutor(fake_roles(rollout=Quick)({}))
        supervisor = Supervisor(
            executor, ActorsConfig(deadline_s=500), on_event=lambda *_, **__: None
        )
        supervisor.open("rollout", 1)
        await supervisor.call("rollout", "a probe", "run", kind="probe")
        probed = supervisor.deadlines.limit_s("run")
        await supervisor.call("rollout", "a group", "run")
        return probed, supervisor.deadlines.limit_s("run")

    assert asyncio.run(deadlines()) == (500, 60)


# --- best adapter, alarm, early end ---------------------------------------------------------------


class SaysStep(FakeRollout):
    """Tells the reward which weights it rolled out with."""

    def run(self, blob: np.ndarray) -> Any:
        result, group = super().run(blob)
        spoken = as_array({**as_content(group), "step": result.adapter.step})
        return replace(
            result, sha256=hashlib.sha256(spoken.tobytes()).hexdigest(), nbytes=spoken.nbytes
        ), spoken


def hacked(*golds: float) -> dict[str, Any]:
    """Training reward rises with every update; gold of the weights after update u is the u-th
    number."""

    class Hacked(FakeReward):
        def score(self, blob: np.ndarray) -> np.ndarray:
            group = as_content(blob)
            probe, step = group["rows"] == 1, group["step"]
            values = (
                torch.full((1, 2), golds[step - 1])
                if probe
                else torch.rand(4, 2, generator=torch.Generator().manual_seed(0)) + step
            )
            return wire.pack(self.table(group["group_id"], values))

    return {"rollout": SaysStep, "reward": Hacked}


FALLING = (0.5, 0.9, 0.8, 0.7, 0.6, 0.5)


def test_the_best_adapter_by_gold_is_kept_and_survives_pruning_and_resume(tmp_path: Path) -> None:
    overrides = ("train.updates=6", "train.keep_checkpoints=1", "evaluation.patience=9")
    fakes(tmp_path, *overrides, stop_after=4, **hacked(*FALLING))
    second = events_of(tmp_path, "update_applied")[1]["adapter"]
    outcome = fakes(tmp_path, *overrides, resume=True, **hacked(*FALLING))
    stored = read_best(tmp_path / BEST)
    assert stored is not None and outcome.adapter is not None
    best, weights = stored
    assert (best.update, best.gold, best.adapter, str(weights.id)) == (
        1,
        pytest.approx(0.9),
        second,
        second,
    )
    assert weights.id != outcome.adapter.id
    assert sorted(path.name for path in (tmp_path / BEST).iterdir()) == sorted(
        [best.file, "best.json"]
    )
    assert not (tmp_path / "checkpoints" / "step_000002").exists()


def test_beside_the_best_adapter_only_adapters_and_their_remainders_are_removed(
    tmp_path: Path,
) -> None:
    fakes(tmp_path, "train.updates=1", **hacked(0.5, 0.9))
    folder = tmp_path / BEST
    before, _ = read_best(folder) or pytest.fail("no adapter was stored")
    (folder / f".{before.file}.77-0a0a.tmp").write_bytes(b"of a killed writer")
    (folder / "notes.txt").write_text("of a user")
    (folder / "views").mkdir()
    fakes(tmp_path, "train.updates=2", resume=True, **hacked(0.5, 0.9))
    best, _ = read_best(folder) or pytest.fail("no adapter was stored")
    assert best.update == 1 and [line["update"] for line in lines(tmp_path)] == [0, 1]
    names = {path.name for path in folder.iterdir()}
    assert names == {best.file, "best.json", "notes.txt", "views"}


def test_bytes_that_are_not_the_best_adapters_are_refused_and_the_next_evaluation_replaces_them(
    tmp_path: Path,
) -> None:
    fakes(tmp_path, "train.updates=2", **hacked(*FALLING))
    best, _ = read_best(tmp_path / BEST) or pytest.fail("nothing was kept")
    with (tmp_path / BEST / best.file).open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"is not the adapter that best\.json names"):
        read_best(tmp_path / BEST)


def test_the_alarm_is_told_once_with_its_numbers_and_the_run_goes_on(tmp_path: Path) -> None:
    notes = Notes()
    outcome = fakes(tmp_path, "train.updates=6", observer=notes, **hacked(*FALLING))
    assert (outcome.updates_done, outcome.early) == (6, "")
    (raised,) = events_of(tmp_path, "gold_alarm")
    assert (raised["update"], raised["since"], raised["in_a_row"]) == (4, 1, 3)
    assert raised["gold"] == pytest.approx([0.9, 0.6]) and raised["training"][1] == pytest.approx(
        raised["training"][0] + 3 * 1.3
    )
    (note,) = [note for note in notes.notes if "gold" in note]
    assert (
        "fell from 0.9 to 0.6, 3 evaluations in a row (updates 2 to 5)" in note
        and "after update 2, is kept in best/" in note
    )


def test_a_run_that_is_to_stop_on_alarm_ends_there_stays_ended_and_goes_on_when_told_otherwise(
    tmp_path: Path,
) -> None:
    overrides = ("train.updates=6", "evaluation.stop_on_alarm=true", "train.checkpoint_every=4")
    for resume in (False, True):
        outcome = fakes(tmp_path, *overrides, resume=resume, **hacked(*FALLING))
        assert outcome.updates_done == 5 and "fell from 0.9 to 0.6" in outcome.early
    assert checkpoint.newest(tmp_path / "checkpoints", on_corrupt=pytest.fail).updates_done == 5  # type: ignore[union-attr]
    outcome = fakes(
        tmp_path, *overrides, "evaluation.stop_on_alarm=false", resume=True, **hacked(*FALLING)
    )
    assert (outcome.updates_done, outcome.early) == (6, "")


def test_evaluations_by_another_gold_or_of_other_tasks_are_not_compared(tmp_path: Path) -> None:
    fakes(tmp_path, "train.updates=3", **hacked(*FALLING))
    fakes(tmp_path, "train.updates=5", "evaluation.probe_tasks=2", resume=True, **hacked(*FALLING))
    assert [(line["update"], line["n"]) for line in lines(tmp_path)] == [
        (0, 3),
        (1, 3),
        (2, 3),
        (2, 2),
        (3, 2),
        (4, 2),
    ]
    assert events_of(tmp_path, "gold_alarm") == []
    assert read_json(tmp_path / BEST / "best.json")["update"] == 2


def test_a_full_disk_costs_the_evaluation_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Any]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(heldout, "replace_file", full)
    notes = Notes()
    outcome = fakes(tmp_path, observer=notes)
    assert adapter_bytes(outcome) == undisturbed()[0] and lines(tmp_path) == []
    assert len(events_of(tmp_path, "evaluation_unwritten")) == 4 and any(
        "No space left" in note for note in notes.notes
    )


# --- settings -------------------------------------------------------------------------------------

JUDGE = {"kind": "shapes_judge", "weight": 0.0}


def chosen(rewards: dict[str, Any], *overrides: str) -> str:
    config = small_config(EDITOR, *EVERY, *overrides, rewards=rewards)
    stored = heldout.probes(config, tuple(config.rewards.values()), pixels_per_token=16)
    assert stored is not None
    return stored.gold


def test_gold_is_the_first_judge_unless_named_and_the_first_term_where_there_is_none() -> None:
    assert chosen({"preservation": PRESERVATION, "attention": ATTENTION, "judge": JUDGE}) == "judge"
    assert chosen({"attention": ATTENTION, "preservation": PRESERVATION}) == "attention"
    assert (
        chosen({"preservation": PRESERVATION, "judge": JUDGE}, "evaluation.gold=preservation")
        == "preservation"
    )


def test_a_gold_that_is_no_term_and_held_out_tasks_that_cannot_be_scored_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        InputError, match=r"evaluation\.gold 'jugde' is no reward of this run.*preservation, judge"
    ):
        chosen({"preservation": PRESERVATION, "judge": JUDGE}, "evaluation.gold=jugde")
    poor = type("Poor", (), {"fields": frozenset(), "__len__": lambda self: 3})()
    monkeypatch.setattr(heldout, "open_dataset", lambda *_, **__: poor)
    with pytest.raises(
        InputError, match="reward 'judge' needs the field target of every held-out task"
    ):
        chosen({"preservation": PRESERVATION, "judge": JUDGE})


# --- the command line and the report --------------------------------------------------------------

CALLS = {"probe": 0, "train": 0}


def falls(candidates: Candidates) -> list[float]:
    """A gold that falls from one call on a probe to the next."""
    CALLS["probe"] += len(candidates.images) == 1
    return [1 - 0.01 * CALLS["probe"]] * len(candidates.images)


def rises(candidates: Candidates) -> list[float]:
    CALLS["train"] += len(candidates.images) > 1
    return [0.01 * CALLS["train"] + 0.001 * row for row in range(len(candidates.images))]


def test_the_command_line_ends_early_with_exit_code_0_a_sentence_and_the_best_adapter(
    small_editor: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewards = {
        "trained": {"kind": "python", "function": f"{__name__}:rises", "low": 0.0, "high": 1.0},
        "trusted": {
            "kind": "python",
            "function": f"{__name__}:falls",
            "low": 0.0,
            "high": 1.0,
            "weight": 0.0,
        },
    }
    overrides = (
        "train.updates=6",
        "evaluation.patience=2",
        "evaluation.stop_on_alarm=true",
        "evaluation.gold=trusted",
        *EVERY[:2],
    )
    small_config(small_editor, rewards=rewards, directory=tmp_path)
    run = tmp_path / "run"
    code, out, _ = command(
        monkeypatch, capsys, "train", tmp_path / "run.yaml", *overrides, "--run-dir", run
    )
    said = " ".join(out.split())
    assert code == 0
    assert re.search(
        r"ended after update 3 of 6 \(evaluation\.stop_on_alarm\): training reward rose .* while "
        r"held-out gold fell",
        said,
    )
    assert "--resume evaluation.stop_on_alarm=false" in said and f"{run / 'adapter_best'}" in said
    assert read_json(run / "run.json")["status"] == "done early"
    best, _ = lora.read(run / "adapter_best")
    last, _ = lora.read(run / "adapter")
    assert (best.id.step, last.id.step) == (1, 3)

    page = render_report(run).read_text()
    chart = page[page.index("Held-out gold against training reward") :]
    assert "alarm" in chart and "best" in chart and 'class="mark' in chart


def test_words_of_marks_and_labels_of_wide_numbers_stay_apart_in_the_chart_of_gold() -> None:
    left = Series(label="gold", points=((0.0, 5.26512), (9.0, 5.26508)))
    right = Series(label="training", points=((0.0, -70000.0), (9.0, 90000.0)))
    chart = twin_chart(
        title="t",
        left=left,
        right=right,
        marks=[Mark(label="best", update=0), Mark(label="alarm", update=9)],
    )
    assert chart is not None
    words = {
        word: (side, float(x))
        for side, x, word in re.findall(
            r'<text class="(start|end)" x="([\d.]+)" y="[\d.]+">(\w+)<', chart.svg
        )
    }
    line = re.search(r'<line x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', chart.svg)
    assert line is not None
    plot = tuple(map(float, line.groups()))
    assert words["best"][0] == "start" and words["alarm"][0] == "end"
    assert plot[0] < words["best"][1] < words["alarm"][1] < plot[1]
    widest = [
        max(len(text) for text in re.findall(pattern, chart.svg))
        for pattern in (r'class="end" x="\d+" [^>]*>([^<]+)<', r'<text x="[^>]+>([^<]+)<')
    ]
    assert plot[0] > 6.5 * widest[0] + 18 and 440 - plot[1] > 6.5 * widest[1] + 18, (
        "room for the labels, and beside them for the axis's name"
    )


def test_an_unknown_gold_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_config(EDITOR, directory=tmp_path)
    code, _, err = command(
        monkeypatch,
        capsys,
        "train",
        tmp_path / "run.yaml",
        "evaluation.every=1",
        "evaluation.gold=none",
        "--run-dir",
        tmp_path / "run",
    )
    assert code == 2 and "evaluation.gold 'none' is no reward of this run" in err[-1]
    assert not (tmp_path / "run").exists()
