"""Evaluation: metrics by convention, paired statistics, base against adapter on held-out tasks, and what is watched while training."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EvaluationConfig(BaseModel):
    """How base and adapter are compared (the same held-out tasks, the same noises), and how held-out tasks are watched in training.

    Attributes:
        num_tasks: held-out tasks; fewer if the data has fewer.
        num_noises: noises per task; intervals cluster by task.
        num_steps: solver steps; None takes the rollout's.
        seed: root of the evaluation noises, apart from training's.
        examples: tasks whose pictures are written, spread over task types.
        batch_size: rows evaluated together; a multiple of ``editor.micro_batch`` wastes none.
        every: updates between two looks at held-out tasks during training; 0 is never. A look costs one candidate a task and
            changes nothing that is learnt.
        gold: the reward term that is trusted there; None is the first judge, or the first term where there is none. Best one that
            is not trained on (weight 0).
        probe_tasks: the first so many held-out tasks are looked at, fewer if the data has fewer.
        patience: looks in a row with more training reward and less gold than the one before, at which the alarm is raised.
        stop_on_alarm: end the run there; the best adapter by gold is kept either way.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    num_tasks: int = Field(default=256, ge=1)
    num_noises: int = Field(default=1, ge=1)
    num_steps: int | None = Field(default=None, ge=2)
    seed: int = 1_000_003
    examples: int = Field(default=12, ge=0)
    batch_size: int = Field(default=16, ge=1)
    every: int = Field(default=0, ge=0)
    gold: str | None = None
    probe_tasks: int = Field(default=32, ge=1)
    patience: int = Field(default=3, ge=1)
    stop_on_alarm: bool = False
