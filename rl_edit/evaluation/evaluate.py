"""Base against adapter on the same held-out tasks and noises, inside and outside the mask."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_edit.config import EvaluationConfig
from rl_edit.data import Dataset
from rl_edit.data.canvas import fit
from rl_edit.editors import Editor, editor_identity, lora
from rl_edit.evaluation.examples import Example, ExampleQuota, write_example
from rl_edit.evaluation.record import (
    SIDES,
    EvaluationMeta,
    EvaluationRecord,
    ExampleRecord,
    Row,
    Sides,
)
from rl_edit.files import replace_json
from rl_edit.measures.diagnostics import (
    background_fidelity,
    change_inside,
    concentration,
)
from rl_edit.measures.intervals import Interval, bootstrap, paired_bootstrap
from rl_edit.method.attention import MassTally
from rl_edit.method.exploration import NoiseSource
from rl_edit.method.regions import token_mask
from rl_edit.method.rollout import denoise
from rl_edit.rewards import Reward, score_candidates
from rl_edit.types import Candidates, Conditioning, EditTask, PairedTask

CONVENTIONS = {
    "reward": "weighted sum of raw terms",
    "background_psnr_masked": "mean squared error over kept pixels only, dB",
    "background_psnr_zero_filled": (
        "edited pixels set to 0 in both images, error over all pixels (CompBench, PIE-Bench), dB"
    ),
    "background_ssim": "SSIM map averaged over kept pixels",
    "interval": "95 % bootstrap over tasks; delta is paired by task and noise",
}
"""Definitions of the numbers of an evaluation, written beside them."""

INSTRUCTION_PARTS = ("instruction", "prompt_following")
"""Names that judges give to the part of their score that says the instruction was followed.

The first reward term with such a part is reported as ``instruction``.
"""
_BACKGROUND_NAMES = {
    "psnr": "background_psnr_masked",
    "psnr_zero_filled": "background_psnr_zero_filled",
    "ssim": "background_ssim",
}
_DEFAULT_TYPES = 4
"""Task types to spread examples over, where the data does not name its types."""

Encoded = tuple[EditTask, Conditioning]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every row, and their summary as it is written."""

    rows: tuple[Row, ...]
    record: EvaluationRecord

    def write(self, path: Path, rows: Path) -> None:
        """Writes the record to ``path``, whole or not at all, and the rows to ``rows``."""
        # NaN stays NaN in the rows: Python reads it back, and null would be no float.
        rows.write_text("".join(json.dumps(row.model_dump()) + "\n" for row in self.rows))
        replace_json(path, self.record.model_dump(mode="json"))


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """One edited image, with the attention mass of each token."""

    image: Tensor
    mass: Tensor


def evaluate(
    editor: Editor,
    dataset: Dataset,
    terms: Sequence[Reward],
    config: EvaluationConfig,
    *,
    num_steps: int,
    adapter: str,
    left_out: Sequence[str] = (),
    images: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Edits each task once per noise as base and as trained; the adapter must be loaded.

    Args:
        num_steps: solver steps when the config does not say.
        adapter: id of the loaded adapter, for the record.
        left_out: names of reward terms that the data cannot feed, for the record.
        images: directory for ``config.examples`` tasks, spread over task types; None writes none.
        progress: called with tasks done and their total.
    """
    count = min(config.num_tasks, len(dataset))
    steps = config.num_steps or num_steps
    # Scoring a candidate twice separates a judge's noise from the differences within a training
    # group. An evaluation has no groups, so each image is scored once.
    once = [term.model_copy(update={"repeat_every": 0}) for term in terms]
    num_types = len(getattr(dataset, "task_types", ()) or ()) or _DEFAULT_TYPES
    quota = ExampleQuota(num_examples=0 if images is None else config.examples, num_types=num_types)
    rows: list[Row] = []
    # Over the tasks in order, as they lie on the canvas: compare refuses other tasks by it.
    digest = hashlib.sha256()
    done = 0
    with torch.no_grad():
        for batch in _batches(editor, _on_canvas(editor, dataset, count), config.batch_size):
            for noise in range(config.num_noises):
                for encoded, edits in _edit(editor, batch, steps, seed=config.seed, noise=noise):
                    row = _row(once, encoded, edits)
                    rows.append(row)
                    # One noise is enough for an image; the numbers have them all.
                    if images is not None and noise == 0 and quota.take(row.task_type):
                        write_example(images, _example(encoded, edits, row))
            for task, _ in batch:
                _add_task(digest, task)
            done += len(batch)
            progress(done, count)
    # The caller gets the editor back as it was loaded: with its adapter active.
    lora.set_active(editor.transformer, True)
    meta = EvaluationMeta(
        num_tasks=count,
        num_steps=steps,
        tasks=digest.hexdigest(),
        adapter=adapter,
        rewards={term.name: term.sha256() for term in terms},
        left_out=tuple(sorted(left_out)),
        **_settings(editor, config),
    )
    return Evaluation(rows=tuple(rows), record=summarise(rows, meta.model_dump(mode="json")))


def _settings(editor: Editor, config: EvaluationConfig) -> dict[str, Any]:
    """Returns the fields of :class:`EvaluationMeta` that the settings alone decide."""
    return {
        "num_noises": config.num_noises,
        "seed": config.seed,
        **editor.config.evaluation_settings(),
        "editor": editor_identity(editor.config),
        "conventions": CONVENTIONS,
    }


def summarise(rows: Sequence[Row], meta: Mapping[str, Any]) -> EvaluationRecord:
    """Computes base, trained and paired delta of each metric, overall and by task type."""
    types = sorted({row.task_type for row in rows})
    total = _sides(rows)
    return EvaluationRecord(
        base=total.base,
        trained=total.trained,
        delta=total.delta,
        by_type={name: _sides([row for row in rows if row.task_type == name]) for name in types},
        meta=meta,
    )


def _sides(rows: Sequence[Row]) -> Sides:
    """Bootstraps each metric over the rows where both sides are finite; ``n`` counts their tasks.

    A judge's invalid score is NaN and leaves its row out of that metric only.
    """
    intervals: dict[str, dict[str, Interval]] = {"base": {}, "trained": {}, "delta": {}}
    for metric in sorted({metric for row in rows for side in SIDES for metric in row.values[side]}):
        measured = [
            row
            for row in rows
            if all(math.isfinite(row.values[side].get(metric, math.nan)) for side in SIDES)
        ]
        # A metric without a single pair is absent, not zero.
        if not measured:
            continue
        # Noises of one task are no independent samples: whole tasks are resampled.
        tasks = [row.task_id for row in measured]
        values = {side: np.array([row.values[side][metric] for row in measured]) for side in SIDES}
        for side in SIDES:
            intervals[side][metric] = bootstrap(values[side], seed=0, groups=tasks)
        intervals["delta"][metric] = paired_bootstrap(
            values["base"], values["trained"], seed=0, groups=tasks
        )
    return Sides(**intervals)


def _on_canvas(editor: Editor, dataset: Dataset, count: int) -> Iterator[EditTask]:
    """Yields the first ``count`` tasks, scaled and cut to the editor's canvas."""
    for index in range(count):
        yield fit(
            dataset[index],
            resolution=editor.config.resolution,
            multiple=editor.pixels_per_token,
        )


def _batches(editor: Editor, tasks: Iterator[EditTask], size: int) -> Iterator[list[Encoded]]:
    """Yields consecutive tasks that share a canvas, encoded."""
    batch: list[Encoded] = []
    for task in tasks:
        conditioning = editor.encode(task)
        # Images of one forward must have one size; order is kept, so that rows are reproducible.
        if batch and (len(batch) == size or batch[0][1].grid != conditioning.grid):
            yield batch
            batch = []
        batch.append((task, conditioning))
    if batch:
        yield batch


def _add_task(digest: Any, task: EditTask) -> None:
    """Adds a task, as it lies on the canvas, to the digest of all tasks.

    Evaluations of equal digests used the same images, masks and instructions.
    """
    # JSON separates the fields: "ab" + "c" and "a" + "bc" must differ.
    digest.update(json.dumps([task.task_id, task.task_type, task.instruction]).encode())
    target = [task.target] if isinstance(task, PairedTask) else []
    for part in (task.source, task.edit_mask, *target):
        # The shape first: 2 x 8 and 4 x 4 pixels have equal bytes.
        digest.update(f"{tuple(part.shape)}".encode() + part.numpy().tobytes())


def _edit(
    editor: Editor, batch: Sequence[Encoded], steps: int, *, seed: int, noise: int
) -> Iterator[tuple[Encoded, dict[str, _Edit]]]:
    """Edits a batch as base and as trained, and yields each task with both results."""
    results = {side: _edit_side(editor, batch, steps, seed, noise, side) for side in SIDES}
    for index, encoded in enumerate(batch):
        yield encoded, {side: edits[index] for side, edits in results.items()}


def _edit_side(
    editor: Editor, batch: Sequence[Encoded], steps: int, seed: int, noise: int, side: str
) -> list[_Edit]:
    lora.set_active(editor.transformer, side == "trained")
    conditionings = [conditioning for _, conditioning in batch]
    shape = editor.latent_shape(conditionings[0])
    # Keyed by task and number, not by side: both sides start from the same noise.
    initial = torch.stack(
        [NoiseSource(seed, task.task_id, noise).normal("evaluation", 0, shape) for task, _ in batch]
    )
    # The velocity adds every step's attention; the mean over steps is what is reported.
    tally = MassTally()
    final = denoise(
        lambda x, s: editor.velocity(x, s, conditionings, tally),
        initial,
        editor.sigmas(steps, conditionings[0]),
    ).final
    images = editor.decode(final, conditionings[0])
    return [_Edit(image=image, mass=mass) for image, mass in zip(images, tally.mean(), strict=True)]


def _row(terms: Sequence[Reward], encoded: Encoded, edits: Mapping[str, _Edit]) -> Row:
    # Scored one by one, as a user's image would be: a judge must not see the other side.
    task = encoded[0]
    values = {side: _measure(terms, encoded, edit) for side, edit in edits.items()}
    return Row(task_id=task.task_id, task_type=task.task_type, values=values)


def _measure(terms: Sequence[Reward], encoded: Encoded, edit: _Edit) -> dict[str, float]:
    """Measures one edited image: reward terms, their parts, and the diagnostics."""
    task, conditioning = encoded
    candidates = Candidates(
        task=task,
        images=edit.image[None],
        attention=edit.mass[None],
        token_mask=token_mask(task.edit_mask, conditioning.grid),
    )
    table = score_candidates(tuple(terms), candidates, group_id=task.task_id)
    values = {f"reward/{name}": float(table.values[0, i]) for i, name in enumerate(table.names)}
    # A term of weight 0 is measured but not trained on; its NaN must not spoil the sum.
    values["reward"] = sum(
        weight * float(table.values[0, i]) for i, weight in enumerate(table.weights) if weight > 0
    )
    for term in table.names:
        for part, column in table.columns(term).items():
            values[f"{term}.{part}"] = column[0]
            # setdefault: the first judge in the order of the config wins.
            if part in INSTRUCTION_PARTS:
                values.setdefault("instruction", column[0])
        if term in table.repeats:
            values[f"{term}.repeat_difference"] = table.repeats[term][0]
    for name, column in background_fidelity(candidates).items():
        values[_BACKGROUND_NAMES[name]] = column[0]
    values["inside_change"] = change_inside(candidates)[0]
    values["concentration"] = concentration(candidates)[0]
    return values


def _example(encoded: Encoded, edits: Mapping[str, _Edit], row: Row) -> Example:
    task, conditioning = encoded
    # One scale for both sides, so that their maps compare.
    brightest = torch.stack([edit.mass for edit in edits.values()]).max().clamp(min=1e-12)
    attention = {
        side: (edit.mass.reshape(conditioning.grid) / brightest * 255).round()
        for side, edit in edits.items()
        if bool(edit.mass.isfinite().all())
    }
    return Example(
        record=ExampleRecord(
            task_id=task.task_id,
            task_type=task.task_type,
            instruction=task.instruction,
            metrics=row.values,
        ),
        source=task.source.numpy(),
        mask=task.edit_mask.numpy(),
        target=task.target.numpy() if isinstance(task, PairedTask) else None,
        edited={side: edit.image.numpy() for side, edit in edits.items()},
        attention={side: heat.numpy().astype(np.uint8) for side, heat in attention.items()},
    )
