"""The benchmarks of methods and of ablations: equal budgets, equal settings, and their tables."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Command
from evaluated_runs import rows, written
from rl_edit.config import load_config
from rl_edit.data import open_dataset
from rl_edit.evaluation.comparison import compare
from rl_edit.evaluation.effort import effort
from rl_edit.measures.intervals import Interval
from rl_edit.method.algorithms import METHODS
from rl_edit.training import Silent
from runs import command, read_json, small_config

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sys.argv", ["methods.py"])
    import methods

    yield methods


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sys.argv", ["ablation.py"])
    import ablation

    yield ablation


def finish(job: Any, gain: float) -> None:
    """Leaves what a job leaves."""
    measured = rows([gain] * 4)
    for row in measured:
        for values in row["values"].values():
            values |= {"concentration": 1.5, "background_ssim": 0.9}
    written(job.directory, job.config, measured)
    job.stamp_file.write_text(json.dumps({"stamp": job.stamp}))


def test_every_method_is_a_row_and_all_spend_equal_evaluations_within_one_update(
    methods: Any,
) -> None:
    options = methods._options()
    assert set(METHODS) <= set(methods.ROWS)
    for row in methods.ROWS:
        job = methods.job_of(row, 3, options)
        assert (
            options.evaluations - effort(job.config).total < job.evaluations <= options.evaluations
        )
        assert (job.config.seed, job.config.name) == (3, row)
        assert job.config.algorithm.name == row or row not in METHODS
    with pytest.raises(SystemExit, match="below the 704 of one update"):
        methods.updates_within(load_config(preset="tiny-flow-grpo"), 600)


def test_a_rows_equal_values_are_equal_in_every_row(methods: Any) -> None:
    options = methods._options()
    configs = [methods.job_of(row, 0, options).config for row in methods.ROWS]
    shared = {
        (c.editor, c.lora, c.rollout, c.train.groups_per_update, c.evaluation, c.actors.runtime)
        for c in configs
    }
    assert len(shared) == 1
    assert all((c.train.learning_rate == 5e-4) == ("rate" not in c.name) for c in configs)
    data = {
        c.data
        for c, row in zip(configs, methods.ROWS.values(), strict=True)
        if row.tasks == "world"
    }
    assert len(data) == 1 and all(
        c.data.heldout_path == "builtin:shapes" for c in configs if c.data not in data
    )
    assert {c.data.num_heldout for c in configs} == {options.tasks}
    assert {(c.rewards["judge"].weight, c.rewards["preservation"].weight) for c in configs} == {
        (1.0, 0.3)
    }


def test_a_row_with_masks_found_differs_from_its_fellow_in_nothing_but_the_masks(
    rl_edit: Command, methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(*words: str) -> None:
        assert rl_edit(*words)[0] == 0

    monkeypatch.setattr(methods, "command", in_this_process)
    monkeypatch.setattr(methods, "ON_DISK", 9)
    options = methods._options()
    options.work, options.set = tmp_path, ["rollout.num_steps=2"]
    rows_on_masks = [name for name, row in methods.ROWS.items() if row.tasks == "found"]
    for row in rows_on_masks:
        predicted, true = (
            methods.job_of(name, 0, options).config for name in (row, methods.ROWS[row].against)
        )
        assert predicted.model_copy(update={"name": true.name, "data": true.data}) == true
    methods.write_tasks("found", options)
    with_true, with_predicted = (
        open_dataset(config.data, "train", resolution=64, multiple=8)
        for config in (true, predicted)
    )
    assert (len(with_true), with_true.fields) == (9, frozenset({"target", "caption", "regions"}))
    drawn = {task.task_id: task for task in (with_true[i] for i in range(9))}
    tasks = [with_predicted[i] for i in range(len(with_predicted))]
    assert tasks and all(torch.equal(task.source, drawn[task.task_id].source) for task in tasks)
    assert any(not torch.equal(task.edit_mask, drawn[task.task_id].edit_mask) for task in tasks)
    heldout = open_dataset(predicted.data, "heldout")
    assert (
        heldout.fingerprint
        == open_dataset(methods.job_of("rc-grpo", 0, options).config.data, "heldout").fingerprint
    )
    before = sorted(tmp_path.rglob("*"))
    methods.write_tasks("found", options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("interval", "falls", "verdict"),
    [
        (Interval(1.0, 0.5, 1.5, 9), False, "reproduced"),
        (Interval(1.0, -0.5, 1.5, 9), False, "in direction only; the interval includes zero"),
        (Interval(-0.1, -0.5, 1.5, 9), False, "not reproduced"),
        (Interval(-1.0, -1.5, -0.5, 9), False, "not reproduced; the reverse, beyond the interval"),
        (Interval(-1.0, -1.5, -0.5, 9), True, "reproduced"),
        (Interval(1.0, 0.5, 1.5, 9), True, "not reproduced; the reverse, beyond the interval"),
        (None, False, "not measured"),
    ],
)
def test_an_effect_is_reproduced_only_beyond_the_interval(
    methods: Any, interval: Interval | None, falls: bool, verdict: str
) -> None:
    effect = methods.Effect(claim="", one="a", other="b", measure="total", falls=falls)
    assert effect.verdict(interval) == verdict


def test_the_table_of_methods_names_effects_and_what_is_missing(
    methods: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = ["rc-grpo", methods.NO_ATTENTION_ROW, "rc-grpo + background_pull", "mixgrpo"]
    monkeypatch.setattr(
        "sys.argv",
        [
            "methods.py",
            "--methods",
            *chosen,
            "--seeds",
            "0",
            "1",
            "--tasks",
            "4",
            "--work",
            str(tmp_path),
        ],
    )
    options = methods._options()
    options.out = tmp_path / "methods.md"
    every = [methods.job_of(row, seed, options) for seed in options.seeds for row in chosen]
    for job in every:
        if job.row != "mixgrpo":
            finish(job, 0.1 * (chosen.index(job.row) + 1))
    methods.write_table(every, options)
    table = options.out.read_text()
    assert "| mixgrpo | none finished |" in table
    assert re.search(
        r"\| rc-grpo \| 2 \| 50 \| 25600 \|.*\| \+0\.100 \[\+0\.100, \+0\.100\] \|.*"
        r"\| 512 \(384 \+ 128\) \|",
        table,
    )
    assert re.search(r"edits better than the base \|.*\| \+0\.100 .*n = 4 \| reproduced \|", table)
    assert re.search(r"keeps it better still \|.*\| not reproduced \|", table)
    assert re.search(r"\| rc-grpo \+ background_pull \| rc-grpo \| \+0\.000 .*\| \+0\.200 ", table)
    numbers = read_json(options.out.with_suffix(".json"))
    assert numbers["effects"][3]["here"] == "reproduced"
    assert str(tmp_path) not in json.dumps(numbers) and numbers["arms"][0]["runs"] == [
        "seed_0",
        "seed_1",
    ]
    assert numbers["raises_training_reward"]["rc-grpo"] == "no; the interval includes zero"


def test_a_finished_run_is_not_repeated_and_one_of_other_settings_is_refused(
    methods: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = methods._options()
    options.work = tmp_path
    job = methods.job_of("flow-grpo", 0, options)
    assert not job.finished() and job.done() == 0
    finish(job, 1.0)
    assert job.finished() and job.trained() and job.done() == job.evaluations
    assert methods.jobs.run_all([job], side_by_side=1) == 0
    assert "1 runs, 1 already done" in capsys.readouterr().out
    options.set = ["train.learning_rate=1.0e-3"]
    with pytest.raises(SystemExit, match="made with other settings or editor weights"):
        methods.job_of("flow-grpo", 0, options).finished()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seeds", "0", "0"), "names one twice"),
        (("--set", "seed=5"), "--set seed=5"),
        (("--set", "train.updates=3"), "--updates"),
    ],
)
def test_options_that_would_make_two_runs_one_are_refused(
    methods: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["methods.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        methods.jobs.command(methods.main)
    assert refused.value.code == 2 and words in capsys.readouterr().err


def test_a_stopped_run_is_trained_to_its_end_before_it_is_evaluated(
    methods: Any, small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = methods.jobs.Job(
        row="small",
        directory=tmp_path / "seed_0",
        config=small_config(small_editor, "train.updates=2"),
    )
    update_done = Silent.update_done

    def stop(self: Any, metrics: dict[str, Any]) -> None:
        update_done(self, metrics)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Silent, "update_done", stop)
    with pytest.raises(SystemExit) as stopped:
        job.run()
    assert stopped.value.code == 130
    assert (job.directory / "adapter").is_dir() and not job.trained() and not job.finished()
    assert job.done() == job.evaluations / 2
    monkeypatch.setattr(Silent, "update_done", update_done)
    job.run()
    assert job.finished() and compare([job.directory]).arms[0].updates == 2


def test_the_ablation_keeps_its_command_line_and_separates_variants(
    ablation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "--base",
        "shipped=builtin:tiny-kontext",
        "--variants",
        "global",
        "region",
        "--seeds",
        "0",
        "--updates",
        "2",
        "--tasks",
        "4",
        "--side-by-side",
        "1",
    ]
    words += [
        "--set",
        "lora.rank=8",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out.md"),
    ]
    monkeypatch.setattr("sys.argv", ["ablation.py", *words])
    options = ablation._options()
    every = [
        ablation.job_of("shipped", "builtin:tiny-kontext", variant, 0, options)
        for variant in options.variants
    ]
    assert [
        (job.config.train.updates, job.config.lora.rank, job.config.evaluation.num_tasks)
        for job in every
    ] == [(2, 8, 4)] * 2
    finish(every[0], 0.25)
    finish(every[1], 0.75)
    ablation.write_table({"shipped": "builtin:tiny-kontext"}, every, options)
    table = options.out.read_text()
    assert "| global | 1 | +0.250 [+0.250, +0.250] |" in table
    assert "| region minus global | +0.500 [+0.500, +0.500] |" in table
    assert "- region: 0: +0.750; +0.00" in table


def test_the_table_of_the_method_page_is_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, _ = command(monkeypatch, capsys, "methods", "--markdown")
    assert code == 0 and [name for name in METHODS if f"\n| `{name}` |" not in printed] == []
    text = (ROOT / "docs/method.md").read_text()
    table = text.split("<!-- methods: begin -->\n")[1].split("<!-- methods: end -->")[0]
    assert table == printed, "docs/method.md: put in what rl-edit methods --markdown prints"


def test_the_method_page_names_the_preset_of_every_method() -> None:
    text = (ROOT / "docs/method.md").read_text()
    assert [name for name in METHODS if f"`tiny-{name}`" not in text.split("Per paper")[1]] == []
