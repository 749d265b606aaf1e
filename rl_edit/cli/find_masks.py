"""``rl-edit find-masks``: finds edit regions of rows without a mask and writes a dataset.

The regions follow from the edits that the base editor makes
(:mod:`rl_edit.evaluation.found_masks`).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from jaxtyping import Bool
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from rl_edit.cli.arguments import print_notices
from rl_edit.config import RunConfig, load_config, modern, modern_name
from rl_edit.data import open_requests
from rl_edit.data.compbench import new_dataset
from rl_edit.data.folder import FoundMasks
from rl_edit.data.images import read_rgb
from rl_edit.data.mask_finding import MaskFinder, NotFound, agreement
from rl_edit.data.rows import Request, Row
from rl_edit.editors import Editor, editor_config, editor_identity, load_editor
from rl_edit.errors import InputError
from rl_edit.evaluation.found_masks import (
    MEASURES,
    Observation,
    Outcome,
    observe,
    regions_at_size,
    summarise,
    task_on_canvas,
)
from rl_edit.report.contact_sheet import FOUND, TRUE, Example, Panel, contact_sheet

SCHEMA = "rl-edit/find-masks/1"

EXAMPLES = 24
"""Rows on the contact sheet, spread over task types."""

PREFIX = "mask."
"""Of overrides that are MaskFinder's; the others are the run's."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Edits made of each row: their number, solver steps, and the seed of their noises."""

    samples: int
    num_steps: int
    seed: int


# Arguments and options of the command.
Data = Annotated[
    str,
    typer.Argument(help="Directory or .jsonl file. Rows that have a mask measure the agreement."),
]
Out = Annotated[
    Path, typer.Option(help="New directory for the dataset, agreement.json and masks.png.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Dotted overrides: mask.floor=0.2 editor.resolution=512 data.mask_polarity=edit_black"
    ),
]
Preset = Annotated[str, typer.Option(help="Preset whose editor and sampling are used.")]
EditorPath = Annotated[str | None, typer.Option(help="Editor. Default: the preset's.")]
Samples = Annotated[int, typer.Option(help="Edits per row, each from another noise.", min=1)]
Steps = Annotated[int | None, typer.Option(help="Solver steps. Default: the preset's.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the noises.")]
Weight = Annotated[
    float | None, typer.Option(help="Weight of attention against change of pixels, 0 to 1.")
]
NumTasks = Annotated[
    int | None, typer.Option(help="Number of rows, as a fair sample. Default: all.", min=1)
]


def find_masks_command(
    data: Data,
    out: Out,
    overrides: Overrides = None,
    preset: Preset = "tiny-rc-grpo",
    editor: EditorPath = None,
    samples: Samples = 4,
    steps: Steps = None,
    seed: Seed = 0,
    attention_weight: Weight = None,
    num_tasks: NumTasks = None,
) -> None:
    """Find the edit region of every row and write a dataset with masks."""
    changes = list(overrides or [])
    finder = mask_finder([c for c in changes if c.startswith(PREFIX)], attention_weight)
    # As JSON, which is YAML: a path may hold characters that YAML would read.
    places = [f"data.path={json.dumps(data)}"]
    if editor:
        places.append(_editor_override(preset, editor))
    run_changes = [change for change in changes if not change.startswith(PREFIX)]
    config = load_config(preset=preset, overrides=[*places, *run_changes])
    _require_attention(finder, config)
    sampling = Sampling(samples=samples, num_steps=steps or config.rollout.num_steps, seed=seed)
    console = Console()
    # The directory appears complete or not at all.
    with new_dataset(out) as partial:
        listing = open_requests(config.data)
        print_notices(console, listing.notices)
        requests = listing.requests[:num_tasks]
        outcomes = find_masks(requests, finder, config, partial, sampling, console=console)
        content = _content(data, outcomes, finder, config, sampling)
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (partial / "agreement.json").write_text(text, encoding="utf-8")
    if content["agreement"]:
        console.print(_table(content["agreement"]))
    refusals = content["not_found"]
    without = f"; without one: {_counted(refusals)}" if refusals else ""
    console.print(
        f"{content['found']} of {len(outcomes)} rows have a mask now{without}. Look at "
        f"{out / 'masks.png'}, then train on them with: rl-edit train --preset {preset} "
        f"data.path={out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _editor_override(preset: str, editor: str) -> str:
    """Puts an editor in the place of the preset's, whose settings fit its own family alone."""
    path = json.dumps(editor)
    ours, preset_editor = editor_config({"path": editor}), load_config(preset=preset).editor
    same = type(ours) is type(preset_editor)
    return f"editor.path={path}" if same else f"editor={{path: {path}}}"


def _require_attention(finder: MaskFinder, config: RunConfig) -> None:
    if finder.attention_weight > 0 and config.editor.attention_layers == 0:
        raise InputError(
            f"attention has weight {finder.attention_weight:g} and editor.attention_layers is 0, so"
            " none is measured: set it to 1 or more, or --attention-weight 0."
        )


def _content(
    data: str,
    outcomes: Sequence[Outcome],
    finder: MaskFinder,
    config: RunConfig,
    sampling: Sampling,
) -> dict[str, Any]:
    """Returns the content of ``agreement.json``.

    Raises:
        InputError: no row has a region.
    """
    refusals: Counter[str] = Counter(o.refusal.kind for o in outcomes if o.refusal)
    if refusals.total() == len(outcomes):
        raise InputError(
            f"{data}: no region was found in any of {len(outcomes)} rows ({_counted(refusals)}), "
            "so there is nothing to write. Does this editor follow such instructions at this "
            "resolution? Try rl-edit edit; or change mask.floor, mask.min_area, mask.max_area."
        )
    return {
        "schema": SCHEMA,
        "data": data,
        "editor": {"path": config.editor.path, "identity": editor_identity(config.editor)},
        "settings": {
            "samples": sampling.samples,
            "seed": sampling.seed,
            "num_steps": sampling.num_steps,
            "mask": finder.model_dump(),
        },
        "num_rows": len(outcomes),
        "found": len(outcomes) - refusals.total(),
        "not_found": dict(refusals),
        "agreement": summarise(outcomes),
        "rows": [outcome.record() for outcome in outcomes],
    }


def find_masks(
    requests: Sequence[Request],
    finder: MaskFinder,
    config: RunConfig,
    root: Path,
    sampling: Sampling,
    *,
    console: Console,
) -> list[Outcome]:
    """Finds regions row by row; writes the rows that have some, and ``masks.png``, into ``root``.

    Returns:
        The outcome of each row, in order.
    """
    editor, masks = load_editor(config.editor), FoundMasks(root)
    outcomes: list[Outcome] = []
    examples: dict[str, list[Example]] = defaultdict(list)
    # So many of each type, in the order of the rows.
    share = math.ceil(EXAMPLES / len({request.task_type for request in requests}))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for request in progress.track(requests, description="finding masks"):
            row = _found_row(request, finder, config, editor, sampling)
            # Rows are written as they come: one image at a time is in memory.
            if row.outcome.refusal is None:
                masks.add(request, row.regions.numpy())
            outcomes.append(row.outcome)
            if len(examples[request.task_type]) < share:
                examples[request.task_type].append(_example(row))
    masks.finish()
    title = "source, an edit, found (orange) and true (blue) region"
    ordered = [example for kind in sorted(examples) for example in examples[kind]]
    contact_sheet(title, ordered).save(root / "masks.png")
    return outcomes


@dataclass(frozen=True, kw_only=True)
class _FoundRow:
    """One row with everything that its example shows, at the source's size."""

    source: Tensor
    observation: Observation
    regions: Bool[Tensor, "region height width"]
    true: Bool[Tensor, "height width"] | None
    outcome: Outcome


def _found_row(
    request: Request, finder: MaskFinder, config: RunConfig, editor: Editor, sampling: Sampling
) -> _FoundRow:
    source = torch.from_numpy(read_rgb(request.source, where=request.where))
    observation = observe(
        editor,
        task_on_canvas(request, source, editor),
        samples=sampling.samples,
        num_steps=sampling.num_steps,
        seed=sampling.seed,
    )
    result = finder(observation.change, observation.attention)
    refusal = result if isinstance(result, NotFound) else None
    regions = regions_at_size(result, source.shape[0], source.shape[1])
    true = _true_mask(request)
    # Agreement of nothing with a mask would be 0 and pull the mean; such rows are counted apart.
    both = refusal is None and true is not None
    outcome = Outcome(
        request=request,
        regions=len(regions),
        refusal=refusal,
        agreement=agreement(regions.any(dim=0), true) if both and true is not None else None,
    )
    return _FoundRow(
        source=source, observation=observation, regions=regions, true=true, outcome=outcome
    )


def _true_mask(request: Request) -> Bool[Tensor, "height width"] | None:
    """Reads the mask that a row came with; None for a request without."""
    if not isinstance(request, Row):
        return None
    return torch.from_numpy(request.edit_mask())


def mask_finder(changes: Sequence[str], attention_weight: float | None) -> MaskFinder:
    """Returns the defaults with ``mask.key=value`` overrides and the option's weight.

    Raises:
        InputError: an override is of no known key, or its value is refused.
    """
    # Under the names as given: modern() renames old ones and refuses both at once.
    written: dict[str, Any] = {}
    for change in changes:
        key, separator, value = change.removeprefix(PREFIX).partition("=")
        name = modern_name(f"{PREFIX}{key}").removeprefix(PREFIX)
        if not separator or name not in MaskFinder.model_fields:
            raise InputError(
                f"override {change!r} is not {PREFIX}KEY=VALUE with a key of "
                f"{', '.join(MaskFinder.model_fields)}"
            )
        written[key] = yaml.safe_load(value)
    values: dict[str, Any] = (
        {} if attention_weight is None else {"attention_weight": attention_weight}
    )
    values |= modern({"mask": written})["mask"]
    try:
        return MaskFinder.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(
            f"{PREFIX}{first['loc'][0]}: {first['msg']}, got {first['input']!r}"
        ) from error


def _example(row: _FoundRow) -> Example:
    """Draws a row: source, an edit, and both regions outlined on the source."""
    outcome, source = row.outcome, row.source.numpy()
    # The found region last, so that it lies on top.
    outlined = [(row.true.numpy(), TRUE)] if row.true is not None else []
    if outcome.refusal is None:
        outlined.append((row.regions.any(dim=0).numpy(), FOUND))
        result = f"{outcome.regions} region{'s' * (outcome.regions != 1)}"
    else:
        result = f"no mask: {outcome.refusal.kind}"
    measured = f", IoU {outcome.agreement.iou:.2f}" if outcome.agreement else ""
    return Example(
        panels=[
            Panel(pixels=source),
            Panel(pixels=row.observation.edit.numpy()),
            Panel(pixels=source, outlined=outlined),
        ],
        lines=[
            f"{outcome.request.task_type}: {outcome.request.instruction}"[:90],
            result + measured,
        ],
    )


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))


def _table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns the agreement by task type, for the terminal."""
    table = Table("task type", title="found against true masks; 95 % intervals")
    for column in ("found", "not found", "IoU", "precision", "recall", "same number"):
        table.add_column(column, justify="right")
    for name, part in summary.items():
        cells = [_cell(part.get(measure)) for measure in MEASURES]
        table.add_row(name, str(part["found"]), str(part["not_found"]), *cells)
    return table


def _cell(interval: Mapping[str, Any] | None) -> str:
    """Writes a mean with its interval; one task has no interval, no task has no mean."""
    if not interval:
        return ""
    low, high = interval["low"], interval["high"]
    return f"{interval['mean']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
