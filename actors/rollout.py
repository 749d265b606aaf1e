"""The rollout actor: an editor at a named adapter. A plain class; Ray is applied to it in ``pool.py``."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace

import numpy as np
import torch

from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.editors import Editor, load_editor, lora
from rl_edit.method import exploration, regions
from rl_edit.method.attention import MassTally
from rl_edit.method.rollout import blank_task, denoise
from rl_edit.types import (
    AdapterId,
    AdapterWeights,
    Candidates,
    RolloutGroup,
    RolloutResult,
    WorkItem,
    areas_of,
)

KEPT = 3
"""Adapters an actor keeps besides those the lag needs: one that is being published, and one that is evaluated."""


class UnknownAdapter(RuntimeError):
    """The work names weights this actor was never given."""


class RolloutActor:
    """Rolls out groups, or chunks of them. Stateless but for the adapters it was given: any actor can serve any item.

    A result carries the hash of the tensors found in the loaded module, not of what was asked for, so a weight update that
    never arrived is seen on the first item.

    Args:
        editor: one to share with others in this process; None loads one.
        adapter_name: the adapter of the editor's transformer that holds this actor's weights.
    """

    def __init__(
        self,
        config: RunConfig,
        threads: int,
        *,
        editor: Editor | None = None,
        adapter_name: str = lora.POLICY,
    ) -> None:
        torch.set_num_threads(threads)
        self.config, self.adapter_name = config, adapter_name
        self.editor = load_editor(config.editor) if editor is None else editor
        lora.attach(
            self.editor.transformer, config.lora, seed=config.seed, adapter_name=adapter_name
        )
        self._published: dict[AdapterId, AdapterWeights] = {}
        self._loaded: AdapterWeights | None = None

    def ready(self) -> int:
        """Answers once construction is over: the process id."""
        return os.getpid()

    def load(self, blob: np.ndarray) -> AdapterId:
        """Takes a published adapter, under the name its tensors have; keeps as many as the lag allows to be in use."""
        weights: AdapterWeights = wire.unpack(blob)
        name = AdapterId(weights.id.step, lora.digest(weights.tensors))
        self._published.pop(name, None)
        self._published[name] = replace(weights, id=name)
        while len(self._published) > self.config.train.max_lag + KEPT:
            del self._published[
                next(iter(self._published))
            ]  # the first given, not the lowest step: a replay publishes low steps anew
        return name

    def run(self, blob: np.ndarray) -> tuple[RolloutResult, np.ndarray]:
        """Rolls out one item. Returns what to know about the group, and the group as a blob."""
        item: WorkItem = wire.unpack(blob)
        group, seconds = self.rollout(item)
        packed = wire.pack(group)
        rolled = RolloutResult(
            work_id=item.work_id,
            adapter=group.adapter,
            sha256=hashlib.sha256(packed.data).hexdigest(),
            nbytes=packed.nbytes,
            finite=all(
                bool(part.isfinite().all())
                for part in (group.latents, group.next_latents, group.velocities)
            ),
            areas=group.areas,
            seconds=seconds,
        )
        return rolled, packed

    def rollout(self, item: WorkItem) -> tuple[RolloutGroup, dict[str, float]]:
        """The item's candidates, integrated together, with images and attention; and seconds by phase.

        Every draw is keyed by the candidate's place in the group, so a candidate does not depend on its chunk.
        """
        start = time.perf_counter()
        weights = self._use(item.adapter)
        first, past = item.chunk
        algorithm, settings = self.config.algorithm, self.config.rollout
        noise = algorithm.initial_noise.at(weights.exploration, item.task.task_type)
        source = exploration.NoiseSource(item.run_seed, item.task.task_id, item.epoch)
        conditioning = self.editor.encode(item.task)
        mask = regions.token_mask(item.task.edit_mask, conditioning.grid)
        shape = self.editor.latent_shape(conditioning)
        initial = noise(item.num_candidates, shape, mask, source)
        # A chunk that is pulled to the reference candidate integrates it too, and leaves it out at the end.
        reference_rows = [0] if noise.background_pull > 0 and first > 0 else []
        rows = [*reference_rows, *range(first, past)]
        encoded = time.perf_counter()
        tally = MassTally()
        levels = (
            algorithm.step_noise(item.update, settings.num_steps)
            if item.explores
            else torch.zeros(settings.num_steps)
        )
        kept = (
            algorithm.objective.trained_steps(levels, source.generator("trained steps"))
            if item.explores
            else (settings.num_steps - 1,)
        )
        trajectory = denoise(
            lambda latents, sigma: self.editor.velocity(latents, sigma, conditioning, tally),
            initial[rows],
            self.editor.sigmas(settings.num_steps, conditioning),
            keep=kept,
            solver=settings.solver,
            step_noise=levels,
            sde=algorithm.step_noise.sde,
            normal=lambda step: torch.stack(
                [source.normal(f"step {step}", i, shape) for i in rows]
            ),
            project=(
                lambda states: exploration.pull_background(states, mask, noise.background_pull)
            )
            if noise.background_pull > 0
            else None,
        )
        integrated = time.perf_counter()
        own = slice(len(reference_rows), None)
        images = self.editor.decode(trajectory.final[own], conditioning)
        group = RolloutGroup(
            group_id=item.group_id,
            adapter=lora.export(
                self.editor.transformer, step=item.adapter.step, adapter_name=self.adapter_name
            ).id,
            candidates=Candidates(
                task=item.task, images=images, attention=tally.mean()[own], token_mask=mask
            ),
            conditioning=conditioning,
            latents=trajectory.latents[own],
            next_latents=trajectory.next_latents[own],
            velocities=trajectory.velocities[own],
            sigmas=trajectory.sigmas,
            sigmas_next=trajectory.sigmas_next,
            step_noise=trajectory.step_noise,
            sde=algorithm.step_noise.sde,
            schedule=self.editor.sigmas(settings.num_steps, conditioning),
            areas=regions.token_areas(areas_of(item.task), conditioning.grid),
        )
        return group, {
            "encode": encoded - start,
            "denoise": integrated - encoded,
            "decode": time.perf_counter() - integrated,
        }

    @torch.no_grad()
    def canary(self) -> str:
        """What is wrong with the way weights reach this actor's forward; "" when nothing is.

        An adapter that is attached but never applied trains for weeks without an error. Here random weights must be found in the
        module, must change the velocity, and the weights before must come back.
        """
        transformer = self.editor.transformer
        before = lora.export(transformer, step=0, adapter_name=self.adapter_name)
        random = torch.Generator().manual_seed(0)
        tensors = {
            name: 0.02 * torch.randn(value.shape, generator=random)
            for name, value in before.tensors.items()
        }
        trial = AdapterWeights(id=AdapterId(0, lora.digest(tensors)), tensors=tensors)
        conditioning = self.editor.encode(blank_task(self.editor.pixels_per_token))
        latents = torch.randn(
            self.config.editor.micro_batch,
            *self.editor.latent_shape(conditioning),
            generator=random,
        )
        sigma = torch.full((len(latents),), 0.5)
        try:
            lora.load(transformer, trial, adapter_name=self.adapter_name)
            found = lora.export(transformer, step=0, adapter_name=self.adapter_name).id
            lora.set_active(transformer, True, adapter_name=self.adapter_name)
            applied = self.editor.velocity(latents, sigma, conditioning)
            lora.set_active(transformer, False)
            base = self.editor.velocity(latents, sigma, conditioning)
        finally:
            lora.set_active(transformer, True, adapter_name=self.adapter_name)
            lora.load(transformer, before, adapter_name=self.adapter_name)
        if found != trial.id:
            return f"weights {trial.id} were loaded but {found} are found in the model: an update would never arrive"
        if not float((applied - base).abs().max()) > 0:
            return "a random adapter does not change the velocity: the adapter is attached but never applied"
        after = lora.export(transformer, step=0, adapter_name=self.adapter_name).id
        return (
            ""
            if after == before.id
            else f"weights {before.id} were put back but {after} are found in the model"
        )

    def _use(self, wanted: AdapterId) -> AdapterWeights:
        """The wanted weights, loaded into the adapter that the next forward uses."""
        if self._loaded is None or self._loaded.id != wanted:
            if wanted not in self._published:
                known = ", ".join(str(i) for i in sorted(self._published)) or "none"
                raise UnknownAdapter(
                    f"work asks for adapter {wanted}; this actor holds {known}. The publish did not reach it."
                )
            self._loaded = self._published[wanted]
            lora.load(self.editor.transformer, self._loaded, adapter_name=self.adapter_name)
        lora.set_active(self.editor.transformer, True, adapter_name=self.adapter_name)
        return self._loaded
