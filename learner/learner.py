"""The learner: policy, optimizer, one step from groups to a new adapter. A plain class; any executor may hold it.

Several learners, one per process, may share every update: each is one rank, is sent the groups of its slots, and ends with
the same weights as all others.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from learner.ranks import Alone, Ranks, free_address
from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.editors import Editor, load_editor, lora
from rl_edit.errors import InputError
from rl_edit.messages import ABSENT, LearnAnswer, LearnerState, LearnOrder, LearnReport
from rl_edit.method.algorithms import Latest
from rl_edit.method.objectives import Policy
from rl_edit.method.regions import UniformRows
from rl_edit.method.rollout import blank_group, blank_task, joined, merged
from rl_edit.method.update import (
    Collective,
    ConditionedVelocity,
    LearningConfig,
    StepResult,
    TrainingFailed,
    averaged,
    learning_step,
    losses,
)
from rl_edit.types import AdapterId, AdapterWeights, Advantages, Conditioning, RolloutGroup, moved


class Learner:
    """Holds the trained adapter on a frozen base and its optimizer; beside it, where the run asks for them, two averages of it.

    The acting weights are what the actors run: the policy itself, or a decayed average (``algorithm.acting``). The resulting weights
    are what is evaluated and saved: the policy itself, or an exponential moving average (``train.ema_decay``).

    Args:
        editor: one to share with others in this process; None loads one.
    """

    def __init__(self, config: RunConfig, threads: int, *, editor: Editor | None = None) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.editor = load_editor(config.editor) if editor is None else editor
        lora.attach(self.editor.transformer, config.lora, seed=config.seed)
        self._named = lora.named_parameters(self.editor.transformer)
        self.parameters = list(self._named.values())
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.train.learning_rate, weight_decay=config.train.weight_decay
        )
        self.ranks: Collective = Alone()
        self.updates_done = 0
        self.skipped_in_a_row = 0
        self.exploration: dict[str, float] = {}
        self.acts_apart = not isinstance(config.algorithm.acting, Latest)
        policy = {name: p.detach().clone() for name, p in self._named.items()}
        self.averages: dict[str, dict[str, Tensor]] = {}
        # Within an update the policy moves and the acting weights do not, be they the latest or not.
        if self.acts_apart or "acting" in config.algorithm.objective.policies:
            self.averages["acting"] = policy
        if config.train.ema_decay is not None:
            self.averages["result"] = {name: value.clone() for name, value in policy.items()}
        if "acting" in config.algorithm.objective.policies:
            lora.attach(
                self.editor.transformer, config.lora, seed=config.seed, adapter_name=lora.ACTING
            )
        lora.set_active(self.editor.transformer, True)
        self._last: LearnAnswer | None = None

    def ready(self) -> int:
        """Answers once construction is over: the process id."""
        return os.getpid()

    def address(self) -> str:
        """A free "host:port" of this machine, for the ranks to meet at when this is rank 0."""
        return free_address()

    def join(self, rank: int, world: int, address: str) -> None:
        """Becomes one rank of several, once for good; returns when all have joined. A learner that joins nobody is alone."""
        ranks = Ranks(
            rank, world, address, device=self.device, timeout_s=self.config.actors.deadline_s
        )
        if self.config.actors.shard_base:
            ranks.shard(self.editor.transformer, whole=self.parameters)
        self.ranks = ranks

    def export(self) -> LearnAnswer:
        """The weights as they are now, with all that a resumed learner needs. The report is of no update."""
        return self._answer(plan="", result=StepResult(metrics={}))

    def _answer(
        self,
        *,
        plan: str,
        result: StepResult,
        declined: dict[str, tuple[str, ...]] | None = None,
        used: int = 0,
    ) -> LearnAnswer:
        """What the driver is told of the present weights."""
        acting, resulting = self._weights("acting"), self._weights("result")
        report = LearnReport(
            adapter=acting.id,
            result=resulting.id,
            plan=plan,
            metrics=result.metrics,
            declined=declined or {},
            used=used,
            skipped=result.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
            has_blobs=self.ranks.rank == 0,
        )
        if not report.has_blobs:
            return LearnAnswer(report)
        return LearnAnswer(
            report,
            adapter=wire.pack(acting),
            state=wire.pack(self.state()),
            result=wire.pack(resulting) if report.separate_result else ABSENT,
        )

    def _weights(self, name: str) -> AdapterWeights:
        """The acting or the resulting weights as an adapter."""
        tensors = lora.exported(self.averages.get(name, self._named))
        return AdapterWeights(
            id=AdapterId(self.updates_done, lora.digest(tensors)),
            tensors=tensors,
            exploration=dict(self.exploration),
        )

    def learn(self, order: LearnOrder, *blobs: np.ndarray) -> LearnAnswer:
        """One update, applied once: the same order again gives the same answer.

        Args:
            blobs: the groups of this rank's slots (slot % world == rank, lost ones left out), in slot order, chunks in order.

        Raises:
            TrainingFailed: when training cannot go on.
            RuntimeError: when the update is not the next one, or is the last one with another plan.
        """
        start = time.perf_counter()
        if (
            self._last is not None
            and order.update == self.updates_done - 1
            and order.plan == self._last.report.plan
        ):
            return self._last
        if order.update != self.updates_done:
            raise RuntimeError(
                f"asked for update {order.update} with plan {order.plan[:12]}, but this learner has done {self.updates_done}, the last "
                f"with plan {self._last.report.plan[:12] if self._last else 'unknown'}: it would be applied twice or out of order"
            )
        credits, declined = self._credit(order)
        result = (
            self._optimise(self._own(order, credits, blobs), sorted(credits))
            if credits
            else StepResult(metrics={})
        )
        if result.skipped:
            if self.skipped_in_a_row + 1 >= self.config.train.max_skipped:
                raise TrainingFailed(
                    f"{result.skipped} at update {order.update}, after {self.skipped_in_a_row} updates skipped for the same reason "
                    f"(train.max_skipped {self.config.train.max_skipped}): lower train.learning_rate, or look at RUN/diagnostics"
                )
            self.skipped_in_a_row += 1
        elif credits:
            self.skipped_in_a_row = 0
        if credits and not result.skipped:
            self._move_averages()
        result = replace(result, metrics={**result.metrics, **self._explore(order)})
        self.updates_done += 1
        answer = self._answer(plan=order.plan, result=result, declined=declined, used=len(credits))
        if len(set(self.ranks.exchange(f"{answer.report.adapter} {answer.report.result}"))) != 1:
            raise RuntimeError(
                f"the ranks hold different weights after update {order.update}: they do not compute the same function"
            )
        seconds = time.perf_counter() - start
        self._last = answer._replace(report=replace(answer.report, seconds=seconds))
        return self._last

    @torch.no_grad()
    def _move_averages(self) -> None:
        """After an update: each average takes its share of the new policy."""
        ema = self.config.train.ema_decay
        # A young average follows closely: min((1 + n) / (10 + n), decay).
        kept = {
            "acting": self.config.algorithm.acting.decay(self.updates_done),
            "result": 0.0
            if ema is None
            else min((1 + self.updates_done) / (10 + self.updates_done), ema),
        }
        for which, average in self.averages.items():
            for name, parameter in self._named.items():
                average[name].lerp_(parameter.detach(), 1 - kept[which])

    def _explore(self, order: LearnOrder) -> dict[str, float]:
        """Steers the exploration by what the update's groups scored; metrics of how they were explored."""
        seen = [
            (slot.task_type, joined([wire.unpack(table) for table in slot.tables]))
            for slot in order.slots
            if not slot.lost
        ]
        law, before = self.config.algorithm.initial_noise, self.exploration
        self.exploration = law.steered(before, seen)
        return law.measured(before, seen)

    def ratio(self, blob: np.ndarray) -> float:
        """Largest deviation of the policy ratio from 1 at the present weights on a packed group, or a chunk of one; changes nothing.

        Any candidate may be an anchor, for a chunk may hold few others than the reference. The forward keeps its gradient, as in
        learning: without one, kernels may differ.
        """
        lora.set_active(self.editor.transformer, True)
        group: RolloutGroup = moved(wire.unpack(blob), self.device)
        signs = 1.0 - 2.0 * (torch.arange(len(group.latents)) % 2)[:, None]
        rows = UniformRows()(group.candidates.token_mask)
        advantages = moved(
            Advantages(values=signs, regions=rows, weights=torch.ones(1)), self.device
        )
        objective, generator = self.config.algorithm.objective, torch.Generator().manual_seed(0)
        deviations = [torch.zeros((), device=self.device)]
        for batch in losses(
            self.editor.velocity,
            self._others(),
            objective,
            group,
            advantages,
            num_references=0,
            generator=generator,
            states_per_forward=None,
        ):
            deviations += [
                value
                for _, output in batch
                for name, value in output.metrics.items()
                if name == "ratio/max_deviation"
            ]
        return float(torch.stack(deviations).max())

    def _credit(
        self, order: LearnOrder
    ) -> tuple[dict[int, Advantages], dict[str, tuple[str, ...]]]:
        """Credit of the slots to train, and why the others are not. Every rank computes it for all slots."""
        declined: dict[str, tuple[str, ...]] = {}
        found: dict[int, Advantages] = {}
        kept = {index: slot for index, slot in enumerate(order.slots) if not slot.lost}
        tables = [joined([wire.unpack(table) for table in slot.tables]) for slot in kept.values()]
        areas = [slot.areas for slot in kept.values() if slot.areas is not None]
        results = dict(zip(kept, self.config.algorithm.credit(tables, areas), strict=True))
        for index, slot in enumerate(order.slots):
            credit = results.get(index)
            if isinstance(credit, Advantages):
                found[index] = credit
            else:
                kind, reason = (
                    ("lost", slot.lost) if credit is None else (credit.kind, credit.reason)
                )
                declined[kind] = (*declined.get(kind, ()), reason)
        dropped, budget = (
            (*declined.get("lost", ()), *declined.get("invalid", ())),
            self.config.train.max_dropped_groups,
        )
        if "invalid" in declined and len(dropped) > budget:
            raise TrainingFailed(
                f"{len(dropped)} of {len(order.slots)} groups of update {order.update} give no credit, train.max_dropped_groups is "
                f"{budget}: {dropped[-1]}. Check the judge, or allow drops with train.max_dropped_groups."
            )
        return found, declined

    def _own(
        self, order: LearnOrder, credits: Mapping[int, Advantages], blobs: Sequence[np.ndarray]
    ) -> dict[int, tuple[RolloutGroup, Advantages]]:
        """This rank's groups to train, by slot."""
        slots = range(self.ranks.rank, len(order.slots), self.ranks.world)
        expected = sum(len(order.slots[index].tables) for index in slots)
        if len(blobs) != expected:
            raise RuntimeError(
                f"rank {self.ranks.rank} of {self.ranks.world} got {len(blobs)} chunks of its slots, expected {expected}"
            )
        rest, own = list(blobs), {}
        for index in slots:
            number = len(order.slots[index].tables)
            chunks, rest = rest[:number], rest[number:]
            if index in credits:
                group = merged([wire.unpack(chunk) for chunk in chunks])
                own[index] = (moved(group, self.device), moved(credits[index], self.device))
        return own

    def _optimise(
        self, own: Mapping[int, tuple[RolloutGroup, Advantages]], trained: Sequence[int]
    ) -> StepResult:
        """All passes over the groups, a step per part of them. A step that is skipped undoes those before it and ends the update."""
        train = self.config.train
        parts = [
            [slot for slot in trained if slot * train.minibatches // train.groups_per_update == p]
            for p in range(train.minibatches)
        ]
        begun = None  # a single step that is skipped has changed nothing
        if train.inner_epochs * train.minibatches > 1:
            begun = (
                [parameter.detach().clone() for parameter in self.parameters],
                copy.deepcopy(self.optimizer.state_dict()),
            )
        lora.set_active(self.editor.transformer, True)
        current = lora.export(self.editor.transformer, step=self.updates_done).id.sha256
        results: list[StepResult] = []
        for index in range(train.inner_epochs):
            results = []
            for part in filter(None, parts):
                results.append(self._step(own, part, pass_index=index, on_policy=current))
                current = ""
                if results[-1].skipped:
                    if begun is not None:
                        for parameter, value in zip(self.parameters, begun[0], strict=True):
                            parameter.data.copy_(value)
                        self.optimizer.load_state_dict(begun[1])
                    return results[-1]
        return StepResult(metrics=averaged([result.metrics for result in results]))

    def _step(
        self,
        own: Mapping[int, tuple[RolloutGroup, Advantages]],
        trained: Sequence[int],
        **which: Any,
    ) -> StepResult:
        """One optimizer step from the groups of some slots."""
        train = self.config.train
        return learning_step(
            self.editor.velocity,
            self._others(),
            self.parameters,
            self.optimizer,
            self.config.algorithm.objective,
            {slot: own[slot] for slot in trained if slot in own},
            trained=trained,
            ranks=self.ranks,
            idle=self._idle if self.config.actors.shard_base else lambda: None,
            config=LearningConfig(
                max_grad_norm=train.max_grad_norm,
                ratio_tolerance=train.ratio_tolerance,
                states_per_forward=train.states_per_forward,
                reduction=train.reduction,
            ),
            num_references=self.config.algorithm.initial_noise.num_references,
            run_seed=self.config.seed,
            update=self.updates_done,
            **which,
        )

    def _idle(self) -> None:
        """The forwards and backwards of one group, on nothing, for nothing: with a sharded base the other ranks need ours."""
        rollout, algorithm = self.config.rollout, self.config.algorithm
        conditioning = moved(
            self.editor.encode(blank_task(self.editor.pixels_per_token)), self.device
        )
        levels = algorithm.step_noise(self.updates_done, rollout.num_steps)
        keep = algorithm.objective.trained_steps(levels, torch.Generator())
        group = blank_group(
            conditioning,
            self.editor.latent_shape(conditioning),
            size=rollout.group_size,
            levels=levels,
            keep=keep,
        )
        rows = UniformRows()(group.candidates.token_mask)
        nothing = Advantages(
            values=torch.zeros(rollout.group_size, 1), regions=rows, weights=torch.ones(1)
        )
        for batch in losses(
            self.editor.velocity,
            self._others(),
            algorithm.objective,
            moved(group, self.device),
            moved(nothing, self.device),
            num_references=algorithm.initial_noise.num_references,
            generator=torch.Generator(),
            states_per_forward=self.config.train.states_per_forward,
        ):
            torch.stack([output.loss for _, output in batch]).sum().backward()

    def _others(self) -> dict[Policy, ConditionedVelocity]:
        """Velocities of the base editor and of the acting weights, without gradient."""
        if "acting" in self.config.algorithm.objective.policies:
            weights = self._weights("acting")
            lora.load(self.editor.transformer, weights, adapter_name=lora.ACTING)
        return {"reference": self._reference, "acting": self._acting}

    @torch.no_grad()
    def _acting(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity of the weights the actors run."""
        lora.set_active(self.editor.transformer, True, adapter_name=lora.ACTING)
        try:
            return self.editor.velocity(latents, sigma, conditioning)
        finally:
            lora.set_active(self.editor.transformer, True)

    @torch.no_grad()
    def _reference(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The base editor's velocity: the same function with the adapter off."""
        lora.set_active(self.editor.transformer, False)
        try:
            return self.editor.velocity(latents, sigma, conditioning)
        finally:
            lora.set_active(self.editor.transformer, True)

    def state(self) -> LearnerState:
        """Adapter, optimizer and averages as named tensors, the updates skipped in a row, and what is explored with."""
        tensors = {"skipped_in_a_row": torch.tensor(self.skipped_in_a_row)}
        tensors |= {
            f"exploration/{name}": torch.tensor(value, dtype=torch.float64)
            for name, value in self.exploration.items()
        }
        for which, average in self.averages.items():
            tensors |= {
                f"average/{which}/{name}": value.cpu().clone() for name, value in average.items()
            }
        for name, parameter in self._named.items():
            tensors[f"parameter/{name}"] = parameter.detach().cpu().clone()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value).detach().cpu().clone()
        return LearnerState(updates_done=self.updates_done, tensors=tensors)

    def restore(self, blob: np.ndarray) -> None:
        """Puts back the state of :meth:`export`; continuing is then bit for bit the uninterrupted run.

        Raises:
            InputError: when it is the state of another adapter.
        """
        state: LearnerState = wire.unpack(blob)
        expected = {
            (f"parameter/{name}", tuple(parameter.shape)) for name, parameter in self._named.items()
        }
        found = {
            (key, tuple(value.shape))
            for key, value in state.tensors.items()
            if key.startswith("parameter/")
        }
        if expected != found:
            raise InputError(
                f"the checkpoint's parameters are not those of this run's adapter ({sorted(expected ^ found)[:2]}), so it cannot be "
                "continued: resume with the run's own lora settings"
            )
        if lacking := sorted(
            which
            for which in self.averages
            if not any(key.startswith(f"average/{which}/") for key in state.tensors)
        ):
            raise InputError(
                f"the checkpoint has no average of {' and '.join(lacking)} weights, so this run cannot be continued with one: resume with "
                "the run's own train.ema_decay and algorithm.acting"
            )
        for name, parameter in self._named.items():
            parameter.data.copy_(state.tensors[f"parameter/{name}"])
            self.optimizer.state[parameter] = {
                key.split("/", 2)[1]: value.to(
                    parameter.device if not key.startswith("optimizer/step/") else "cpu"
                ).clone()
                for key, value in state.tensors.items()
                if key.startswith("optimizer/") and key.split("/", 2)[2] == name
            }
        for which, average in self.averages.items():
            for name, value in average.items():
                value.copy_(state.tensors[f"average/{which}/{name}"])
        self.exploration = {
            key.split("/", 1)[1]: float(value)
            for key, value in state.tensors.items()
            if key.startswith("exploration/")
        }
        self.updates_done = state.updates_done
        self.skipped_in_a_row = int(state.tensors["skipped_in_a_row"])
        self._last = None
