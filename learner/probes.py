"""Forwards on a group that train nothing: the ratio check, and the work of an idle rank."""

from __future__ import annotations

import torch

from learner.policy import TrainedPolicy
from rl_edit.method.regions import UniformRows
from rl_edit.method.rollout import blank_group, blank_task
from rl_edit.method.update import losses
from rl_edit.types import Advantages, RolloutGroup, moved


def ratio_deviation(policy: TrainedPolicy, group: RolloutGroup) -> float:
    """Measures the largest ``|ratio - 1|`` on a group.

    The group may be a chunk of one. Any candidate may be an anchor, for a chunk may hold
    few others than the reference. The forward keeps its gradient, as in learning: without one,
    kernels may differ.
    """
    # Alternating signs, so that both sides of the clip are met. Uniform rows need no mask.
    signs = 1.0 - 2.0 * (torch.arange(len(group.latents)) % 2)[:, None]
    rows = UniformRows()(group.candidates.token_mask)
    advantages = Advantages(values=signs, regions=rows, weights=torch.ones(1))
    deviations = [torch.zeros((), device=policy.device)]
    for batch in losses(
        policy.editor.velocity,
        policy.others(),
        policy.config.algorithm.objective,
        group,
        moved(advantages, policy.device),
        num_references=0,
        generator=torch.Generator().manual_seed(0),
        # A point at a time spares memory.
        states_per_forward=None,
    ):
        deviations += [
            value
            for _, output in batch
            for name, value in output.metrics.items()
            if name == "ratio/max_deviation"
        ]
    return float(torch.stack(deviations).max())


def idle(policy: TrainedPolicy) -> None:
    """Makes the forwards and backwards of one group, for nothing.

    Inputs are zeros and so is the gradient. With a sharded base every forward is a
    collective: a rank without a group in some round has to take part, or the others would wait for
    it for ever.
    """
    config, editor = policy.config, policy.editor
    algorithm, size = config.algorithm, config.rollout.group_size
    conditioning = moved(editor.encode(blank_task(editor.pixels_per_token)), policy.device)
    levels = algorithm.step_noise(policy.updates_done, config.rollout.num_steps)
    group = blank_group(
        conditioning,
        editor.latent_shape(conditioning),
        size=size,
        levels=levels,
        keep=algorithm.objective.trained_steps(levels, torch.Generator()),
    )
    rows = UniformRows()(group.candidates.token_mask)
    no_credit = Advantages(values=torch.zeros(size, 1), regions=rows, weights=torch.ones(1))
    # As many forwards as a real group makes: same steps, anchors and batches.
    for batch in losses(
        editor.velocity,
        policy.others(),
        algorithm.objective,
        moved(group, policy.device),
        moved(no_credit, policy.device),
        num_references=algorithm.initial_noise.num_references,
        generator=torch.Generator(),
        states_per_forward=config.train.states_per_forward,
    ):
        torch.stack([output.loss for _, output in batch]).sum().backward()
