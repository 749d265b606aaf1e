"""Tries out a judge with three images of one task, before anything is reserved or trained.

The images are a correct edit, the untouched source, and the edit under strong noise. A usable judge
prefers the first. No editor is loaded. One task shows that a judge works, not that it is good: that
is the question of an audit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rl_edit.audit.corruptions import LEVELS, RGB, generator, noise
from rl_edit.audit.images import Reference
from rl_edit.audit.responses import candidates
from rl_edit.rewards import Reward
from rl_edit.rewards.composite import Composite
from rl_edit.rewards.vlm.answers import Unreadable, answer_in
from rl_edit.rewards.vlm.judge_reward import Consultation, Exchange, JudgeReward

GOOD, UNTOUCHED, DAMAGED = "correct edit", "untouched source", "noisy edit"


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """One answer, as shown to a person.

    Attributes:
        text: the JSON object that was read, or all there was; "" without an answer.
        prompt_tokens, answer_tokens, cost: as the server counts them; None where it does not.
    """

    question: str
    text: str
    seconds: float
    prompt_tokens: int | None
    answer_tokens: int | None
    cost: float | None


@dataclass(frozen=True, kw_only=True)
class ImageTrial:
    """The repeated scores of one image.

    Attributes:
        values: one per repeat; None where there was no score.
        reasons: why scores are missing, without repeats.
        seconds: of each scoring.
        responses: of all repeats, in order.
    """

    image: str
    values: tuple[float | None, ...]
    reasons: tuple[str, ...]
    seconds: tuple[float, ...]
    responses: tuple[Spoken, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """The values that there are."""
        return tuple(value for value in self.values if value is not None)

    @property
    def mean(self) -> float:
        """Averages the scores; NaN without any."""
        return fmean(self.scores) if self.scores else math.nan


@dataclass(frozen=True, kw_only=True)
class JudgeTrial:
    """One judge's scores of the three images.

    Attributes:
        low, high: its declared range.
        questions: per candidate and scoring, passes included.
        notes: what the server does not take, and how it is asked instead.
    """

    term: str
    low: float
    high: float
    questions: int
    images: tuple[ImageTrial, ...]
    notes: tuple[str, ...]

    @property
    def noise(self) -> float:
        """The largest difference between two scores of the same image."""
        return max((max(i.scores) - min(i.scores) for i in self.images if i.scores), default=0.0)

    @property
    def problem(self) -> str:
        """Says why the judge is of no use; "" when it is."""
        for image in self.images:
            if not image.scores:
                return f"it gives the {image.image} no score: {image.reasons[0]}"
        good, *others = self.images
        means = [image.mean for image in self.images]
        if max(means) - min(means) < 1e-6 * (self.high - self.low):
            return f"it gives all three images the same score, {means[0]:.4g}"
        better = [image for image in others if image.mean >= good.mean]
        if better:
            return f"it does not prefer the correct edit: {good.mean:.4g}, and " + ", ".join(
                f"{image.mean:.4g} for the {image.image}" for image in better
            )
        return ""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Says what a usable judge still makes difficult; the problem of another says it all."""
        if self.problem:
            return ()
        missing = [reason for image in self.images for reason in image.reasons]
        number = sum(value is None for image in self.images for value in image.values)
        total = sum(len(image.values) for image in self.images)
        lines = [f"{number} of {total} scores are missing: {missing[0]}"] if missing else []
        gap = self.images[0].mean - max(image.mean for image in self.images[1:])
        if gap <= self.noise:
            lines.append(
                f"the correct edit is ahead by {gap:.4g}, and two scores of one image differ by up "
                f"to {self.noise:.4g}: raise num_pass, or lower temperature"
            )
        return tuple(lines)


def judge_of(term: Reward) -> JudgeReward | None:
    """Returns the judge of a term, also of one that pastes the edit; None where it has none."""
    inner = term.of if isinstance(term, Composite) else term
    return inner if isinstance(inner, JudgeReward) else None


def judge_trial(
    name: str,
    judge: JudgeReward,
    correct: Reference,
    *,
    repeats: int,
    seed: int,
    progress: Callable[[str], None] = lambda image: None,
) -> JudgeTrial:
    """Scores the three images, each several times and with other seeds.

    A judge that cannot be reached, or has no score for an image, is asked about no further one:
    each may take as long as the judge may be waited for.

    Args:
        progress: called with the name of an image before each of its scorings.
    """
    tests: list[ImageTrial] = []
    for image, pixels in three_images(correct, seed=seed).items():
        scored: list[tuple[Consultation, float]] = []
        term = judge
        while len(scored) < repeats and not (scored and _unreachable(scored[-1][0])):
            progress(image)
            began = time.perf_counter()
            (consultation,) = term.consult(candidates(correct.task, pixels[None]))
            scored.append((consultation, time.perf_counter() - began))
            # As repeat_every does in training: the noise that no fixed seed hides.
            term = term.reseeded()
        tests.append(_image_trial(image, scored))
        if not tests[-1].scores:
            break
    return JudgeTrial(
        term=name,
        low=judge.low,
        high=judge.high,
        questions=judge.num_questions * judge.num_pass,
        images=tuple(tests),
        notes=judge.notes(),
    )


def _unreachable(consultation: Consultation) -> bool:
    return not consultation.score.ok and any(
        exchange.reply.status != "ok" for exchange in consultation.exchanges
    )


def three_images(correct: Reference, *, seed: int) -> dict[str, RGB]:
    """Makes the images to score, by name; the correct edit comes first."""
    random = generator(seed, correct.task.task_id, "judge test")
    damaged = noise(correct.edit, correct.task.edit_mask, LEVELS, random)
    return {GOOD: correct.edit, UNTOUCHED: correct.task.source, DAMAGED: damaged}


def _image_trial(image: str, scored: Sequence[tuple[Consultation, float]]) -> ImageTrial:
    scores = [consultation.score for consultation, _ in scored]
    return ImageTrial(
        image=image,
        values=tuple(score.value for score in scores),
        reasons=tuple(dict.fromkeys(score.reason for score in scores if not score.ok)),
        seconds=tuple(seconds for _, seconds in scored),
        responses=tuple(
            _spoken(exchange) for consultation, _ in scored for exchange in consultation.exchanges
        ),
    )


def _spoken(exchange: Exchange) -> Spoken:
    reply = exchange.reply
    try:
        answer = answer_in(reply.words, exchange.question.schema)
        text = reply.words[answer.start : answer.end]
    except Unreadable:
        text = reply.words
    usage = reply.usage
    return Spoken(
        question=exchange.question.name,
        text=" ".join(text.split()),
        seconds=reply.seconds,
        prompt_tokens=None if usage is None else usage.prompt_tokens,
        answer_tokens=None if usage is None else usage.answer_tokens,
        cost=None if usage is None else usage.cost,
    )
