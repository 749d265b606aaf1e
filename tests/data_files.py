"""Images, masks and rows on disk for tests of data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rl_edit.data import DataConfig, open_dataset
from rl_edit.types import EditTask


def assert_equal_tasks(actual: EditTask, expected: EditTask) -> None:
    assert type(actual) is type(expected)
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


def an_image(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def a_box(height: int, width: int) -> np.ndarray[Any, Any]:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 4 : height // 2, width // 3 : width // 2] = 255
    return mask


def saved(path: Path, pixels: np.ndarray[Any, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_folder(root: Path, num_rows: int = 4, height: int = 37, width: int = 53) -> Path:
    for index in range(num_rows):
        saved(root / f"p{index}.png", an_image(height, width, seed=index))
        saved(root / f"p{index}_mask.png", a_box(height, width))
        (root / f"p{index}.txt").write_text(f"  edit\t number {index} \n")
    return root


def write_lines(root: Path, *rows: dict[str, Any]) -> Path:
    path = root / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def all_tasks(path: Path, **options: Any) -> list[EditTask]:
    dataset = open_dataset(
        DataConfig(path="builtin:shapes", heldout_path=str(path), **options), "heldout"
    )
    return sorted((dataset[index] for index in range(len(dataset))), key=lambda task: task.task_id)


def task_ids(path: Path, split: Any, **options: Any) -> set[str]:
    dataset = open_dataset(DataConfig(path=str(path), **options), split)
    return {dataset[index].task_id for index in range(len(dataset))}
