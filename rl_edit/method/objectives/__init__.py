"""Objectives: states to evaluate again under the current weights, and the loss there.

An objective turns a group and its advantages into replay points, and velocities at those points
into a loss. It reads no weights and runs no model. The learner evaluates exactly the points it
returns, under exactly the policies it names.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rl_edit.method.objectives.background_regularised import BackgroundRegularised
from rl_edit.method.objectives.forward_process import ForwardProcess
from rl_edit.method.objectives.neighbor import NeighborSurrogate
from rl_edit.method.objectives.protocol import ObjectiveProtocol
from rl_edit.method.objectives.region_regularised import RegionRegularised
from rl_edit.method.objectives.replay import Policy, ReplayPoint, Setting, Velocities
from rl_edit.method.objectives.transition import TransitionSurrogate
from rl_edit.method.plugins import Plugin

Objective = Annotated[
    NeighborSurrogate
    | TransitionSurrogate
    | ForwardProcess
    | BackgroundRegularised
    | RegionRegularised,
    Field(discriminator="kind"),
    Plugin("algorithm.objective", ObjectiveProtocol),
]
"""Seam: from advantages and trajectories to a loss."""

__all__ = [
    "BackgroundRegularised",
    "ForwardProcess",
    "NeighborSurrogate",
    "Objective",
    "ObjectiveProtocol",
    "Policy",
    "RegionRegularised",
    "ReplayPoint",
    "Setting",
    "TransitionSurrogate",
    "Velocities",
]
