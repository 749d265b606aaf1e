"""The base of all terms that ask a vision-language model.

It puts the questions, repeats those without a readable answer, and turns answers into scores. A
question without an answer leaves the candidate without a score.
"""

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
class JudgeQuestion:
    """One question about one candidate, put once per pass.

    Attributes:
        name: appears in the reasons of missing scores.
    """

    name: str
    images: tuple[UInt8[Tensor, "height width 3"], ...]
    prompt: str
    schema: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The numbers of an answer, in the order of its schema.

    Attributes:
        mass: the probability they rest on; 1 for numbers read from the text.
    """

    scores: tuple[float, ...]
    mass: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A question without an answer.

    Attributes:
        final: another attempt cannot help.
    """

    status: Status
    reason: str
    final: bool = False


class JudgeReward(RewardTerm):
    """Scores candidates by the numbers in a judge's answers.

    An answer that cannot be read is requested again with a new seed. When that does not help, the
    candidate has no score.

    Attributes:
        transport: the model, and how it is reached. Its ``kind`` may be left out: openai.
        num_pass: how often each question is put; the passes differ by seed.
        score_range: top of the judge's scale; EditScore's models were trained on 0..25.
        score_from: "text" takes the numbers of the answer; "expected" takes their expectation under
            its token probabilities (``expected_score.py``).
        min_mass: share of probability an expected score must rest on.
        temperature, top_p, top_k, max_tokens: sampling, as EditScore's local backends set it.
            ``top_k`` is no field of OpenAI's API: None leaves it out.
        seed: of the first pass; later passes and retries count up from it.
        retries: further attempts after a failed one, each with a new seed.
        backoff_s: wait before a missing answer is requested again; doubles.
    """

    transport: JudgeTransport
    num_pass: int = Field(default=1, ge=1)
    score_range: int = Field(default=25, ge=1)
    score_from: Literal["text", "expected"] = "text"
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
    def _over_http_by_default(cls, transport: Any) -> Any:
        return {"kind": "openai", **transport} if isinstance(transport, dict) else transport

    @model_validator(mode="after")
    def _require_probabilities(self) -> JudgeReward:
        if self.score_from == "expected" and not self.transport.offers_logprobs:
            raise InputError(
                "score_from(expected) needs the probabilities of tokens and "
                f"transport({self.transport.kind}) does not give them. "
                "Use 'score_from: text' or another transport."
            )
        return self

    def judge_timeout_s(self, num_candidates: int) -> float:
        if not isinstance(self.transport, OpenAI):
            return 0.0
        # Requests beyond ``concurrency`` wait for a free slot, so timeouts add up in waves.
        waves = math.ceil(
            num_candidates * self.num_questions * self.num_pass / self.transport.concurrency
        )
        pauses: float = sum(
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
    ) -> tuple[JudgeQuestion, ...]:
        """Builds the questions about one candidate; ``num_questions`` of them."""

    @abstractmethod
    def combined(self, passes: Sequence[Sequence[tuple[float, ...]]]) -> Score:
        """Combines the answers about one candidate into its score.

        Args:
            passes: numbers scaled to 0..10, by pass and then in the order of the questions.
        """

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        # A thread has an event loop of its own, even when the caller already runs one.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._score(candidates)).result()

    async def _score(self, candidates: Candidates) -> tuple[Score, ...]:
        by_candidate = [self.questions(candidates.task, image) for image in candidates.images]
        # Passes of one question are neighbours, then questions of one candidate: each request
        # shares the longest prefix with the one before it, which servers cache.
        requests = [
            (question, number)
            for questions in by_candidate
            for question in questions
            for number in range(self.num_pass)
        ]
        results = iter(await self._request_all(requests))
        return tuple(
            self._scored(
                questions, [[next(results) for _ in range(self.num_pass)] for _ in questions]
            )
            for questions in by_candidate
        )

    def _scored(
        self, questions: Sequence[JudgeQuestion], results: Sequence[Sequence[Answer | Failure]]
    ) -> Score:
        scaled: list[list[tuple[float, ...]]] = [[] for _ in range(self.num_pass)]
        masses: list[float] = []
        for question, passes in zip(questions, results, strict=True):
            for number, result in enumerate(passes, start=1):
                # One missing answer costs the candidate: a mean over fewer passes or questions
                # would not compare with the others of its group.
                if isinstance(result, Failure):
                    reason = f"{question.name} of pass {number}: {result.reason}"
                    return Score(value=None, reason=reason, status=result.status)
                masses.append(result.mass)
                scaled[number - 1].append(
                    tuple(score * 10 / self.score_range for score in result.scores)
                )
        score = self.combined(scaled)
        mass = {"mass": min(masses)} if self.score_from == "expected" else {}
        return replace(score, components={**score.components, **mass})

    async def _request_all(
        self, requests: Sequence[tuple[JudgeQuestion, int]]
    ) -> list[Answer | Failure]:
        """Requests an answer to every question and pass.

        Those without one are requested again, together and with new seeds.
        """
        results: dict[int, Answer | Failure] = {}
        pending = list(range(len(requests)))
        for attempt in range(self.retries + 1):
            replies = await self.transport.ask(
                [self._question(*requests[row], attempt) for row in pending]
            )
            for row, reply in zip(pending, replies, strict=True):
                results[row] = self._read(requests[row][0], reply, attempt)
            unanswered = [
                (row, reply)
                for row, reply in zip(pending, replies, strict=True)
                if _worth_repeating(results[row])
            ]
            pending = [row for row, _ in unanswered]
            if not pending or attempt == self.retries:
                break
            # An unreadable answer is requested again at once; only a silent server needs a pause.
            if missing := [reply for _, reply in unanswered if reply.status != "ok"]:
                wait_s = max(self.backoff_s * 2**attempt, *(reply.wait_s for reply in missing))
                await asyncio.sleep(min(wait_s, _LONGEST_WAIT_S))
        return [results[row] for row in range(len(requests))]

    def _question(self, question: JudgeQuestion, number: int, attempt: int) -> Question:
        return Question(
            images=question.images,
            prompt=question.prompt,
            # Passes take consecutive seeds and each retry a fresh block of them, so no request
            # repeats another's.
            seed=self.seed + number + self.num_pass * attempt,
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                max_tokens=self.max_tokens,
            ),
            schema=question.schema,
            want_logprobs=self.score_from == "expected",
        )

    def _read(self, question: JudgeQuestion, reply: Reply, attempt: int) -> Answer | Failure:
        attempts = f"(after {attempt + 1} attempt{'s' if attempt else ''})"
        if reply.status != "ok":
            status: Status = "invalid" if reply.status == "unreachable" else reply.status
            return Failure(status=status, reason=f"{reply.reason} {attempts}", final=reply.final)
        try:
            if not reply.finished:
                raise Unreadable("the answer was cut off at max_tokens")
            # Also for expected scores: an answer of the wrong form has none.
            scores = scores_in(reply.text, question.schema)
            if self.score_from == "text":
                return Answer(scores=scores)
            expected = expected_scores(
                reply.tokens, scores, top=self.score_range, min_mass=self.min_mass
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
    """Averages each part over the passes."""
    return {name: fmean(part[name] for part in parts) for name in parts[0]}
