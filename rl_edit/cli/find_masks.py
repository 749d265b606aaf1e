"""``rl-edit find-masks``: the edit regions of rows that have no mask, from what the base editor does; a dataset to train on."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
import yaml
from jaxtyping import Bool, Float, UInt8
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from rl_edit.config import RunConfig, load_config, modern, modern_name
from rl_edit.data import open_requests
from rl_edit.data.canvas import fit
from rl_edit.data.compbench import new_dataset
from rl_edit.data.folder import FoundMasks
from rl_edit.data.images import read_mask, read_rgb
from rl_edit.data.mask_finding import Agreement, FoundRegions, MaskFinder, NotFound, agreement
from rl_edit.data.rows import Request, Row
from rl_edit.editors import Editor, editor_identity, load_editor
from rl_edit.errors import InputError
from rl_edit.evaluation.record import interval_json
from rl_edit.measures.intervals import bootstrap
from rl_edit.method.attention import MassTally
from rl_edit.method.exploration import NoiseSource
from rl_edit.method.rollout import denoise
from rl_edit.report.contact_sheet import FOUND, TRUE, Example, Panel, contact_sheet
from rl_edit.types import EditTask

SCHEMA = "rl-edit/find-masks/1"
EXAMPLES = 24
"""Rows on the contact sheet, spread over task types."""
PREFIX = "mask."
"""Of overrides that are MaskFinder's; the others are the run's."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the base editor did with one request, on the canvas.

    Attributes:
        change: mean over edits and channels of ``|edit - source|``, intensities 0..1.
        attention: text-to-image mass by token, mean over edits.
        edit: the first edit.
    """

    change: Float[Tensor, "height width"]
    attention: Float[Tensor, "rows columns"]
    edit: UInt8[Tensor, "height width 3"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One row: the number of its regions, or why there are none; and the agreement, where both masks exist."""

    request: Request
    regions: int
    refusal: NotFound | None
    agreement: Agreement | None

    def record(self) -> dict[str, Any]:
        told = {"kind": self.refusal.kind, "reason": self.refusal.reason} if self.refusal else {}
        measured = asdict(self.agreement) if self.agreement else {}
        return {
            "task_id": self.request.task_id,
            "task_type": self.request.task_type,
            "regions": self.regions,
            **told,
            **measured,
        }


def find_masks_command(
    data: Annotated[
        str,
        typer.Argument(help="Directory or .jsonl file; rows with a mask measure the agreement."),
    ],
    out: Annotated[
        Path, typer.Option(help="New directory for the dataset, agreement.json and masks.png.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Dotted overrides: mask.floor=0.2 editor.resolution=512 data.mask_polarity=edit_black"
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Preset whose editor and sampling are used.")
    ] = "tiny-rc-grpo",
    editor: Annotated[str | None, typer.Option(help="Editor; the preset's unless given.")] = None,
    samples: Annotated[
        int, typer.Option(help="Edits made of every row, from as many noises.", min=1)
    ] = 4,
    steps: Annotated[
        int | None, typer.Option(help="Solver steps; the preset's unless given.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noises.")] = 0,
    attention_weight: Annotated[
        float | None, typer.Option(help="Share of attention beside change, 0 to 1.")
    ] = None,
    num_tasks: Annotated[
        int | None, typer.Option(help="Only so many rows, a fair sample.", min=1)
    ] = None,
) -> None:
    """Find the edit region of every row and write a dataset with masks."""
    given = list(overrides or [])
    automask = _automask(
        [change for change in given if change.startswith(PREFIX)], attention_weight
    )
    changes = [
        f"data.path={json.dumps(data)}",
        *([f"editor.path={json.dumps(editor)}"] if editor else []),
    ]
    config = load_config(
        preset=preset,
        overrides=[*changes, *(change for change in given if not change.startswith(PREFIX))],
    )
    if automask.attention_weight > 0 and config.editor.attention_layers == 0:
        raise InputError(
            f"attention has weight {automask.attention_weight:g} and editor.attention_layers is 0, so none is measured: set it to 1 or "
            "more, or --attention-weight 0."
        )
    console = Console()
    with new_dataset(out) as partial:
        requests = open_requests(config.data)[:num_tasks]
        num_steps = steps or config.rollout.num_steps
        outcomes = find_masks(
            requests,
            automask,
            config,
            partial,
            samples=samples,
            num_steps=num_steps,
            seed=seed,
            console=console,
        )
        lost: Counter[str] = Counter(
            outcome.refusal.kind for outcome in outcomes if outcome.refusal
        )
        if lost.total() == len(outcomes):
            raise InputError(
                f"{data}: no region was found in any of {len(outcomes)} rows ({_counted(lost)}), so there is nothing to write. Does this "
                "editor follow such instructions at this resolution? Try rl-edit edit; or change mask.floor, mask.smallest, mask.largest."
            )
        summary = summarise(outcomes)
        content = {
            "schema": SCHEMA,
            "data": data,
            "editor": {"path": config.editor.path, "identity": editor_identity(config.editor)},
            "settings": {
                "samples": samples,
                "seed": seed,
                "num_steps": num_steps,
                "mask": automask.model_dump(),
            },
            "num_rows": len(outcomes),
            "found": len(outcomes) - lost.total(),
            "not_found": dict(lost),
            "agreement": summary,
            "rows": [outcome.record() for outcome in outcomes],
        }
        (partial / "agreement.json").write_text(
            json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
    if summary:
        console.print(_table(summary))
    console.print(
        f"{content['found']} of {len(outcomes)} rows have a mask now{f'; without one: {_counted(lost)}' if lost else ''}. Look at "
        f"{out / 'masks.png'}, then train on them with: rl-edit train --preset {preset} data.path={out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def find_masks(
    requests: Sequence[Request],
    automask: MaskFinder,
    config: RunConfig,
    root: Path,
    *,
    samples: int,
    num_steps: int,
    seed: int,
    console: Console,
) -> list[Outcome]:
    """Finds regions row by row, writes those rows and ``masks.png`` into ``root``, and says what became of each row."""
    editor, masks = load_editor(config.editor), FoundMasks(root)
    outcomes: list[Outcome] = []
    examples: dict[str, list[Example]] = defaultdict(list)
    share = math.ceil(EXAMPLES / len({request.task_type for request in requests}))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for request in progress.track(requests, description="finding masks"):
            source = torch.from_numpy(read_rgb(request.source, where=request.where))
            task = _on_canvas(request, source, editor)
            seen = observe(editor, task, samples=samples, num_steps=num_steps, seed=seed)
            found = automask(seen.change, seen.attention)
            regions = _at_size(found, source)
            true = _drawn(request, config)
            mask = regions.any(dim=0)
            refusal = found if isinstance(found, NotFound) else None
            agreed = agreement(mask, true) if refusal is None and true is not None else None
            if refusal is None:
                masks.add(request, regions.numpy())
            outcomes.append(
                Outcome(request=request, regions=len(regions), refusal=refusal, agreement=agreed)
            )
            if len(examples[request.task_type]) < share:
                examples[request.task_type].append(_example(source, seen, mask, true, outcomes[-1]))
    masks.finish()
    title = "source, an edit, found (orange) and true (blue) region"
    contact_sheet(title, [example for kind in sorted(examples) for example in examples[kind]]).save(
        root / "masks.png"
    )
    return outcomes


@torch.no_grad()
def observe(
    editor: Editor, task: EditTask, *, samples: int, num_steps: int, seed: int
) -> Observation:
    """Runs the editor from several noises, by the deterministic ODE, and looks at what changed and where the instruction looked."""
    conditioning = editor.encode(task)
    noise, shape = NoiseSource(seed, task.task_id, 0), editor.latent_shape(conditioning)
    initial = torch.stack([noise.normal("find masks", sample, shape) for sample in range(samples)])
    tally = MassTally()
    final = denoise(
        lambda x, s: editor.velocity(x, s, conditioning, tally),
        initial,
        editor.sigmas(num_steps, conditioning),
    ).final
    images = editor.decode(final, conditioning)
    return Observation(
        change=(images.float() - task.source.float()).abs().mean(dim=(0, 3)) / 255,
        attention=tally.mean().mean(dim=0).reshape(conditioning.grid),
        edit=images[0],
    )


def summarise(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Agreement over all rows ("all") and by task type: each measure's mean with its 95 % bootstrap interval; empty without true masks.

    Rows without a found mask have no agreement; how many there are is said beside it (``not_found``). Rows that show one picture
    are resampled together.
    """
    measured = [outcome for outcome in outcomes if isinstance(outcome.request, Row)]
    types = sorted({outcome.request.task_type for outcome in measured})
    parts = {
        "all": measured,
        **{
            name: [outcome for outcome in measured if outcome.request.task_type == name]
            for name in types
        },
    }
    return {name: _summary(part) for name, part in parts.items() if part}


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    found = [
        (outcome.request.group, outcome.agreement)
        for outcome in outcomes
        if outcome.agreement is not None
    ]
    summary: dict[str, Any] = {"found": len(found), "not_found": len(outcomes) - len(found)}
    for name in ("iou", "precision", "recall", "same_number") if found else ():
        interval = bootstrap(
            [float(getattr(agreed, name)) for _, agreed in found],
            seed=0,
            groups=[group for group, _ in found],
        )
        summary[name] = interval_json(interval)
    return summary


def _automask(changes: Sequence[str], attention_weight: float | None) -> MaskFinder:
    """The defaults with ``mask.key=value`` overrides and the option's weight."""
    values: dict[str, Any] = (
        {} if attention_weight is None else {"attention_weight": attention_weight}
    )
    written: dict[str, Any] = {}
    for change in changes:
        key, separator, value = change.removeprefix(PREFIX).partition("=")
        name = modern_name(f"{PREFIX}{key}").removeprefix(PREFIX)
        if not separator or name not in MaskFinder.model_fields:
            raise InputError(
                f"override {change!r} is not {PREFIX}KEY=VALUE with a key of {', '.join(MaskFinder.model_fields)}"
            )
        written[key] = yaml.safe_load(value)
    values |= modern({"mask": written})["mask"]
    try:
        return MaskFinder.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(
            f"{PREFIX}{first['loc'][0]}: {first['msg']}, got {first['input']!r}"
        ) from error


def _on_canvas(
    request: Request, source: UInt8[Tensor, "height width 3"], editor: Editor
) -> EditTask:
    """A task for an editor that only makes pictures of it: its mask is one pixel, and nobody reads it."""
    mask = torch.zeros(source.shape[:2], dtype=torch.bool)
    mask[0, 0] = True
    task = EditTask(
        task_id=request.task_id,
        task_type=request.task_type,
        source=source,
        instruction=request.instruction,
        edit_mask=mask,
    )
    return fit(task, resolution=editor.config.resolution, multiple=editor.pixels_per_token)


def _at_size(
    found: FoundRegions | NotFound, source: UInt8[Tensor, "height width 3"]
) -> Bool[Tensor, "region height width"]:
    """Regions in pixels of the picture itself; none where none were found."""
    if isinstance(found, NotFound):
        return torch.zeros(0, *source.shape[:2], dtype=torch.bool)
    return F.interpolate(found.regions[None].float(), source.shape[:2], mode="nearest")[0].bool()


def _drawn(request: Request, config: RunConfig) -> Bool[Tensor, "height width"] | None:
    if not isinstance(request, Row):
        return None
    return torch.from_numpy(
        read_mask(request.mask, polarity=config.data.mask_polarity, where=request.where).edit
    )


def _example(
    source: Tensor, seen: Observation, mask: Tensor, true: Tensor | None, outcome: Outcome
) -> Example:
    outlined = [
        *([(true.numpy(), TRUE)] if true is not None else []),
        *([(mask.numpy(), FOUND)] if outcome.refusal is None else []),
    ]
    panels = [
        Panel(pixels=source.numpy()),
        Panel(pixels=seen.edit.numpy()),
        Panel(pixels=source.numpy(), outlined=outlined),
    ]
    told = (
        f"no mask: {outcome.refusal.kind}"
        if outcome.refusal
        else f"{outcome.regions} region{'s' * (outcome.regions != 1)}"
    )
    measured = f", IoU {outcome.agreement.iou:.2f}" if outcome.agreement else ""
    return Example(
        panels=panels,
        lines=[f"{outcome.request.task_type}: {outcome.request.instruction}"[:90], told + measured],
    )


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))


def _table(summary: dict[str, dict[str, Any]]) -> Table:
    shown = Table("task type", title="found against true masks; 95 % intervals")
    for column in ("found", "not found", "IoU", "precision", "recall", "as many places"):
        shown.add_column(column, justify="right")
    for name, part in summary.items():
        cells = []
        for measure in ("iou", "precision", "recall", "same_number"):
            value = part.get(measure)
            ends = (
                f" [{value['low']:.3f}, {value['high']:.3f}]"
                if value and value["low"] is not None
                else ""
            )
            cells.append(f"{value['mean']:.3f}{ends}" if value else "")
        shown.add_row(name, str(part["found"]), str(part["not_found"]), *cells)
    return shown
