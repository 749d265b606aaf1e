"""The base of all terms that ask a vision-language model.

It puts the questions, repeats those without a readable answer, and turns answers into scores. A
question without an answer leaves the candidate without a score.
"""

from __future__ import annotations

import asyncio
import math
import time
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
from rl_edit.rewards.model_files import stored_bytes
from rl_edit.rewards.term import RewardTerm
from rl_edit.rewards.vlm.answers import Unreadable, scores_in, thinking_in
from rl_edit.rewards.vlm.backends import (
    JudgeTransport,
    OpenAI,
    Question,
    Reply,
    Sampling,
    Transformers,
)
from rl_edit.rewards.vlm.expected_score import expected_scores
from rl_edit.types import Candidates, EditTask, Score, Status

_LONGEST_WAIT_S = 30.0
NEWER = ("extra_body", "omit", "max_images")
"""Settings of a transport that runs of earlier versions do not have. Unset, they mean the same."""


@dataclass(frozen=True, kw_only=True)
class JudgeQuestion:
    """One question about one candidate, put once per pass.

    Attributes:
        name: appears in the reasons of missing scores.
        labels: a few words for each image, for servers that take a single one.
    """

    name: str
    images: tuple[UInt8[Tensor, "height width 3"], ...]
    labels: tuple[str, ...]
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


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question of one pass, with its last reply and what was read in it."""

    question: JudgeQuestion
    reply: Reply
    result: Answer | Failure


@dataclass(frozen=True, kw_only=True)
class Consultation:
    """The score of one candidate, and the exchanges that it follows from."""

    score: Score
    exchanges: tuple[Exchange, ...]


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
        longest_s = self._longest_s(num_candidates * self.num_questions * self.num_pass)
        again = (
            self.model_copy(update={"repeat_every": 0}).judge_timeout_s(1)
            if self.repeat_every
            else 0.0
        )
        return longest_s + again

    def require_files(self) -> None:
        super().require_files()
        self.transport.require_files()

    @property
    def remote(self) -> bool:
        return isinstance(self.transport, OpenAI)

    def gpu_weights(self) -> dict[str, int]:
        transport = self.transport
        # The other local transports size themselves by settings of their own.
        if not isinstance(transport, Transformers) or transport.device == "cpu":
            return {}
        return {transport.path: stored_bytes(transport.path, transport.dtype)}

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

    def notes(self) -> tuple[str, ...]:
        return self.transport.notes() if isinstance(self.transport, OpenAI) else ()

    def fingerprint(self) -> dict[str, Any]:
        # Settings that are newer than stored runs count where they are set.
        content = super().fingerprint()
        unset = {name for name in NEWER if not content["transport"].get(name)}
        transport = {name: v for name, v in content["transport"].items() if name not in unset}
        return {**content, "transport": transport}

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        return tuple(consultation.score for consultation in self.consult(candidates))

    def consult(self, candidates: Candidates) -> tuple[Consultation, ...]:
        """Scores every candidate and keeps what the judge was asked and answered."""
        # A thread has an event loop of its own, even when the caller already runs one.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._consult(candidates)).result()

    async def _consult(self, candidates: Candidates) -> tuple[Consultation, ...]:
        by_candidate = [self.questions(candidates.task, image) for image in candidates.images]
        # Passes of one question are neighbours, then questions of one candidate: each request
        # shares the longest prefix with the one before it, which servers cache.
        requests = [
            (question, number)
            for questions in by_candidate
            for question in questions
            for number in range(self.num_pass)
        ]
        exchanges = await self._request_all(requests)
        per_candidate = len(exchanges) // len(by_candidate)
        return tuple(
            self._concluded(questions, exchanges[row * per_candidate : (row + 1) * per_candidate])
            for row, questions in enumerate(by_candidate)
        )

    def _concluded(
        self, questions: Sequence[JudgeQuestion], exchanges: Sequence[Exchange]
    ) -> Consultation:
        results = iter(exchange.result for exchange in exchanges)
        passes = [[next(results) for _ in range(self.num_pass)] for _ in questions]
        return Consultation(score=self._scored(questions, passes), exchanges=tuple(exchanges))

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

    async def _request_all(self, requests: Sequence[tuple[JudgeQuestion, int]]) -> list[Exchange]:
        """Requests an answer to every question and pass.

        Those without one are requested again, together and with new seeds.
        """
        exchanges: dict[int, Exchange] = {}
        pending = list(range(len(requests)))
        began = time.monotonic()
        for attempt in range(self.retries + 1):
            replies = await self.transport.ask(
                [self._question(*requests[row], attempt) for row in pending]
            )
            for row, reply in zip(pending, replies, strict=True):
                question, _ = requests[row]
                result = self._read(question, reply, attempt)
                exchanges[row] = Exchange(question=question, reply=reply, result=result)
            pending = [row for row in pending if _worth_repeating(exchanges[row].result)]
            if not pending or attempt == self.retries:
                break
            # An unreadable answer is requested again at once; only a silent server needs a pause.
            if missing := [
                reply for row in pending if (reply := exchanges[row].reply).status != "ok"
            ]:
                spent_s = time.monotonic() - began
                # Busy for longer than this judge may be waited for: waiting would be in vain.
                if min(r.wait_s for r in missing) > self._longest_s(len(requests)) - spent_s > 0:
                    break
                requested_s = max(reply.wait_s for reply in missing)
                await asyncio.sleep(self._pause_s(attempt, requested_s, spent_s, len(requests)))
        return [exchanges[row] for row in range(len(requests))]

    def _pause_s(
        self, attempt: int, requested_s: float, spent_s: float, num_requests: int
    ) -> float:
        """Returns the seconds before the next attempt.

        A server that asks for a longer pause gets it from the time that is left over by attempts
        which ended early, so that the whole stays within ``judge_timeout_s``.
        """
        planned_s = self._longest_s(num_requests, attempts=attempt + 1)
        return max(self._pauses()[attempt], min(requested_s, planned_s - spent_s))

    def _longest_s(self, num_requests: int, attempts: int | None = None) -> float:
        """Returns the longest time of some attempts, each with the pause after it.

        Args:
            attempts: from the first; all of them unless given.
        """
        if not isinstance(self.transport, OpenAI):
            return 0.0
        # Requests beyond ``concurrency`` wait for a free slot, so timeouts add up in waves.
        waves = math.ceil(num_requests / self.transport.concurrency)
        number = self.retries + 1 if attempts is None else attempts
        return number * waves * self.transport.timeout_s + sum(self._pauses()[:number])

    def _pauses(self) -> list[float]:
        """Lists the planned seconds before each repeated attempt."""
        return [
            min(self.backoff_s * 2**attempt, _LONGEST_WAIT_S) for attempt in range(self.retries)
        ]

    def _question(self, question: JudgeQuestion, number: int, attempt: int) -> Question:
        return Question(
            images=question.images,
            labels=question.labels,
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
        text = reply.words
        try:
            if not reply.finished:
                raise Unreadable(self._cut_off(reply))
            # Also for expected scores: an answer of the wrong form has none.
            scores = scores_in(text, question.schema)
            if self.score_from == "text":
                return Answer(scores=scores)
            expected = expected_scores(
                reply.tokens,
                scores,
                schema=question.schema,
                top=self.score_range,
                min_mass=self.min_mass,
            )
            return Answer(scores=expected.scores, mass=expected.mass)
        except Unreadable as error:
            return Failure(
                status="invalid",
                reason=f"{error} {attempts}: {' '.join(text.split())[:160]!r}",
            )

    def _cut_off(self, reply: Reply) -> str:
        """Says where an answer was cut off and which setting gives it more room."""
        reason = f"the answer was cut off at max_tokens({self.max_tokens})"
        if reply.thinking or thinking_in(reply.text):
            reason += (
                ", which its thinking used up. Raise max_tokens of this reward, or switch thinking "
                "off, e.g. transport.extra_body: {chat_template_kwargs: {enable_thinking: false}}"
            )
        else:
            reason += ". Raise max_tokens of this reward"
        return reason


def _worth_repeating(answer: Answer | Failure) -> bool:
    return isinstance(answer, Failure) and not answer.final


def mean_of(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Averages each part over the passes."""
    return {name: fmean(part[name] for part in parts) for name in parts[0]}
