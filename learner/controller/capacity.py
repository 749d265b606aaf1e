"""The devices that a run's workers occupy, and how efficiently they are used."""

from __future__ import annotations

from dataclasses import dataclass

from learner.controller.placement import GroupCost, ideal_seconds
from rl_edit.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Devices: GPUs where the run has any, else CPU cores.

    Attributes:
        rollout, reward, learner: devices that one worker of the role keeps busy while it works.
        total: devices that the run has.
        divisible: True when workers of the roles could be exchanged one for one. Only then does
            advice on the split make sense.
    """

    rollout: float = 1
    reward: float = 1
    learner: float = 1
    total: float = 1
    divisible: bool = False

    @classmethod
    def of(cls, config: RunConfig, threads: tuple[int, int], cores: int) -> Capacity:
        """Returns the devices of a run: GPUs where it has any, else cores.

        Waiting for a judge elsewhere occupies none.

        Args:
            threads: CPU threads of a rollout actor and of a learner rank.
            cores: cores of this machine.
        """
        actors = config.actors
        colocated = actors.placement == "colocated"
        learner_gpus = actors.rollout_gpus if colocated else actors.learner_gpus
        total = actors.num_rollout * actors.rollout_gpus + actors.num_reward * actors.reward_gpus
        # Colocated ranks learn on the GPUs of the rollout actors, which are counted already.
        if not colocated:
            total += actors.num_learner * learner_gpus
        if total:
            return cls(
                rollout=actors.rollout_gpus,
                reward=actors.reward_gpus,
                learner=learner_gpus,
                total=total,
                divisible=actors.rollout_gpus == actors.reward_gpus == learner_gpus,
            )
        return cls(
            rollout=min(threads[0], cores),
            reward=0 if any(term.remote for term in config.rewards.values()) else 1,
            learner=min(threads[1], cores),
            total=cores if actors.runtime == "ray" else threads[0],
        )

    def efficiency(self, cost: GroupCost, groups: int, measured_s: float) -> float:
        """Returns the ideal time over the measured one: 1 when no device ever waited."""
        # Worker seconds become device seconds, because a worker may occupy several devices or none.
        occupied = GroupCost(
            rollout_s=cost.rollout_s * self.rollout,
            reward_s=cost.reward_s * self.reward,
            learn_s=cost.learn_s * self.learner,
        )
        return ideal_seconds(occupied, 1, groups) / self.total / measured_s
