"""An algorithm is a bundle of values in four seams. This is the only file where a paper's name selects behaviour.

==================  =============================================  ==========  ==========================================
method              initial noise                                  step noise  credit -> objective
==================  =============================================  ==========  ==========================================
RC-GRPO-Editing     strong inside the mask, weak outside, centre   none        one area-normalised row -> NeighborSurrogate
Neighbor GRPO       one spread everywhere                          none        one uniform row -> NeighborSurrogate
==================  =============================================  ==========  ==========================================
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from rl_edit.advantages import CreditRule, GroupCredit
from rl_edit.exploration import NoStepNoise, Perturbation, StepNoise
from rl_edit.objectives import NeighborSurrogate, Objective
from rl_edit.regions import MaskedRows, UniformRows


class Latest(BaseModel):
    """Actors run the newest published weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["latest"] = "latest"


class Algorithm(BaseModel):
    """The four seams, and which weights act. The validated value is the object that runs.

    Attributes:
        initial_noise: the law of a group's initial noises.
        step_noise: SDE level of each rollout step; zero is the ODE.
        credit: from reward tables to advantages.
        objective: from advantages and trajectories to a loss.
        acting: which weights the actors run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = "custom"
    initial_noise: Perturbation = Perturbation()
    step_noise: StepNoise = NoStepNoise()
    credit: CreditRule = GroupCredit()
    objective: Objective = NeighborSurrogate()
    acting: Latest = Latest()


def rc_grpo() -> Algorithm:
    """RC-GRPO-Editing (arXiv 2604.09386): region-decoupled noise, masked metric, minibatch-normalised terms.

    The paper does not state its spreads, group size or bandwidths; 0.3/0.02 follow Neighbor GRPO's best spread.
    """
    return Algorithm(
        name="rc-grpo",
        initial_noise=Perturbation(inside=0.3, outside=0.02, keep_reference=True),
        credit=GroupCredit(normalise="minibatch", rows=MaskedRows()),
        objective=NeighborSurrogate(num_anchors=4),
    )


def neighbor_grpo() -> Algorithm:
    """Neighbor GRPO (arXiv 2511.16955): one spread of 0.3 everywhere, plain metric, quasi-norm p = 0.8, symmetric anchors."""
    return Algorithm(
        name="neighbor-grpo",
        initial_noise=Perturbation(inside=0.3, outside=0.3, keep_reference=False),
        credit=GroupCredit(normalise="group", rows=UniformRows(), quasi_norm=0.8),
        objective=NeighborSurrogate(num_anchors=4, temperature=1.0),
    )


BUNDLES = {"rc-grpo": rc_grpo, "neighbor-grpo": neighbor_grpo}
"""Vetted bundles by paper name; ``algorithm.name`` in a config picks one and the other keys adjust it."""

CITATIONS = {
    "rc-grpo": "RC-GRPO-Editing, arXiv 2604.09386",
    "neighbor-grpo": "Neighbor GRPO, arXiv 2511.16955",
}
