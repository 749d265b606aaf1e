"""Records between an objective and the learner: states to evaluate again, and velocities there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Policy = Literal["reference", "acting"]
"""Weights besides the trained ones: the base editor's ("reference"), or those the actors run."""


@dataclass(frozen=True, kw_only=True)
class ReplayPoint:
    """States whose velocity under the current weights the loss needs.

    Attributes:
        latents, sigma: where to evaluate; no gradient flows into them.
        context: private to the objective that made the point.
        weight: of the point's loss; the weights of a group's points sum to 1.
    """

    latents: Float[Tensor, "batch token channel"]
    sigma: Float[Tensor, " batch"]
    context: Any
    weight: float


@dataclass(frozen=True, kw_only=True)
class Velocities:
    """Velocities at the states of a point.

    Attributes:
        policy: under the current weights; the only one that takes a gradient.
        reference, acting: under the base editor and under the acting weights; None unless the
            objective asks for them.
    """

    policy: Float[Tensor, "batch token channel"]
    reference: Float[Tensor, "batch token channel"] | None = None
    acting: Float[Tensor, "batch token channel"] | None = None

    def of(self, policy: Policy) -> Float[Tensor, "batch token channel"]:
        """Returns the velocity under other weights, which the objective has to name."""
        velocity = self.reference if policy == "reference" else self.acting
        # Only the learner makes this record, so a missing velocity is our fault, not the user's.
        assert velocity is not None, (
            f"the learner evaluates {policy!r} for objectives that name it in policies"
        )
        return velocity


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Facts of a run that an objective must fit, known when the config is read.

    Attributes:
        group_size: candidates of a group; ``num_references`` of them are unperturbed.
        num_steps: rollout steps.
        stochastic: how many of them are stochastic.
        multistep: whether the rollout solver uses earlier steps.
        guided: whether the velocity is guided by a second, negative forward.
    """

    group_size: int
    num_references: int
    num_steps: int
    stochastic: int
    multistep: bool
    guided: bool = False


def parts(indices: Tensor, states_per_forward: int | None) -> tuple[Tensor, ...]:
    """Splits indices into batches of at most ``states_per_forward``; None is one batch."""
    batches: tuple[Tensor, ...] = indices.split(states_per_forward or len(indices))
    return batches


def draw(indices: range, number: int | None, generator: torch.Generator) -> tuple[int, ...]:
    """Draws ``number`` indices without replacement, ascending; all of them when None or too few."""
    # Where all are taken the generator does not advance: later draws keep their values.
    if number is None or number >= len(indices):
        return tuple(indices)
    return tuple(
        sorted(
            indices[i] for i in torch.randperm(len(indices), generator=generator)[:number].tolist()
        )
    )


def ratio_metrics(ratio: Tensor, gain: Tensor, clipped: Tensor) -> dict[str, Tensor]:
    """Measures policy ratios and their clipping."""
    # The clip acts where it lowers min(rho A, clip(rho) A).
    with torch.no_grad():
        return {
            "ratio/mean": ratio.mean(),
            "ratio/min": ratio.min(),
            "ratio/max": ratio.max(),
            "ratio/max_deviation": (ratio - 1).abs().max(),
            "clip/share": ((ratio * gain) > (clipped * gain)).float().mean(),
        }
