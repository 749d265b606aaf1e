"""The policy: the trained adapter, its optimizer, and the averages of it.

Everything that a learner continues from is here, and so is its form in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rl_edit.config import RunConfig
from rl_edit.editors import Editor, lora
from rl_edit.errors import InputError
from rl_edit.messages import LearnerState
from rl_edit.method.algorithms import Latest
from rl_edit.method.objectives import Policy
from rl_edit.method.update import ConditionedVelocity
from rl_edit.types import AdapterId, AdapterWeights, Conditioning, RewardTable


class TrainedPolicy:
    """Holds a trained adapter, its optimizer and its averages.

    The base under it is frozen. There are three sets of weights, which are one in most runs:

    - the policy, which the optimizer moves;
    - the acting weights, which the actors run: the policy, or a decayed average of it
      (``algorithm.acting``);
    - the resulting weights, which are evaluated and saved: the policy, or an exponential moving
      average of it (``train.ema_decay``).

    Attributes:
        parameters: the policy's parameters, in a fixed order.
        averages: averages by name ("acting", "result"); each has a tensor for each parameter.
        exploration: in-mask noise spread by task type, for laws that are steered.
        updates_done: updates that the weights have seen.
        skipped_in_a_row: newest updates in a row that moved nothing.
    """

    def __init__(self, config: RunConfig, editor: Editor) -> None:
        self.config, self.editor = config, editor
        lora.attach(editor.transformer, config.lora, seed=config.seed)
        self._named = lora.named_parameters(editor.transformer)
        self.parameters = list(self._named.values())
        # Only the adapter: the base is frozen and has no optimizer state.
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.train.learning_rate, weight_decay=config.train.weight_decay
        )
        self.updates_done = 0
        self.skipped_in_a_row = 0
        self.exploration: dict[str, float] = {}
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._reads_acting = "acting" in config.algorithm.objective.policies
        # Within an update the policy moves and the acting weights do not. An objective that reads
        # their velocity needs a copy even where the actors run the latest weights.
        if self._reads_acting or not isinstance(config.algorithm.acting, Latest):
            self.averages["acting"] = self._copy()
        if config.train.ema_decay is not None:
            self.averages["result"] = self._copy()
        if self._reads_acting:
            lora.attach(editor.transformer, config.lora, seed=config.seed, adapter_name=lora.ACTING)
        lora.set_active(editor.transformer, True)

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._named.items()}

    def weights(self, which: Literal["policy", "acting", "result"]) -> AdapterWeights:
        """Copies one set of weights as an adapter."""
        tensors = lora.exported(self.averages.get(which, self._named))
        return AdapterWeights(
            id=AdapterId(self.updates_done, lora.digest(tensors)),
            tensors=tensors,
            # It travels with the weights, so that actors explore alike, after a resume too.
            exploration=dict(self.exploration),
        )

    def finish_update(
        self, *, trained: bool, scored: Sequence[tuple[str, RewardTable]]
    ) -> dict[str, float]:
        """Ends an update: averages, exploration, count.

        Args:
            trained: whether the update moved the policy.
            scored: task type and reward table of each group.

        Returns:
            metrics of how the groups were explored.
        """
        if trained:
            self._move_averages()
        law, before = self.config.algorithm.initial_noise, self.exploration
        self.exploration = law.steered(before, scored)
        self.updates_done += 1
        return law.measured(before, scored)

    @torch.no_grad()
    def _move_averages(self) -> None:
        """Moves each average towards the policy."""
        n, ema = self.updates_done, self.config.train.ema_decay
        decay = {
            # Counted from 1, as released: the first update decays by decay(1).
            "acting": self.config.algorithm.acting.decay(n + 1),
            # A young average follows closely: min((1 + n) / (10 + n), decay).
            "result": 0.0 if ema is None else min((1 + n) / (10 + n), ema),
        }
        for which, average in self.averages.items():
            # average <- decay * average + (1 - decay) * policy
            for name, parameter in self._named.items():
                average[name].lerp_(parameter.detach(), 1 - decay[which])

    def others(self) -> dict[Policy, ConditionedVelocity]:
        """Returns the velocities under other weights, without gradient.

        These are the base editor and the acting weights at the time of this call.
        """
        if self._reads_acting:
            acting = self.weights("acting")
            lora.load(self.editor.transformer, acting, adapter_name=lora.ACTING)
        return {"reference": self._reference, "acting": self._acting}

    # Both switch the policy's adapter on again: the next forward, and the recomputation of a
    # checkpointed one in its backward, must use the policy.

    @torch.no_grad()
    def _acting(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the velocity under the acting weights."""
        lora.set_active(self.editor.transformer, True, adapter_name=lora.ACTING)
        try:
            return self.editor.velocity(latents, sigma, conditioning)
        finally:
            lora.set_active(self.editor.transformer, True)

    @torch.no_grad()
    def _reference(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the velocity of the base: no adapter."""
        lora.set_active(self.editor.transformer, False)
        try:
            return self.editor.velocity(latents, sigma, conditioning)
        finally:
            lora.set_active(self.editor.transformer, True)

    def state(self) -> LearnerState:
        """Copies everything that evolves into named tensors.

        Names are ``parameter/NAME``, ``optimizer/KEY/NAME``, ``average/WHICH/NAME``,
        ``exploration/TASK_TYPE`` and ``skipped_in_a_row``.
        """
        # On the CPU and cloned: the state must not change with the next update.
        tensors = {"skipped_in_a_row": torch.tensor(self.skipped_in_a_row)}
        tensors |= {
            f"exploration/{name}": torch.tensor(value, dtype=torch.float64)
            for name, value in self.exploration.items()
        }
        for which, average in self.averages.items():
            tensors |= {
                f"average/{which}/{name}": value.cpu().clone() for name, value in average.items()
            }
        for name, parameter in self._named.items():
            tensors[f"parameter/{name}"] = parameter.detach().cpu().clone()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value).detach().cpu().clone()
        return LearnerState(updates_done=self.updates_done, tensors=tensors)

    def restore(self, state: LearnerState) -> None:
        """Puts back a state. Continuing is then bit for bit the uninterrupted run.

        Raises:
            InputError: the state of another adapter, or one without an average that is needed.
        """
        # Before anything is written: a refused state leaves the policy as it was.
        self._require_own(state.tensors)
        for name, parameter in self._named.items():
            parameter.data.copy_(state.tensors[f"parameter/{name}"])
            self.optimizer.state[parameter] = {
                # AdamW keeps its step counter on the CPU, its moments beside the parameter.
                key.split("/", 2)[1]: value.to(
                    "cpu" if key.startswith("optimizer/step/") else parameter.device
                ).clone()
                for key, value in state.tensors.items()
                if key.startswith("optimizer/") and key.split("/", 2)[2] == name
            }
        for which, average in self.averages.items():
            for name, value in average.items():
                value.copy_(state.tensors[f"average/{which}/{name}"])
        self.exploration = {
            key.split("/", 1)[1]: float(value)
            for key, value in state.tensors.items()
            if key.startswith("exploration/")
        }
        self.updates_done = state.updates_done
        self.skipped_in_a_row = int(state.tensors["skipped_in_a_row"])

    def _require_own(self, tensors: dict[str, Tensor]) -> None:
        """Refuses the state of another policy."""
        expected = {(f"parameter/{name}", p.shape) for name, p in self._named.items()}
        present = {
            (key, value.shape) for key, value in tensors.items() if key.startswith("parameter/")
        }
        if difference := sorted((key, tuple(shape)) for key, shape in expected ^ present):
            raise InputError(
                "the checkpoint's parameters are not those of this run's adapter "
                f"({difference[:2]}), so it cannot be continued: resume with the run's own lora "
                "settings"
            )
        missing = sorted(
            which
            for which in self.averages
            if not any(key.startswith(f"average/{which}/") for key in tensors)
        )
        if missing:
            raise InputError(
                f"the checkpoint has no average of {' and '.join(missing)} weights, so this run "
                "cannot be continued with one: resume with the run's own train.ema_decay and "
                "algorithm.acting"
            )
