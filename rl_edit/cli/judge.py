"""``rl-edit judge``: tries out the judges of a run before a GPU is reserved."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from rl_edit.audit.images import Reference, reference
from rl_edit.audit.judge_trial import JudgeTrial, judge_of, judge_trial
from rl_edit.cli.arguments import (
    ConfigFile,
    Overrides,
    Preset,
    Strict,
    configured,
    print_notices,
    strictly,
)
from rl_edit.cli.audit_reward import first_tasks
from rl_edit.config import RunConfig
from rl_edit.data import Dataset, open_dataset
from rl_edit.errors import InputError
from rl_edit.files import write_result
from rl_edit.rewards.vlm.judge_reward import JudgeReward
from rl_edit.types import PairedTask

SCHEMA = "rl-edit/judge-test/1"
UNUSABLE = 3
"""Exit code when a judge of the run cannot be used."""
SHOWN = 200
"""Characters of an answer on the terminal; --json holds all of them."""

judge_app = typer.Typer(help="Try out judges.", no_args_is_help=True)


@judge_app.callback()
def _group() -> None:
    """Try out judges."""


@judge_app.command("test")
def judge_test_command(
    config: ConfigFile = None,
    overrides: Overrides = None,
    preset: Preset = None,
    term: Annotated[
        list[str] | None,
        typer.Option(help="Only this reward. May be repeated. Default: all that ask a judge."),
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="Scorings of each image; they show the judge's noise.", min=1)
    ] = 2,
    row: Annotated[int, typer.Option(help="Row of the training data to ask about.", min=0)] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for all answers and numbers.")
    ] = None,
    strict: Strict = False,
) -> None:
    """Ask the judges of a run about a correct edit, an untouched source and a noisy edit.

    No editor is loaded. Exits with 3 when a judge gives no scores or does not prefer the edit.
    """
    run = configured(config, strictly(overrides, strict=strict), preset)
    judges = _judges(run, term)
    dataset, console = open_dataset(run.data, "train"), Console()
    print_notices(console, dataset.notices)
    correct = _reference(dataset, row, run.editor.resolution)
    _say(console, _introduction(correct, row))
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("asking", total=3 * repeats * len(judges))
        tests = []
        for name, judge in judges.items():

            def show(image: str, name: str = name) -> None:
                progress.update(bar, advance=1, description=f"{name}: {image}")

            tests.append(
                judge_trial(name, judge, correct, repeats=repeats, seed=run.seed, progress=show)
            )
    if json_file is not None:
        write_result(json_file, _to_json(run, tests))
    for test in tests:
        console.print(_table(test))
        for line in _lines(test, run):
            _say(console, line)
    unusable = [f"{test.term}: {test.problem}" for test in tests if test.problem]
    if unusable:
        line = f"rl-edit: no usable judge: {'; '.join(unusable)}"
        print(" ".join(line.split()), file=sys.stderr)
        raise typer.Exit(UNUSABLE)


def _judges(run: RunConfig, names: Sequence[str] | None) -> dict[str, JudgeReward]:
    """Returns the judges to ask, by the name of their reward."""
    judges = {
        name: judge for name, term in run.rewards.items() if (judge := judge_of(term)) is not None
    }
    if not judges:
        rewards = ", ".join(f"{name} ({term.kind})" for name, term in run.rewards.items())
        raise InputError(
            "No reward of this run asks a vision-language model, so there is no judge to test. It "
            f"has {rewards}. Add one of kind editscore or region_judge, or use audit-reward for "
            "the others."
        )
    unknown = [name for name in names or () if name not in judges]
    if unknown:
        raise InputError(
            f"{unknown[0]!r} is no judge of this run. Its judges are {', '.join(judges)}. Correct "
            "--term."
        )
    # A cached score would say nothing about the judge of today.
    return {
        name: judge.model_copy(update={"cache": None, "repeat_every": 0})
        for name, judge in judges.items()
        if not names or name in names
    }


def _reference(dataset: Dataset, row: int, resolution: int) -> Reference:
    if row >= len(dataset):
        raise InputError(
            f"--row {row} is beyond the last of {len(dataset)} rows, which count from 0."
        )
    return reference(first_tasks(dataset, row + 1, resolution=resolution)[row])


def _introduction(correct: Reference, row: int) -> str:
    task, (height, width) = correct.task, correct.task.edit_mask.shape
    if isinstance(task, PairedTask):
        made = "its target is the correct edit"
    else:
        made = "it has no target, so the masked area is painted and the instruction asks for that"
    return f"row {row}, {width}x{height}: {task.instruction!r}; {made}"


def _table(test: JudgeTrial) -> Table:
    verdict = "[red]not usable[/]" if test.problem else "[green]usable[/]"
    title = f"{escape(test.term)}: {verdict}, scores {test.low:g}..{test.high:g}"
    table = Table("image", "mean", "scores", "seconds", title=title)
    for image in test.images:
        scores = ", ".join("none" if value is None else f"{value:.4g}" for value in image.values)
        mean = f"{image.mean:.4g}" if image.scores else "none"
        table.add_row(image.image, mean, scores, ", ".join(f"{s:.2f}" for s in image.seconds))
    return table


def _answers_shown(test: JudgeTrial) -> Iterator[str]:
    """Shows one answer to each question about each image; equal ones once."""
    shown: dict[str, str] = {}
    for image in test.images:
        questions: set[str] = set()
        for answer in image.responses:
            if answer.text and answer.question not in questions:
                questions.add(answer.question)
                shown.setdefault(answer.text, f"{image.image}, {answer.question}")
    yield from (f"{where}: {_cut(text)}" for text, where in shown.items())


def _lines(test: JudgeTrial, run: RunConfig) -> Iterator[str]:
    """Says what the judge answers and costs, its noise, and what it does not take."""
    yield from _answers_shown(test)
    responses = [answer for image in test.images for answer in image.responses]
    seconds = [answer.seconds for answer in responses]
    noise = f"; largest difference between two scores of one image: {test.noise:.4g}"
    yield (
        f"{len(responses)} questions, {fmean(seconds):.2f} s each, at most {max(seconds):.2f} s"
        + noise * any(len(image.scores) > 1 for image in test.images)
    )
    num_candidates = run.train.updates * run.train.groups_per_update * run.rollout.group_size
    number = num_candidates * test.questions
    counted = [answer for answer in responses if answer.answer_tokens is not None]
    if counted:
        prompt = fmean(answer.prompt_tokens or 0 for answer in counted)
        answer = fmean(answer.answer_tokens or 0 for answer in counted)
        priced = [answer.cost for answer in counted if answer.cost is not None]
        cost = f", cost {fmean(priced):.3g}" if priced else ""
        total = f", cost {number * fmean(priced):.3g}" if priced else ""
        yield (
            f"a question: {prompt:.0f} tokens of prompt, {answer:.0f} of answer{cost}; this run "
            f"asks {number}: {number * (prompt + answer):.3g} tokens{total}"
        )
    else:
        yield f"this run asks {number} questions; the server does not count tokens"
    yield from (f"note: {note}" for note in test.notes)
    yield from (f"warning: {line}" for line in test.warnings)


def _to_json(run: RunConfig, tests: Sequence[JudgeTrial]) -> str:
    content = {
        "schema": SCHEMA,
        "run": run.name,
        "judges": [
            {
                **asdict(test),
                "noise": test.noise,
                "problem": test.problem,
                "warnings": test.warnings,
            }
            for test in tests
        ],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
