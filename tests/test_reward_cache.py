"""Kept scores: the same content is scored once, other content never shares a score, and nothing but
ok scores is kept."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_edit.data import shapes
from rl_edit.rewards import Reward, score_candidates
from rl_edit.rewards.cache import ScoreCache
from rl_edit.rewards.composite import Composite
from rl_edit.rewards.concentration import Concentration
from rl_edit.rewards.custom import PythonReward
from rl_edit.rewards.preservation import Preservation
from rl_edit.types import Candidates, RewardTable, Score

TASK = shapes.task("validation", 0)
ASKED: list[int] = []
"""How many candidates each call of ``brightness`` was asked about."""


def brightness(group: Candidates) -> list[Score]:
    ASKED.append(len(group.images))
    return [
        Score(value=float(image.float().mean()) / 255, components={"size": float(image.shape[0])})
        for image in group.images
    ]


def sometimes(group: Candidates) -> list[float | None]:
    ASKED.append(len(group.images))
    return [
        None
        if float(image.float().mean()) < 1
        else 2.0
        if float(image.float().mean()) > 200
        else 0.5
        for image in group.images
    ]


def noisy(group: Candidates) -> list[float]:
    ASKED.append(len(group.images))
    return [NOISE.random() for _ in group.images]


NOISE = random.Random(0)


@pytest.fixture(autouse=True)
def _nothing_asked() -> None:
    ASKED.clear()


def group(levels: Sequence[int] = (10, 20, 30), **changes: Any) -> Candidates:
    task = replace(TASK, **changes)
    token_mask = torch.arange(4) < 1
    images = torch.stack([torch.full_like(task.source, level) for level in levels])
    return Candidates(
        task=task,
        images=images,
        attention=torch.full((len(levels), 4), 0.25),
        token_mask=token_mask,
    )


def term(directory: Path | None, function: str = "brightness", **changes: Any) -> PythonReward:
    return PythonReward(
        **{
            "function": f"{__name__}:{function}",
            "low": 0.0,
            "high": 1.0,
            "cache": directory,
            **changes,
        }
    )


def scored(reward: Reward, candidates: Candidates) -> RewardTable:
    return score_candidates([reward], candidates, group_id="w")


def test_a_score_is_asked_for_once_and_recalled_bit_for_bit_with_its_parts(tmp_path: Path) -> None:
    first, again = (scored(term(tmp_path), group()) for _ in range(2))
    assert ASKED == [3]
    assert torch.equal(first.values, again.values) and first.components == again.components
    assert (first.counts["python.cached"], again.counts["python.cached"]) == (0, 3)
    assert again.counts["python.ok"] == 3


def test_only_candidates_that_are_new_are_asked_about_and_each_keeps_its_place(
    tmp_path: Path,
) -> None:
    scored(term(tmp_path), group((20,)))
    table = scored(term(tmp_path), group((10, 20, 30)))
    assert ASKED == [1, 2]
    assert table.values[:, 0].tolist() == pytest.approx([10 / 255, 20 / 255, 30 / 255])


def test_name_weight_and_place_of_a_term_and_the_tasks_id_do_not_matter(tmp_path: Path) -> None:
    scored(term(tmp_path), group())
    scored(
        term(tmp_path, name="other", weight=3.0, when="if_available"),
        group(task_id="elsewhere", task_type="x"),
    )
    assert ASKED == [3]


@pytest.mark.parametrize(
    "change",
    [
        {"instruction": "something else"},
        {"edit_mask": ~TASK.edit_mask},
        {"source": 255 - TASK.source},
        {"target": 255 - TASK.target},
        {"caption": "another"},
        {"regions": ~TASK.regions},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_task_shares_no_score(change: dict[str, Any], tmp_path: Path) -> None:
    scored(term(tmp_path), group())
    scored(term(tmp_path), group(**change))
    assert ASKED == [3, 3]


def test_other_settings_of_a_term_share_no_score(tmp_path: Path) -> None:
    scored(term(tmp_path), group())
    scored(term(tmp_path, high=2.0), group())
    assert ASKED == [3, 3]
    plain, pasted = (
        Preservation(cache=tmp_path, ssim_weight=0),
        Composite(of=Preservation(ssim_weight=0), cache=tmp_path),
    )
    assert float(scored(plain, group()).values[0]) < float(scored(pasted, group()).values[0]) == 1.0


def test_attention_is_part_of_the_content_only_for_a_term_that_reads_it(tmp_path: Path) -> None:
    looked = replace(group((10,)), attention=torch.tensor([[0.7, 0.1, 0.1, 0.1]]))
    for reward, values in (
        (Concentration(cache=tmp_path), {1.0, 2.8}),
        (term(tmp_path), {10 / 255}),
    ):
        found = {
            float(scored(reward, candidates).values[0]) for candidates in (group((10,)), looked)
        }
        assert sorted(found) == pytest.approx(sorted(values))
    assert ASKED == [1]


def test_only_ok_scores_are_kept(tmp_path: Path) -> None:
    for _ in range(2):
        table = scored(term(tmp_path, "sometimes"), group((0, 100, 255)))
        assert table.valid[:, 0].tolist() == [False, True, False]
    assert ASKED == [3, 2]


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"value": 0.5',
        '{"value": NaN, "components": {}, "regions": null}',
        "[]",
        '{"value": 9, "components": {}, "regions": null}',
    ],
)
def test_an_entry_that_cannot_be_trusted_never_becomes_an_accepted_score(
    content: str, tmp_path: Path
) -> None:
    expected = scored(term(tmp_path), group((10,)))
    (entry,) = tmp_path.rglob("*.json")
    entry.write_text(content)
    table = scored(term(tmp_path), group((10,)))
    assert not table.valid.all() or torch.equal(table.values, expected.values)


def test_a_negated_term_is_recalled_with_the_same_sign(tmp_path: Path) -> None:
    values = [
        float(scored(term(tmp_path, direction="lower"), group((10,))).values[0]) for _ in range(2)
    ]
    assert values == pytest.approx([-10 / 255, -10 / 255]) and ASKED == [1]


def test_a_directory_that_takes_nothing_costs_only_the_saving_and_is_counted(
    tmp_path: Path,
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    table = scored(term(blocked / "cache"), group())
    assert table.valid.all() and table.counts["python.uncached"] == 3


def test_many_writers_of_one_entry_leave_one_whole_entry(tmp_path: Path) -> None:
    store = ScoreCache(tmp_path, {}, reads_attention=False)
    (key,) = store.keys(group((10,)))
    scores = [Score(value=float(number), components={"p" * 2000: 1.0}) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda score: store.put(key, score), scores))
    assert all(kept) and store.get(key) in scores
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{key}.json"]
    assert json.loads(next(tmp_path.rglob("*.json")).read_text())["value"] in range(40)


def test_candidates_scored_twice_are_never_recalled_and_only_one_of_a_group_is(
    tmp_path: Path,
) -> None:
    table = scored(term(tmp_path, "noisy", repeat_every=1), group())
    assert ASKED == [3, 1]
    differences = [value for value in table.repeats["python"] if not math.isnan(value)]
    assert len(differences) == 1 and differences[0] != 0
    scored(term(tmp_path, "noisy", repeat_every=1), group())
    assert ASKED == [3, 1, 1]


def test_about_one_group_in_repeat_every_is_repeated_and_always_the_same_ones() -> None:
    def repeated(number: int) -> bool:
        table = score_candidates(
            [term(None, repeat_every=4)], group((10, 20)), group_id=f"{number:016x}"
        )
        return "python" in table.repeats

    first = [repeated(number) for number in range(200)]
    assert 30 <= sum(first) <= 70
    assert first[:20] == [repeated(number) for number in range(20)]


def test_a_repeat_has_another_seed_where_the_term_has_one() -> None:
    class Seeded(Preservation):
        seed: int = 42

    assert Seeded().reseeded().seed != 42 and Preservation().reseeded() == Preservation()


@pytest.mark.parametrize(
    "reward", [Preservation(), Concentration(), term(None)], ids=lambda reward: reward.kind
)
def test_a_fingerprint_is_json_without_name_weight_and_place(reward: Reward) -> None:
    found = json.loads(json.dumps(reward.fingerprint()))
    assert found["kind"] == reward.kind and not {
        "name",
        "weight",
        "when",
        "cache",
        "repeat_every",
    } & set(found)
