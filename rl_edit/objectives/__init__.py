"""Objectives: what to evaluate again under the current weights, and the loss made of it.

An objective turns a group and its advantages into replay points, and velocities at those points into a loss. It reads
no weights and runs no model; the learner evaluates exactly the points asked for.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rl_edit.objectives.anchored import BackgroundAnchored
from rl_edit.objectives.neighbor import NeighborSurrogate
from rl_edit.objectives.replay import ReplayPoint

Objective = Annotated[NeighborSurrogate | BackgroundAnchored, Field(discriminator="kind")]

__all__ = ["BackgroundAnchored", "NeighborSurrogate", "Objective", "ReplayPoint"]
