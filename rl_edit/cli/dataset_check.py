"""``rl-edit dataset check``: opens data as training would, and shows what it makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rl_edit.cli.arguments import Preset, Strict
from rl_edit.config import RunConfig, load_config
from rl_edit.data import Dataset, RowsDataset, open_dataset
from rl_edit.data.config import BUILTIN_SHAPES
from rl_edit.data.notices import Notice, require_none
from rl_edit.data.problems import FaultyRows, problem_list
from rl_edit.data.splits import Split
from rl_edit.editors import inspect_editor
from rl_edit.errors import InputError
from rl_edit.files import replace_file
from rl_edit.report.overlays import SHEET, write_mask_files

PROBLEMS = "problems.txt"
"""File of all problems and notices in --out."""

_NUM_ROWS = 8
"""Rows that are printed: the first of each split, in the order of training."""
_NUM_CHARACTERS = 60
_ANY_PRESET = "tiny-rc-grpo"
"""Supplies the settings that are not the data's; none of them is used."""


def check_command(
    data: Annotated[str, typer.Argument(help="Directory or table of rows, as data.path.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Dotted overrides: data.text_lines=join data.heldout_fraction=0.2"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of a run: its canvas and its tokens are checked.")
    ] = None,
    preset: Preset = None,
    out: Annotated[
        Path | None,
        typer.Option(help=f"Directory for {PROBLEMS} and the masks on their images, {SHEET}."),
    ] = None,
    strict: Strict = False,
) -> None:
    """Open data as training would: rows, split, what is not used, and the first rows.

    Exits with 2 when training would refuse the data.
    """
    # As JSON, which is YAML: a path may hold characters that YAML would read.
    changes = [f"data.path={json.dumps(data)}", *(overrides or ())]
    canvas = config is not None or preset is not None
    run = load_config(config, preset=preset if canvas else _ANY_PRESET, overrides=changes)
    console = Console()
    try:
        train, heldout = _opened(run, canvas=canvas)
    except InputError as error:
        problems = error.problems if isinstance(error, FaultyRows) else (str(error),)
        if out is not None:
            _write(out / PROBLEMS, [f"error: {problem}" for problem in problems])
        if isinstance(error, FaultyRows):
            console.out(problem_list(problems), end="", highlight=False)
        raise
    notices = list({str(notice): notice for notice in (*train.notices, *heldout.notices)}.values())
    _print(console, {"train": train, "held out": heldout}, notices)
    if out is not None:
        _write(out / PROBLEMS, [f"note: {notice}" for notice in notices])
        if isinstance(train, RowsDataset):
            write_mask_files(train, out)
        console.print(
            f"{out / PROBLEMS}, {out / SHEET}", highlight=False, markup=False, soft_wrap=True
        )
    if strict or run.data.strict:
        require_none(notices, source=data)


def _opened(run: RunConfig, *, canvas: bool) -> tuple[Dataset, Dataset]:
    """Opens both splits. Notices are shown before --strict turns them into an error."""
    if run.data.path == BUILTIN_SHAPES:
        raise InputError(f"{BUILTIN_SHAPES} has no files to check. Name a directory or a table.")
    settings = run.data.model_copy(update={"strict": False})
    if not canvas:
        return open_dataset(settings, "train"), open_dataset(settings, "heldout")
    unit = inspect_editor(run.editor).pixels_per_token

    def opened(split: Split) -> Dataset:
        return open_dataset(
            settings, split, resolution=run.editor.resolution, multiple=unit, text=run.editor
        )

    return opened("train"), opened("heldout")


def _print(console: Console, splits: dict[str, Dataset], notices: Sequence[Notice]) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for name, dataset in splits.items():
        say(f"{name}: {_size(dataset)}")
    for notice in notices:
        say(f"note ({notice.kind}, {notice.count}): {notice}")
    if not notices:
        say("every file is in a row; nothing to note")
    table = Table(title="first rows", box=None, title_justify="left")
    for column in ("split", "id", "image", "instruction"):
        table.add_column(column, overflow="fold")
    for name, dataset in splits.items():
        for index in range(min(_NUM_ROWS, len(dataset))):
            task = dataset[index]
            height, width = task.source.shape[:2]
            text = task.instruction
            cut = f"{text[:_NUM_CHARACTERS]}..." if len(text) > _NUM_CHARACTERS else text
            table.add_row(name, task.task_id, f"{width}x{height}", cut)
    console.print(table, markup=False)


def _size(dataset: Dataset) -> str:
    """Describes the number of rows, and the optional fields that all of them have."""
    fields = f"; every row has {', '.join(sorted(dataset.fields))}" if dataset.fields else ""
    skipped = f"; {dataset.skipped} skipped (empty or full mask)" if dataset.skipped else ""
    images = ""
    if isinstance(dataset, RowsDataset):
        number = len({row.source for row in dataset.rows})
        images = f" of {number} image{'s' if number != 1 else ''}"
    return f"{len(dataset)} row{'s' if len(dataset) != 1 else ''}{images}{fields}{skipped}"


def _write(path: Path, lines: Sequence[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, problem_list(lines).encode(errors="replace"))
    except OSError as error:
        raise InputError(f"--out {path.parent} cannot be written ({error}).") from error
