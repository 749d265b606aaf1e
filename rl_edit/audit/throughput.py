"""Measures the throughput and the latencies of a reward.

Calls are like those of training: whole groups, several at once. No image is scored twice, since a
cache or a serving engine would remember it.
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

from rl_edit.audit.corruptions import generator
from rl_edit.audit.images import Reference
from rl_edit.audit.responses import candidates
from rl_edit.errors import InputError
from rl_edit.rewards import Reward, score_candidates
from rl_edit.types import Candidates

TAIL = 2.0
"""Calls slower than this many medians belong to the tail."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """One term under one number of concurrent calls. A call scores one group.

    Attributes:
        seconds: from the first call's start to the last one's end.
        p50_s, p90_s, p99_s, max_s: of one call.
        tail_share: of all time spent in calls, the share in calls slower than ``TAIL`` medians.
        invalid_share: candidates without a score.
        reason: of the first invalid score; "" when all are valid.
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
    """Measures one term with ``concurrency`` calls at once.

    Calls run for ``seconds``; those that have begun by then are waited for and counted. One call
    comes first and is not counted.

    Args:
        progress: called after every call with the seconds that have passed.
    """
    if not references:
        raise InputError("There is no task to score. Use data with at least one.")
    # A cached score takes no time, and repeats would be counted as calls.
    term = term.model_copy(update={"cache": None, "repeat_every": 0})
    numbers, guard = itertools.count(), threading.Lock()

    def score_next_group() -> _Call:
        # Only the number is taken under the lock: groups are made by all threads at once.
        with guard:
            number = next(numbers)
        return _call(term, _group(references, number, group_size=group_size, seed=seed))

    # Not counted: the first call may load a model.
    score_next_group()
    began = time.perf_counter()

    def work() -> list[_Call]:
        calls: list[_Call] = []
        # At least one call each, however short the time.
        while not calls or time.perf_counter() - began < seconds:
            calls.append(score_next_group())
            progress(time.perf_counter() - began)
        return calls

    with ThreadPoolExecutor(concurrency) as threads:
        workers = [threads.submit(work) for _ in range(concurrency)]
        calls = [call for worker in workers for call in worker.result()]
    return _summary(
        term.name,
        calls,
        elapsed=time.perf_counter() - began,
        concurrency=concurrency,
        group_size=group_size,
    )


def _summary(
    term: str, calls: Sequence[_Call], *, elapsed: float, concurrency: int, group_size: int
) -> Throughput:
    # Calls that began before the time was up are complete, so no latency is cut off.
    latencies = np.array([call.seconds for call in calls])
    p50, p90, p99 = (float(value) for value in np.quantile(latencies, [0.5, 0.9, 0.99]))
    num_candidates = len(calls) * group_size
    return Throughput(
        term=term,
        concurrency=concurrency,
        group_size=group_size,
        calls=len(calls),
        seconds=elapsed,
        candidates_per_s=num_candidates / elapsed,
        p50_s=p50,
        p90_s=p90,
        p99_s=p99,
        max_s=float(latencies.max()),
        tail_share=float(latencies[latencies > TAIL * p50].sum() / latencies.sum()),
        invalid_share=sum(call.invalid for call in calls) / num_candidates,
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


def _group(
    references: Sequence[Reference], number: int, *, group_size: int, seed: int
) -> Candidates:
    """Makes a group of correct edits under faint noise.

    Every number has noise of its own, so no cache knows the images.
    """
    correct = references[number % len(references)]
    random = generator(seed, "throughput", number)
    # Three of 255 levels: other bytes for every cache, the same image for a judge.
    faint = torch.randint(-3, 4, (group_size, *correct.edit.shape), generator=random)
    images = (correct.edit.to(torch.int64) + faint).clamp(0, 255).to(torch.uint8)
    return candidates(correct.task, images)
