"""The model card of the built-in editor, and the directory that it is written to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import FluxKontextPipeline

from rl_edit.data import shapes
from rl_edit.editors.tiny.architecture import MODELS
from rl_edit.editors.tiny.measuring import EditMetrics, measure
from rl_edit.editors.tiny.recipe import (
    DEFAULT_GUIDANCE,
    EVALUATION_STEPS,
    LATENT_CHANNELS,
    MAX_TEXT_TOKENS,
    PIXELS_PER_TOKEN,
    VAE_WIDTHS,
    PretrainConfig,
)

CARD = Path(__file__).parent / "card.md"
"""Text of the card, with fields for the numbers."""

REPORTING = frozenset(
    {"resolution", "checkpoint_every", "log_every", "sample_every", "snapshot_at"}
)
"""Settings that change no weight, or that have one possible value."""

# The text of the third stage. Line breaks are those of the card.
FLAWS = (
    " The last stage learns from pairs with\n"
    "the flaws of machine-made ones, so what the editor does is a mixture that its initial noise\n"
    "picks from: it edits, it leaves the image as it is, it discolours it."
)
THIRD = (
    "3. {flawed_steps} steps more of the same with peak rate {flawed_lr:g} on flawed pairs: in a\n"
    "   share of {failed_share:g} the edit did not happen (the target is the source), in a share\n"
    "   of {cast_share:g} the target has a colour cast (channels shifted by up to {cast_size:g} of "
    "255).\n"
)
EARLY = (
    "These are the averaged weights at transformer step {steps}, before the schedule of {total} "
    "steps ended.\n\n"
)


def save_editor(
    pipeline: FluxKontextPipeline, out: Path, config: PretrainConfig, *, steps: int
) -> EditMetrics:
    """Measures the editor and writes it to ``out`` with its model card and ``metrics.json``."""
    metrics = measure(pipeline, config, num_tasks=config.num_eval_tasks)
    out.mkdir(parents=True, exist_ok=True)
    card = model_card(pipeline, config, metrics, steps=steps)
    (out / "README.md").write_text(card, encoding="utf-8")
    numbers = json.dumps(asdict(metrics), indent=1) + "\n"
    (out / "metrics.json").write_text(numbers, encoding="utf-8")
    # model_index.json is what marks a complete editor, and save_pretrained writes it last.
    pipeline.save_pretrained(out)
    return metrics


def model_card(
    pipeline: FluxKontextPipeline, config: PretrainConfig, metrics: EditMetrics, *, steps: int
) -> str:
    """Returns the README of an editor directory, with this run's numbers.

    Args:
        steps: steps of flow matching behind the weights, over both of its stages.
    """
    settings = config.model_dump()
    recipe = {name: value for name, value in settings.items() if name not in REPORTING}
    sizes = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in MODELS}
    total = config.transformer_steps + config.flawed_steps
    # A snapshot of the second stage has seen no flawed pair, so its card says nothing of them.
    flawed = steps > config.transformer_steps
    return CARD.read_text(encoding="utf-8").format(
        **recipe,
        **{f"{name}_parameters": f"{size:,}" for name, size in sizes.items()},
        **_measured(metrics),
        millions=f"{sum(sizes.values()) / 1e6:.1f}",
        evaluation_steps=EVALUATION_STEPS,
        guidance=DEFAULT_GUIDANCE,
        max_text_tokens=MAX_TEXT_TOKENS,
        widths="/".join(map(str, VAE_WIDTHS)),
        factor=PIXELS_PER_TOKEN // 2,
        latent_channels=LATENT_CHANNELS,
        num_words=len(shapes.vocabulary()),
        early="" if steps == total else EARLY.format(steps=steps, total=total),
        flaws=FLAWS if flawed else "",
        third=THIRD.format(**recipe) if flawed else "",
        command=_command(recipe),
    )


def _measured(metrics: EditMetrics) -> dict[str, Any]:
    rows = (
        f"| instruction progress, {name} | {value:.3f} |"
        for name, value in metrics.progress_by_type.items()
    )
    return {
        "num_measured": metrics.num_tasks,
        "progress": f"{metrics.progress:.3f}",
        "progress_rows": "\n".join(rows),
        "background_psnr": f"{metrics.background_psnr:.2f}",
        "vae_background_psnr": f"{metrics.vae_background_psnr:.2f}",
        "vae_psnr": f"{metrics.vae_psnr:.2f}",
    }


def _command(recipe: dict[str, Any]) -> str:
    """Returns the command that makes these weights again."""
    defaults = PretrainConfig()
    # Settings at their default are left out, so the command of the shipped weights is bare.
    changed = {name: value for name, value in recipe.items() if value != getattr(defaults, name)}
    options = (f" --{name.replace('_', '-')} {value}" for name, value in changed.items())
    return "rl-edit pretrain OUT" + "".join(options)
