"""One learning step: every replay point of every group, one gradient, one optimizer step.

Takes a velocity function with gradient; knows neither editor nor Ray. Groups are accumulated in the order given, which
the loop makes canonical, so a replayed step gives the same bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_edit.exploration import NoiseSource
from rl_edit.objectives import Objective
from rl_edit.types import Advantages, Conditioning, RolloutGroup

ConditionedVelocity = Callable[[Tensor, Tensor, Conditioning], Tensor]


class TrainingFailed(RuntimeError):
    """Training cannot go on: the message says what was seen and what to change. Exit code 3."""


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """Values of one learning step.

    Attributes:
        max_grad_norm: gradients above this norm are scaled down to it.
        ratio_tolerance: when ``on_policy``, the largest |ratio - 1| accepted before the optimizer may step.
    """

    max_grad_norm: float
    ratio_tolerance: float


def learning_step(
    velocity: ConditionedVelocity,
    reference: ConditionedVelocity,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batch: Sequence[tuple[RolloutGroup, Advantages]],
    *,
    config: LearningConfig,
    num_references: int,
    run_seed: int,
    update: int,
    pass_index: int,
    on_policy: bool,
) -> dict[str, float]:
    """Accumulates the mean loss over groups, points and anchors, clips the gradient and steps the optimizer.

    ``reference`` is the base editor's velocity, without gradient; it is evaluated only for objectives that need it.

    Raises:
        TrainingFailed: on a ratio that is not 1 on-policy (the actors and the learner do not compute the same
            function), or a non-finite loss or gradient. The optimizer has not stepped then.
    """
    optimizer.zero_grad(set_to_none=True)
    tally: dict[str, list[Tensor]] = defaultdict(list)
    for group, advantages in batch:
        generator = NoiseSource(run_seed, group.work_id, update).generator("anchors", pass_index)
        points = objective.replay(group, advantages, num_references=num_references, generator=generator)
        for point in points:
            base = reference(point.latents, point.sigma, group.conditioning) if objective.needs_reference else None
            output = objective.loss(point, velocity(point.latents, point.sigma, group.conditioning), base)
            (output.loss / (len(points) * len(batch))).backward()
            tally["loss"].append(output.loss.detach())
            for name, value in output.metrics.items():
                tally[name].append(value)
    metrics = {name: _summary(name, torch.stack(values)) for name, values in tally.items()}
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    metrics["gradient/norm"] = norm
    deviation = metrics.get("ratio/max_deviation", 0.0)
    if on_policy and deviation > config.ratio_tolerance:
        raise TrainingFailed(
            f"policy ratio deviates from 1 by {deviation:.3g} with unchanged weights (tolerance {config.ratio_tolerance:g}): "
            "actor and learner do not compute the same velocity. Use the same editor.dtype, device kind and editor.micro_batch in both, "
            "or raise train.ratio_tolerance."
        )
    if not torch.isfinite(torch.tensor([norm, metrics["loss"]])).all():
        raise TrainingFailed(
            f"loss {metrics['loss']} or gradient norm {norm} is not finite at update {update}: lower train.learning_rate or check the data"
        )
    optimizer.step()
    return metrics


def _summary(name: str, values: Tensor) -> float:
    reduced = values.max() if name.endswith(("/max", "/max_deviation")) else values.min() if name.endswith("/min") else values.mean()
    return float(reduced)
