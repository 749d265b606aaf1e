"""Objectives: what to evaluate again under the current weights, and the loss made of it.

An objective turns a group and its advantages into replay points, and velocities at those points into a loss. It reads
no weights and runs no model; the learner evaluates exactly the points asked for, under exactly the policies asked for.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rl_edit.objectives.anchored import BackgroundAnchored
from rl_edit.objectives.forward_process import ForwardProcess
from rl_edit.objectives.neighbor import NeighborSurrogate
from rl_edit.objectives.plain import ObjectiveLaw
from rl_edit.objectives.regularised import RegionRegularised
from rl_edit.objectives.replay import Policy, ReplayPoint, Setting, Velocities
from rl_edit.objectives.transition import TransitionSurrogate
from rl_edit.plugged import Plugged

Objective = Annotated[
    NeighborSurrogate | TransitionSurrogate | ForwardProcess | BackgroundAnchored | RegionRegularised,
    Field(discriminator="kind"),
    Plugged("algorithm.objective", ObjectiveLaw),
]
"""Seam: from advantages and trajectories to a loss."""

__all__ = [
    "BackgroundAnchored",
    "ForwardProcess",
    "NeighborSurrogate",
    "Objective",
    "ObjectiveLaw",
    "Policy",
    "RegionRegularised",
    "ReplayPoint",
    "Setting",
    "TransitionSurrogate",
    "Velocities",
]
