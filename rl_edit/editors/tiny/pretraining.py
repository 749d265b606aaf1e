"""Makes `tiny-kontext`, the built-in editor, from nothing: a stock pipeline small enough to ship.

Three stages, on CPU, from the shapes world alone: (1) an autoencoder by reconstruction; (2) the
transformer with both text encoders by flow matching on (source, instruction, target), conditioned
on the source exactly as the stock pipeline conditions it (clean source tokens behind the noisy
target tokens); (3) some hundred steps more on pairs with the flaws of machine-made pairs, which is
what leaves reinforcement learning something to sharpen. The product is a directory that
`FluxKontextPipeline.from_pretrained` loads without network, with a model card that states what was
measured.

Every batch is a function of (seed, stage, step), never of a running generator, so a killed run that
is started again ends in the same bytes as one that was not. This file does not adapt editors with
rewards; that is the learner's work.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from rich.console import Console
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rl_edit.data import shapes
from rl_edit.editors.tiny.architecture import new_editor, trainable
from rl_edit.editors.tiny.card import save_editor
from rl_edit.editors.tiny.latent_tasks import draw, latent_tasks, pixels
from rl_edit.editors.tiny.losses import flow_losses, vae_losses
from rl_edit.editors.tiny.measuring import EditMetrics, measure, sample_sheet, summary
from rl_edit.editors.tiny.progress import PretrainProgress
from rl_edit.editors.tiny.recipe import (
    CHECKPOINT_DIR,
    FlowStage,
    PretrainConfig,
    Stage,
    flow_stages,
)
from rl_edit.errors import InputError
from rl_edit.files import replace_file, replace_json

Tensors = dict[str, Tensor]


def pretrain(
    out: Path,
    config: PretrainConfig,
    *,
    console: Console | None = None,
    stop_after: tuple[Stage, int] | None = None,
) -> EditMetrics | None:
    """Makes the built-in editor in ``out`` and measures it on held-out tasks.

    Killed and called again with the same arguments, it continues from its last checkpoint and ends
    in the same bytes (on the same number of threads: sums over threads round differently).

    Args:
        stop_after: (stage, step) at which it checkpoints and returns None.

    Raises:
        InputError: ``out`` is a file, or holds a finished editor, or an unfinished one of
            other settings.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a directory for the editor")
    if (out / "model_index.json").exists() and not (out / CHECKPOINT_DIR).exists():
        raise InputError(
            f"{out} already holds an editor: training would overwrite it. Choose another directory "
            "or remove it."
        )
    if config.resolution != shapes.SIZE:
        raise InputError(
            f"resolution({config.resolution}) is not that of the shapes world ({shapes.SIZE}), "
            f"which is all there is to learn from: set it to {shapes.SIZE}."
        )
    # Within the directory that is made, so that two runs never share one.
    checkpoint = Checkpoint(folder=out / CHECKPOINT_DIR, config=config)
    with PretrainProgress(console or Console(), config.log_every) as progress:
        run = _Run(out=out, checkpoint=checkpoint, progress=progress, stop_after=stop_after)
        pipeline = run.trained()
        if pipeline is None:
            return None
        steps = config.transformer_steps + config.flawed_steps
        metrics = save_editor(pipeline, out, config, steps=steps)
        progress.say(summary(metrics))
    # Last: a run killed while it saves finds its checkpoint and saves again.
    shutil.rmtree(checkpoint.folder)
    return metrics


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One call of :func:`pretrain`: its places, and where it stops on request."""

    out: Path
    checkpoint: Checkpoint
    progress: PretrainProgress
    stop_after: tuple[Stage, int] | None

    @property
    def config(self) -> PretrainConfig:
        return self.checkpoint.config

    def trained(self) -> FluxKontextPipeline | None:
        """Trains all stages from the last checkpoint on; None when stopped on request."""
        config, resumed = self.config, self.checkpoint.read()
        pipeline = new_editor(seed=config.seed)
        if resumed:
            self.progress.say(f"continuing {self.out} at {resumed[0]} step {resumed[1]}")
        stage, done, stored = resumed or ("vae", 0, {})
        if stage == "vae":
            if not self._train_vae(pipeline.vae, done, stored):
                return None
            done, stored = 0, {}
        else:
            # Checkpoints of the later stages carry the finished autoencoder.
            prefix = "vae."
            weights = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
            pipeline.vae.load_state_dict(weights)
        # Always anew: it follows from the autoencoder alone, so no checkpoint needs it.
        _normalise_latents(pipeline.vae, config)
        stages = flow_stages(config)
        for flow_stage in stages[1:] if stage == "flawed" else stages:
            if not self._train_flow(pipeline, flow_stage, done, stored):
                return None
            done, stored = 0, {}
        return pipeline

    def _train_vae(self, vae: AutoencoderKL, done: int, stored: Tensors) -> bool:
        """Runs stage one from step ``done``; True at its end, False when stopped on request."""
        config = self.config
        part = Averaged(vae, decay=config.ema_decay)
        if stored:
            part.load(stored)
        vae.train()
        steps = range(done, config.vae_steps)
        for step, loss in zip(steps, vae_losses(vae, config, steps), strict=True):
            rate = learning_rate(step, steps=config.vae_steps, peak=config.vae_lr)
            part.update(loss, lr=rate, step=step)
            self.progress.step("vae", step + 1, config.vae_steps, loss.item())
            if self._checkpoint_is_due("vae", step + 1):
                self.checkpoint.write("vae", step + 1, part.tensors())
            # A test's way to be killed between two steps.
            if self.stop_after == ("vae", step + 1):
                return False
        # The later stages learn in the latents of this autoencoder, which therefore stays as it is.
        part.finish()
        vae.requires_grad_(False)
        return True

    def _train_flow(
        self, pipeline: FluxKontextPipeline, stage: FlowStage, done: int, stored: Tensors
    ) -> bool:
        """Runs a stage of flow matching from step ``done``; False when stopped on request."""
        config = self.config
        frozen = {f"vae.{key}": value for key, value in pipeline.vae.state_dict().items()}
        part = Averaged(trainable(pipeline), decay=config.ema_decay)
        if stored:
            part.load(stored)
        else:
            # From here on the stage before is finished for good, the autoencoder's included.
            self.checkpoint.write(stage.name, 0, part.tensors() | frozen)
        tasks = latent_tasks(pipeline, stage, config, self.progress.step)
        part.module.train()
        steps = range(done, stage.steps)
        losses = flow_losses(pipeline, tasks, stage, config, steps)
        for step, loss in zip(steps, losses, strict=True):
            rate = learning_rate(step, steps=stage.steps, peak=stage.lr)
            part.update(loss, lr=rate, step=step)
            self.progress.step(stage.name, step + 1, stage.steps, loss.item())
            if self._checkpoint_is_due(stage.name, step + 1):
                self.checkpoint.write(stage.name, step + 1, part.tensors() | frozen)
            self._show(pipeline, part, total=stage.before + step + 1)
            if self.stop_after == (stage.name, step + 1):
                return False
        part.finish()
        return True

    def _checkpoint_is_due(self, stage: Stage, step: int) -> bool:
        return self.stop_after == (stage, step) or step % self.config.checkpoint_every == 0

    def _show(self, pipeline: FluxKontextPipeline, part: Averaged, *, total: int) -> None:
        """Writes the sample sheet and the snapshot that are due after ``total`` steps."""
        config, folder = self.config, self.checkpoint.folder
        if config.sample_every and total % config.sample_every == 0:
            with part.averaged():
                metrics = measure(pipeline, config, num_tasks=min(64, config.num_eval_tasks))
                folder.mkdir(parents=True, exist_ok=True)
                sample_sheet(pipeline, config).save(folder / f"samples-{total}.png")
            self.progress.say(f"step {total}: {summary(metrics)}")
        if total in config.snapshot_at:
            snapshot = self.out.with_name(f"{self.out.name}-step-{total}")
            with part.averaged():
                save_editor(pipeline, snapshot, config, steps=total)


class Averaged:
    """A module in training: AdamW, and an exponential moving average, which is what is saved."""

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.module = module
        self.parameters: list[Tensor] = list(module.parameters())
        # No weight decay on vectors (norms, biases): shrinking them helps nothing.
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=True)
        self.average = [p.detach().clone() for p in self.parameters]
        self._decay = decay

    def update(self, loss: Tensor, *, lr: float, step: int) -> None:
        """Makes one AdamW step and moves the average.

        The average starts short (Karras et al. 2024 on warm-up of EMA) and grows to its decay.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Bounds what one unusual batch may do.
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        # average <- decay * average + (1 - decay) * parameters
        decay = min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Holds the module under its averaged weights, in eval mode, for the block."""
        # The optimizer goes on from the live weights afterwards, as if nothing had been measured.
        live = [p.detach().clone() for p in self.parameters]
        self._set(self.average)
        self.module.eval()
        yield
        self.module.train()
        self._set(live)

    def finish(self) -> None:
        """Puts the averaged weights in for good."""
        self._set(self.average)
        self.module.eval()

    def tensors(self) -> Tensors:
        """Returns everything a checkpoint needs, by name."""
        # Optimizer slots by the parameter's index, which is the order of construction.
        state = self.optimizer.state_dict()["state"]
        slots = {
            f"optimizer.{i}.{key}": value
            for i, values in state.items()
            for key, value in values.items()
        }
        parameters = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        averages = {f"average.{i}": value for i, value in enumerate(self.average)}
        return slots | parameters | averages

    def load(self, stored: Tensors) -> None:
        """Continues from :meth:`tensors`. Other names are ignored."""
        self._set([stored[f"parameter.{i}"] for i in range(len(self.parameters))])
        self.average = [stored[f"average.{i}"] for i in range(len(self.parameters))]
        slots: dict[int, Tensors] = {}
        for name, value in stored.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                slots.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The folder that a run continues from.

    ``state.json`` (stage, step, config) names the tensors file beside it.
    """

    folder: Path
    config: PretrainConfig

    def read(self) -> tuple[Stage, int, Tensors] | None:
        """Reads where the run stood; None where there is no checkpoint.

        Raises:
            InputError: it is of another config. Mixing two recipes is neither.
        """
        state_file = self.folder / "state.json"
        if not state_file.exists():
            return None
        state = json.loads(state_file.read_text())
        before, now = state["config"], self._settings()
        # Settings of either side, so that one which came or went since counts too.
        changed = sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))
        if changed:
            was = ", ".join(f"{key}={before.get(key)}" for key in changed)
            raise InputError(
                f"{self.folder.parent} holds an unfinished run with other settings ({was}): "
                "continuing it would mix two recipes. Use the same settings, or remove "
                f"{self.folder}."
            )
        return state["stage"], state["step"], load_file(self.folder / state["tensors"])

    def write(self, stage: Stage, step: int, tensors: Tensors) -> None:
        """Writes a checkpoint; killed at any point, the last complete one is read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{stage}-{step}.safetensors"
        content = {key: value.contiguous() for key, value in tensors.items()}
        # The tensors are complete before state.json names them, and older ones go afterwards.
        replace_file(self.folder / name, save(content))
        state = {"stage": stage, "step": step, "tensors": name, "config": self._settings()}
        replace_json(self.folder / "state.json", state)
        # With the second star also what a killed write left: it is as large as a checkpoint.
        for file in self.folder.glob("*.safetensors*"):
            if file.name != name:
                file.unlink()

    def _settings(self) -> dict[str, object]:
        # Through JSON: tuples become lists, as in a file that was read.
        settings: dict[str, object] = self.config.model_dump(mode="json")
        return settings


def learning_rate(step: int, *, steps: int, peak: float) -> float:
    """Returns the rate of a step: linear warm-up, then cosine to zero.

    The warm-up is a tenth of the run, at most 200 steps.
    """
    # At least one step, so that the first rate is never 0.
    warmup = max(1, min(200, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _normalise_latents(vae: AutoencoderKL, config: PretrainConfig) -> None:
    """Sets shift and scale so that latents have mean 0 and standard deviation 1.

    The noise that they are mixed with has these.
    """
    tasks = draw(0, min(config.num_tasks, 1024), config)
    with torch.no_grad():
        modes = torch.cat(
            [vae.encode(pixels(part)).latent_dist.mode() for part in tasks.target.split(256)]
        )
    shift, scale = modes.mean().item(), 1.0 / modes.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
