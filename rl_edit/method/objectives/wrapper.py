"""Wrappers: a plain objective plus a term of the loss at the same points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rl_edit.method.objectives.protocol import ObjectiveProtocol
from rl_edit.method.objectives.replay import Policy, ReplayPoint, Setting
from rl_edit.types import Advantages, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class WrappedContext:
    """The wrapped objective's point, and the inputs of the added term.

    Attributes:
        inner: the point as the wrapped objective made it, with its own context.
        source: clean latents of the image to edit.
        edited: True on the tokens of the edit region.
    """

    inner: ReplayPoint
    source: Float[Tensor, "token channel"]
    edited: Bool[Tensor, "rows columns"]


class Wrapper(BaseModel, ABC):
    """A plain objective plus one term.

    Everything but the loss comes from the wrapped objective.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    @abstractmethod
    def wrapped(self) -> ObjectiveProtocol:
        """The plain objective."""

    @property
    def policies(self) -> frozenset[Policy]:
        return self.wrapped.policies

    def check(self, setting: Setting) -> None:
        # The error has to name the setting that the user wrote, which is below ``inner``.
        try:
            self.wrapped.check(setting)
        except ValueError as error:
            raise ValueError(f"inner {self.wrapped.kind!r} {error}") from error

    def trained_steps(
        self, levels: Float[Tensor, " step"], generator: torch.Generator
    ) -> tuple[int, ...]:
        return self.wrapped.trained_steps(levels, generator)

    def replay(
        self,
        group: RolloutGroup,
        advantages: Advantages,
        *,
        num_references: int,
        generator: torch.Generator,
        states_per_forward: int | None = None,
    ) -> list[ReplayPoint]:
        """Returns the wrapped objective's points, with the source and the edit region."""
        points = self.wrapped.replay(
            group,
            advantages,
            num_references=num_references,
            generator=generator,
            states_per_forward=states_per_forward,
        )
        # The points stay the wrapped objective's own, so the added term costs no further state.
        source, edited = group.conditioning.source_latents, group.areas.any(dim=0)
        # The inner context stays reachable: the wrapped loss reads it from the inner point.
        return [
            replace(point, context=WrappedContext(inner=point, source=source, edited=edited))
            for point in points
        ]
