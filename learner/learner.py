"""The learner: applies an update's groups to the policy, exactly once.

A plain class; any executor may hold it. Several learners, one per process, may share every update.
Each is one rank: it is sent the groups of its slots, and ends with the same weights as all others.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from learner.policy import TrainedPolicy
from learner.probes import idle, ratio_deviation
from learner.ranks import Alone, Ranks
from learner.rendezvous import open_place
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.config.sections import TrainConfig
from rl_edit.editors import Editor, load_editor, lora
from rl_edit.messages import ABSENT, LearnAnswer, LearnOrder, LearnReport
from rl_edit.method.rollout import joined, merged
from rl_edit.method.update import (
    Collective,
    LearningConfig,
    StepResult,
    TrainingFailed,
    averaged,
    learning_step,
)
from rl_edit.types import Advantages, RewardTable, RolloutGroup, moved

Credited = Mapping[int, tuple[RolloutGroup, Advantages]]
"""Groups with their credit, by slot of the update."""


def minibatches(slots: Sequence[int], train: TrainConfig) -> list[list[int]]:
    """Splits slots into minibatches.

    Each takes an optimizer step. Parts are cut by slot number, so a group that is missing
    moves no other to another part. Parts without a group are left out.
    """
    parts: list[list[int]] = [[] for _ in range(train.minibatches)]
    for slot in slots:
        parts[slot * train.minibatches // train.groups_per_update].append(slot)
    return [part for part in parts if part]


def learning_config(train: TrainConfig) -> LearningConfig:
    """Returns the values of one learning step."""
    return LearningConfig(
        max_grad_norm=train.max_grad_norm,
        ratio_tolerance=train.ratio_tolerance,
        states_per_forward=train.states_per_forward,
        reduction=train.reduction,
    )


def _scored(order: LearnOrder) -> list[tuple[str, RewardTable]]:
    """Unpacks each group's task type and reward table."""
    return [
        (slot.task_type, joined([wire.unpack(table) for table in slot.tables]))
        for slot in order.slots
        if not slot.lost
    ]


class Learner:
    """Learns from groups: one rank of the central learner.

    Args:
        editor: an editor to share with others in this process; None loads one.
    """

    def __init__(self, config: RunConfig, threads: int, *, editor: Editor | None = None) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.editor = load_editor(config.editor) if editor is None else editor
        self.policy = TrainedPolicy(config, self.editor)
        self.ranks: Collective = Alone()
        self._last: LearnAnswer | None = None

    def ready(self) -> int:
        """Returns the process id, once construction is over."""
        return os.getpid()

    def address(self) -> str:
        """Opens a place where the ranks can meet, and returns its address.

        It is this machine's, so it is asked of rank 0.
        """
        return open_place()

    def join(self, rank: int, world: int, address: str) -> None:
        """Becomes one rank of several, for good; returns when all have joined.

        A learner that never joins is the only rank.
        """
        ranks = Ranks(
            rank,
            world,
            address,
            device=self.policy.device,
            timeout_s=self.config.actors.deadline_s,
        )
        # Sharding is a collective too: it waits until every rank has joined.
        if self.config.actors.shard_base:
            ranks.shard(self.editor.transformer, unsharded=self.policy.parameters)
        self.ranks = ranks

    def export(self) -> LearnAnswer:
        """Returns the present weights and state.

        That is all that a resumed learner needs. The report is of no update.
        """
        return self._answer(plan="", result=StepResult(metrics={}))

    def restore(self, state: NDArray[np.uint8]) -> None:
        """Puts back the packed state of :meth:`export`.

        Raises:
            InputError: when it is the state of another adapter.
        """
        self.policy.restore(wire.unpack(state))
        # The last answer belonged to other weights.
        self._last = None

    def ratio(self, blob: NDArray[np.uint8]) -> float:
        """Measures the largest ``|ratio - 1|`` on a packed group.

        It may be a chunk of one. Nothing is changed.
        """
        lora.set_active(self.editor.transformer, True)
        return ratio_deviation(self.policy, moved(wire.unpack(blob), self.policy.device))

    def learn(self, order: LearnOrder, *blobs: NDArray[np.uint8]) -> LearnAnswer:
        """Applies one update once: the same order again gives the same answer.

        Args:
            blobs: the groups of this rank's slots (slot % world == rank, lost ones left out), in
                slot order, chunks in order.

        Raises:
            TrainingFailed: training cannot go on.
            RuntimeError: the update is not the next one, or is the last one with another plan.
        """
        start = time.perf_counter()
        policy, last = self.policy, self._last
        if last is not None:
            done = (policy.updates_done - 1, last.report.plan)
            if (order.update, order.plan) == done:
                # The controller lost the answer and asks again: nothing is applied twice.
                return last
        if order.update != policy.updates_done:
            raise RuntimeError(
                f"asked for update {order.update} with plan {order.plan[:12]}, but this learner "
                f"has done {policy.updates_done}, the last with plan "
                f"{last.report.plan[:12] if last else 'unknown'}: it would be applied twice or "
                "out of order"
            )
        credits, declined = self._credit(order)
        result = StepResult(metrics={})
        # Without a group to train, the update counts but no weight or average moves.
        if credits:
            result = self._optimise(self._groups(order, credits, blobs), sorted(credits))
            self._count_skipped(order.update, result)
        explored = policy.finish_update(
            trained=bool(credits) and not result.skipped, scored=_scored(order)
        )
        result = replace(result, metrics={**result.metrics, **explored})
        answer = self._answer(plan=order.plan, result=result, declined=declined, used=len(credits))
        # A collective, so every rank gets here or none; a rank that differs is found at once.
        self._require_equal_ranks(order.update, answer.report)
        seconds = time.perf_counter() - start
        self._last = answer._replace(report=replace(answer.report, seconds=seconds))
        return self._last

    def _credit(
        self, order: LearnOrder
    ) -> tuple[dict[int, Advantages], dict[str, tuple[str, ...]]]:
        """Computes credit, and why some slots have none.

        Every rank computes it for all slots: credit may compare groups, and tables are small.
        """
        present = {index: slot for index, slot in enumerate(order.slots) if not slot.lost}
        tables = [
            joined([wire.unpack(table) for table in slot.tables]) for slot in present.values()
        ]
        areas = [slot.areas for slot in present.values() if slot.areas is not None]
        results = dict(zip(present, self.config.algorithm.credit(tables, areas), strict=True))
        # Every slot ends in one of the two: the run's metrics account for all groups.
        credits: dict[int, Advantages] = {}
        declined: dict[str, tuple[str, ...]] = {}
        for index, slot in enumerate(order.slots):
            result = results.get(index)
            if isinstance(result, Advantages):
                credits[index] = result
                continue
            kind, reason = ("lost", slot.lost) if result is None else (result.kind, result.reason)
            declined[kind] = (*declined.get(kind, ()), reason)
        # Equal scores ("spread") are no failure, so they do not count against the budget.
        dropped = (*declined.get("lost", ()), *declined.get("invalid", ()))
        budget = self.config.train.max_dropped_groups
        if "invalid" in declined and len(dropped) > budget:
            raise TrainingFailed(
                f"{len(dropped)} of {len(order.slots)} groups of update {order.update} give no "
                f"credit, train.max_dropped_groups is {budget}: {dropped[-1]}. Check the judge, or "
                "allow drops with train.max_dropped_groups."
            )
        return credits, declined

    def _groups(
        self,
        order: LearnOrder,
        credits: Mapping[int, Advantages],
        blobs: Sequence[NDArray[np.uint8]],
    ) -> Credited:
        """Unpacks this rank's groups to train, by slot."""
        slots = range(self.ranks.rank, len(order.slots), self.ranks.world)
        expected = sum(len(order.slots[index].tables) for index in slots)
        if len(blobs) != expected:
            raise RuntimeError(
                f"rank {self.ranks.rank} of {self.ranks.world} got {len(blobs)} chunks of its "
                f"slots, expected {expected}"
            )
        # Blobs come in slot order, as many for a slot as it has tables, also where it has no
        # credit.
        rest, groups = list(blobs), {}
        for index in slots:
            number = len(order.slots[index].tables)
            chunks, rest = rest[:number], rest[number:]
            if index in credits:
                group = merged([wire.unpack(chunk) for chunk in chunks])
                device = self.policy.device
                groups[index] = (moved(group, device), moved(credits[index], device))
        return groups

    def _optimise(self, groups: Credited, trained: Sequence[int]) -> StepResult:
        """Makes all passes over the groups.

        Each minibatch takes an optimizer step. A step that is skipped undoes those before it and
        ends the update.
        """
        train, policy = self.config.train, self.policy
        # A copy to go back to. A single step that is skipped has changed nothing and needs none.
        begun = None
        if train.inner_epochs * train.minibatches > 1:
            weights = [parameter.detach().clone() for parameter in policy.parameters]
            begun = weights, copy.deepcopy(policy.optimizer.state_dict())
        lora.set_active(self.editor.transformer, True)
        # Groups rolled out under exactly these weights must have a ratio of 1, before the first
        # step only.
        on_policy = policy.weights("policy").id.sha256
        results: list[StepResult] = []
        for index in range(train.inner_epochs):
            # Metrics are those of the last pass, the furthest from the rollout's policy.
            results = []
            for part in minibatches(trained, train):
                results.append(self._step(groups, part, pass_index=index, on_policy=on_policy))
                on_policy = ""
                if not results[-1].skipped:
                    continue
                # A half-applied update would leave the policy where no metric describes it.
                if begun is not None:
                    for parameter, value in zip(policy.parameters, begun[0], strict=True):
                        parameter.data.copy_(value)
                    policy.optimizer.load_state_dict(begun[1])
                return results[-1]
        return StepResult(metrics=averaged([result.metrics for result in results]))

    def _step(
        self, groups: Credited, trained: Sequence[int], *, pass_index: int, on_policy: str
    ) -> StepResult:
        """Makes one optimizer step from some slots."""
        policy, algorithm = self.policy, self.config.algorithm
        return learning_step(
            self.editor.velocity,
            policy.others(),
            policy.parameters,
            policy.optimizer,
            algorithm.objective,
            {slot: groups[slot] for slot in trained if slot in groups},
            trained=trained,
            ranks=self.ranks,
            # Only a sharded base makes the other ranks wait for one without a group.
            idle=(lambda: idle(policy)) if self.config.actors.shard_base else lambda: None,
            config=learning_config(self.config.train),
            num_references=algorithm.initial_noise.num_references,
            run_seed=self.config.seed,
            update=policy.updates_done,
            pass_index=pass_index,
            on_policy=on_policy,
        )

    def _count_skipped(self, update: int, result: StepResult) -> None:
        """Counts skipped updates in a row.

        Raises:
            TrainingFailed: at ``train.max_skipped`` of them.
        """
        policy, limit = self.policy, self.config.train.max_skipped
        if not result.skipped:
            policy.skipped_in_a_row = 0
            return
        if policy.skipped_in_a_row + 1 >= limit:
            raise TrainingFailed(
                f"{result.skipped} at update {update}, after {policy.skipped_in_a_row} updates "
                f"skipped for the same reason (train.max_skipped {limit}): lower "
                "train.learning_rate, or look at RUN/diagnostics"
            )
        policy.skipped_in_a_row += 1

    def _require_equal_ranks(self, update: int, report: LearnReport) -> None:
        """Raises when ranks end an update with different weights."""
        names = self.ranks.exchange(f"{report.adapter} {report.result}")
        if len(set(names)) != 1:
            raise RuntimeError(
                f"the ranks hold different weights after update {update}: they do not compute the "
                "same function"
            )

    def _answer(
        self,
        *,
        plan: str,
        result: StepResult,
        declined: dict[str, tuple[str, ...]] | None = None,
        used: int = 0,
    ) -> LearnAnswer:
        """Reports the present weights. Rank 0 alone sends their bytes."""
        # Every rank computes both names, which are compared; one rank sends the bytes.
        acting, resulting = self.policy.weights("acting"), self.policy.weights("result")
        report = LearnReport(
            adapter=acting.id,
            result=resulting.id,
            plan=plan,
            metrics=result.metrics,
            declined=declined or {},
            used=used,
            skipped=result.skipped,
            skipped_in_a_row=self.policy.skipped_in_a_row,
            has_blobs=self.ranks.rank == 0,
        )
        if not report.has_blobs:
            return LearnAnswer(report)
        return LearnAnswer(
            report,
            adapter=wire.pack(acting),
            state=wire.pack(self.policy.state()),
            result=wire.pack(resulting) if report.separate_result else ABSENT,
        )
