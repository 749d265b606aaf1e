"""The central learner: policy, optimizer, one step from groups to a new adapter. A plain class; any executor may hold it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rl_edit import adapters, wire
from rl_edit.advantages import Declined
from rl_edit.config import RunConfig
from rl_edit.editors import load_editor
from rl_edit.types import AdapterWeights, Advantages, Conditioning, RewardTable, RolloutGroup, moved
from rl_edit.update import LearningConfig, learning_step


@dataclass(frozen=True, kw_only=True)
class LearnReport:
    """What one update did.

    Attributes:
        adapter: the new weights, packed.
        metrics: loss, ratio, clip and gradient statistics; empty when no group was trained.
        declined: why groups were not trained, by kind: "invalid" or "spread".
    """

    adapter: np.ndarray
    metrics: dict[str, float]
    declined: dict[str, list[str]] = field(default_factory=dict)
    used: int = 0
    seconds: float = 0.0


class Learner:
    """Holds the trained adapter on a frozen base and its optimizer."""

    def __init__(self, config: RunConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.editor = load_editor(config.editor)
        adapters.attach(self.editor.transformer, config.lora, seed=config.seed)
        self.editor.transformer.requires_grad_(False)
        self.parameters = adapters.parameters(self.editor.transformer)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.train.learning_rate, weight_decay=config.train.weight_decay)
        self.updates_done = 0

    def ready(self) -> int:
        """Answers once construction is over: the process id."""
        return os.getpid()

    def export(self) -> np.ndarray:
        """The adapter as it is now, packed."""
        return wire.pack(adapters.export(self.editor.transformer, step=self.updates_done))

    def learn(self, update: int, tables: Sequence[np.ndarray], *blobs: np.ndarray) -> LearnReport:
        """One update from reward tables and their packed groups, in the order given (blobs last: Ray passes them by reference)."""
        start = time.perf_counter()
        if update != self.updates_done:
            raise RuntimeError(
                f"asked for update {update}, but this learner has done {self.updates_done}: it would be applied twice or out of order"
            )
        groups: list[RolloutGroup] = [wire.unpack(blob) for blob in blobs]
        rewards: list[RewardTable] = [wire.unpack(table) for table in tables]
        credits = self.config.algorithm.credit(rewards, [group.candidates.token_mask for group in groups])
        device = self.parameters[0].device
        batch: list[tuple[RolloutGroup, Advantages]] = []
        declined: dict[str, list[str]] = {}
        for group, credit in zip(groups, credits, strict=True):
            if isinstance(credit, Declined):
                declined.setdefault(credit.kind, []).append(credit.reason)
            else:
                batch.append((moved(group, device), moved(credit, device)))
        metrics = self._optimise(batch, update) if batch else {}
        self.updates_done += 1
        return LearnReport(adapter=self.export(), metrics=metrics, declined=declined, used=len(batch), seconds=time.perf_counter() - start)

    def _optimise(self, batch: Sequence[tuple[RolloutGroup, Advantages]], update: int) -> dict[str, float]:
        current = adapters.export(self.editor.transformer, step=self.updates_done).id
        on_policy = all(group.adapter.sha256 == current.sha256 for group, _ in batch)
        metrics: dict[str, float] = {}
        for index in range(self.config.train.passes):
            metrics = learning_step(
                self.editor.velocity,
                self._reference,
                self.parameters,
                self.optimizer,
                self.config.algorithm.objective,
                batch,
                config=LearningConfig(max_grad_norm=self.config.train.max_grad_norm, ratio_tolerance=self.config.train.ratio_tolerance),
                num_references=self.config.algorithm.initial_noise.num_references,
                run_seed=self.config.seed,
                update=update,
                pass_index=index,
                on_policy=on_policy and index == 0,
            )
        return metrics

    @torch.no_grad()
    def _reference(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The base editor's velocity: the same function with the adapter off."""
        adapters.set_active(self.editor.transformer, False)
        try:
            return self.editor.velocity(latents, sigma, conditioning)
        finally:
            adapters.set_active(self.editor.transformer, True)

    def state(self) -> dict[str, Tensor]:
        """Adapter and optimizer as named tensors: all that a resumed learner needs (seeds are keyed, not streamed)."""
        names = sorted(name for name, _ in self.editor.transformer.named_parameters() if f".{adapters.POLICY}." in name)
        tensors = {f"parameter/{name}": p.detach().cpu().clone() for name, p in zip(names, self.parameters, strict=True)}
        for name, parameter in zip(names, self.parameters, strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value).detach().cpu().clone()
        return tensors

    def restore(self, tensors: dict[str, Tensor], updates_done: int) -> None:
        """Puts back what :meth:`state` gave; continuing is then bit for bit the uninterrupted run."""
        names = sorted(name for name, _ in self.editor.transformer.named_parameters() if f".{adapters.POLICY}." in name)
        expected = {f"parameter/{name}" for name in names}
        found = {key for key in tensors if key.startswith("parameter/")}
        if expected != found:
            raise ValueError(
                f"checkpoint parameters differ from this run's adapter: {sorted(expected ^ found)[:4]}; "
                "resume with the run's own lora settings"
            )
        for name, parameter in zip(names, self.parameters, strict=True):
            parameter.data.copy_(tensors[f"parameter/{name}"])
            self.optimizer.state[parameter] = {
                key.split("/", 2)[1]: value.to(parameter.device if not key.startswith("optimizer/step/") else "cpu").clone()
                for key, value in tensors.items()
                if key.startswith("optimizer/") and key.split("/", 2)[2] == name
            }
        self.updates_done = updates_done


def unpack_adapter(blob: np.ndarray) -> AdapterWeights:
    """The adapter of a packed export."""
    weights: AdapterWeights = wire.unpack(blob)
    return weights
