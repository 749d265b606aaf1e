"""One learning step: every replay point of every group, one gradient, one optimizer step.

Takes a velocity function with gradient; knows neither editor nor Ray. The groups of an update have
a canonical order of slots. Each group's gradient is computed by itself and the gradients are added
in that order, so neither a replay nor the number of learner processes changes a bit of the sum.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from rl_edit.method.exploration import NoiseSource
from rl_edit.method.objectives import ObjectiveProtocol, Policy, ReplayPoint, Velocities
from rl_edit.types import Advantages, Conditioning, LossOutput, RolloutGroup

ConditionedVelocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""``(latents [batch, token, channel], sigma [batch], conditioning of one task) -> velocity [batch,
token, channel]``."""


class TrainingFailed(RuntimeError):
    """Ends a run that cannot go on: the message says why and what to change. Exit code 3."""

    exit_code = 3


@runtime_checkable
class Collective(Protocol):
    """The processes that share an update.

    Each of them calls every method, in the same order. Slot s belongs to rank s % world.
    """

    rank: int
    world: int

    def broadcast(self, value: Tensor, source: int) -> Tensor:
        """Sends ``value`` of rank ``source`` to every rank; it has the same shape on all."""

    def total(self, value: Tensor) -> Tensor:
        """Sums over ranks, in an order of the library's choosing."""

    def exchange(self, text: str) -> list[str]:
        """Gathers every rank's text, by rank."""


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """Values of one learning step.

    Attributes:
        max_grad_norm: gradients above this norm are scaled down to it.
        ratio_tolerance: largest |ratio - 1| accepted on-policy before the optimizer may step.
        states_per_forward: states of one forward and backward: points are split and joined to fit
            it. None is a point at a time.
        reduction: "ordered" adds gradients slot by slot, whatever the number of ranks; "allreduce"
            adds each rank's gradients first and leaves the rest to the library, which is faster and
            equal up to rounding.
    """

    max_grad_norm: float
    ratio_tolerance: float
    states_per_forward: int | None = None
    reduction: Literal["ordered", "allreduce"] = "ordered"


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Metrics over the groups of all ranks, and why the optimizer did not step ("" if it did)."""

    metrics: dict[str, float]
    skipped: str = ""


def learning_step(
    velocity: ConditionedVelocity,
    others: Mapping[Policy, ConditionedVelocity],
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    objective: ObjectiveProtocol,
    groups: Mapping[int, tuple[RolloutGroup, Advantages]],
    *,
    trained: Sequence[int],
    ranks: Collective,
    idle: Callable[[], None] = lambda: None,
    config: LearningConfig,
    num_references: int,
    run_seed: int,
    update: int,
    pass_index: int,
    on_policy: str,
) -> StepResult:
    """Adds the mean gradient over groups, points and anchors, clips it and steps the optimizer.

    A loss or gradient that is not finite leaves parameters and optimizer as they are.

    Args:
        others: velocities under other weights, without gradient; those that the objective names are
            evaluated.
        groups: this rank's trained groups by slot.
        trained: the trained slots of all ranks, ascending.
        idle: what a rank does in a round of slots in which it has none to train.
        on_policy: sha256 of the adapter as it is now; groups rolled out with it must have a ratio
            of 1. "" requires it of none.

    Raises:
        TrainingFailed: on a ratio that is not 1 on-policy (the actors and the learner do not
            compute the same function). The optimizer has not stepped then.
    """
    # One flat vector: a gradient travels between ranks, and is added, in a single piece.
    total = torch.zeros(
        sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
    )
    tallies: dict[int, dict[str, list[float]]] = {}
    # A round is one slot of every rank, and all ranks go through it together. A forward of a
    # sharded base is a collective call, so a rank that has no group takes part too (``idle``).
    for start in sorted({slot - slot % ranks.world for slot in trained}):
        slot, gradient = start + ranks.rank, torch.zeros_like(total)
        if slot in groups:
            group, advantages = groups[slot]
            batches = losses(
                velocity,
                others,
                objective,
                group,
                advantages,
                num_references=num_references,
                generator=_anchor_generator(run_seed, group, update, pass_index),
                states_per_forward=config.states_per_forward,
            )
            tallies[slot] = _backward(batches, num_groups=len(trained))
            if group.adapter.sha256 == on_policy:
                tallies[slot][_ON_POLICY] = tallies[slot].get("ratio/max_deviation", [])
            gradient = _flat(parameters)
        else:
            idle()
        # Gradients of the next group start from nothing, so that no order of ranks enters them.
        optimizer.zero_grad(set_to_none=True)
        if config.reduction == "allreduce":
            total += gradient
        else:
            _add_in_slot_order(total, gradient, start, trained, ranks)
    if config.reduction == "allreduce":
        total = ranks.total(total)
    return _step(parameters, optimizer, total, _gathered(ranks, tallies), config)


def _anchor_generator(
    run_seed: int, group: RolloutGroup, update: int, pass_index: int
) -> torch.Generator:
    """Seeds a group's draw of anchors by content, so that a replay of the update draws the same."""
    return NoiseSource(run_seed, group.group_id, update).generator("anchors", pass_index)


def _backward(
    batches: Iterator[list[tuple[ReplayPoint, LossOutput]]], *, num_groups: int
) -> dict[str, list[float]]:
    """Adds a group's gradient to the parameters and returns its numbers by name."""
    tally: dict[str, list[tuple[Tensor, float]]] = defaultdict(list)
    for batch in batches:
        # L = 1/N sum_groups sum_points w_p L_p, with the weights of a group's points summing to 1.
        # The mean over anchors and candidates is part of each point's loss.
        torch.stack(
            [output.loss * (point.weight / num_groups) for point, output in batch]
        ).sum().backward()
        # Detached tensors wait on the device: reading them here would stop it at every batch.
        for point, output in batch:
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                tally[name].append((value, point.weight))
    return {name: _of_group(name, values) for name, values in tally.items()}


def _add_in_slot_order(
    total: Tensor, gradient: Tensor, start: int, trained: Sequence[int], ranks: Collective
) -> None:
    """Adds the gradients of a round to ``total`` in place, slot by slot.

    Floating-point sums depend on their order: this one is the same for any number of ranks.
    """
    for rank in range(ranks.world):
        if start + rank in trained:
            total += ranks.broadcast(gradient, rank)


def losses(
    velocity: ConditionedVelocity,
    others: Mapping[Policy, ConditionedVelocity],
    objective: ObjectiveProtocol,
    group: RolloutGroup,
    advantages: Advantages,
    *,
    num_references: int,
    generator: torch.Generator,
    states_per_forward: int | None,
) -> Iterator[list[tuple[ReplayPoint, LossOutput]]]:
    """Yields a group's points with their losses, a batch per forward.

    Lazily, so that one batch's graph is alive at a time.
    """
    points = objective.replay(
        group,
        advantages,
        num_references=num_references,
        generator=generator,
        states_per_forward=states_per_forward,
    )
    for batch in _batches(points, states_per_forward):
        velocities = _velocities(velocity, others, objective.policies, batch, group.conditioning)
        yield [
            (point, objective.loss(point, at)) for point, at in zip(batch, velocities, strict=True)
        ]


def _batches(
    points: Sequence[ReplayPoint], states_per_forward: int | None
) -> list[list[ReplayPoint]]:
    """Joins neighbouring points up to ``states_per_forward`` states in a forward."""
    # Greedy and in order, so that the batches of a group are the same on every rank.
    batches: list[list[ReplayPoint]] = []
    for point in points:
        if (
            states_per_forward is not None
            and batches
            and sum(len(p.latents) for p in batches[-1]) + len(point.latents) <= states_per_forward
        ):
            batches[-1].append(point)
        else:
            batches.append([point])
    return batches


def _velocities(
    velocity: ConditionedVelocity,
    others: Mapping[Policy, ConditionedVelocity],
    policies: frozenset[Policy],
    points: Sequence[ReplayPoint],
    conditioning: Conditioning,
) -> list[Velocities]:
    """Evaluates the velocities at every point, in one forward per policy."""
    latents = torch.cat([point.latents for point in points])
    sigma = torch.cat([point.sigma for point in points])
    sizes = [len(point.latents) for point in points]
    # Sorted: with a sharded base the ranks must make the same forwards in the same order.
    fixed = {
        name: others[name](latents, sigma, conditioning).split(sizes) for name in sorted(policies)
    }
    # The trained policy comes last: its graph is not yet alive while the others run.
    current = velocity(latents, sigma, conditioning).split(sizes)
    return [
        Velocities(policy=part, **{name: values[i] for name, values in fixed.items()})
        for i, part in enumerate(current)
    ]


_ON_POLICY = "on-policy deviation"
"""The deviations among a slot's numbers that must be zero; no metric."""

# Endings of metrics that are the largest or the smallest of a batch, and never averaged.
_EXTREMES = ("/max", "/max_deviation", "/min")


def _of_group(name: str, values: Sequence[tuple[Tensor, float]]) -> list[float]:
    """Reduces a number of a group's points to their weighted mean; extremes stay as they are."""
    numbers = torch.stack([value for value, _ in values])
    if name.endswith(_EXTREMES):
        return numbers.tolist()
    weights = torch.tensor(
        [weight for _, weight in values], dtype=numbers.dtype, device=numbers.device
    )
    # sum_p w_p n_p / sum_p w_p: splitting a point into parts changes nothing.
    return [float((numbers * weights).sum() / weights.sum())]


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    # A parameter that no loss of the group reaches has no gradient: it counts as 0.
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )


def _gathered(
    ranks: Collective, tallies: Mapping[int, Mapping[str, Sequence[float]]]
) -> dict[str, Tensor]:
    """Gathers every rank's numbers, in slot order: all ranks then decide the same."""
    # JSON writes a float so that it reads back bit for bit, NaN and infinity included.
    everyone = {
        int(slot): tally
        for text in ranks.exchange(json.dumps(tallies))
        for slot, tally in json.loads(text).items()
    }
    numbers: dict[str, list[float]] = defaultdict(list)
    for slot in sorted(everyone):
        for name, values in everyone[slot].items():
            numbers[name].extend(values)
    return {name: torch.tensor(values) for name, values in numbers.items()}


def _step(
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    gradient: Tensor,
    numbers: dict[str, Tensor],
    config: LearningConfig,
) -> StepResult:
    """Steps the optimizer along a gradient, unless the numbers forbid it."""
    # With unchanged weights new and old policy are one, so every ratio is exp(0) = 1.
    deviations = numbers.pop(_ON_POLICY, torch.zeros(0))
    deviation = float(deviations.max()) if len(deviations) else 0.0
    if deviation > config.ratio_tolerance:
        raise TrainingFailed(
            f"policy ratio deviates from 1 by {deviation:.3g} with unchanged weights (tolerance "
            f"{config.ratio_tolerance:g}): actor and learner do not compute the same velocity. "
            "Use the same editor.dtype, device kind and editor.micro_batch in both, or raise "
            "train.ratio_tolerance."
        )
    metrics = {name: _summary(name, values) for name, values in numbers.items()}
    # Each parameter's gradient is a view into the flat sum; clipping scales them all by
    # min(1, max_grad_norm / norm).
    for parameter, part in zip(
        parameters, gradient.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = part.view_as(parameter)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    metrics["gradient/norm"] = norm
    skipped = ""
    # The norm is the same on every rank, and so is this decision.
    if bool(torch.tensor([norm, metrics["loss"]]).isfinite().all()):
        optimizer.step()
    else:
        skipped = f"loss {metrics['loss']:g} or gradient norm {norm:g} is not finite"
    optimizer.zero_grad(set_to_none=True)
    return StepResult(metrics=metrics, skipped=skipped)


def averaged(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Averages the metrics of the steps that shared a batch of groups; extremes stay extremes."""
    return {
        name: _summary(name, torch.tensor([step[name] for step in steps if name in step]))
        for step in steps
        for name in step
    }


def _summary(name: str, values: Tensor) -> float:
    reduced = (
        values.max()
        if name.endswith(("/max", "/max_deviation"))
        else values.min()
        if name.endswith("/min")
        else values.mean()
    )
    return float(reduced)
