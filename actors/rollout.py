"""The rollout actor: an editor at a named adapter. A plain class; Ray is applied to it in ``pool.py``."""

from __future__ import annotations

import os
import time

import numpy as np
import torch

from rl_edit import adapters, exploration, regions, wire
from rl_edit.attention import MassTally
from rl_edit.config import RunConfig
from rl_edit.editors import load_editor
from rl_edit.rollout import denoise
from rl_edit.types import AdapterId, AdapterWeights, Candidates, RolloutGroup, WorkItem


class UnknownAdapter(RuntimeError):
    """The work names weights this actor was never given."""


class RolloutActor:
    """Rolls out groups. Stateless but for the adapters it was given: any actor can serve any item.

    A result carries the hash of the tensors found in the loaded module, not of what was asked for, so a weight update that
    never arrived is seen on the first item.
    """

    def __init__(self, config: RunConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.editor = load_editor(config.editor)
        adapters.attach(self.editor.transformer, config.lora, seed=config.seed)
        self._published: dict[AdapterId, AdapterWeights] = {}
        self._loaded: AdapterId | None = None

    def ready(self) -> int:
        """Answers once construction is over: the process id."""
        return os.getpid()

    def load(self, blob: np.ndarray) -> None:
        """Takes a published adapter; keeps as many versions as the lag allows to be in use."""
        weights: AdapterWeights = wire.unpack(blob)
        self._published[weights.id] = weights
        while len(self._published) > self.config.train.max_lag + 2:
            del self._published[min(self._published)]

    def run(self, blob: np.ndarray) -> tuple[dict[str, object], np.ndarray]:
        """Rolls out one item. Returns small metadata and the group as a blob."""
        item: WorkItem = wire.unpack(blob)
        group = self.rollout(item)
        packed = wire.pack(group)
        meta = {"work_id": group.work_id, "adapter": group.adapter, "nbytes": packed.nbytes, "seconds": group.seconds}
        return meta, packed

    def rollout(self, item: WorkItem) -> RolloutGroup:
        """Initial noises, one deterministic integration of all candidates, images, attention."""
        start = time.perf_counter()
        self._use(item.adapter)
        algorithm, settings = self.config.algorithm, self.config.rollout
        source = exploration.NoiseSource(item.run_seed, item.task.task_id, item.draw)
        conditioning = self.editor.encode(item.task)
        mask = regions.token_mask(item.task.edit_mask, conditioning.grid)
        initial = algorithm.initial_noise(item.num_candidates, self.editor.latent_shape(conditioning), mask, source)
        encoded = time.perf_counter()
        tally = MassTally()
        trajectory = denoise(
            lambda latents, sigma: self.editor.velocity(latents, sigma, conditioning, tally),
            initial,
            self.editor.sigmas(settings.num_steps, conditioning),
            keep=algorithm.objective.trained_steps(settings.num_steps, source.generator("trained steps")),
            step_noise=algorithm.step_noise(item.update, settings.num_steps),
            normal=lambda step: torch.stack([source.normal(f"step {step}", i, tuple(noise.shape)) for i, noise in enumerate(initial)]),
        )
        integrated = time.perf_counter()
        images = self.editor.decode(trajectory.final, conditioning)
        return RolloutGroup(
            work_id=item.work_id,
            adapter=AdapterId(item.adapter.step, adapters.export(self.editor.transformer, step=item.adapter.step).id.sha256),
            candidates=Candidates(task=item.task, images=images, attention=tally.mean(), token_mask=mask),
            conditioning=conditioning,
            latents=trajectory.latents,
            next_latents=trajectory.next_latents,
            velocities=trajectory.velocities,
            sigmas=trajectory.sigmas,
            sigmas_next=trajectory.sigmas_next,
            step_noise=trajectory.step_noise,
            seconds={"encode": encoded - start, "denoise": integrated - encoded, "decode": time.perf_counter() - integrated},
        )

    def _use(self, wanted: AdapterId) -> None:
        if self._loaded == wanted:
            return
        if wanted not in self._published:
            known = ", ".join(str(i) for i in sorted(self._published)) or "none"
            raise UnknownAdapter(f"work asks for adapter {wanted}; this actor holds {known}. The publish did not reach it.")
        adapters.load(self.editor.transformer, self._published[wanted])
        self._loaded = wanted
