"""Runs side by side: the model evaluations they cost, what is compared with what, and the benchmark that compares methods."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_edit.cli.train import _Watch, train
from rl_edit.config import RunConfig, load_config
from rl_edit.data import open_dataset
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.errors import InputError
from rl_edit.evaluation.comparison import compare
from rl_edit.evaluation.effort import effort
from rl_edit.measures.intervals import Interval
from rl_edit.method.algorithms import METHODS
from rl_edit.report.compare import comparison_page
from runs import command, read_json, run_inline, small_config

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
META = {
    "num_tasks": 4,
    "num_noises": 1,
    "seed": 1_000_003,
    "num_steps": 6,
    "guidance": 2.5,
    "true_cfg": 1.0,
    "negative_prompt": "",
    "dtype": "float32",
    "max_text_tokens": 32,
    "tasks": "a" * 64,
    "editor": "b" * 64,
    "adapter": "50:cafe",
}
BASE = {
    "reward": 7.0,
    "reward/judge": 6.7,
    "reward/preservation": 0.8,
    "instruction": 6.0,
    "background_psnr_masked": 30.0,
}
HARD = (-3.0, 0.0, 1.0, 2.0)
"""By how much tasks differ for every editor."""

Values = dict[str, float]
Command = Callable[..., tuple[int, str, Sequence[str]]]


@pytest.fixture
def rl_edit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: command(monkeypatch, capsys, *arguments)


def ends(interval: Interval | None) -> tuple[float, float, float, int]:
    assert interval is not None
    return interval.mean, interval.low, interval.high, interval.n


def rows(
    gains: Sequence[float],
    *,
    metric: str = "instruction",
    noises: int = 1,
    base: Values | None = None,
) -> list[dict[str, Any]]:
    """A row a task and noise: the trained editor is better by the task's gain in one metric."""
    found = []
    for noise in range(noises):
        for task, gain in enumerate(gains):
            before = {
                name: value + HARD[task % len(HARD)] / 10 for name, value in (base or BASE).items()
            }
            after = {**before, metric: before[metric] + gain + noise}
            kind = "two_regions" if task == 0 else "add"
            found.append(
                {
                    "task_id": f"t{task}",
                    "task_type": kind,
                    "values": {"base": before, "trained": after},
                }
            )
    return found


def evaluated(
    directory: Path,
    *overrides: str,
    measured: list[dict[str, Any]] | None = None,
    preset: str = "tiny-flow-grpo",
    **meta: Any,
) -> Path:
    """A run directory as training and evaluation leave it."""
    config = load_config(preset=preset, overrides=overrides)
    return written(directory, config, rows([1.0] * 4) if measured is None else measured, **meta)


def written(
    directory: Path, config: RunConfig, measured: list[dict[str, Any]], **meta: Any
) -> Path:
    (directory / "evaluation").mkdir(parents=True)
    (directory / "config.yaml").write_text(config.to_yaml())
    (directory / "evaluation" / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in measured)
    )
    (directory / "evaluation.json").write_text(json.dumps({"meta": {**META, **meta}}))
    (directory / "run.json").write_text(
        json.dumps({"status": "done", "adapter": "50:cafe", "data_fingerprint": "d"})
    )
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps({"update": u, "seconds/update": u + 1.0}) + "\n" for u in range(3))
    )
    return directory


# --- model evaluations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "learning"),
    [
        ("tiny-rc-grpo", 4 * 6),  # anchors x trained steps
        ("tiny-neighbor-grpo", 4 * 4),
        ("tiny-flow-grpo", 8 * 5),  # every candidate at every stochastic step
        ("tiny-flow-grpo-fast", 8 * 2),
        ("tiny-mixgrpo", 8 * 2),
        ("tiny-diffusion-nft", 8 * 5 * 3),  # policy, acting and base
        ("tiny-cocoedit", 8 * 5 * 3),
        ("tiny-spatialflow-grpo", 8 * 5),
        ("tiny-edit-grpo", 8 * 5),
    ],
)
def test_an_update_costs_the_rollouts_forwards_and_every_replayed_state_under_every_policy(
    preset: str, learning: int
) -> None:
    found = effort(load_config(preset=preset))
    assert (found.rollout, found.learning) == (8 * 8 * 6, 8 * learning)
    assert (
        effort(
            load_config(
                preset=preset, overrides=["train.inner_epochs=2", "train.states_per_forward=3"]
            )
        ).learning
        == 2 * 8 * learning
    )
    if learning == 8 * 5 * 3:  # a guided velocity is none to regress on samples
        return
    guided = effort(load_config(preset=preset, overrides=["editor.true_cfg=2"]))
    assert (guided.rollout, guided.learning) == (2 * found.rollout, 2 * found.learning), (
        "a forward of either prompt"
    )


TRANSITION = "algorithm={name: flow-grpo, credit: {normalise: group}}"
FORWARD = "algorithm={name: diffusion-nft, credit: {normalise: group}}"
HELD = "algorithm.objective={kind: background_regularised, target: reference, inner: {num_anchors: 2, num_steps: 1}}"


@pytest.mark.parametrize("method", ["train.inner_epochs=1", TRANSITION, FORWARD, HELD])
def test_the_counted_evaluations_are_the_forwards_of_a_real_update(
    method: str, small_editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(small_editor, "train.updates=1", method)
    states: list[int] = []
    velocity = FluxKontextEditor.velocity

    def counted(self: Any, latents: Tensor, *rest: Any) -> Tensor:
        states.append(len(latents))
        return velocity(self, latents, *rest)

    monkeypatch.setattr(FluxKontextEditor, "velocity", counted)
    run_inline(config, tmp_path)
    assert sum(states) == effort(config).total


# --- what is compared -------------------------------------------------------------------------------------------------


def test_a_gain_is_the_mean_of_paired_differences_however_much_tasks_differ(tmp_path: Path) -> None:
    (arm,) = compare([evaluated(tmp_path / "a", measured=rows([0.5, 0.5, 0.5, 0.5]))]).arms
    assert ends(arm.gain("instruction")) == pytest.approx((0.5, 0.5, 0.5, 4))
    assert ends(arm.gain("background_psnr_masked")) == pytest.approx((0.0, 0.0, 0.0, 4))
    assert arm.gain("background_ssim") is None
    two = arm.gain("instruction", task_type="two_regions")
    assert two is not None and two.n == 1 and math.isinf(two.high)


def test_runs_that_differ_only_in_the_seed_are_one_arm_and_count_each_task_once(
    tmp_path: Path,
) -> None:
    seeds = [
        evaluated(tmp_path / f"{seed}", f"seed={seed}", measured=rows([seed + 1.0] * 4))
        for seed in (2, 0)
    ]
    other = evaluated(tmp_path / "other", "train.learning_rate=1.0e-3", "name=other")
    found = compare([*seeds, other])
    assert [(arm.label, arm.seeds) for arm in found.arms] == [
        ("tiny-flow-grpo", (0, 2)),
        ("other", (0,)),
    ]
    assert ends(found.arms[0].gain("instruction")) == pytest.approx((2.0, 2.0, 2.0, 4))
    assert found.arms[0].by_seed("instruction") == pytest.approx({0: 1.0, 2: 3.0})
    assert found.arms[0].seconds_per_update == 2.0


def test_noises_of_a_task_are_one_unit(tmp_path: Path) -> None:
    (arm,) = compare(
        [evaluated(tmp_path / "a", measured=rows([0.0, 0.0, 0.0, 0.0], noises=2), num_noises=2)]
    ).arms
    assert ends(arm.gain("instruction")) == pytest.approx((0.5, 0.5, 0.5, 4))


def test_a_run_is_subtracted_from_another_task_by_task(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "one", "name=one", measured=rows([1.0, 5.0, -3.0, 2.0]))
    other = evaluated(
        tmp_path / "other",
        "name=other",
        "train.learning_rate=1.0e-3",
        measured=rows([0.8, 4.8, -3.2, 1.8]),
    )
    found = compare([one], against=other)
    assert found.against is not None
    assert ends(found.arms[0].minus(found.against, "instruction")) == pytest.approx(
        (0.2, 0.2, 0.2, 4)
    )
    assert list(found.record()["over"]) == ["one"]


def test_a_score_that_is_missing_on_either_side_leaves_its_task_out_and_n_says_so(
    tmp_path: Path,
) -> None:
    measured = rows([1.0] * 4)
    measured[1]["values"]["trained"]["instruction"] = math.nan
    (arm,) = compare([evaluated(tmp_path / "a", measured=measured)]).arms
    assert ends(arm.gain("instruction")) == pytest.approx((1.0, 1.0, 1.0, 3))


def test_the_total_is_weighed_as_in_the_first_run_over_terms_that_all_runs_measured_alike(
    tmp_path: Path,
) -> None:
    one = evaluated(tmp_path / "one", "name=one", measured=rows([2.0] * 4, metric="reward/judge"))
    other = evaluated(
        tmp_path / "other",
        "name=other",
        "rewards.judge.weight=3",
        measured=rows([2.0] * 4, metric="reward/judge"),
    )
    found = compare([one, other])
    assert dict(found.weights) == {"judge": 1.0, "preservation": 0.3}
    assert [ends(arm.gain("total")) for arm in found.arms] == [
        pytest.approx((2.0, 2.0, 2.0, 4))
    ] * 2
    coarse = evaluated(tmp_path / "coarse", "name=coarse", "rewards.judge.coarse=true")
    fewer = compare([one, coarse])
    assert dict(fewer.weights) == {"preservation": 0.3}
    assert "not in the total, because not every run measured it alike: judge" in fewer.notes


def test_the_base_has_a_number_only_where_all_runs_agree_on_it(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "one", "name=one")
    other = evaluated(
        tmp_path / "other",
        "name=other",
        "rewards.judge.weight=3",
        measured=rows([1.0] * 4, base={**BASE, "reward": 20.0}),
    )
    found = compare([one, other])
    base = found.base("instruction")
    assert found.base("reward") is None
    assert base is not None and base.mean == pytest.approx(6.0)


def test_a_run_that_did_not_come_to_its_end_is_noted(tmp_path: Path) -> None:
    assert not compare([evaluated(tmp_path / "whole")]).notes[1:]
    cut = evaluated(tmp_path / "cut", "train.updates=400")
    assert compare([cut]).notes[-1] == f"{cut} was evaluated after 50 of its 400 updates"


def test_a_run_that_has_trained_on_since_its_evaluation_is_noted(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a", adapter="40:beef")
    found = compare([run])
    assert found.arms[0].updates == 40
    assert (
        f"{run} now has adapter 50:cafe, and 40:beef was evaluated: rl-edit evaluate {run}"
        in found.notes
    )


def test_a_directory_given_twice_is_compared_once_and_a_copy_is_refused(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "one")
    (arm,) = compare([one, tmp_path / "." / "one"]).arms
    assert len(arm.runs) == 1
    with pytest.raises(
        InputError, match=r"one and .*two have the same settings and the same seed 0"
    ):
        compare([one, evaluated(tmp_path / "two")])


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"tasks": "c" * 64}, "held-out tasks cccccccccccc against aaaaaaaaaaaa"),
        ({"seed": 7}, "evaluation.seed 7 against 1000003"),
        ({"editor": "e" * 64}, "editor eeeeeeeeeeee against bbbbbbbbbbbb"),
        ({"num_tasks": 3, "tasks": "c" * 64}, "settings: evaluation.num_tasks 3 against 4. "),
        ({"num_noises": 2}, "evaluation.num_noises 2 against 1"),
    ],
)
def test_runs_evaluated_on_other_tasks_seeds_or_editors_are_refused_in_one_line_that_names_the_difference(
    rl_edit: Command, tmp_path: Path, meta: dict[str, Any], words: str
) -> None:
    number = (meta.get("num_tasks", 4), meta.get("num_noises", 1))
    one = evaluated(tmp_path / "one")
    other = evaluated(
        tmp_path / "other", "seed=1", measured=rows([1.0] * number[0], noises=number[1]), **meta
    )
    code, _, err = rl_edit("compare", one, other)
    (line,) = err
    assert code == 2
    assert words in line and str(other) in line


def test_runs_that_were_not_evaluated_are_refused_with_the_commands_that_do_it(
    rl_edit: Command, tmp_path: Path
) -> None:
    one, two, three = (
        evaluated(tmp_path / name, f"seed={seed}")
        for seed, name in enumerate(("one", "two", "three"))
    )
    (two / "evaluation.json").unlink()
    (three / "evaluation.json").write_text(json.dumps({"meta": {"num_tasks": 4}}))
    code, _, (line,) = rl_edit("compare", one, two, three)
    assert code == 2
    assert (
        f"Run: rl-edit evaluate {two}; rl-edit evaluate {three}" in line
        and f"evaluate {one}" not in line
    )
    code, _, (line,) = rl_edit("compare", one, tmp_path / "none")
    assert code == 2 and "no run at" in line and "rl-edit train" in line


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_compare_prints_the_table_and_writes_page_and_json(
    rl_edit: Command, tmp_path: Path
) -> None:
    one = evaluated(tmp_path / "one", "name=mine")
    other = evaluated(tmp_path / "other", preset="tiny-diffusion-nft")
    page, record = tmp_path / "out" / "page.html", tmp_path / "out" / "numbers.json"
    code, out, _ = rl_edit(
        "compare", one, other, "--against", other, "--out", page, "--json", record
    )
    assert code == 0
    assert all(
        word in out
        for word in (
            "mine",
            "tiny-diffusion-nft",
            "diffusion-nft",
            "+1.000",
            "[+1.000, +1.000]",
            "384 + 960",
        )
    )
    assert all(
        word in out
        for word in (
            "trained minus trained of tiny-diffusion-nft",
            "total reward is 1 judge + 0.3 preservation",
        )
    )
    numbers = read_json(record)
    assert [
        (arm["label"], arm["updates"], arm["evaluations_per_update"]["total"])
        for arm in numbers["arms"]
    ] == [
        ("mine", 50, 704),
        ("tiny-diffusion-nft", 50, 1344),
    ]
    assert numbers["arms"][0]["gain"]["instruction"] == {
        "mean": 1.0,
        "low": 1.0,
        "high": 1.0,
        "n": 4,
    }
    assert numbers["arms"][0]["by_type"]["two_regions"]["instruction"]["high"] is None
    assert page.read_text() == comparison_page(compare([one, other], against=other))


def test_labels_of_neighbouring_ticks_do_not_touch_and_zero_has_one(tmp_path: Path) -> None:
    gains = [-0.065, 0.027, -0.065, 0.027]
    page = comparison_page(compare([evaluated(tmp_path / "run", measured=rows(gains))]))
    drawn = page[page.index("<svg") : page.index("</svg>")]
    labels = re.findall(r'<text class="mid" x="([0-9.]+)" y="[0-9.]+">([^<]+)</text>', drawn)
    ends = [(float(x) - 3.5 * len(text), float(x) + 3.5 * len(text)) for x, text in labels]
    assert (
        len(labels) > 6 and sum(float(text.replace("\u2212", "-")) == 0 for _, text in labels) == 3
    )
    for (left, right), (after, _) in itertools.pairwise(ends):
        assert right + 1.5 < after or after < left  # the next one, or the next panel's


def test_the_page_draws_every_run_escapes_its_name_and_needs_nothing_but_itself(
    tmp_path: Path,
) -> None:
    hostile = '<script>alert("x")</script>'
    runs = [evaluated(tmp_path / f"{seed}", f"seed={seed}", f"name='{hostile}'") for seed in (0, 1)]
    page = comparison_page(
        compare([*runs, evaluated(tmp_path / "b", "train.learning_rate=1.0e-3", "name=b")])
    )
    assert "<script" not in page
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[a-z/]""", page)
    assert page.count('class="mean"') == 2 * 3 and page.count('class="seed"') == 2 * 3
    assert "two regions (1)" in page


def test_evaluations_of_real_runs_are_compared_and_say_which_tasks_they_saw(
    rl_edit: Command, small_editor: str, tmp_path: Path
) -> None:
    runs = [tmp_path / "one", tmp_path / "other"]
    for seed, run in enumerate(runs):
        train(
            small_config(
                small_editor, "train.updates=1", "train.learning_rate=0.1", f"seed={seed}"
            ),
            run,
            resume=False,
        )
        assert rl_edit("evaluate", run)[0] == 0
    (arm,) = compare(runs).arms
    summary = read_json(runs[0] / "evaluation.json")
    gain, alone = arm.by_seed("background_psnr_masked"), summary["delta"]["background_psnr_masked"]
    assert arm.seeds == (0, 1) and gain[0] == pytest.approx(alone["mean"])
    assert rl_edit("evaluate", runs[1], "data.seed=1")[0] == 0
    code, _, (line,) = rl_edit("compare", *runs)
    assert code == 2 and "different settings: held-out tasks" in line


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("evaluation/rows.jsonl", "", "0 rows of 4"),
        ("evaluation/rows.jsonl", json.dumps(rows([1.0])[0]) + "\n", "1 rows of 4"),
        ("evaluation/rows.jsonl", "{}\n", "damaged"),
        ("evaluation.json", "[]", "damaged"),
        ("evaluation.json", '{"meta": null}', "damaged"),
        ("run.json", "null", "damaged"),
    ],
)
def test_a_damaged_evaluation_is_refused_with_the_command_that_mends_it(
    rl_edit: Command, tmp_path: Path, file: str, content: str, words: str
) -> None:
    one, other = evaluated(tmp_path / "one"), evaluated(tmp_path / "other", "seed=1")
    (other / file).write_text(content)
    code, _, (line,) = rl_edit("compare", one, other)
    assert code == 2 and words in line and f"rl-edit evaluate {other}" in line


def test_an_evaluation_with_other_rewards_than_the_run_has_is_refused(
    rl_edit: Command, tmp_path: Path
) -> None:
    rewards = {
        name: term.sha256() for name, term in load_config(preset="tiny-flow-grpo").rewards.items()
    }
    one = evaluated(tmp_path / "one", rewards=rewards, left_out=[])
    other = evaluated(
        tmp_path / "other",
        "seed=1",
        rewards={"preservation": rewards["preservation"]},
        left_out=["judge"],
    )
    assert rl_edit("compare", one, other)[0] == 0, (
        "what the data cannot feed is left out by the same rule"
    )
    heavier = (
        load_config(preset="tiny-flow-grpo", overrides=["rewards.judge.weight=100"])
        .rewards["judge"]
        .sha256()
    )
    for changed in ({**rewards, "judge": heavier}, {"preservation": rewards["preservation"]}):
        (other / "evaluation.json").write_text(
            json.dumps({"meta": {**META, "rewards": changed, "left_out": []}})
        )
        code, _, (line,) = rl_edit("compare", one, other)
        assert (
            code == 2
            and "other rewards" in line
            and "(judge)" in line
            and f"rl-edit evaluate {other}" in line
        )


# --- the benchmark ----------------------------------------------------------------------------------------------------


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


def test_every_method_is_a_row_and_every_row_spends_the_same_evaluations_but_for_less_than_an_update(
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
    methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "ON_DISK", 9)
    options = methods._options()
    options.work, options.set = tmp_path, ["rollout.num_steps=2"]
    for row in (name for name, asked in methods.ROWS.items() if asked.tasks == "found"):
        found, true = (
            methods.job_of(name, 0, options).config for name in (row, methods.ROWS[row].against)
        )
        assert found.model_copy(update={"name": true.name, "data": true.data}) == true
    methods.write_tasks("found", options)
    with_true, with_found = (
        open_dataset(config.data, "train", resolution=64, multiple=8) for config in (true, found)
    )
    assert (len(with_true), with_true.fields) == (9, frozenset({"target", "caption", "regions"}))
    drawn = {task.task_id: task for task in (with_true[i] for i in range(9))}
    given = [with_found[i] for i in range(len(with_found))]
    assert given and all(torch.equal(task.source, drawn[task.task_id].source) for task in given)
    assert any(not torch.equal(task.edit_mask, drawn[task.task_id].edit_mask) for task in given)
    heldout = open_dataset(found.data, "heldout")
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
    told = options.out.read_text()
    assert "| mixgrpo | none finished |" in told
    assert re.search(
        r"\| rc-grpo \| 2 \| 50 \| 25600 \|.*\| \+0\.100 \[\+0\.100, \+0\.100\] \|.*\| 512 \(384 \+ 128\) \|",
        told,
    )
    assert re.search(r"edits better than the base \|.*\| \+0\.100 .*n = 4 \| reproduced \|", told)
    assert re.search(r"keeps it better still \|.*\| not reproduced \|", told)
    assert re.search(r"\| rc-grpo \+ background_pull \| rc-grpo \| \+0\.000 .*\| \+0\.200 ", told)
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
    update_done = _Watch.update_done

    def stop(self: Any, metrics: dict[str, Any]) -> None:
        update_done(self, metrics)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(_Watch, "update_done", stop)
    with pytest.raises(SystemExit) as stopped:
        job.run()
    assert stopped.value.code == 130
    assert (job.directory / "adapter").is_dir() and not job.trained() and not job.finished()
    assert job.done() == job.evaluations / 2
    monkeypatch.setattr(_Watch, "update_done", update_done)
    job.run()
    assert job.finished() and compare([job.directory]).arms[0].updates == 2


def test_the_ablation_keeps_its_command_line_and_tells_variants_apart(
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
    told = options.out.read_text()
    assert "| global | 1 | +0.250 [+0.250, +0.250] |" in told
    assert "| region minus global | +0.500 [+0.500, +0.500] |" in told
    assert "- region: 0: +0.750; +0.00" in told


def test_the_method_page_has_a_row_for_every_method() -> None:
    text = (ROOT / "docs/method.md").read_text()
    assert [name for name in METHODS if f"\n| `{name}` |" not in text] == []
