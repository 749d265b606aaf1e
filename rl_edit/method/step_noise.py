"""Step noise: which steps of a rollout are stochastic in an update, and how much.

A schedule is a function of the update and holds no state, so every actor computes the same.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from rl_edit.method.exploration import keyed_seed
from rl_edit.types import SDE


class NoStepNoise(BaseModel):
    """Deterministic rollouts: the probability-flow ODE at every step."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["none"] = "none"

    @property
    def sde(self) -> SDE:
        """The law of stochastic steps, of which there are none: any value serves."""
        return "flow"

    def __call__(self, update: int, num_steps: int) -> Float[Tensor, " step"]:
        """Returns the SDE level of each rollout step: 0 is the ODE."""
        return torch.zeros(num_steps)

    def check(self, num_steps: int) -> None:
        """Fits any number of steps; other laws raise ValueError where they do not."""


class ConstantNoise(BaseModel):
    """Stochastic steps all along, but for the last (Flow-GRPO, arXiv 2505.05470).

    The last step's density is too sharp to be a policy.

    Attributes:
        level: a of ``flow.moments``. 0.7 in Flow-GRPO; 0.9 for FLUX.1-Kontext, 1.0 for
            Qwen-Image-Edit in its released configs.
        sde: which law.
        skip_last: trailing steps that stay deterministic (the released ``timestep_fraction`` 0.99).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["constant"] = "constant"
    level: float = Field(default=0.7, gt=0)
    sde: SDE = "flow"
    skip_last: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> ConstantNoise:
        _require_level(self.sde, self.level)
        return self

    def __call__(self, update: int, num_steps: int) -> Float[Tensor, " step"]:
        levels = torch.full((num_steps,), self.level)
        # The deviation of a step goes to 0 with its end, and a log-density with it to infinity.
        levels[num_steps - self.skip_last :] = 0
        return levels

    def check(self, num_steps: int) -> None:
        if self.skip_last >= num_steps:
            raise ValueError(
                f"algorithm.step_noise.skip_last {self.skip_last} leaves no stochastic step of "
                f"rollout.num_steps {num_steps}: lower it, or roll out more steps."
            )


class NoiseWindow(BaseModel):
    """Stochastic steps in a moving window, the ODE elsewhere (MixGRPO, Flow-GRPO-Fast).

    MixGRPO is arXiv 2507.21802.

    Attributes:
        level, sde: as in :class:`ConstantNoise`.
        size: steps in the window.
        schedule: how its first step moves. "progressive": by ``stride`` every ``every`` updates;
            "exponential": it stays ``every * exp(-decay * max(position - threshold, 0))`` updates
            (rounded up) at each position, so that later steps get less; "random": anew for each
            update; "fixed": never.
        every: updates at a position, of the progressive and the exponential schedule.
        stride: steps between two positions.
        decay: of the exponential schedule.
        threshold: position from which the exponential schedule shortens its stays.
        first, stop: window starts lie in ``[first, stop - size]``; ``stop`` None ends two steps
            before the end, as released. Past the last start, which a long stride does not leap
            over, the window rolls back to ``first``. It never shrinks and is never empty.
        seed: of the random schedule: a function of the update, so that every actor draws the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: Literal["window"] = "window"
    level: float = Field(default=0.7, gt=0)
    sde: SDE = "flow"
    size: int = Field(default=4, ge=1)
    schedule: Literal["progressive", "exponential", "random", "fixed"] = "progressive"
    every: int = Field(default=25, ge=1)
    stride: int = Field(default=1, ge=1)
    decay: float = Field(default=0.1, ge=0)
    threshold: int = Field(default=13, ge=0)
    first: int = Field(default=0, ge=0)
    stop: int | None = Field(default=None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> NoiseWindow:
        _require_level(self.sde, self.level)
        return self

    def starts(self, num_steps: int) -> range:
        """Lists the steps at which the window may start."""
        # ``[l, min(l + size, num_steps - 2))`` is MixGRPO's window; here it never shrinks.
        # At least one step, for grids too short for the two that stay deterministic.
        stop = max(num_steps - 2, 1) if self.stop is None else self.stop
        return range(self.first, stop - self.size + 1)

    def start(self, update: int, num_steps: int) -> int:
        """Computes the first step of an update's window."""
        starts = self.starts(num_steps)
        if self.schedule == "fixed":
            return starts[0]
        if self.schedule == "random":
            # A function of the update and no state: every actor draws the same, after a resume too.
            seed = keyed_seed(self.seed, "window", update)
            return starts[
                int(torch.randint(len(starts), (), generator=torch.Generator().manual_seed(seed)))
            ]
        # The last whole window is always one of them, so that a cycle leaves no step out.
        positions = sorted({*starts[:: self.stride], starts[-1]})
        stays = [self._stay(position) for position in positions]
        # One cycle takes sum(stays) updates; the window then rolls back to its first position.
        remaining = update % sum(stays)
        for position, stay in zip(positions, stays, strict=True):
            if remaining < stay:
                return int(position)
            remaining -= stay
        raise AssertionError("the remainder of a sum is below it")

    def _stay(self, position: int) -> int:
        if self.schedule == "progressive":
            return self.every
        # ceil(every exp(-k relu(l - threshold))): the released exponential schedule.
        return max(
            1, math.ceil(self.every * math.exp(-self.decay * max(position - self.threshold, 0)))
        )

    def __call__(self, update: int, num_steps: int) -> Float[Tensor, " step"]:
        start = self.start(update, num_steps)
        levels = torch.zeros(num_steps)
        levels[start : start + self.size] = self.level  # all other steps are the ODE
        return levels

    def check(self, num_steps: int) -> None:
        stop = max(num_steps - 2, 1) if self.stop is None else self.stop
        if stop > num_steps - 1:
            raise ValueError(
                f"algorithm.step_noise.stop {stop} reaches the last of rollout.num_steps "
                f"{num_steps}, whose density is too sharp to train: use at most {num_steps - 1}."
            )
        if not self.starts(num_steps):
            raise ValueError(
                f"algorithm.step_noise.size {self.size} does not fit between step {self.first} and "
                f"step {stop} of rollout.num_steps {num_steps}: use a smaller window or roll out "
                "more steps."
            )


def _require_level(sde: SDE, level: float) -> None:
    # cps: the fresh share of the noise is sin(a pi / 2), which is all of it at a = 1.
    if sde == "cps" and level > 1:
        raise ValueError(
            f"level {level:g} with sde 'cps' is beyond 1, where all noise is fresh: use at most 1."
        )


StepNoise = Annotated[NoStepNoise | ConstantNoise | NoiseWindow, Field(discriminator="kind")]
"""Seam: SDE level of each rollout step, ``(update, num_steps) -> [step]``, and the law of
stochastic ones."""
