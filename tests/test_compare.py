"""Runs side by side: the pairs that are compared, the runs that are refused, and the page."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from commands import Command
from evaluated_runs import BASE, META, evaluated, rows
from rl_edit.config import load_config
from rl_edit.errors import InputError
from rl_edit.evaluation.comparison import compare
from rl_edit.files import METRICS
from rl_edit.measures.intervals import Interval
from rl_edit.report.compare import comparison_page
from rl_edit.training import train
from runs import read_json, small_config


def ends(interval: Interval | None) -> tuple[float, float, float, int]:
    assert interval is not None
    return interval.mean, interval.low, interval.high, interval.n


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
    comparison = compare([*seeds, other])
    assert [(arm.label, arm.seeds) for arm in comparison.arms] == [
        ("tiny-flow-grpo", (0, 2)),
        ("other", (0,)),
    ]
    assert ends(comparison.arms[0].gain("instruction")) == pytest.approx((2.0, 2.0, 2.0, 4))
    assert comparison.arms[0].by_seed("instruction") == pytest.approx({0: 1.0, 2: 3.0})
    assert comparison.arms[0].seconds_per_update == 2.0


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
    comparison = compare([one], against=other)
    assert comparison.against is not None
    assert ends(comparison.arms[0].minus(comparison.against, "instruction")) == pytest.approx(
        (0.2, 0.2, 0.2, 4)
    )
    assert list(comparison.record()["over"]) == ["one"]


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
    comparison = compare([one, other])
    assert dict(comparison.weights) == {"judge": 1.0, "preservation": 0.3}
    assert [ends(arm.gain("total")) for arm in comparison.arms] == [
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
    comparison = compare([one, other])
    base = comparison.base("instruction")
    assert comparison.base("reward") is None
    assert base is not None and base.mean == pytest.approx(6.0)


def test_a_run_that_did_not_come_to_its_end_is_noted(tmp_path: Path) -> None:
    assert not compare([evaluated(tmp_path / "whole")]).notes[1:]
    cut = evaluated(tmp_path / "cut", "train.updates=400")
    assert compare([cut]).notes[-1] == f"{cut} was evaluated after 50 of its 400 updates"


def test_lines_of_metrics_that_cannot_be_read_are_counted_and_noted(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a")
    seconds = compare([run]).arms[0].seconds_per_update
    with (run / METRICS).open("ab") as file:
        # The last line has no end: a run that goes on may be writing it.
        file.write(b'{"update": \xff}\n[]\n{"update": 3, "sec')
    comparison = compare([run])
    assert comparison.arms[0].seconds_per_update == seconds
    assert comparison.notes[-1] == (
        f"2 lines of {run / METRICS} cannot be read (damaged) and are left out of the seconds per "
        "update"
    )
    assert comparison.record()["notes"] == list(comparison.notes)


def test_a_run_that_has_trained_on_since_its_evaluation_is_noted(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a", adapter="40:beef")
    comparison = compare([run])
    assert comparison.arms[0].updates == 40
    assert (
        f"{run} now has adapter 50:cafe, and 40:beef was evaluated: rl-edit evaluate {run}"
        in comparison.notes
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
def test_runs_evaluated_under_other_settings_are_refused_in_one_line_that_names_them(
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
    assert code == 2 and "no run at" in line and "there is no such directory" in line


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
    gain, single = arm.by_seed("background_psnr_masked"), summary["delta"]["background_psnr_masked"]
    assert arm.seeds == (0, 1) and gain[0] == pytest.approx(single["mean"])
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
