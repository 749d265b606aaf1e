"""What is proven on the real actors before the first update: seconds now instead of a run that
learns nothing.

An adapter that is attached but never applied, weights that do not arrive, an actor and a learner
that compute different
functions, groups that do not fit the object store: each of these has cost somebody weeks, and each
    shows in one small group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from learner.controller.executor import Executor, Ref
from learner.controller.supervisor import GivenUp, Supervisor
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.errors import ResourcesInfeasible
from rl_edit.messages import RolloutResult
from rl_edit.method.update import TrainingFailed
from rl_edit.types import WorkItem

STORE_SHARE = 0.5
"""Part of the object store that groups in flight may fill: the rest is for adapters, states and
Ray's own copies."""


class RatioCheck(Protocol):
    """What is asked of the learner."""

    async def ratio(self, group: Ref) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was seen.

    Attributes:
        ratio_deviation: largest |ratio - 1| with equal weights; None when the probe was not
            on-policy.
        bytes_in_flight: of all groups that may be in flight at once; ``store_bytes``: what the
            object store holds.
    """

    adapter: str
    ratio_deviation: float | None
    bytes_in_flight: int
    store_bytes: float


async def prove(
    executor: Executor,
    supervisor: Supervisor,
    learners: RatioCheck,
    item: WorkItem,
    config: RunConfig,
    *,
    on_policy: bool,
) -> Proof:
    """Rolls out one micro-batch of the run's first group and compares actor, learner and store.

    Raises:
        TrainingFailed: with what was seen and what to change.
        ResourcesInfeasible: groups in flight do not fit the object store.
    """
    for slot, wrong in await supervisor.broadcast("rollout", "adapter canary", "canary"):
        if wrong:
            raise TrainingFailed(
                f"preflight: rollout actor {slot}: {wrong}. Check lora.targets against the "
                "editor's module names."
            )
    size = min(max(config.editor.micro_batch, 2), item.num_candidates)
    probe = replace(item, group_id=f"preflight-{item.group_id}", chunk=(0, size))
    try:
        answer = await supervisor.call(
            "rollout",
            "preflight rollout",
            "run",
            lambda: (wire.pack(probe),),
            blobs=1,
            check=lambda a: _stale(a, probe),
        )
    except GivenUp as error:
        raise TrainingFailed(
            f"preflight: {error}. The published adapter or the editor does not work on the actors; "
            "see their logs."
        ) from error
    rolled, blob = answer
    deviation = await learners.ratio(blob) if on_policy else None
    if deviation is not None and not deviation <= config.train.ratio_tolerance:
        raise TrainingFailed(
            f"preflight: policy ratio deviates from 1 by {deviation:.3g} with equal weights "
            "(train.ratio_tolerance "
            f"{config.train.ratio_tolerance:g}): actor and learner do not compute the same "
            "velocity. Use the same editor.dtype, device "
            "kind and editor.micro_batch in both, or raise the tolerance."
        )
    per_group = rolled.nbytes / size * item.num_candidates
    in_flight = int(per_group * config.train.groups_per_update * (config.train.max_lag + 1))
    store = executor.store_bytes()
    if in_flight > STORE_SHARE * store:
        raise ResourcesInfeasible(
            f"preflight: {config.train.groups_per_update} groups x {config.train.max_lag + 1} "
            f"updates x {per_group / 2**20:.0f} MiB = "
            f"{in_flight / 2**20:.0f} MiB in flight exceed half of the object store "
            f"({store / 2**20:.0f} MiB): lower groups_per_update, "
            "group_size, trained steps or max_lag, or give Ray a larger --object-store-memory."
        )
    return Proof(
        adapter=str(rolled.adapter),
        ratio_deviation=deviation,
        bytes_in_flight=in_flight,
        store_bytes=store,
    )


def _stale(answer: tuple[RolloutResult, object], probe: WorkItem) -> str:
    rolled, _ = answer
    if rolled.adapter != probe.adapter:
        return f"it rolled out with {rolled.adapter}, published is {probe.adapter}: a weight update did not reach it"
    return "" if rolled.finite else "its latents or velocities are not finite"
