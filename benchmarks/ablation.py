"""What each part of RC-GRPO does to a picture, inside the mask and outside it: one table,
resumable.

Every variant is a set of values in the same preset, trained with equal budgets and several seeds,
and evaluated on the same held-out tasks under the same noises as the base. Finished runs are kept
under ``--work`` and never repeated::

    python benchmarks/ablation.py --base shipped=builtin:tiny-kontext --seeds 0 1 2

writes ``benchmarks/results/ablation.md`` and ``ablation.json``. Runs use the inline runtime, one
thread each, side by side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jobs
from commit import commit_name
from rl_edit.config import load_config
from rl_edit.evaluation.arms import TOTAL, Arm
from rl_edit.evaluation.comparison import optional_json
from rl_edit.files import METRICS, read_json_lines

SURROGATE = "{kind: neighbor, num_anchors: 4, clip: 0.2, temperature: 0.5, num_steps: 4}"
COMMON = [
    "lora={rank: 16, alpha: 16}",
    "rollout={group_size: 8, num_steps: 6}",
    "train.groups_per_update=8",
    "train.learning_rate=5.0e-4",
    "rewards.preservation.weight=0.3",
    f"algorithm.objective={SURROGATE}",
    "rewards.attention.weight=0",
]
"""Equal for every variant, whatever the preset ships; later values win."""

REGION = [
    *COMMON,
    "algorithm.initial_noise={kind: perturbation, inside: 0.7, outside: 0.05, keep_reference: "
    "true}",
]
GLOBAL = [
    *COMMON,
    "algorithm.initial_noise={kind: perturbation, inside: 0.7, outside: 0.7, keep_reference: true}",
]
MASKED = "algorithm.credit={{kind: group, normalise: {}, rows: {{kind: masked}}}}"
BANDWIDTHS = (
    "algorithm.credit={{kind: group, normalise: minibatch, "
    "rows: {{kind: masked, inside: {}, outside: {}}}}}"
)
UNIFORM = "algorithm.credit={{kind: group, normalise: {}, rows: {{kind: uniform}}}}"
ACD = ["rewards.attention.weight=0.3"]
ANCHOR = [f"algorithm.objective={{kind: background_regularised, weight: 0.1, inner: {SURROGATE}}}"]
LIGHT_ANCHOR = [
    f"algorithm.objective={{kind: background_regularised, weight: 0.01, inner: {SURROGATE}}}"
]
SPLIT = [
    "algorithm.credit={kind: split, edit_share: 0.5, normalise: group}",
    "rewards.preservation.weight=1",
]

VARIANTS: dict[str, list[str]] = {
    "global": [*GLOBAL, UNIFORM.format("minibatch")],
    "region": [*REGION, MASKED.format("minibatch")],
    "region + ACD": [*REGION, MASKED.format("minibatch"), *ACD],
    "region, terms standardised per group": [*REGION, MASKED.format("group")],
    "region + source-latent anchor outside (0.1)": [*REGION, MASKED.format("minibatch"), *ANCHOR],
    "region + source-latent anchor outside (0.01)": [
        *REGION,
        MASKED.format("minibatch"),
        *LIGHT_ANCHOR,
    ],
    "region, areas judged apart": [*REGION, *SPLIT],
    "region, edit weighs more (h_in 0.5)": [*REGION, BANDWIDTHS.format(0.5, 1.0)],
    "region, background weighs more (h_out 0.5)": [*REGION, BANDWIDTHS.format(1.0, 0.5)],
    "global, terms standardised per group": [*GLOBAL, UNIFORM.format("group")],
    "region, raw terms summed": [*REGION, MASKED.format("none"), "rewards.judge.weight=0.1"],
    "as shipped": [],
}
"""Values of each variant on top of the preset tiny-rc-grpo; "minibatch" is the paper's
normalisation of terms."""

DEFAULT_VARIANTS = [*list(VARIANTS)[:9], "as shipped"]

COMPARISONS = [
    ("region", "global"),
    ("region + ACD", "region"),
    ("region, terms standardised per group", "region"),
    ("region + source-latent anchor outside (0.1)", "region"),
    ("region + source-latent anchor outside (0.01)", "region"),
    ("region, areas judged apart", "region"),
    ("region, edit weighs more (h_in 0.5)", "region"),
    ("region, background weighs more (h_out 0.5)", "region"),
]

REPORTED = {
    "instruction": ("instruction", 3),
    "background_psnr_masked": ("background PSNR, dB", 3),
    "background_ssim": ("background SSIM", 4),
    TOTAL: ("total reward", 3),
    "concentration": ("ACD", 3),
}
"""Label and decimals."""


def main() -> None:
    options = _options()
    jobs.require_sound(options)
    bases = dict(item.split("=", 1) for item in options.base)
    every = [
        job_of(b, path, v, s, options)
        for s in options.seeds
        for b, path in bases.items()
        for v in options.variants
    ]
    if options.one is not None:
        every[options.one].run()
        return
    failed = jobs.run_all(every, side_by_side=options.side_by_side)
    write_table(bases, every, options)
    if failed:
        sys.exit(
            f"{failed} runs failed; their rows are missing above. Run the same command again to "
            "retry them."
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", nargs="+", default=["shipped=builtin:tiny-kontext"], help="NAME=EDITOR pairs"
    )
    parser.add_argument("--variants", nargs="+", default=DEFAULT_VARIANTS, choices=list(VARIANTS))
    parser.add_argument("--updates", type=int, default=30)
    jobs.arguments(parser, name="ablation")
    return parser.parse_args()


def job_of(
    base: str, editor: str, variant: str, seed: int, options: argparse.Namespace
) -> jobs.Job:
    changes = [
        f"editor.path={editor}",
        f"train.updates={options.updates}",
        *jobs.overrides(seed=seed, tasks=options.tasks),
        *VARIANTS[variant],
        *options.set,
    ]
    return jobs.Job(
        row=row_of(base, variant),
        directory=options.work / base / jobs.slug(variant) / f"seed_{seed}",
        config=load_config(preset="tiny-rc-grpo", overrides=changes),
    )


def row_of(base: str, variant: str) -> str:
    return f"{base} | {variant}"


def write_table(
    bases: dict[str, str], every: Sequence[jobs.Job], options: argparse.Namespace
) -> None:
    """One row a variant: paired difference to base over all seeds, clustered by task, with 95 %
    intervals."""
    lines = [
        "# Ablation on the built-in editor",
        "",
        *jobs.provenance("ablation.py"),
        f"{options.updates} updates x 8 groups x 8 candidates, {options.tasks} held-out tasks, "
        f"seeds {options.seeds}; equal budgets.",
        "",
        "Differences to base are paired by task and noise and averaged over seeds; "
        "brackets are 95 % bootstrap intervals over tasks (clusters). "
        "Total reward is judge / 10 + preservation, the same for every row. "
        "PSNR spread is the mean within-group standard deviation of the background PSNR during "
        "training.",
        "",
    ]
    record: dict[str, Any] = {"commit": commit_name(), "command": jobs.settings(), "bases": {}}
    for base in bases:
        arms = {
            v: found
            for v in options.variants
            if (found := jobs.arm(row_of(base, v), every)) is not None
        }
        lines += [
            f"## Base: {base}",
            "",
            *_gains(arms, options.variants),
            "",
            *_between(arms),
            *_by_seed(arms),
            "",
        ]
        record["bases"][base] = _recorded(arms)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    jobs.write(options.out, lines)
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")


def _gains(arms: dict[str, Arm], variants: Sequence[str]) -> list[str]:
    rows = []
    if arms:
        first = next(iter(arms.values()))
        rows.append(
            [
                "base",
                "",
                *(f"{_mean(first, metric):.{digits}f}" for metric, (_, digits) in REPORTED.items()),
                "",
            ]
        )
    for variant in variants:
        if (arm := arms.get(variant)) is None:
            rows.append([variant, "none finished", *[""] * (len(REPORTED) + 1)])
            continue
        cells = [jobs.cell(arm.gain(metric), digits) for metric, (_, digits) in REPORTED.items()]
        rows.append([variant, str(len(arm.runs)), *cells, f"{_spread(arm):.2f}"])
    return jobs.table(
        ["variant", "seeds", *(label for label, _ in REPORTED.values()), "PSNR spread"], rows
    )


def _between(arms: dict[str, Arm]) -> list[str]:
    """Variant against variant, paired by task and noise."""
    shown = ("instruction", "background_psnr_masked", TOTAL)
    rows = [
        [
            f"{one} minus {other}",
            *(
                jobs.cell(arms[one].minus(arms[other], metric), REPORTED[metric][1])
                for metric in shown
            ),
        ]
        for one, other in COMPARISONS
        if one in arms and other in arms
    ]
    return [*jobs.table(["comparison", *(REPORTED[metric][0] for metric in shown)], rows), ""]


def _by_seed(arms: dict[str, Arm]) -> list[str]:
    lines = [
        "Differences to base by seed (instruction; background PSNR, dB), to show what the "
        "intervals over tasks do not:",
        "",
    ]
    for variant, arm in arms.items():
        edits, backgrounds = arm.by_seed("instruction"), arm.by_seed("background_psnr_masked")
        seeds = (f"{seed}: {edits[seed]:+.3f}; {backgrounds[seed]:+.2f}" for seed in arm.seeds)
        lines.append(f"- {variant}: {' | '.join(seeds)}")
    return lines


def _recorded(arms: dict[str, Arm]) -> dict[str, Any]:
    comparisons = {
        f"{one} - {other}": {
            metric: optional_json(arms[one].minus(arms[other], metric)) for metric in REPORTED
        }
        for one, other in COMPARISONS
        if one in arms and other in arms
    }
    variants = {
        variant: {
            "seeds": list(arm.seeds),
            "delta": {metric: optional_json(arm.gain(metric)) for metric in REPORTED},
            "psnr_spread": _spread(arm),
            "overrides": VARIANTS[variant],
        }
        for variant, arm in arms.items()
    }
    base = {metric: _mean(next(iter(arms.values())), metric) for metric in REPORTED} if arms else {}
    return {"base": base, **variants, "comparisons": comparisons}


def _mean(arm: Arm, metric: str) -> float:
    """The base editor's."""
    return statistics.fmean(arm.base(metric).values())


def _spread(arm: Arm) -> float:
    lines = [line for run in arm.runs for line in read_json_lines(run.directory / METRICS)]
    values = [line["background/psnr/spread"] for line in lines if "background/psnr/spread" in line]
    return sum(values) / max(1, len(values))


if __name__ == "__main__":
    jobs.command(main)
