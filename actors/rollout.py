"""The rollout actor: samples groups of candidates with an editor and a named adapter.

A plain class; ``ray_executor.py`` applies Ray to it.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl_edit import wire
from rl_edit.config import RunConfig
from rl_edit.editors import Editor, load_editor, lora
from rl_edit.messages import RolloutResult
from rl_edit.method import regions
from rl_edit.method.attention import MassTally
from rl_edit.method.exploration import NoiseSource, pull_background
from rl_edit.method.rollout import Trajectory, blank_task, denoise
from rl_edit.types import (
    AdapterId,
    AdapterWeights,
    Candidates,
    Conditioning,
    RolloutGroup,
    WorkItem,
    areas_of,
    moved,
)

SPARE_ADAPTERS = 3
"""Adapters an actor keeps besides those the lag needs.

One is being published, one is evaluated on held-out tasks, and one is in use."""


class UnknownAdapter(RuntimeError):
    """The work names weights that never arrived here."""


def roll_out(
    editor: Editor, config: RunConfig, item: WorkItem, weights: AdapterWeights
) -> tuple[RolloutGroup, dict[str, float]]:
    """Samples the candidates of a work item.

    The weights must be loaded and active. Every random number is keyed by the candidate's
    place in its group, so a candidate does not depend on its chunk.

    Args:
        weights: the loaded weights. The group carries their name, and candidates are explored
            with the noise spread that travels with them.

    Returns:
        the group, or chunk of one, on the CPU; and seconds by phase.
    """
    # Seconds by phase show where a slow rollout spends them: text encoder, transformer, or VAE.
    began = time.perf_counter()
    conditioning = editor.encode(item.task)
    mask = regions.token_mask(item.task.edit_mask, conditioning.grid)
    encoded = time.perf_counter()
    trajectory, attention = _integrate(editor, config, item, conditioning, mask, weights)
    integrated = time.perf_counter()
    group = RolloutGroup(
        group_id=item.group_id,
        adapter=weights.id,
        candidates=Candidates(
            task=item.task,
            images=editor.decode(trajectory.final, conditioning),
            attention=attention,
            token_mask=mask,
        ),
        conditioning=conditioning,
        # States, velocities and noise levels of the trained steps only; learning replays these.
        latents=trajectory.latents,
        next_latents=trajectory.next_latents,
        velocities=trajectory.velocities,
        sigmas=trajectory.sigmas,
        sigmas_next=trajectory.sigmas_next,
        step_noise=trajectory.step_noise,
        sde=config.algorithm.step_noise.sde,
        schedule=editor.sigmas(config.rollout.num_steps, conditioning),
        areas=regions.token_areas(areas_of(item.task), conditioning.grid),
    )
    # On the CPU from here on: rewards and credit compute there, and the GPU's memory is freed.
    return moved(group, "cpu"), {
        "encode": encoded - began,
        "denoise": integrated - encoded,
        "decode": time.perf_counter() - integrated,
    }


def _integrate(
    editor: Editor,
    config: RunConfig,
    item: WorkItem,
    conditioning: Conditioning,
    mask: Tensor,
    weights: AdapterWeights,
) -> tuple[Trajectory, Tensor]:
    """Denoises an item's candidates in one batch."""
    algorithm, num_steps = config.algorithm, config.rollout.num_steps
    source = NoiseSource(item.run_seed, item.task.task_id, item.epoch)
    noise = algorithm.initial_noise.at(weights.exploration, item.task.task_type)
    shape = editor.latent_shape(conditioning)
    # All candidates of the group, of which a chunk takes its rows.
    initial = noise(item.num_candidates, shape, mask, source)
    levels, trained = _steps(config, item, source)
    # A background that is pulled to the reference candidate needs it in every chunk. A chunk
    # without it integrates it as well, and drops it at the end.
    first, past = item.chunk
    reference_rows = [0] if noise.background_pull > 0 and first > 0 else []
    rows = [*reference_rows, *range(first, past)]
    tally = MassTally()
    trajectory = denoise(
        lambda latents, sigma: editor.velocity(latents, sigma, conditioning, tally),
        initial[rows],
        editor.sigmas(num_steps, conditioning),
        keep=trained,
        solver=config.rollout.solver,
        step_noise=levels,
        sde=algorithm.step_noise.sde,
        # eps of the stochastic steps, keyed by step and candidate.
        normal=lambda step: torch.stack([source.normal(f"step {step}", i, shape) for i in rows]),
        project=(lambda states: pull_background(states, mask, noise.background_pull))
        if noise.background_pull > 0
        else None,
    )
    chunk = slice(len(reference_rows), None)
    parts = ("latents", "next_latents", "velocities", "final")
    trajectory = replace(trajectory, **{part: getattr(trajectory, part)[chunk] for part in parts})
    return trajectory, tally.mean()[chunk]


def _steps(
    config: RunConfig, item: WorkItem, source: NoiseSource
) -> tuple[Tensor, tuple[int, ...]]:
    """Returns SDE levels of all steps, and the trained steps."""
    num_steps = config.rollout.num_steps
    if not item.explores:
        # Held-out evaluation compares weights, so every step is deterministic.
        return torch.zeros(num_steps), (num_steps - 1,)
    levels = config.algorithm.step_noise(item.update, num_steps)
    # Drawn once for the group, so that all its chunks train the same steps.
    generator = source.generator("trained steps")
    return levels, config.algorithm.objective.trained_steps(levels, generator)


class RolloutActor:
    """Rolls out groups, or chunks of them.

    Any adapter that it was given can be named by an item. It has no other state, so any
    actor can serve any item. A result carries the hash of the tensors found in the loaded module
    rather than the requested hash. A weight update that never arrived is thus seen on the first
    item.

    Args:
        editor: an editor to share with others in this process; None loads one.
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
        """Returns the process id, once construction is over."""
        return os.getpid()

    def load(self, blob: NDArray[np.uint8]) -> AdapterId:
        """Takes a published adapter; returns its name.

        The name is that of the tensors which arrived. As many are kept as the lag allows to be in
        use.
        """
        weights: AdapterWeights = wire.unpack(blob)
        name = AdapterId(weights.id.step, lora.digest(weights.tensors))
        # Popped first, so that an adapter that is published again is the newest.
        self._published.pop(name, None)
        self._published[name] = replace(weights, id=name)
        while len(self._published) > self.config.train.max_lag + SPARE_ADAPTERS:
            # The first that arrived, not the lowest step: a replay publishes low steps again.
            del self._published[next(iter(self._published))]
        return name

    def run(self, blob: NDArray[np.uint8]) -> tuple[RolloutResult, NDArray[np.uint8]]:
        """Rolls out one packed item; returns the result record and the packed group."""
        item: WorkItem = wire.unpack(blob)
        group, seconds = self.rollout(item)
        packed = wire.pack(group)
        result = RolloutResult(
            work_id=item.work_id,
            adapter=group.adapter,
            # Two results of one item must agree in this hash: the controller keeps the first.
            sha256=hashlib.sha256(packed.data).hexdigest(),
            nbytes=packed.nbytes,
            finite=all(
                bool(part.isfinite().all())
                for part in (group.latents, group.next_latents, group.velocities)
            ),
            areas=group.areas,
            seconds=seconds,
        )
        return result, packed

    def rollout(self, item: WorkItem) -> tuple[RolloutGroup, dict[str, float]]:
        """Samples the item's candidates under its adapter; see :func:`roll_out`."""
        weights = self._use(item.adapter)
        # The name of what the module really holds, whatever was asked for.
        loaded = replace(weights, id=self._export(item.adapter.step).id)
        return roll_out(self.editor, self.config, item, loaded)

    @torch.no_grad()
    def canary(self) -> str:
        """Checks that weights reach this actor's forward; returns the problem, "" for none.

        An adapter that is attached but never applied trains for weeks without an error. Here
        random weights must be found in the module, must change the velocity, and the weights
        before must come back.
        """
        transformer, adapter_name = self.editor.transformer, self.adapter_name
        before = self._export(0)
        # B is zero in a new adapter, which would change nothing, so both factors are random.
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: 0.02 * torch.randn(value.shape, generator=generator)
            for name, value in before.tensors.items()
        }
        trial = AdapterWeights(id=AdapterId(0, lora.digest(tensors)), tensors=tensors)
        conditioning = self.editor.encode(blank_task(self.editor.pixels_per_token))
        shape = (self.config.editor.micro_batch, *self.editor.latent_shape(conditioning))
        latents, sigma = torch.randn(*shape, generator=generator), torch.full(shape[:1], 0.5)
        try:
            lora.load(transformer, trial, adapter_name=adapter_name)
            loaded = self._export(0).id
            lora.set_active(transformer, True, adapter_name=adapter_name)
            applied = self.editor.velocity(latents, sigma, conditioning)
            lora.set_active(transformer, False)
            base = self.editor.velocity(latents, sigma, conditioning)
        finally:
            lora.set_active(transformer, True, adapter_name=adapter_name)
            lora.load(transformer, before, adapter_name=adapter_name)
        if loaded != trial.id:
            return (
                f"weights {trial.id} were loaded but {loaded} are found in the model: an update "
                "would never arrive"
            )
        if not float((applied - base).abs().max()) > 0:
            return (
                "a random adapter does not change the velocity: the adapter is attached but never "
                "applied"
            )
        after = self._export(0).id
        if after != before.id:
            return f"weights {before.id} were put back but {after} are found in the model"
        return ""

    def _export(self, step: int) -> AdapterWeights:
        """Copies the weights that the transformer holds now."""
        return lora.export(self.editor.transformer, step=step, adapter_name=self.adapter_name)

    def _use(self, requested: AdapterId) -> AdapterWeights:
        """Loads the requested weights and switches them on."""
        if self._loaded is None or self._loaded.id != requested:
            if requested not in self._published:
                known = ", ".join(str(i) for i in sorted(self._published)) or "none"
                raise UnknownAdapter(
                    f"work asks for adapter {requested}; this actor holds {known}. The publish did "
                    "not reach it."
                )
            self._loaded = self._published[requested]
            lora.load(self.editor.transformer, self._loaded, adapter_name=self.adapter_name)
        # Always: on a shared base, a learner may have switched its own adapter on meanwhile.
        lora.set_active(self.editor.transformer, True, adapter_name=self.adapter_name)
        return self._loaded
