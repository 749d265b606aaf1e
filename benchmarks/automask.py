"""Measures the agreement of found masks with true ones; writes benchmarks/results/automask.md.

On the built-in editor and world. Every setting sees the same edits of the same tasks. Defaults are
chosen on training tasks and reported on held-out ones::

    python benchmarks/automask.py            # about a minute on one free core
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from commit import commit_name
from rl_edit.config import load_config
from rl_edit.data import DataConfig, open_requests, shapes
from rl_edit.data.compbench import write_compbench
from rl_edit.data.mask_finding import FoundRegions, MaskFinder, agreement
from rl_edit.data.rows import Request, Row, load
from rl_edit.editors import BUILTIN, Editor, load_editor
from rl_edit.evaluation.found_masks import Observation, Outcome, observe, summarise
from rl_edit.measures.intervals import paired_bootstrap
from rl_edit.types import PairedTask

ROOT = Path(__file__).resolve().parent.parent
HEADLINE: dict[str, dict[str, Any]] = {
    "change only": {"attention_weight": 0.0},
    "attention only": {"attention_weight": 1.0},
    "both": {},
}
CHOICES: dict[str, dict[str, Any]] = {
    **{
        f"attention_weight {weight:g}": {"attention_weight": weight}
        for weight in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
    },
    **{f"margin {margin:g}": {"margin": margin} for margin in (0.0, 0.016, 0.047)},
    **{f"smoothing {width:g}": {"smoothing": width} for width in (0.008, 0.031)},
    "box false": {"box": False},
    "box false, margin 0.047": {"box": False, "margin": 0.047},
    "floor 0": {"floor": 0.0},
}
MEASURES = {
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "same_number": "as many places",
}

Observed = Sequence[tuple[Request, torch.Tensor, Observation]]
"""Tasks with their true mask and the editor's edits."""


def observe_split(
    editor: Editor, split: str, count: int, samples: int, num_steps: int
) -> tuple[Observed, Observed]:
    """Observes tasks of a split under the base editor, and under one whose every edit is right."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "tasks"
        write_compbench((shapes.task(split, index) for index in range(count)), root)
        observed, ideal = [], []
        requests = open_requests(DataConfig(path=str(root))).requests
        for request in track(requests, description=f"{split} tasks"):
            assert isinstance(request, Row)
            mask = torch.from_numpy(request.edit_mask())
            task = load(request)
            assert isinstance(task, PairedTask)
            observation = observe(editor, task, samples=samples, num_steps=num_steps, seed=0)
            observed.append((request, mask, observation))
            right = (task.target.float() - task.source.float()).abs().mean(dim=2) / 255
            ideal.append((request, mask, replace(observation, change=right)))
    return observed, ideal


def outcomes_of(observed: Observed, finder: MaskFinder) -> list[Outcome]:
    outcomes = []
    for request, mask, observation in observed:
        result = finder(observation.change, observation.attention)
        if isinstance(result, FoundRegions):
            agreed = agreement(result.regions.any(dim=0), mask)
            number = len(result.regions)
            outcome = Outcome(request=request, regions=number, refusal=None, agreement=agreed)
        else:
            outcome = Outcome(request=request, regions=0, refusal=result, agreement=None)
        outcomes.append(outcome)
    return outcomes


def gain(before: Sequence[Outcome], after: Sequence[Outcome]) -> str:
    """Paired difference in IoU over the rows that both have a mask for."""
    pairs = [
        (b.agreement.iou, a.agreement.iou)
        for b, a in zip(before, after, strict=True)
        if b.agreement and a.agreement
    ]
    interval = paired_bootstrap([b for b, _ in pairs], [a for _, a in pairs], seed=0)
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}] (n = {interval.n})"


def cells(part: dict[str, Any]) -> str:
    """Measures of one summary, with their intervals."""
    shown = [_cell(part.get(name)) for name in MEASURES]
    return " | ".join([str(part["found"]), str(part["not_found"]), *shown])


def _cell(interval: dict[str, Any] | None) -> str:
    if not interval:
        return ""
    low, high = interval["low"], interval["high"]
    # A single task has no interval.
    return f"{interval['mean']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def table(title: str, first_column: str) -> list[str]:
    """Heading and head of a table of measures."""
    columns = " | ".join(["found", "not found", *MEASURES.values()])
    rule = "|---" * (3 + len(MEASURES)) + "|"
    return ["", f"## {title}", "", f"| {first_column} | {columns} |", rule]


def heldout_rows(heldout: Observed, ideal: Observed, choosing: Observed) -> list[str]:
    """The settings of the headline by task type, and the gain of both sources over change."""
    lines = []
    for name, values in HEADLINE.items():
        summary = summarise(outcomes_of(heldout, MaskFinder(**values)))
        lines += [
            f"| {name}{'' if kind == 'all' else f', {kind}'} | {cells(part)} |"
            for kind, part in summary.items()
        ]
    change_only = MaskFinder(**HEADLINE["change only"])
    bound = summarise(outcomes_of(ideal, change_only))["all"]
    gains = [
        gain(outcomes_of(observed, change_only), outcomes_of(observed, MaskFinder()))
        for observed in (heldout, choosing)
    ]
    return [
        *lines,
        f"| change of the right edit | {cells(bound)} |",
        "",
        f"Both minus change only, IoU, paired: {gains[0]} on held-out tasks, {gains[1]} on "
        "training tasks.",
    ]


def provenance(arguments: argparse.Namespace, num_steps: int, seconds: float) -> list[str]:
    """Commit, machine, command and editor of the numbers."""
    commit = commit_name()
    option = f" --editor {arguments.editor}" if arguments.editor != BUILTIN else ""
    return [
        f"Commit `{commit}`, {time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, "
        f"{os.cpu_count()} cores, torch {torch.__version__}. "
        f"Command: `python benchmarks/automask.py{option}`.",
        f"Editor `{arguments.editor}`, {arguments.samples} edits of every task, {num_steps} steps, "
        f"{seconds:.2f} s a task on one thread. Brackets are 95 % bootstrap intervals over tasks; "
        "rows without a found mask are counted, not averaged.",
    ]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--editor", default=BUILTIN)
    parser.add_argument(
        "--tasks",
        type=int,
        default=64,
        help="held-out tasks; as many training tasks and half again choose the defaults",
    )
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "automask.md")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    config = load_config(preset="tiny-rc-grpo", overrides=[f"editor.path={arguments.editor}"])
    editor, began = load_editor(config.editor), time.perf_counter()
    steps, num_choosing = config.rollout.num_steps, math.ceil(1.5 * arguments.tasks)
    choosing, _ = observe_split(editor, "train", num_choosing, arguments.samples, steps)
    heldout, ideal = observe_split(editor, "heldout", arguments.tasks, arguments.samples, steps)
    seconds = (time.perf_counter() - began) / (len(choosing) + len(heldout))
    lines = [
        "# Masks that are found against true masks",
        "",
        *provenance(arguments, steps, seconds),
        *table(f"{arguments.tasks} held-out tasks", "mask from"),
        *heldout_rows(heldout, ideal, choosing),
        *table(
            f"{num_choosing} training tasks: what chose the defaults", "changed from the default"
        ),
    ]
    for name, values in {"nothing": {}, **CHOICES}.items():
        summary = summarise(outcomes_of(choosing, MaskFinder(**values)))["all"]
        lines.append(f"| {name} | {cells(summary)} |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # What a person wrote under the numbers stays.
    before = arguments.out.read_text() if arguments.out.is_file() else ""
    reading = before.partition("\n## Reading\n")[2]
    text = "\n".join([*lines, ""]) + (f"\n## Reading\n{reading}" if reading else "")
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
