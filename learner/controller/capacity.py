"""What the workers of a run occupy, so that their time can be compared with what the hardware could have done."""

from __future__ import annotations

from dataclasses import dataclass

from learner.controller.placement import GroupCost, ideal_seconds


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Devices: GPUs where the run has any, else CPU cores.

    Attributes:
        rollout, reward, learner: devices that one worker of the role keeps busy while it works.
        total: devices that the run has.
        divisible: whether workers of the roles could be exchanged one for one, so that advice on the split makes sense.
    """

    rollout: float = 1
    reward: float = 1
    learner: float = 1
    total: float = 1
    divisible: bool = False

    def efficiency(self, cost: GroupCost, groups: int, measured_s: float) -> float:
        """Ideal work-conserving time over the measured one: 1 when no device ever waited."""
        occupied = GroupCost(
            rollout_s=cost.rollout_s * self.rollout,
            reward_s=cost.reward_s * self.reward,
            learn_s=cost.learn_s * self.learner,
        )
        return ideal_seconds(occupied, 1, groups) / self.total / measured_s
