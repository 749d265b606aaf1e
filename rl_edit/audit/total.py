"""Audits what a run really maximises: the weighted sum of its rewards.

Each term may do what it declares, and their sum may still ask for nothing: preservation and
attention alone prefer the untouched source to every edit. So the sum itself scores a correct edit,
the untouched source, another task's edit and images without content. It is the sum of the metric
``reward/total``, of raw scores and the run's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from rl_edit.audit.checks.order import check_wins
from rl_edit.audit.checks.ranks import win
from rl_edit.audit.checks.verdict import Check, Verdict, failed, not_applicable, passed, worst
from rl_edit.audit.corruptions import RGB, within
from rl_edit.audit.images import Reference, blank_images, reference
from rl_edit.audit.responses import candidates
from rl_edit.rewards import Reward, score_candidates
from rl_edit.rewards.purpose import REMEDY, asks_for_edit, unrewarded
from rl_edit.types import EditTask

TASKS_BEFORE_TRAINING = 8
"""Tasks measured before a run starts: enough to separate always from half of the time."""

_EDIT, _SOURCE, _OTHER = "correct edit", "untouched source", "another task's edit"
_RIVALS = {
    "no edit": ((_SOURCE,), "the untouched source"),
    "wrong instruction": ((_OTHER,), "what another task's instruction asks for"),
    "blank image": (("grey", "black", "white", "negative", "static"), "images without content"),
}
"""By check, the images that deserve less than the correct edit, and their name in words."""


@dataclass(frozen=True, kw_only=True)
class TotalAudit:
    """The audit of a run's weighted sum.

    Attributes:
        weights: of the terms in the sum.
        unseen: terms with a weight that score no image, and why; they are equal for all images.
        example: images of the first task.
        scores: their weighted sums; NaN where a term gave no score.
        allowed: whether the run trains nevertheless (``train.allow_unrewarded_edit``).
    """

    weights: dict[str, float]
    unseen: dict[str, str]
    checks: tuple[Check, ...]
    example: dict[str, RGB]
    scores: dict[str, float]
    allowed: bool = False

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the checks; a failure that is allowed only warns."""
        verdict = worst(check.verdict for check in self.checks)
        return "warn" if verdict == "fail" and self.allowed else verdict

    @property
    def problem(self) -> str:
        """Says what the failed checks saw; "" where none failed."""
        return " ".join(check.sentence for check in self.checks if check.verdict == "fail")


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """Holds what is known before training about the purpose of the rewards.

    Attributes:
        problem: why the weighted sum does not ask for the edit; "" where nothing says so.
        unknown: what could not be examined, and how it can be; "" where all was.
    """

    problem: str = ""
    unknown: str = ""


def audit_total(
    terms: Sequence[Reward],
    tasks: Sequence[EditTask],
    *,
    seed: int,
    left_out: Mapping[str, str],
    allowed: bool = False,
) -> TotalAudit:
    """Scores correct and wrong edits of some tasks with the weighted sum of all terms.

    Args:
        terms: those that the data can feed, with the run's weights.
        left_out: the reason for each term that it cannot.
    """
    weighted = [term for term in terms if term.weight > 0]
    scored = [term for term in weighted if not term.needs_attention]
    references = [reference(task) for task in tasks]
    images = [
        _images(correct, _other(references, row), seed=seed)
        for row, correct in enumerate(references)
    ]
    totals = [
        _totals(scored, correct.task, shown)
        for correct, shown in zip(references, images, strict=True)
    ]
    ids = [task.task_id for task in tasks]
    return TotalAudit(
        weights={term.name: term.weight for term in scored},
        unseen={
            term.name: "it reads the editor's attention, which is not in an image"
            for term in weighted
            if term.needs_attention
        },
        checks=(
            _declared(weighted, left_out),
            *(_check(name, totals, ids, seed=seed) for name in _RIVALS),
        ),
        example=images[0],
        scores=totals[0],
        allowed=allowed,
    )


def examine(
    terms: Sequence[Reward],
    tasks: Callable[[], Sequence[EditTask]],
    *,
    left_out: Mapping[str, str],
    has_targets: bool,
    seed: int,
) -> Purpose:
    """Finds out before training whether the weighted sum asks for the edit.

    Declarations come first. Where the data has targets and no weighted term needs a model, the sum
    is measured too. Nothing is loaded and no server is asked.

    Args:
        tasks: called only where something is measured.
    """
    if declared := unrewarded(terms, left_out):
        return Purpose(problem=f"{declared}. {REMEDY}")
    weighted = [term for term in terms if term.weight > 0]
    slow = [term.name for term in weighted if not (term.quick or term.needs_attention)]
    examples = () if slow or not has_targets else tasks()
    if not examples:
        return Purpose(unknown=_unmeasured(weighted, slow))
    measured = audit_total(terms, examples, seed=seed, left_out=left_out)
    if not measured.problem:
        return Purpose()
    total = " + ".join(f"{weight:g} x {name}" for name, weight in measured.weights.items())
    return Purpose(
        problem=f"the weighted sum of the rewards ({total}) does not ask for the edit. "
        f"{measured.problem} Look at rl-edit audit-reward, and raise the weight of a reward that "
        "asks for the edit"
    )


def _unmeasured(weighted: Sequence[Reward], slow: Sequence[str]) -> str:
    """Says what was not measured, why, and what is declared instead."""
    why = f"{', '.join(slow)} may need a model" if slow else "no target of the data serves for it"
    declared = ", ".join(term.name for term in weighted if asks_for_edit(term))
    known = (
        f"by declaration, {declared} asks for the edit"
        if declared
        else f"nothing declares whether {', '.join(slow)} asks for the edit"
    )
    return (
        f"the weighted sum of the rewards was not measured before the start ({why}); {known}. "
        "rl-edit audit-reward measures the sum"
    )


def _declared(weighted: Sequence[Reward], left_out: Mapping[str, str]) -> Check:
    if problem := unrewarded(weighted, left_out):
        return failed("asks for the edit", f"{problem[0].upper()}{problem[1:]}. {REMEDY}.")
    asking = ", ".join(term.name for term in weighted if asks_for_edit(term))
    if not asking:
        return not_applicable("asks for the edit", "No reward declares what it responds to.")
    return passed("asks for the edit", f"By its declaration: {asking}.")


def _check(
    name: str, totals: Sequence[Mapping[str, float]], ids: Sequence[str], *, seed: int
) -> Check:
    rivals, worse = _RIVALS[name]
    wins = [
        (task, won)
        for task, scores in zip(ids, totals, strict=True)
        for rival in rivals
        if math.isfinite(won := win(scores[_EDIT], scores.get(rival, math.nan)))
    ]
    if not wins:
        sentence = "Nothing to compare: no valid scores, or no second instruction."
        return not_applicable(name, sentence)
    return check_wins(name, [won for _, won in wins], [task for task, _ in wins], worse, seed=seed)


def _images(correct: Reference, other: RGB | None, *, seed: int) -> dict[str, RGB]:
    task = correct.task
    images = {_EDIT: correct.edit, _SOURCE: task.source}
    if other is not None:
        images[_OTHER] = within(task.edit_mask, _resized(other, like=task.source), task.source)
    return images | blank_images(correct.edit, seed=seed, task_id=task.task_id)


def _other(references: Sequence[Reference], row: int) -> RGB | None:
    """Takes the edit of the next task with another instruction; None where all ask the same."""
    following = [*references[row + 1 :], *references[:row]]
    instruction = references[row].task.instruction
    return next((other.edit for other in following if other.task.instruction != instruction), None)


def _resized(image: RGB, *, like: RGB) -> RGB:
    height, width = like.shape[:2]
    resized = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized, dtype=np.uint8))


def _totals(terms: Sequence[Reward], task: EditTask, images: Mapping[str, RGB]) -> dict[str, float]:
    """Adds the weighted scores of each image; NaN where a term has none."""
    # A cached score hides noise, and a run's own repeats are not part of an audit.
    fresh = [term.model_copy(update={"cache": None, "repeat_every": 0}) for term in terms]
    if not fresh:
        # Attention alone: the sum is the same for every image.
        return dict.fromkeys(images, 0.0)
    stack = torch.stack(list(images.values()))
    table = score_candidates(fresh, candidates(task, stack), group_id=task.task_id)
    totals = table.values.double() @ torch.tensor(table.weights, dtype=torch.float64)
    return dict(zip(images, totals.tolist(), strict=True))
