"""Preflight: proofs on the real actors before the first update.

An adapter may be attached but never applied. Weights may not arrive. Actor and learner may compute
different functions. Groups may not fit the object store. Each of these errors is expensive when it
is found late, and each shows in one small group within seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from learner.controller.executor import Executor, Ref
from learner.controller.supervisor import GivenUp, Supervisor
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.errors import BlobLost, ResourcesInfeasible
from rl_edit.messages import RolloutResult
from rl_edit.method.update import TrainingFailed
from rl_edit.types import WorkItem

STORE_SHARE = 0.5
"""Share of the object store that groups in flight may fill.

The rest is for adapters, states and Ray's own copies.
"""


class RatioCheck(Protocol):
    """The part of the learner that the preflight calls."""

    async def ratio(self, group: Ref) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The measurements of a preflight.

    Attributes:
        ratio_deviation: largest |ratio - 1| with equal weights; None when the probe was not
            on-policy.
        bytes_in_flight: size of all groups that may be in flight at once.
        store_bytes: size of the object store.
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
        TrainingFailed: with what was measured and what to change.
        ResourcesInfeasible: groups in flight do not fit the object store.
    """
    # Every actor, not only the one that takes the probe: an adapter may be broken on one node.
    for slot, wrong in await supervisor.broadcast("rollout", "adapter canary", "canary"):
        if wrong:
            raise TrainingFailed(
                f"preflight: rollout actor {slot}: {wrong}. Check lora.targets against the "
                "editor's module names."
            )
    size = min(max(config.editor.micro_batch, 2), item.num_candidates)
    # Another id than the group's: the ledger must not take the probe for its work.
    probe = replace(item, group_id=f"preflight-{item.group_id}", chunk=(0, size))
    result, deviation = await _measure(supervisor, learners, probe, on_policy=on_policy)
    # Written so that a NaN is refused too.
    if deviation is not None and not deviation <= config.train.ratio_tolerance:
        raise TrainingFailed(
            f"preflight: policy ratio deviates from 1 by {deviation:.3g} with equal weights "
            f"(train.ratio_tolerance {config.train.ratio_tolerance:g}): actor and learner do not "
            "compute the same velocity. Use the same editor.dtype, device kind and "
            "editor.micro_batch in both, or raise the tolerance."
        )
    return Proof(
        adapter=str(result.adapter),
        ratio_deviation=deviation,
        bytes_in_flight=_require_store(executor, result.nbytes / size, config),
        store_bytes=executor.store_bytes(),
    )


async def _measure(
    supervisor: Supervisor, learners: RatioCheck, probe: WorkItem, *, on_policy: bool
) -> tuple[RolloutResult, float | None]:
    """Rolls out the probe and measures the ratio, again when the probe's blob is lost between.

    Raises:
        BlobLost: it was lost more often than ``actors.infra_retries``.
    """
    lost = 0
    while True:
        result, blob = await _rollout(supervisor, probe)
        try:
            return result, await learners.ratio(blob) if on_policy else None
        except BlobLost as error:
            lost += 1
            supervisor.event(
                "blob_lost", work_id=probe.work_id, update=probe.update, reason=str(error)
            )
            if lost > supervisor.config.infra_retries:
                raise
            supervisor.retries["infra"] += 1


async def _rollout(supervisor: Supervisor, probe: WorkItem) -> tuple[RolloutResult, Ref]:
    """Rolls out the probe with the published weights.

    Raises:
        TrainingFailed: no actor could.
    """
    try:
        answer: tuple[RolloutResult, Ref] = await supervisor.call(
            "rollout",
            "preflight rollout",
            "run",
            lambda: (wire.pack(probe),),
            blobs=1,
            check=lambda answer: _problem(answer[0], probe),
        )
    except GivenUp as error:
        raise TrainingFailed(
            f"preflight: {error}. The published adapter or the editor does not work on the actors; "
            "see their logs."
        ) from error
    return answer


def _require_store(executor: Executor, bytes_per_candidate: float, config: RunConfig) -> int:
    """Returns the bytes of all groups that may be in flight at once.

    Raises:
        ResourcesInfeasible: they exceed their share of the object store.
    """
    per_group = bytes_per_candidate * config.rollout.group_size
    in_flight = int(per_group * config.train.groups_per_update * (config.train.max_lag + 1))
    # Measured on a real group: its size depends on trained steps and what the method stores.
    store = executor.store_bytes()
    if in_flight > STORE_SHARE * store:
        raise ResourcesInfeasible(
            f"preflight: {config.train.groups_per_update} groups x {config.train.max_lag + 1} "
            f"updates x {per_group / 2**20:.0f} MiB = "
            f"{in_flight / 2**20:.0f} MiB in flight exceed half of the object store "
            f"({store / 2**20:.0f} MiB): lower groups_per_update, "
            "group_size, trained steps or max_lag, or give Ray a larger --object-store-memory."
        )
    return in_flight


def _problem(result: RolloutResult, probe: WorkItem) -> str:
    """Returns what is wrong with the actor that made a result, or ""."""
    # The id is the hash of the loaded tensors, so it cannot be right by accident.
    if result.adapter != probe.adapter:
        return (
            f"it rolled out with {result.adapter}, published is {probe.adapter}: a weight update "
            "did not reach it"
        )
    return "" if result.finite else "its latents or velocities are not finite"
