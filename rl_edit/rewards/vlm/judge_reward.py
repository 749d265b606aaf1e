"""What every term that asks a language model has in common: whom it asks, how often, and that an answer is read or there is none."""

from __future__ import annotations

import asyncio
import math
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar, Literal

from jaxtyping import UInt8
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from rl_edit.errors import InputError
from rl_edit.rewards.term import RewardTerm
from rl_edit.rewards.vlm.backends import JudgeTransport, OpenAI, Question, Reply, Sampling
from rl_edit.rewards.vlm.expected_score import expected_scores
from rl_edit.rewards.vlm.prompts import Unreadable, scores_in
from rl_edit.types import Candidates, EditTask, Score, Status

_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question about one candidate, put once a pass. ``name`` stands in reasons."""

    name: str
    images: tuple[UInt8[Tensor, "height width 3"], ...]
    prompt: str
    schema: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The numbers of an answer, in its schema's order, and the probability they rest on (1 unless expected)."""

    scores: tuple[float, ...]
    mass: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a question has no answer, and whether asking again cannot help."""

    status: Status
    reason: str
    final: bool = False


class JudgeReward(RewardTerm):
    """An answer that cannot be read is asked for again with a new seed; when that does not help, the candidate has no score.

    Attributes:
        transport: who is asked, and how. Its ``kind`` may be left out: openai.
        num_pass: how often each question is asked; the passes differ by seed.
        score_range: top of the judge's scale; EditScore's models were trained on 0..25.
        readout: "text" takes the numbers the judge wrote; "expected" their expectation under its token probabilities (``readout.py``).
        min_mass: share of probability an expected score must rest on.
        temperature, top_p, top_k, max_tokens: sampling, as EditScore's local backends set it. ``top_k`` is no field of
            OpenAI's API: None leaves it out.
        seed: of the first pass; later passes and retries count up from it.
        retries: further attempts after a failed one, each with a new seed.
        backoff_s: wait before asking again for an answer that did not come; doubles.
    """

    transport: JudgeTransport
    num_pass: int = Field(default=1, ge=1)
    score_range: int = Field(default=25, ge=1)
    readout: Literal["text", "expected"] = "text"
    min_mass: float = Field(default=0.8, gt=0, le=1)
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int | None = Field(default=20, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    seed: int = Field(default=42, ge=0)
    retries: int = Field(default=2, ge=0)
    backoff_s: float = Field(default=0.5, ge=0)

    requires: ClassVar[frozenset[str]] = frozenset()
    low: ClassVar[float] = 0.0
    needs_attention: ClassVar[bool] = False
    num_questions: ClassVar[int] = 1
    """Questions about one candidate in each pass."""

    @field_validator("transport", mode="before")
    @classmethod
    def _over_http_unless_said(cls, transport: Any) -> Any:
        return {"kind": "openai", **transport} if isinstance(transport, dict) else transport

    @model_validator(mode="after")
    def _probabilities_are_offered(self) -> JudgeReward:
        if self.readout == "expected" and not self.transport.offers_logprobs:
            raise InputError(
                f"readout(expected) needs the probabilities of tokens and transport({self.transport.kind}) does not give them. "
                "Use 'readout: text' or another transport."
            )
        return self

    def judge_timeout_s(self, num_candidates: int) -> float:
        if not isinstance(self.transport, OpenAI):
            return 0.0
        waves = math.ceil(
            num_candidates * self.num_questions * self.num_pass / self.transport.concurrency
        )
        pauses = sum(
            min(self.backoff_s * 2**attempt, _LONGEST_WAIT_S) for attempt in range(self.retries)
        )
        again = (
            self.model_copy(update={"repeat_every": 0}).judge_timeout_s(1)
            if self.repeat_every
            else 0.0
        )
        return (self.retries + 1) * waves * self.transport.timeout_s + pauses + again

    @property
    def remote(self) -> bool:
        return isinstance(self.transport, OpenAI)

    @abstractmethod
    def questions(
        self, task: EditTask, edited: UInt8[Tensor, "height width 3"]
    ) -> tuple[Asked, ...]:
        """What is asked about one candidate."""

    @abstractmethod
    def combined(self, passes: Sequence[Sequence[tuple[float, ...]]]) -> Score:
        """The score of one candidate from its answers, each scaled to 0..10: by pass, then in the order of the questions."""

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        with ThreadPoolExecutor(
            1
        ) as thread:  # a loop of its own, also when the caller already runs one
            return thread.submit(asyncio.run, self._score(candidates)).result()

    async def _score(self, candidates: Candidates) -> tuple[Score, ...]:
        asked = [self.questions(candidates.task, image) for image in candidates.images]
        # Passes of one question, then questions of one candidate: what follows shares the longest prefix with what went before.
        answers = iter(
            await self._answers(
                [(one, number) for each in asked for one in each for number in range(self.num_pass)]
            )
        )
        return tuple(
            self._scored(each, [[next(answers) for _ in range(self.num_pass)] for _ in each])
            for each in asked
        )

    def _scored(
        self, asked: Sequence[Asked], answers: Sequence[Sequence[Answer | Failure]]
    ) -> Score:
        scaled: list[list[tuple[float, ...]]] = [[] for _ in range(self.num_pass)]
        masses: list[float] = []
        for one, passes in zip(asked, answers, strict=True):
            for number, answer in enumerate(passes, start=1):
                if isinstance(answer, Failure):
                    return Score(
                        value=None,
                        reason=f"{one.name} of pass {number}: {answer.reason}",
                        status=answer.status,
                    )
                masses.append(answer.mass)
                scaled[number - 1].append(
                    tuple(score * 10 / self.score_range for score in answer.scores)
                )
        score = self.combined(scaled)
        mass = {"mass": min(masses)} if self.readout == "expected" else {}
        return replace(score, components={**score.components, **mass})

    async def _answers(self, asked: Sequence[tuple[Asked, int]]) -> list[Answer | Failure]:
        """One answer a question and pass: all are asked, then those without an answer again, together, with new seeds."""
        answers: dict[int, Answer | Failure] = {}
        open_questions = list(range(len(asked)))
        for attempt in range(self.retries + 1):
            replies = await self.transport.ask(
                [self._question(*asked[row], attempt) for row in open_questions]
            )
            for row, reply in zip(open_questions, replies, strict=True):
                answers[row] = self._read(asked[row][0], reply, attempt)
            unanswered = [
                (row, reply)
                for row, reply in zip(open_questions, replies, strict=True)
                if _worth_repeating(answers[row])
            ]
            open_questions = [row for row, _ in unanswered]
            if not open_questions or attempt == self.retries:
                break
            if missing := [reply for _, reply in unanswered if reply.status != "ok"]:
                wait_s = max(self.backoff_s * 2**attempt, *(reply.wait_s for reply in missing))
                await asyncio.sleep(min(wait_s, _LONGEST_WAIT_S))
        return [answers[row] for row in range(len(asked))]

    def _question(self, asked: Asked, number: int, attempt: int) -> Question:
        return Question(
            images=asked.images,
            prompt=asked.prompt,
            # Passes take consecutive seeds and each retry a fresh block of them, so no request repeats another's.
            seed=self.seed + number + self.num_pass * attempt,
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                max_tokens=self.max_tokens,
            ),
            schema=asked.schema,
            want_logprobs=self.readout == "expected",
        )

    def _read(self, asked: Asked, reply: Reply, attempt: int) -> Answer | Failure:
        attempts = f"(after {attempt + 1} attempt{'s' if attempt else ''})"
        if reply.status != "ok":
            status: Status = "invalid" if reply.status == "unreachable" else reply.status
            return Failure(status=status, reason=f"{reply.reason} {attempts}", final=reply.final)
        try:
            if not reply.finished:
                raise Unreadable("the answer was cut off at max_tokens")
            said = scores_in(reply.text, asked.schema)
            if self.readout == "text":
                return Answer(scores=said)
            expected = expected_scores(
                reply.tokens, said, top=self.score_range, min_mass=self.min_mass
            )
            return Answer(scores=expected.scores, mass=expected.mass)
        except Unreadable as error:
            return Failure(
                status="invalid",
                reason=f"{error} {attempts}: {' '.join(reply.text.split())[:160]!r}",
            )


def _worth_repeating(answer: Answer | Failure) -> bool:
    return isinstance(answer, Failure) and not answer.final


def mean_of(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each part's mean over passes."""
    return {name: fmean(part[name] for part in parts) for name in parts[0]}
