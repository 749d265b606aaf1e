"""How fast a reward answers: candidates a second, latencies, and how much of the time its slowest calls take.

It measures what training does: whole groups, several at once, and never the same picture twice, which a cache or a serving
engine would remember.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from rl_edit.audit.corruptions import Reference, generator
from rl_edit.audit.responses import candidates
from rl_edit.errors import InputError
from rl_edit.rewards import Reward, score_candidates
from rl_edit.types import Candidates

TAIL = 2.0
"""A call slower than so many medians belongs to the tail."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """One term under one number of calls at a time. A call scores one group.

    Attributes:
        seconds: from the first call's start to the last one's end.
        p50_s, p90_s, p99_s, max_s: of one call.
        tail_share: share of all time spent in calls that was spent in those slower than ``TAIL`` medians.
        invalid_share: candidates without a score.
        reason: why, of the first one; "" when there is none.
    """

    term: str
    concurrency: int
    group_size: int
    calls: int
    seconds: float
    candidates_per_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float
    tail_share: float
    invalid_share: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Call:
    seconds: float
    invalid: int
    reason: str


def measure(
    term: Reward,
    references: Sequence[Reference],
    *,
    seconds: float,
    concurrency: int,
    group_size: int,
    seed: int,
    progress: Callable[[float], None] = lambda elapsed: None,
) -> Throughput:
    """Keeps ``concurrency`` calls running for ``seconds``, then waits for those that have begun. One call comes before, uncounted.

    Args:
        progress: told the seconds that have passed, after every call.
    """
    if not references:
        raise InputError("There is no task to score. Use data with at least one.")
    term = term.model_copy(update={"cache": None, "repeat_every": 0})
    numbers, guard = itertools.count(), threading.Lock()
    # Loading a model is no part of answering.
    _call(term, _group(references[0], next(numbers), group_size=group_size, seed=seed))
    began = time.perf_counter()

    def work() -> list[_Call]:
        calls: list[_Call] = []
        while not calls or time.perf_counter() - began < seconds:
            with guard:
                number = next(numbers)
            calls.append(
                _call(
                    term,
                    _group(
                        references[number % len(references)],
                        number,
                        group_size=group_size,
                        seed=seed,
                    ),
                )
            )
            progress(time.perf_counter() - began)
        return calls

    with ThreadPoolExecutor(concurrency) as threads:
        working = [threads.submit(work) for _ in range(concurrency)]
        calls = [call for future in working for call in future.result()]
    whole = time.perf_counter() - began
    latencies = np.array([call.seconds for call in calls])
    p50, p90, p99 = (float(value) for value in np.quantile(latencies, [0.5, 0.9, 0.99]))
    return Throughput(
        term=term.name,
        concurrency=concurrency,
        group_size=group_size,
        calls=len(calls),
        seconds=whole,
        candidates_per_s=len(calls) * group_size / whole,
        p50_s=p50,
        p90_s=p90,
        p99_s=p99,
        max_s=float(latencies.max()),
        tail_share=float(latencies[latencies > TAIL * p50].sum() / latencies.sum()),
        invalid_share=sum(call.invalid for call in calls) / (len(calls) * group_size),
        reason=next((call.reason for call in calls if call.reason), ""),
    )


def _call(term: Reward, group: Candidates) -> _Call:
    began = time.perf_counter()
    table = score_candidates((term,), group, group_id=group.task.task_id)
    return _Call(
        seconds=time.perf_counter() - began,
        invalid=int((~table.valid).sum()),
        reason=table.reasons[0] if table.reasons else "",
    )


def _group(right: Reference, number: int, *, group_size: int, seed: int) -> Candidates:
    """The right edit under faint noise that no other call has."""
    random = generator(seed, "throughput", number)
    faint = torch.randint(-3, 4, (group_size, *right.edit.shape), generator=random)
    return candidates(
        right.task, (right.edit.to(torch.int64) + faint).clamp(0, 255).to(torch.uint8)
    )
