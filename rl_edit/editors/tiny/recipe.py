"""The recipe of the built-in editor: sizes, settings and stages, without a model library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

VAE_WIDTHS = (16, 32, 48)
# The VAE halves the sides between its widths; packing halves them once more.
PIXELS_PER_TOKEN = 2 ** (len(VAE_WIDTHS) - 1) * 2
LATENT_CHANNELS = 4
CHECKPOINT_DIR = ".pretrain"

MAX_TEXT_TOKENS = 32
"""T5 length in training and inference.

FLUX has no text mask, so padding is part of what the model learns.
"""

DEFAULT_GUIDANCE = 2.5
EVALUATION_STEPS = 6

Stage = Literal["vae", "flow", "flawed"]


class PretrainConfig(BaseModel):
    """A pretraining run. The defaults are the recipe of the shipped weights.

    Attributes:
        seed: root of initialisation, batches, noise and held-out measurements.
        vae_steps, vae_batch, vae_lr: autoencoder stage; a batch holds sources and targets in equal
            parts.
        transformer_steps, batch, lr: flow-matching stage; peak rates of AdamW, linear warm-up,
            cosine to zero.
        flawed_steps, flawed_lr: flow matching continued on flawed pairs, with a schedule of its
            own; 0 steps leave it out.
        failed_share: share of the flawed stage's pairs in which the edit did not happen: their
            target is the source.
        cast_share, cast_size: share of its pairs whose target has a colour cast, and the largest
            shift of a channel (of 255). Machine-made pairs have such flaws (MagicBrush, arXiv
            2306.10012, sec. 1, on InstructPix2Pix). What is learnt from them is a mixture: by its
            initial noise the editor edits, fails or discolours, and a group of candidates holds
            both.
        resolution: side of the square training images in pixels; the shapes world's.
        num_tasks: pretraining tasks in memory (about 10 kB each), revisited with fresh
            noise. A stage whose steps cannot visit them all draws fewer.
        edit_weight: loss weight of latents inside the edit mask, relative to 1 outside.
        ema_decay: decay of the averaged weights that are saved.
        num_eval_tasks: held-out tasks measured at the end.
        checkpoint_every, log_every, sample_every: steps between checkpoints, log lines, and sample
            sheets (0: never).
        snapshot_at: transformer steps, counted over both stages of flow matching, at which a
            complete pipeline is written to ``OUT-step-N``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0)
    # Stage one: the autoencoder.
    vae_steps: int = Field(2800, ge=1)
    vae_batch: int = Field(16, ge=2, multiple_of=2)
    vae_lr: float = Field(2e-3, gt=0)
    # Stage two: flow matching. Stage three: the same on flawed pairs.
    transformer_steps: int = Field(4000, ge=1)
    batch: int = Field(32, ge=1)
    lr: float = Field(1.5e-3, gt=0)
    flawed_steps: int = Field(600, ge=0)
    flawed_lr: float = Field(1e-3, gt=0)
    failed_share: float = Field(0.1, ge=0, lt=1)
    cast_share: float = Field(0.5, ge=0, lt=1)
    cast_size: float = Field(28.0, ge=0, le=255)
    resolution: int = Field(64, ge=16, multiple_of=PIXELS_PER_TOKEN)
    num_tasks: int = Field(32_000, ge=2, le=60_000)
    edit_weight: float = Field(4.0, ge=1)
    ema_decay: float = Field(0.999, gt=0, lt=1)
    # From here on: what is reported, not what is learnt.
    num_eval_tasks: int = Field(256, ge=1)
    checkpoint_every: int = Field(250, ge=1)
    log_every: int = Field(50, ge=1)
    sample_every: int = Field(1000, ge=0)
    snapshot_at: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FlowStage:
    """A stage of flow matching.

    Attributes:
        steps: its length.
        lr: peak rate of its own schedule.
        before: steps of earlier stages of flow matching.
    """

    name: Stage
    steps: int
    lr: float
    before: int = 0

    @property
    def flawed(self) -> bool:
        """Do targets carry the flaws of machine-made pairs?"""
        return self.name == "flawed"


def flow_stages(config: PretrainConfig) -> tuple[FlowStage, ...]:
    """Returns the stages after the autoencoder, in their order."""
    clean = FlowStage(name="flow", steps=config.transformer_steps, lr=config.lr)
    flawed = FlowStage(
        name="flawed",
        steps=config.flawed_steps,
        lr=config.flawed_lr,
        before=config.transformer_steps,
    )
    return (clean, flawed) if config.flawed_steps else (clean,)
