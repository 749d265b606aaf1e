"""Base against adapter on the same held-out tasks and the same noises: paired, inside and outside the mask."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rl_edit.config import EvaluationConfig
from rl_edit.data import Dataset
from rl_edit.data.canvas import fit
from rl_edit.editors import Editor, editor_identity, lora
from rl_edit.files import replace_json
from rl_edit.measures.diagnostics import diagnostics
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
    "background_psnr_zero_filled": "edited pixels set to 0 in both images, error over all pixels (CompBench, PIE-Bench), dB",
    "background_ssim": "SSIM map averaged over kept pixels",
    "interval": "95 % bootstrap over tasks; delta is paired by task and noise",
}
"""What the numbers of an evaluation mean, written beside them."""

VARIANTS = ("base", "trained")
INSTRUCTION_PARTS = (".instruction", ".prompt_following")
"""What judges call the part of their score that says the instruction was followed; the first term that has one is reported."""
DIAGNOSTIC_NAMES = {
    "background.psnr": "background_psnr_masked",
    "background.psnr_zero_filled": "background_psnr_zero_filled",
    "background.ssim": "background_ssim",
    "change.inside": "inside_change",
    "concentration": "concentration",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One task under one noise: metric -> value for base and trained."""

    task_id: str
    task_type: str
    values: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every row, and how they were made."""

    rows: tuple[Row, ...]
    meta: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """``base``, ``trained`` and paired ``delta`` per metric, each mean, low, high, n; the same per task type."""
        types = sorted({row.task_type for row in self.rows})
        return {
            **_summarise(self.rows),
            "by_type": {
                name: _summarise([row for row in self.rows if row.task_type == name])
                for name in types
            },
            "meta": self.meta,
        }

    def write(self, path: Path, rows: Path) -> None:
        """Writes the summary to ``path`` (whole or not at all) and every row to ``rows``."""
        rows.write_text("".join(json.dumps(asdict(row)) + "\n" for row in self.rows))
        replace_json(path, self.summary())


def evaluate(
    editor: Editor,
    dataset: Dataset,
    terms: Sequence[Reward],
    config: EvaluationConfig,
    *,
    num_steps: int,
    images: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    variants: Sequence[str] = VARIANTS,
) -> Evaluation:
    """Runs each task once per noise as base and as trained; the adapter must be attached and loaded.

    Args:
        num_steps: solver steps when the config does not say.
        images: where to write pictures of ``config.examples`` tasks, spread over task types; None writes none.
        variants: ("base",) alone evaluates the base, whose numbers then stand for both.
    """
    count = min(config.num_tasks, len(dataset))
    steps = config.num_steps or num_steps
    # Scoring a candidate twice tells a judge's noise from the differences in a training group; here there is no group.
    terms = [term.model_copy(update={"repeat_every": 0}) for term in terms]
    unit = editor.pixels_per_token
    tasks = (
        fit(dataset[i], resolution=editor.config.resolution, multiple=unit) for i in range(count)
    )
    shown: dict[str, int] = defaultdict(int)
    kinds = len(getattr(dataset, "task_types", ()) or ()) or 4
    rows: list[Row] = []
    seen = hashlib.sha256()
    done = 0
    with torch.no_grad():
        for batch in _batches(editor, tasks, max(1, config.batch_size)):
            for noise in range(config.num_noises):
                results = {
                    variant: _run(editor, batch, steps, config.seed, noise, variant)
                    for variant in variants
                }
                for index, (task, conditioning) in enumerate(batch):
                    scored = {
                        v: _measure(terms, task, conditioning, pictures[index], mass[index])
                        for v, (pictures, mass) in results.items()
                    }
                    rows.append(Row(task_id=task.task_id, task_type=task.task_type, values=scored))
                    if (
                        images is not None
                        and noise == 0
                        and "trained" in results
                        and _wanted(shown, task.task_type, config.examples, kinds)
                    ):
                        _write_example(
                            images / _safe(task.task_id),
                            task,
                            conditioning,
                            {v: (r[0][index], r[1][index]) for v, r in results.items()},
                            scored,
                        )
            for task, _ in batch:
                _take_in(seen, task)
            done += len(batch)
            progress(done, count)
    lora.set_active(editor.transformer, True)
    meta: dict[str, Any] = {
        "num_tasks": count,
        "num_noises": config.num_noises,
        "seed": config.seed,
        "num_steps": steps,
        "guidance": editor.config.guidance,
        "true_cfg": editor.config.true_cfg,
        "negative_prompt": editor.config.negative_prompt,
        "dtype": editor.config.dtype,
        "max_text_tokens": editor.config.max_text_tokens,
        "tasks": seen.hexdigest(),
        "editor": editor_identity(editor.config),
        "conventions": CONVENTIONS,
    }
    return Evaluation(rows=tuple(rows), meta=meta)


def _batches(
    editor: Editor, tasks: Iterator[EditTask], size: int
) -> Iterator[list[tuple[EditTask, Conditioning]]]:
    """Consecutive tasks that share a canvas, encoded."""
    batch: list[tuple[EditTask, Conditioning]] = []
    for task in tasks:
        conditioning = editor.encode(task)
        if batch and (len(batch) == size or batch[0][1].grid != conditioning.grid):
            yield batch
            batch = []
        batch.append((task, conditioning))
    if batch:
        yield batch


def _take_in(digest: Any, task: EditTask) -> None:
    """Adds a task, as it lies on the canvas: evaluations of equal digests saw the same pictures, masks and words."""
    digest.update(json.dumps([task.task_id, task.task_type, task.instruction]).encode())
    for part in (
        task.source,
        task.edit_mask,
        *([task.target] if isinstance(task, PairedTask) else []),
    ):
        digest.update(f"{tuple(part.shape)}".encode() + part.numpy().tobytes())


def _run(
    editor: Editor,
    batch: Sequence[tuple[EditTask, Conditioning]],
    steps: int,
    seed: int,
    noise: int,
    variant: str,
) -> tuple[Tensor, Tensor]:
    """(images, attention mass) of a batch of different tasks under one variant."""
    lora.set_active(editor.transformer, variant == "trained")
    conditionings = [conditioning for _, conditioning in batch]
    shape = editor.latent_shape(conditionings[0])
    initial = torch.stack(
        [NoiseSource(seed, task.task_id, noise).normal("evaluation", 0, shape) for task, _ in batch]
    )
    tally = MassTally()
    final = denoise(
        lambda x, s: editor.velocity(x, s, conditionings, tally),
        initial,
        editor.sigmas(steps, conditionings[0]),
    ).final
    return editor.decode(final, conditionings[0]), tally.mean()


def _measure(
    terms: Sequence[Reward], task: EditTask, conditioning: Conditioning, image: Tensor, mass: Tensor
) -> dict[str, float]:
    candidates = Candidates(
        task=task,
        images=image[None],
        attention=mass[None],
        token_mask=token_mask(task.edit_mask, conditioning.grid),
    )
    table = score_candidates(tuple(terms), candidates, group_id=task.task_id)
    values = {f"reward/{name}": float(table.values[0, i]) for i, name in enumerate(table.names)}
    values["reward"] = sum(
        weight * float(table.values[0, i]) for i, weight in enumerate(table.weights) if weight > 0
    )
    for name, parts in table.components.items():
        values[name] = parts[0]
        if name.endswith(INSTRUCTION_PARTS):
            values.setdefault("instruction", parts[0])
    for name, parts in diagnostics(candidates).items():
        values[DIAGNOSTIC_NAMES[name]] = parts[0]
    return values


def _summarise(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Rows where a metric is not a number on either side (an invalid judge) are left out of that metric; n says how many remain."""
    summary: dict[str, dict[str, Any]] = {"base": {}, "trained": {}, "delta": {}}
    sides = [v for v in VARIANTS if v in rows[0].values]
    for metric in sorted({metric for row in rows for v in sides for metric in row.values[v]}):
        kept = [
            row
            for row in rows
            if all(math.isfinite(row.values[v].get(metric, math.nan)) for v in sides)
        ]
        if not kept:
            continue
        groups = [row.task_id for row in kept]
        values = {v: np.array([row.values[v][metric] for row in kept]) for v in sides}
        for v in sides:
            summary[v][metric] = _plain(bootstrap(values[v], seed=0, groups=groups))
        if len(sides) == 2:
            summary["delta"][metric] = _plain(
                paired_bootstrap(values["base"], values["trained"], seed=0, groups=groups)
            )
    return summary


def _plain(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON; an end that is not known (one task) is null."""
    return {key: value if math.isfinite(value) else None for key, value in asdict(interval).items()}


def _wanted(shown: dict[str, int], task_type: str, examples: int, kinds: int) -> bool:
    """Spreads the example pictures over task types, in order of appearance."""
    if sum(shown.values()) >= examples or shown[task_type] >= max(1, math.ceil(examples / kinds)):
        return False
    shown[task_type] += 1
    return True


def _write_example(
    directory: Path,
    task: EditTask,
    conditioning: Conditioning,
    results: dict[str, tuple[Tensor, Tensor]],
    scored: dict[str, dict[str, float]],
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {
        "source": task.source.numpy(),
        "mask": (task.edit_mask.numpy() * 255).astype(np.uint8),
    }
    if isinstance(task, PairedTask):
        pictures["target"] = task.target.numpy()
    brightest = torch.stack([mass for _, mass in results.values()]).max().clamp(min=1e-12)
    for variant, (image, mass) in results.items():
        pictures[variant] = image.numpy()
        if not bool(mass.isfinite().all()):
            continue
        heat = mass.reshape(conditioning.grid) / brightest
        pictures[f"attention_{variant}"] = (heat.numpy() * 255).round().astype(np.uint8)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(directory / f"{name}.png")
    record = {
        "task_id": task.task_id,
        "task_type": task.task_type,
        "instruction": task.instruction,
        "metrics": scored,
    }
    (directory / "task.json").write_text(json.dumps(record, indent=2) + "\n")


def _safe(task_id: str) -> str:
    """A task id as one folder name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in task_id)[:120]
