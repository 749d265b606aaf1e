"""Rewards of your own in one file: a Python function, and a class with settings.

    python examples/own_reward.py        # two updates on both, into runs/own_reward

A configuration or the command line names them in the same way; nothing is registered:

    export PYTHONPATH=examples
    MINE='rewards.restraint={kind: own_reward:Restraint, tolerance: 0.05, weight: 0.5}'
    rl-edit train --preset tiny-rc-grpo "$MINE"
    rl-edit audit-reward --preset tiny-rc-grpo "$MINE" --term restraint

The contract of a term is ``rl_edit/rewards/term.py``; how to trust one is ``docs/rewards.md``.
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from rl_edit.config import load_config
from rl_edit.rewards import RewardTerm
from rl_edit.rewards.term import Sides
from rl_edit.training import train
from rl_edit.types import Candidates, Score


def sharpness(candidates: Candidates) -> list[float]:
    """Scores the mean difference between neighbouring pixels, 0..1: one number per candidate."""
    images = candidates.images.float() / 255  # [group, height, width, 3], uint8 before
    scores: list[float] = images.diff(dim=2).abs().mean(dim=(1, 2, 3)).tolist()
    return scores


class Restraint(RewardTerm):
    """Scores how little the background changed: 1 is untouched, 0 is ``tolerance`` or more.

    Attributes:
        tolerance: mean absolute change, 0..1, from which the score is 0.
    """

    kind: Literal["own_reward:Restraint"] = "own_reward:Restraint"
    tolerance: float = Field(default=0.1, gt=0, le=1)

    responds_to: ClassVar[Sides] = "outside"  # the audit tests this claim
    requires: ClassVar[frozenset[str]] = frozenset()  # or "target", "caption", "regions"
    low: ClassVar[float] = 0.0  # a value outside low..high is refused, never clipped
    high: ClassVar[float] = 1.0
    needs_attention: ClassVar[bool] = False

    def score(self, candidates: Candidates) -> tuple[Score, ...]:
        """Components: ``change``, before the tolerance is applied."""
        task = candidates.task
        difference = (candidates.images.float() - task.source.float()).abs() / 255
        # edit_mask is True where the instruction may change pixels; the rest is the background.
        change = difference[:, ~task.edit_mask].mean(dim=(1, 2)).tolist()
        return tuple(
            Score(value=max(0.0, 1 - size / self.tolerance), components={"change": size})
            for size in change
        )


OVERRIDES = (
    "rewards.restraint={kind: own_reward:Restraint, tolerance: 0.05, weight: 0.5}",
    # A function declares its range in the configuration. Weight 0 only measures it.
    "rewards.sharpness={kind: python, function: own_reward:sharpness, low: 0, high: 1, weight: 0}",
    "actors.runtime=inline",
    "train.updates=2",
    "train.groups_per_update=2",
    "data.num_train=16",
)

if __name__ == "__main__":
    train(load_config(preset="tiny-rc-grpo", overrides=OVERRIDES), Path("runs/own_reward"))
