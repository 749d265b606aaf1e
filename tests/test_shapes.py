"""The built-in world: deterministic, exact, and with one answer to every instruction."""

from __future__ import annotations

import hashlib
import itertools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_edit.data import shapes
from rl_edit.data.shapes.scenes import compose
from rl_edit.errors import InputError


def test_a_task_is_the_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib; from rl_edit.data import shapes; b = shapes.batch('train', 5, 40, seed=3);"
        "content = b.source.numpy().tobytes() + b.target.numpy().tobytes();"
        "print(hashlib.sha256(content + repr(b.instructions).encode()).hexdigest())"
    )
    root = Path(__file__).parents[1]
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    ).stdout.strip()
    here = shapes.batch("train", 5, 40, seed=3)
    content = (
        here.source.numpy().tobytes()
        + here.target.numpy().tobytes()
        + repr(here.instructions).encode()
    )
    assert other == hashlib.sha256(content).hexdigest()


def test_the_world_is_the_one_that_the_built_in_editor_was_trained_on() -> None:
    batch = shapes.batch("train", 0, 90)
    images = b"".join(part.numpy().tobytes() for part in (batch.source, batch.target, batch.mask))
    assert (
        hashlib.sha256(images + repr(batch.instructions).encode()).hexdigest()
        == "e2347683f01872520f2ffd341de1ccaa80412a00107824311d12025453cdb6e2"
    )


def test_a_batch_holds_the_same_tasks_as_one_by_one() -> None:
    batch = shapes.batch("pretrain", 11, 9, seed=2)
    for row in range(9):
        task = shapes.task("pretrain", 11 + row, seed=2)
        assert torch.equal(batch.source[row], task.source) and torch.equal(
            batch.target[row], task.target
        )
        assert torch.equal(batch.mask[row], task.edit_mask)
        assert (batch.instructions[row], batch.task_types[row]) == (
            task.instruction,
            task.task_type,
        )


def test_splits_and_seeds_share_no_scene() -> None:
    seen: dict[str, set[bytes]] = {}
    for split in shapes.SPLITS:
        for seed in (0, 1):
            batch = shapes.batch(split, 0, 1000, seed=seed)
            images = torch.cat([batch.source, batch.target]).numpy()
            seen[f"{split}{seed}"] = {hashlib.sha256(image.tobytes()).digest() for image in images}
            assert len(seen[f"{split}{seed}"]) == 2000
    assert len(set.union(*seen.values())) == sum(len(hashes) for hashes in seen.values())


def test_source_equals_target_outside_the_mask_and_differs_in_every_region() -> None:
    for index in range(900):
        task = shapes.task("train", index)
        changed = (task.source != task.target).any(dim=-1)
        assert not bool((changed & ~task.edit_mask).any())
        for region in task.regions:
            assert bool((changed & region).any())
        assert torch.equal(task.regions.any(dim=0), task.edit_mask)
        assert int(task.regions.sum(dim=0).max()) == 1
        assert len(task.regions) == (2 if task.task_type == "two_regions" else 1)


def test_the_mask_is_the_bounding_box_of_the_change_widened_by_the_margin() -> None:
    for index in range(300):
        task = shapes.task("heldout", index)
        if task.task_type == "two_regions":
            continue
        changed = (task.source != task.target).any(dim=-1).nonzero()
        top, left = (changed.min(dim=0).values - shapes.MASK_MARGIN).clamp(min=0).tolist()
        bottom, right = (
            (changed.max(dim=0).values + shapes.MASK_MARGIN).clamp(max=shapes.SIZE - 1).tolist()
        )
        expected = torch.zeros(shapes.SIZE, shapes.SIZE, dtype=torch.bool)
        expected[top : bottom + 1, left : right + 1] = True
        assert torch.equal(task.edit_mask, expected)


def test_the_edit_takes_between_5_and_20_percent_of_the_image() -> None:
    share = shapes.batch("train", 0, 2000).mask.float().mean(dim=(1, 2))
    assert float(share.min()) >= 0.05 and float(share.max()) <= 0.20


def test_every_stretch_of_tasks_is_balanced_over_types_and_a_type_can_be_asked_for() -> None:
    types = shapes.batch("heldout", 100, 90).task_types
    assert {task_type: types.count(task_type) for task_type in shapes.TASK_TYPES} == {
        "add": 20,
        "remove": 20,
        "replace": 20,
        "recolour": 20,
        "two_regions": 10,
    }
    assert all(
        shapes.task("train", 7, task_type=task_type).task_type == task_type
        for task_type in shapes.TASK_TYPES
    )


def test_instructions_use_exactly_the_vocabulary() -> None:
    words: set[str] = set()
    for instruction in shapes.batch("pretrain", 0, 4000).instructions:
        words.update(instruction.split(" "))
    assert words == set(shapes.vocabulary())


def _objects(words: list[str]) -> list[tuple[str, str]]:
    return [
        (colour, shape)
        for colour, shape in itertools.pairwise(words)
        if colour in shapes.COLOURS and shape in shapes.SHAPES
    ]


def test_the_object_to_remove_is_there_before_and_gone_after() -> None:
    for index in range(200):
        task = shapes.task("train", index, task_type="remove")
        (named,) = _objects(task.instruction.split())
        colour = torch.tensor(shapes.COLOURS[named[0]])
        before = (task.source == colour).all(dim=-1) & task.edit_mask
        after = (task.target == colour).all(dim=-1) & task.edit_mask
        assert int(before.sum()) > 20 and int(after.sum()) == 0


def test_added_and_recoloured_objects_show_the_colour_asked_for() -> None:
    for index in range(200):
        added = shapes.task("train", index, task_type="add")
        colour = torch.tensor(shapes.COLOURS[_objects(added.instruction.split())[0][0]])
        assert int(((added.target == colour).all(dim=-1) & added.edit_mask).sum()) > 20
        painted = shapes.task("train", index, task_type="recolour")
        colour = torch.tensor(shapes.COLOURS[painted.instruction.split()[-1]])
        assert int(((painted.target == colour).all(dim=-1) & painted.edit_mask).sum()) > 20
        assert int(((painted.source == colour).all(dim=-1) & painted.edit_mask).sum()) == 0


def test_the_place_of_an_added_object_follows_from_the_words() -> None:
    corners = {
        "top left": (True, True),
        "top right": (True, False),
        "bottom left": (False, True),
        "bottom right": (False, False),
    }
    num_checked = 0
    for index in range(300):
        task = shapes.task("train", index, task_type="add")
        rows, columns = task.edit_mask.nonzero().float().mean(dim=0).tolist()
        for words, (top, left) in corners.items():
            if f"in the {words} corner" in task.instruction:
                assert (rows < 32, columns < 32) == (top, left)
                num_checked += 1
        if "to the left of the" in task.instruction:
            anchor = torch.tensor(shapes.COLOURS[_objects(task.instruction.split())[1][0]])
            assert ((task.source == anchor).all(dim=-1)).nonzero()[:, 1].float().max() > columns
            num_checked += 1
    assert num_checked > 100


def test_no_name_of_a_scene_is_used_twice_before_or_after() -> None:
    for index in range(2000):
        scene = compose(shapes.TASK_TYPES[index % 5], random.Random(index))
        for state in ("before", "after"):
            changed = [getattr(change, state) for change in scene.changes]
            things = [thing for thing in (*changed, *scene.bystanders) if thing is not None]
            assert len({thing.name for thing in things}) == len(things)
        things = [*(change.place for change in scene.changes), *scene.bystanders]
        assert 2 <= len(things) <= 4
        for this in things:
            assert (
                min(this.x, this.y) - this.radius >= 1
                and max(this.x, this.y) + this.radius <= shapes.SIZE - 1
            )


def test_objects_stand_out_from_the_ground() -> None:
    for index in range(200):
        task = shapes.task("validation", index, task_type="remove")
        change = (task.source.float() - task.target.float()).norm(dim=-1)
        assert float(change.max()) > 60


def test_every_region_has_a_caption() -> None:
    for index in range(90):
        task = shapes.task("train", index)
        captions = task.caption.split("|")
        assert len(captions) == len(task.regions) and all(captions)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: shapes.task("test", 0), "Use one of pretrain, train"),
        (lambda: shapes.task("train", 0, task_type="rotate"), "Use one of add, remove"),
        (lambda: shapes.task("train", -1), "index >= 0"),
        (lambda: shapes.batch("train", 0, 0), "count >= 1"),
    ],
)
def test_shapes_refuses_what_it_cannot_draw(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
