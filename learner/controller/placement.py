"""How long an update takes for a number of workers, and how best to split them: the arithmetic
behind "use 5:1:2 actors".

The training loop in simulated time, with equal workers and fixed durations, which fits solvers of a
fixed number of steps. Measured seconds come in; nothing here knows a process, a tensor or a file.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, fields, replace

from rl_edit.errors import InputError

UPDATES = 32
"""Updates simulated; the second half is measured, after the pipeline has filled. Even, as a lag of
one repeats in pairs."""


@dataclass(frozen=True, kw_only=True)
class GroupCost:
    """Measured seconds of one worker for one group, and what an update costs besides.

    Attributes:
        rollout_s, reward_s, learn_s: for one group, on one worker of the role.
        step_s, publish_s: overhead of every update whatever its size: the optimizer step with its
            export and commit, and giving the new adapter to every actor.
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
        seconds: of one update with ``counts``; colocated_seconds: with each worker in all three
            roles by turns.
        words: one sentence for people.
    """

    counts: WorkerCounts
    seconds: float
    colocated_seconds: float
    words: str


def iteration_seconds(
    cost: GroupCost, counts: WorkerCounts, groups: int, max_lag: int, chunks: int = 1
) -> float:
    """Steady time of one update: the loop in simulated time, each piece of work going to the first
    free worker in order.

    Groups of update u are rolled out with the weights of u - max_lag, and are admitted when those
    are published. A chunk (an equal part of a group) is scored as it arrives. The learner starts
    when all groups of the update are scored; each rank takes its share group by group; the next
    update is learnt only after this one is published.
    """
    rollout_s, reward_s = cost.rollout_s / chunks, cost.reward_s / chunks
    learn_s = _busy(cost, counts, groups)["learner"]
    # When each worker slot becomes free, soonest first. Work of one length, taken in order, ends in
    # order: the worker slot taken longest ago is
    # the first one free, so a queue serves where unequal work would need a heap.
    rollout, reward = (
        deque([0.0] * counts.rollout, maxlen=counts.rollout),
        deque([0.0] * counts.reward, maxlen=counts.reward),
    )
    published = [0.0]
    for update in range(UPDATES):
        admitted = published[max(update - max_lag, 0)]
        for _ in range(groups * chunks):
            rolled = max(admitted, rollout[0]) + rollout_s
            rollout.append(rolled)
            reward.append(max(rolled, reward[0]) + reward_s)
        published.append(max(published[-1], reward[-1]) + learn_s)
    measured = UPDATES // 2
    # A finite window may end a part of a round early and so flatter the split.
    return max(
        (published[-1] - published[-1 - measured]) / measured,
        _floor(cost, counts, groups, max_lag, chunks),
    )


def colocated_seconds(
    cost: GroupCost, processes: int, groups: int, reward_seats: int, chunks: int = 1
) -> float:
    """Time of one update when each process rolls out, then learns. It does one thing at a time, so
    a lag gains next to nothing.

    Args:
        reward_seats: workers that only score. 0: judges share the workers of the processes, and
            take turns with the rollouts.
    """
    if reward_seats == 0:
        cost = replace(cost, rollout_s=cost.rollout_s + cost.reward_s, reward_s=0.0)
    counts = WorkerCounts(rollout=processes, reward=reward_seats or processes, learner=processes)
    return iteration_seconds(cost, counts, groups, 0, chunks)


def ideal_seconds(cost: GroupCost, workers: int, groups: int) -> float:
    """Time of one update if no worker ever waited and only groups cost time: no placement on equal
    workers is faster."""
    return groups * cost.per_group_s / workers


def efficiency(cost: GroupCost, workers: int, groups: int, measured_s: float) -> float:
    """Share of the workers' time that goes into groups; 1 is the ideal."""
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
    """The fastest split of ``total`` equal workers. Splits are simulated in the order of a time
    none of them can beat; when that reaches the best simulated one, the rest cannot win.

    Args:
        present: the split in use, which the sentence then starts from.
    """
    if total < 3:
        raise InputError(
            f"{total} workers cannot be split: rollout, reward and learner need one each. Use 3 or "
            "more, or colocate them."
        )
    splits = [
        WorkerCounts(rollout=total - reward - learner, reward=reward, learner=learner)
        for learner in range(1, min(groups, total - 2) + 1)
        for reward in range(1, total - learner)
    ]
    # Of splits with one floor, those with least work in all are seldom held up by a second role.
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
        if floor > seconds * (1 - 1e-9):  # a sum of many terms may exceed its floor by a rounding
            break
        if (simulated := iteration_seconds(cost, counts, groups, max_lag, chunks)) < seconds:
            best, seconds = counts, simulated
    now = (
        ""
        if present is None
        else f"{iteration_seconds(cost, present, groups, max_lag, chunks):.2f} s an update with {present} now; "
    )
    colocated_s = colocated_seconds(cost, total, groups, 0, chunks)
    busy = _busy(cost, best, groups)
    role = max(busy, key=lambda role: busy[role])
    share = busy[role] / seconds
    limit = (
        f"{role} limits (busy {share:.0%})"
        if share > 0.9
        else f"waiting limits ({role}, the busiest, works {share:.0%} of the time)"
    )
    return Recommendation(
        counts=best,
        seconds=seconds,
        colocated_seconds=colocated_s,
        words=(
            f"{now}the best rollout:reward:learner split of {total} workers is {best} with "
            f"{seconds:.2f} s, "
            f"{efficiency(cost, total, groups, seconds):.0%} of ideal, where {limit}; "
            f"colocated, with judges sharing the workers, {colocated_s:.2f} s"
        ),
    )


def _busy(cost: GroupCost, counts: WorkerCounts, groups: int) -> dict[str, float]:
    """Mean seconds of an update in which each role is at work. Ranks learn in step, so a part of a
    round costs a whole one."""
    return {
        "rollout": groups * cost.rollout_s / counts.rollout,
        "reward": groups * cost.reward_s / counts.reward,
        "learner": math.ceil(groups / counts.learner) * cost.learn_s + cost.step_s + cost.publish_s,
    }


def _floor(cost: GroupCost, counts: WorkerCounts, groups: int, max_lag: int, chunks: int) -> float:
    """No schedule is faster: not than the busiest role, nor than one update's way from admission to
    publication, of which ``max_lag + 1`` are under way at a time."""
    busy, items = _busy(cost, counts, groups), groups * chunks
    rounds = math.ceil(items / counts.rollout)
    # When round n of the rollouts ends, all of it and all after it is still to be scored.
    scored = max(
        n * cost.rollout_s
        + math.ceil((items - (n - 1) * counts.rollout) / counts.reward) * cost.reward_s
        for n in range(1, rounds + 1)
    )
    return max(*busy.values(), (scored / chunks + busy["learner"]) / (max_lag + 1))
