"""Advice on placement: the time of an update, and the best split of workers over roles.

This is the arithmetic behind "use 5:1:2 actors". It runs the training loop in simulated time, with
equal workers and fixed durations, which fits solvers of a fixed number of steps. The input is
measured seconds; nothing here knows a process, a tensor or a file.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, fields, replace

from rl_edit.errors import InputError

UPDATES = 32
"""Simulated updates. The second half is measured, after the pipeline has filled.

The number is even, because with a lag of one the pattern repeats in pairs.
"""


@dataclass(frozen=True, kw_only=True)
class GroupCost:
    """Measured worker seconds of one group, and the overhead of an update.

    Attributes:
        rollout_s, reward_s, learn_s: for one group, on one worker of the role.
        step_s, publish_s: overhead of every update whatever its size. The first is the optimizer's
            step with export and commit, the second the broadcast of the new adapter.
    """

    rollout_s: float
    reward_s: float
    learn_s: float
    step_s: float = 0.0
    publish_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            if not 0 <= seconds < math.inf:
                raise InputError(
                    f"{field.name} is {seconds}: no plan can be made from it. Give measured "
                    "seconds, 0 or more."
                )
        if self.per_group_s == 0:
            raise InputError(
                "a group costs 0 s in every role: any split is as good as another. Give measured "
                "seconds."
            )

    @property
    def per_group_s(self) -> float:
        """Work of one group through all roles."""
        return self.rollout_s + self.reward_s + self.learn_s


@dataclass(frozen=True, kw_only=True, order=True)
class WorkerCounts:
    """Workers of each role."""

    rollout: int
    reward: int
    learner: int

    def __post_init__(self) -> None:
        if min(self.rollout, self.reward, self.learner) < 1:
            raise InputError(
                f"worker counts {self} leave a role without a worker, and no update would ever "
                "end. Give each role at least 1."
            )

    @property
    def total(self) -> int:
        """Workers of all roles."""
        return self.rollout + self.reward + self.learner

    def __str__(self) -> str:
        return f"{self.rollout}:{self.reward}:{self.learner}"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The best split of some workers over the roles.

    Attributes:
        seconds: of one update with ``counts``.
        colocated_seconds: of one update with each worker in all three roles by turns.
        words: one sentence for people.
    """

    counts: WorkerCounts
    seconds: float
    colocated_seconds: float
    words: str


def iteration_seconds(
    cost: GroupCost, counts: WorkerCounts, groups: int, max_lag: int, chunks: int = 1
) -> float:
    """Returns the steady time of one update, from the loop in simulated time.

    Each piece of work goes to the first free worker, in order. Groups of update u are rolled out
    with the weights of u - max_lag, and are admitted when those are published. A chunk (an equal
    part of a group) is scored as it arrives. The learner starts when all groups of the update are
    scored, and each rank takes its share group by group. The next update is learnt only after this
    one is published.
    """
    rollout_s, reward_s = cost.rollout_s / chunks, cost.reward_s / chunks
    learn_s = _busy(cost, counts, groups)["learner"]
    # Times at which the workers become free, soonest first. Work of one length, taken in order,
    # ends in order: the worker taken longest ago is the first one free. A queue therefore serves
    # where unequal work would need a heap.
    rollout = deque([0.0] * counts.rollout, maxlen=counts.rollout)
    reward = deque([0.0] * counts.reward, maxlen=counts.reward)
    published = [0.0]
    for update in range(UPDATES):
        admitted = published[max(update - max_lag, 0)]
        for _ in range(groups * chunks):
            # A full deque drops its first entry: the worker that takes this piece of work.
            rollout_end = max(admitted, rollout[0]) + rollout_s
            rollout.append(rollout_end)
            reward.append(max(rollout_end, reward[0]) + reward_s)
        # The last score is the latest one, because scores end in order.
        published.append(max(published[-1], reward[-1]) + learn_s)
    measured = UPDATES // 2
    # A finite window may end a part of a round early and so flatter the split.
    return max(
        (published[-1] - published[-1 - measured]) / measured,
        _floor(cost, counts, groups, max_lag, chunks),
    )


def colocated_seconds(
    cost: GroupCost, processes: int, groups: int, num_reward: int, chunks: int = 1
) -> float:
    """Returns the time of one update when each process rolls out, then learns.

    A process does one thing at a time, so a lag gains next to nothing.

    Args:
        num_reward: workers that only score. With 0, judges share the workers of the processes and
            take turns with the rollouts.
    """
    if num_reward == 0:
        # Turns on one worker add up, so scoring counts as a part of the rollout.
        cost = replace(cost, rollout_s=cost.rollout_s + cost.reward_s, reward_s=0.0)
    counts = WorkerCounts(rollout=processes, reward=num_reward or processes, learner=processes)
    return iteration_seconds(cost, counts, groups, 0, chunks)


def ideal_seconds(cost: GroupCost, workers: int, groups: int) -> float:
    """Returns the time of one update if no worker ever waited and only groups cost time.

    No placement on equal workers is faster.
    """
    return groups * cost.per_group_s / workers


def efficiency(cost: GroupCost, workers: int, groups: int, measured_s: float) -> float:
    """Returns the share of the workers' time that goes into groups; 1 is the ideal."""
    return ideal_seconds(cost, workers, groups) / measured_s


def recommend(
    cost: GroupCost,
    total: int,
    groups: int,
    max_lag: int,
    chunks: int = 1,
    *,
    present: WorkerCounts | None = None,
) -> Recommendation:
    """Returns the fastest split of ``total`` equal workers.

    Args:
        present: the split in use, with which the sentence then begins.

    Raises:
        InputError: there are fewer workers than roles.
    """
    if total < 3:
        raise InputError(
            f"{total} workers cannot be split: rollout, reward and learner need one each. Use 3 or "
            "more, or colocate them."
        )
    best, seconds = _fastest_split(cost, total, groups, max_lag, chunks)
    colocated_s = colocated_seconds(cost, total, groups, 0, chunks)
    now = ""
    if present is not None:
        present_s = iteration_seconds(cost, present, groups, max_lag, chunks)
        now = f"{present_s:.2f} s an update with {present} now; "
    return Recommendation(
        counts=best,
        seconds=seconds,
        colocated_seconds=colocated_s,
        words=(
            f"{now}the best rollout:reward:learner split of {total} workers is {best} with "
            f"{seconds:.2f} s, "
            f"{efficiency(cost, total, groups, seconds):.0%} of ideal, where "
            f"{_limit(_busy(cost, best, groups), seconds)}; "
            f"colocated, with judges sharing the workers, {colocated_s:.2f} s"
        ),
    )


def _fastest_split(
    cost: GroupCost, total: int, groups: int, max_lag: int, chunks: int
) -> tuple[WorkerCounts, float]:
    """Finds the fastest split and its seconds, by branch and bound.

    Splits are simulated in the order of a time that none of them can beat. Once that bound reaches
    the best simulated time, the remaining splits cannot be faster.
    """
    splits = [
        WorkerCounts(rollout=total - reward - learner, reward=reward, learner=learner)
        for learner in range(1, min(groups, total - 2) + 1)
        for reward in range(1, total - learner)
    ]
    # Of splits with equal bounds, those with less work in all are seldom delayed by a second role.
    floors = sorted(
        (
            _floor(cost, counts, groups, max_lag, chunks),
            sum(_busy(cost, counts, groups).values()),
            counts,
        )
        for counts in splits
    )
    best, seconds = splits[0], math.inf
    for floor, _, counts in floors:
        # The factor: a sum of many terms may exceed its bound by a rounding.
        if floor > seconds * (1 - 1e-9):
            break
        if (simulated := iteration_seconds(cost, counts, groups, max_lag, chunks)) < seconds:
            best, seconds = counts, simulated
    return best, seconds


def _limit(busy: dict[str, float], seconds: float) -> str:
    """Names the role that limits an update, or waiting."""
    role = max(busy, key=lambda role: busy[role])
    share = busy[role] / seconds
    if share > 0.9:
        return f"{role} limits (busy {share:.0%})"
    return f"waiting limits ({role}, the busiest, works {share:.0%} of the time)"


def _busy(cost: GroupCost, counts: WorkerCounts, groups: int) -> dict[str, float]:
    """Returns the mean seconds of an update in which each role is at work."""
    # Ranks learn in step, so a part of a round costs a full one.
    return {
        "rollout": groups * cost.rollout_s / counts.rollout,
        "reward": groups * cost.reward_s / counts.reward,
        "learner": math.ceil(groups / counts.learner) * cost.learn_s + cost.step_s + cost.publish_s,
    }


def _floor(cost: GroupCost, counts: WorkerCounts, groups: int, max_lag: int, chunks: int) -> float:
    """Returns a time of an update that no schedule beats.

    It is at least that of the busiest role. It is also at least one update's way from admission to
    publication, divided by the ``max_lag + 1`` updates that are under way at a time.
    """
    busy, items = _busy(cost, counts, groups), groups * chunks
    rounds = math.ceil(items / counts.rollout)
    # At the end of rollout round n, all of that round and all later ones are still to be scored.
    scored = max(
        n * cost.rollout_s
        + math.ceil((items - (n - 1) * counts.rollout) / counts.reward) * cost.reward_s
        for n in range(1, rounds + 1)
    )
    return max(*busy.values(), (scored / chunks + busy["learner"]) / (max_lag + 1))
