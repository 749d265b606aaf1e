"""Evaluation: metrics by convention, paired statistics, and base against adapter on held-out tasks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EvaluationConfig(BaseModel):
    """How base and adapter are compared: the same held-out tasks, the same noises.

    Attributes:
        num_tasks: held-out tasks; fewer if the data has fewer.
        num_noises: noises per task; intervals cluster by task.
        num_steps: solver steps; None takes the rollout's.
        seed: root of the evaluation noises, apart from training's.
        examples: tasks whose pictures are written, spread over task types.
        batch_size: rows evaluated together; a multiple of ``editor.micro_batch`` wastes none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_tasks: int = Field(default=256, ge=1)
    num_noises: int = Field(default=1, ge=1)
    num_steps: int | None = Field(default=None, ge=2)
    seed: int = 1_000_003
    examples: int = Field(default=12, ge=0)
    batch_size: int = Field(default=16, ge=1)
