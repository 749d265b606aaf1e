"""Writes the model card of an exported adapter: its base, method, data, seed and evaluation."""

from __future__ import annotations

import math
from pathlib import Path

from rl_edit.config import RunConfig
from rl_edit.evaluation.record import EvaluationRecord
from rl_edit.measures.intervals import Interval
from rl_edit.method.algorithms import METHODS
from rl_edit.report.run_files import RunFiles

METRICS = (
    "reward",
    "instruction",
    "background_psnr_masked",
    "background_psnr_zero_filled",
    "background_ssim",
)
"""Metrics of the card, by their names in evaluation.json, where those are measured."""


def adapter_card(
    run: RunFiles, config: RunConfig, *, adapter: str, file: Path, difference: int | None
) -> str:
    """Writes the card as Markdown, with the header that the Hugging Face hub reads.

    Args:
        adapter: id of the adapter, as in ``evaluation.json``.
        difference: largest difference of a test image, of 255; None where it was not compared.
    """
    # The card is of this file: an evaluation of another adapter is named and not shown.
    updates = adapter.split(":")[0]
    method = METHODS.get(config.algorithm.name)
    # Those that the data could not feed never acted.
    left_out = [reason.split(":")[0] for reason in run.run.left_out_rewards]
    rewards = ", ".join(
        f"{name} {term.weight:g}" for name, term in config.rewards.items() if name not in left_out
    )
    missing = f" Left out for want of data: {', '.join(left_out)}." if left_out else ""
    compared = (
        "Not compared with the run's own adapter."
        if difference is None
        else f"A test image differs by at most {difference} of 255 from the run's own adapter."
    )
    lines = [
        "---",
        f"base_model: {config.editor.path}",
        "library_name: diffusers",
        "tags: [lora, image-editing, reinforcement-learning]",
        "---",
        "",
        f"# {config.name}",
        "",
        f"`{file.name}` is a LoRA for `{config.editor.path}`, trained by reinforcement learning",
        f"with rl-edit. {compared}",
        "",
        f"- **Adapter** `{adapter}`: {updates} updates; rank {config.lora.rank}, alpha "
        f"{config.lora.alpha:g}.",
        f"- **Method** {config.algorithm.name}" + (f" ({method.citation})." if method else "."),
        f"- **Rewards** and their weights: {rewards}.{missing}",
        f"- **Data** `{config.data.path}`, fingerprint `{run.run.data_fingerprint or 'unknown'}`.",
        f"- **Seed** {config.seed}. One run: its spread over seeds is not known from it.",
        "",
        *_evaluation(run.evaluation, adapter),
    ]
    return "\n".join(lines) + "\n"


def _evaluation(record: EvaluationRecord | None, adapter: str) -> list[str]:
    """Tabulates base and trained editor, with intervals of the difference."""
    if record is None:
        return ["Not evaluated: `rl-edit evaluate RUN` does, and then export again."]
    if record.meta.get("adapter") != adapter:
        return [
            f"The run's evaluation is of adapter `{record.meta.get('adapter')}`, not of this one."
        ]
    rows = [
        f"| {name} | {record.base[name].mean:.4g} | {record.trained[name].mean:.4g} | "
        f"{_difference(record.delta[name])} |"
        for name in METRICS
        if name in record.base and name in record.trained and name in record.delta
    ]
    return [
        f"Held-out tasks: {record.meta.get('num_tasks')}, on the same noises for both; intervals "
        "of 95 %.",
        "",
        "| metric | base | trained | difference |",
        "|---|---|---|---|",
        *rows,
    ]


def _difference(interval: Interval) -> str:
    # One task has no spread.
    if not math.isfinite(interval.low):
        return f"{interval.mean:+.4g}"
    return f"{interval.mean:+.4g} [{interval.low:+.4g}, {interval.high:+.4g}]"
