"""Every method on the same editor, data, rewards and seeds, at equal model evaluations: one table,
resumable.

A row is a set of values: a published method, a step of an ablation, or one value beyond the papers
    on top of ``rc-grpo``. Every row may
ask the editor for ``--evaluations`` forwards while it trains, rollout and learning together; it
makes as many whole updates as fit (``evaluation/effort.py`` counts an update's). So a method that
replays more states learns from fewer groups::

    python benchmarks/methods.py                               # all rows, 3 seeds; stop and rerun
    to resume python benchmarks/methods.py --methods flow-grpo spatialflow-grpo --seeds 0 --updates
    2 --tasks 8 --work /tmp/m --out /tmp/m.md

writes ``benchmarks/results/methods.md`` and ``methods.json``. Runs use the inline runtime, one
thread each, side by side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jobs
from commit import commit_name
from rl_edit.config import RunConfig, load_config
from rl_edit.data import BUILTIN_SHAPES
from rl_edit.data.mask_finding import MaskFinder
from rl_edit.editors import editor_identity
from rl_edit.evaluation.arms import COMMON_MEASURES, MEASURES, TOTAL, Arm
from rl_edit.evaluation.comparison import Comparison, optional_json
from rl_edit.evaluation.effort import effort
from rl_edit.evaluation.evaluated_run import require_alike
from rl_edit.measures.intervals import Interval

EVALUATIONS = 15_360
"""Forwards of one latent state that a run may ask for: 30 updates of ``rc-grpo``, as in
``ablation.py``."""

COMMON = [
    "lora={rank: 16, alpha: 16}",
    "rollout={group_size: 8, num_steps: 6}",
    "train.groups_per_update=8",
    "train.learning_rate=5.0e-4",
    "rewards.judge.weight=1",
    "rewards.preservation.weight=0.3",
]
"""Equal for every row, whatever its preset ships."""

SURROGATE = "{kind: neighbor, num_anchors: 4, clip: 0.2, temperature: 0.5, num_steps: 4}"
RC_GRPO = [
    "algorithm.initial_noise={kind: perturbation, inside: 0.7, outside: 0.05, keep_reference: "
    "true}",
    "algorithm.credit={kind: group, normalise: minibatch, rows: {kind: masked}}",
    f"algorithm.objective={SURROGATE}",
    "rewards.attention.weight=0.3",
]
"""The paper's method; the preset's own recipe explores the background a little and pulls it to the
source as well."""
NO_ATTENTION = ["rewards.attention.weight=0"]
EVERYWHERE = [
    "algorithm.initial_noise={kind: perturbation, inside: 0.7, outside: 0.7, keep_reference: true}",
    "algorithm.credit={kind: group, normalise: minibatch, rows: {kind: uniform}}",
]
ADAPTIVE = [
    "algorithm.initial_noise={kind: adaptive, start: {inside: 0.7, outside: 0.05}, watch: "
    "judge.instruction}"
]
LOCAL = ["algorithm.initial_noise={inside: 0.7, outside: 0.05, background_pull: 1}"]
HELD = [
    "algorithm.objective={kind: background_regularised, target: reference, weight: 0.4, "
    f"inner: {SURROGATE}}}"
]
COPIED = [
    "algorithm.objective={kind: background_regularised, target: source, weight: 0.03, "
    f"inner: {SURROGATE}}}"
]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A preset and the values on top of what all rows share.

    Attributes:
        tasks: trains on the built-in world, or on its first ``ON_DISK`` training tasks written to
            disk, with their "true" masks or with those that ``rl-edit find-masks`` "found".
        against: the row that a value beyond the papers is compared with.
    """

    preset: str
    values: tuple[str, ...] = ()
    tasks: Literal["world", "true", "found"] = "world"
    against: str = ""


def rc_grpo(
    *values: str, tasks: Literal["world", "true", "found"] = "world", against: str = ""
) -> Row:
    return Row(preset="tiny-rc-grpo", values=(*RC_GRPO, *values), tasks=tasks, against=against)


TWO_LEVELS = "{kind: forward_process, num_times: 2, reference_weight: 0}"
"""DiffusionNFT at a quarter of the states: two noise levels a group instead of five, and no look at
the base."""
SPARE_ROW, SPARE_REGULARISED_ROW = (
    "diffusion-nft, 2 levels, rate 1e-3",
    "cocoedit, 2 levels, rate 1e-3",
)

ON_DISK = 256
NO_ATTENTION_ROW, EVERYWHERE_ROW = "rc-grpo, no attention reward", "rc-grpo, noise everywhere"
TRUE_ROW, TRUE_REGIONS_ROW = f"rc-grpo, {ON_DISK} tasks", f"spatialflow-grpo, {ON_DISK} tasks"

ROWS: dict[str, Row] = {
    "rc-grpo": rc_grpo(),
    "neighbor-grpo": Row(preset="tiny-neighbor-grpo"),
    "flow-grpo": Row(preset="tiny-flow-grpo"),
    "flow-grpo-fast": Row(preset="tiny-flow-grpo-fast"),
    "mixgrpo": Row(preset="tiny-mixgrpo"),
    "diffusion-nft": Row(preset="tiny-diffusion-nft"),
    "cocoedit": Row(preset="tiny-cocoedit"),
    "spatialflow-grpo": Row(preset="tiny-spatialflow-grpo"),
    "edit-grpo": Row(preset="tiny-edit-grpo"),
    "edit-grpo-neighbor": Row(preset="tiny-edit-grpo-neighbor"),
    SPARE_ROW: Row(
        preset="tiny-diffusion-nft",
        values=(f"algorithm.objective={TWO_LEVELS}", "train.learning_rate=1.0e-3"),
    ),
    SPARE_REGULARISED_ROW: Row(
        preset="tiny-cocoedit",
        values=(f"algorithm.objective.inner={TWO_LEVELS}", "train.learning_rate=1.0e-3"),
    ),
    NO_ATTENTION_ROW: rc_grpo(*NO_ATTENTION),
    EVERYWHERE_ROW: rc_grpo(*EVERYWHERE, *NO_ATTENTION),
    "rc-grpo + adaptive spread": rc_grpo(*ADAPTIVE, against="rc-grpo"),
    "rc-grpo + background_pull": rc_grpo(*LOCAL, against="rc-grpo"),
    "rc-grpo + background held at the base": rc_grpo(*HELD, against="rc-grpo"),
    "rc-grpo + background pulled to the source": rc_grpo(*COPIED, against="rc-grpo"),
    TRUE_ROW: rc_grpo(tasks="true"),
    f"{TRUE_ROW} + masks found": rc_grpo(tasks="found", against=TRUE_ROW),
    TRUE_REGIONS_ROW: Row(preset="tiny-spatialflow-grpo", tasks="true"),
    f"{TRUE_REGIONS_ROW} + regions found": Row(
        preset="tiny-spatialflow-grpo", tasks="found", against=TRUE_REGIONS_ROW
    ),
}


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A published effect: one row's measure above another's, or above the base's; ``falls`` turns
    it round.

    Attributes:
        other: the row compared with; "" is the base.
        task_type: only these tasks; "" is all.
    """

    claim: str
    one: str
    other: str
    measure: str
    task_type: str = ""
    falls: bool = False

    def found(self, arms: dict[str, Arm]) -> Interval | None:
        """One minus other; None when a row is missing or has no such task."""
        if self.one not in arms or (self.other and self.other not in arms):
            return None
        kind = self.task_type or None
        if not self.other:
            return arms[self.one].gain(self.measure, task_type=kind)
        return arms[self.one].minus(arms[self.other], self.measure, task_type=kind)

    def verdict(self, interval: Interval | None) -> str:
        if interval is None:
            return "not measured"
        low, mean = (
            (-interval.high, -interval.mean) if self.falls else (interval.low, interval.mean)
        )
        high = -interval.low if self.falls else interval.high
        if low > 0:
            return "reproduced"
        if mean > 0:
            return "in direction only; the interval includes zero"
        return "not reproduced; the reverse, beyond the interval" if high < 0 else "not reproduced"


PSNR = "background_psnr_masked"
EFFECTS = (
    Effect(
        claim="RC-GRPO-Editing, ablation: noise everywhere puts the background below the base's",
        one=EVERYWHERE_ROW,
        other="",
        measure=PSNR,
        falls=True,
    ),
    Effect(
        claim="RC-GRPO-Editing, ablation: region noise keeps the background better than noise "
        "everywhere",
        one=NO_ATTENTION_ROW,
        other=EVERYWHERE_ROW,
        measure=PSNR,
    ),
    Effect(
        claim="RC-GRPO-Editing, ablation: rewarding attention in the region keeps it better still",
        one="rc-grpo",
        other=NO_ATTENTION_ROW,
        measure=PSNR,
    ),
    Effect(
        claim="RC-GRPO-Editing: the whole method edits better than the base",
        one="rc-grpo",
        other="",
        measure="instruction",
    ),
    Effect(
        claim="CoCoEdit: the region regulariser keeps the background better than plain "
        "DiffusionNFT",
        one="cocoedit",
        other="diffusion-nft",
        measure=PSNR,
    ),
    Effect(
        claim="CoCoEdit: the same, at two levels",
        one=SPARE_REGULARISED_ROW,
        other=SPARE_ROW,
        measure=PSNR,
    ),
    Effect(
        claim="SpatialFlow-GRPO: better than Flow-GRPO where several regions are edited (total "
        "reward)",
        one="spatialflow-grpo",
        other="flow-grpo",
        measure=TOTAL,
        task_type="two_regions",
    ),
    Effect(
        claim="SpatialFlow-GRPO: the same, instruction",
        one="spatialflow-grpo",
        other="flow-grpo",
        measure="instruction",
        task_type="two_regions",
    ),
)

BY_TYPE = ("instruction", PSNR)


def main() -> None:
    options = _options()
    jobs.require_sound(options)
    every = [job_of(row, seed, options) for seed in options.seeds for row in options.methods]
    if options.one is not None:
        every[options.one].run()
        return
    for tasks in {ROWS[row].tasks for row in options.methods} - {"world"}:
        write_tasks(tasks, options)
    failed = jobs.run_all(every, side_by_side=options.side_by_side)
    write_table(every, options)
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
        "--methods",
        nargs="+",
        default=list(ROWS),
        choices=list(ROWS),
        metavar="ROW",
        help=f"of: {'; '.join(ROWS)}",
    )
    parser.add_argument(
        "--evaluations", type=int, default=EVALUATIONS, help="model evaluations of a run"
    )
    parser.add_argument(
        "--updates", type=jobs.positive, help="updates of every run instead, for a small try"
    )
    jobs.arguments(parser, name="methods")
    return parser.parse_args()


def job_of(row: str, seed: int, options: argparse.Namespace) -> jobs.Job:
    """A run of a row. Without --updates it makes as many as the evaluations allow."""
    asked = ROWS[row]
    on_disk = []
    if asked.tasks != "world":
        # A found mask may miss the edit altogether: the judge then gives no score, and the group is
        # dropped.
        on_disk = [
            f"data.path={tasks_at(asked.tasks, options)}",
            f"data.heldout_path={BUILTIN_SHAPES}",
            "train.max_dropped_groups=8",
        ]
    changes = [
        *COMMON,
        *jobs.overrides(seed=seed, tasks=options.tasks),
        *asked.values,
        *on_disk,
        f"name={row}",
        *options.set,
    ]
    config = load_config(preset=asked.preset, overrides=changes)
    updates = options.updates or updates_within(config, options.evaluations)
    config = load_config(preset=asked.preset, overrides=[*changes, f"train.updates={updates}"])
    return jobs.Job(
        row=row, directory=options.work / jobs.slug(row) / f"seed_{seed}", config=config
    )


def tasks_at(tasks: str, options: argparse.Namespace) -> Path:
    """Where a row's tasks on disk are. Masks that another editor or other settings found are other
    tasks, in another place."""
    if tasks == "true":
        return options.work / "tasks-true"
    settings = {
        "editor": editor_identity(load_config(preset="tiny-rc-grpo", overrides=options.set).editor),
        **MaskFinder().model_dump(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return options.work / f"tasks-found-{digest[:8]}"


def write_tasks(tasks: str, options: argparse.Namespace) -> None:
    """Makes the tasks with the commands that a user has, unless they are there."""
    place, true = tasks_at(tasks, options), tasks_at("true", options)
    if not true.exists():
        command("dataset", "make-shapes", str(true), "--count", str(ON_DISK))
    if not place.exists():
        command("find-masks", str(true), "--out", str(place), *options.set)


def command(*words: str) -> None:
    """``rl-edit`` in a process of its own, which says what it does."""
    if code := subprocess.run([sys.executable, "-m", "rl_edit", *words], check=False).returncode:
        sys.exit(f"rl-edit {' '.join(words)} ended with {code}")


def updates_within(config: RunConfig, evaluations: int) -> int:
    """Whole updates that ask for no more model evaluations than these.

    Raises:
        SystemExit: not even one does.
    """
    one = effort(config).total
    if evaluations < one:
        sys.exit(
            f"--evaluations {evaluations} is below the {one} of one update of {config.name}: allow "
            "more"
        )
    return evaluations // one


def write_table(every: Sequence[jobs.Job], options: argparse.Namespace) -> None:
    """The table, what it says about each method and each published effect, and both as JSON."""
    arms = {row: found for row in options.methods if (found := jobs.arm(row, every)) is not None}
    if not arms:
        sys.exit("no run is finished: there is nothing to tell")
    runs = [run for arm in arms.values() for run in arm.runs]
    require_alike(runs)
    whole = Comparison(
        meta=runs[0].meta,
        arms=tuple(arms.values()),
        weights=jobs.TOTAL_WEIGHTS,
        against=arms.get("rc-grpo"),
        notes=(),
    )
    budget = (
        f"{options.updates} updates each, so evaluations are not equal"
        if options.updates
        else f"at most {options.evaluations} model evaluations each, as many whole updates as fit"
    )
    lines = [
        "# Methods on the built-in editor",
        "",
        *jobs.provenance("methods.py"),
        f"{options.tasks} held-out tasks, seeds {options.seeds}; {budget}. A model evaluation is "
        "one forward of one latent state, in "
        "rollout or in learning; one that learns costs a backward on top.",
        "",
        "Differences to base are paired by task and noise and averaged over seeds; brackets are 95 "
        "% bootstrap intervals over tasks. "
        "Training reward is a row's own weighted sum of raw terms; total reward is judge / 10 + "
        "preservation for every row.",
        "",
        "## Differences to base",
        "",
        *_gains(whole, options.methods),
        "",
        "## Does a method raise its own training reward?",
        "",
        *_raises(arms),
        "",
        "## Published effects",
        "",
        *_effects(arms),
        "",
        "## Beyond the papers",
        "",
        "Each value alone: trained with it minus trained without it.",
        "",
        *_beyond(arms),
        "",
        "## By task type",
        "",
        "Differences to base.",
        "",
        *_by_type(arms),
        "## By seed",
        "",
        "Differences to base (training reward; instruction; background PSNR, dB), to show what the "
        "intervals over tasks do not:",
        "",
        *_by_seed(arms),
        "",
    ]
    jobs.write(options.out, lines)
    options.out.with_suffix(".json").write_text(
        json.dumps(_record(whole), indent=2, allow_nan=False) + "\n"
    )


def _gains(whole: Comparison, rows: Sequence[str]) -> list[str]:
    heading = [
        "row",
        "seeds",
        "updates",
        "evaluations",
        *(m.heading for m in MEASURES),
        "s an update",
        "evaluations an update",
    ]
    base = [whole.base(measure.name) for measure in MEASURES]
    means = [
        "" if found is None else f"{found.mean:.{m.digits}f}"
        for found, m in zip(base, MEASURES, strict=True)
    ]
    cells = [["base", "", "", "", *means, "", ""]]
    arms = {arm.label: arm for arm in whole.arms}
    for row in rows:
        if (arm := arms.get(row)) is None:
            cells.append([row, "none finished", *[""] * (len(heading) - 2)])
            continue
        seconds, one = arm.seconds_per_update, arm.effort
        gains = [jobs.cell(arm.gain(measure.name), measure.digits) for measure in MEASURES]
        costs = [
            "" if seconds is None else f"{seconds:.2f}",
            f"{one.total} ({one.rollout} + {one.learning})",
        ]
        cells.append(
            [
                row,
                str(len(arm.runs)),
                str(arm.updates),
                str(arm.updates * one.total),
                *gains,
                *costs,
            ]
        )
    return jobs.table(heading, cells)


def _raises(arms: dict[str, Arm]) -> list[str]:
    rows = []
    for row, arm in arms.items():
        gain = arm.gain("reward")
        rows.append([row, jobs.cell(gain, 3), said(gain)])
    return jobs.table(["row", "training reward", "raised beyond the interval"], rows)


def said(gain: Interval | None) -> str:
    """Whether an interval lies above zero."""
    if gain is None:
        return "not measured"
    return (
        "yes"
        if gain.low > 0
        else "no; it falls"
        if gain.high < 0
        else "no; the interval includes zero"
    )


def _effects(arms: dict[str, Arm]) -> list[str]:
    rows = []
    for effect in EFFECTS:
        interval, measure = (
            effect.found(arms),
            next(m for m in MEASURES if m.name == effect.measure),
        )
        where = f", {effect.task_type.replace('_', ' ')}" if effect.task_type else ""
        compared = f"{effect.one} minus {effect.other or 'base'}, {measure.heading}{where}"
        shown = (
            "" if interval is None else f"{jobs.cell(interval, measure.digits)}, n = {interval.n}"
        )
        rows.append([effect.claim, compared, shown, effect.verdict(interval)])
    return jobs.table(["published", "compared", "difference", "here"], rows)


def _beyond(arms: dict[str, Arm]) -> list[str]:
    rows = [
        [
            row,
            against,
            *(
                jobs.cell(arms[row].minus(arms[against], measure.name), measure.digits)
                for measure in COMMON_MEASURES
            ),
        ]
        for row in arms
        if (against := ROWS[row].against) in arms
    ]
    return jobs.table(
        ["with it", "without it", *(measure.heading for measure in COMMON_MEASURES)], rows
    )


def _by_type(arms: dict[str, Arm]) -> list[str]:
    lines: list[str] = []
    kinds = next(iter(arms.values())).task_types()
    for measure in (m for m in MEASURES if m.name in BY_TYPE):
        gains = {
            row: {kind: arm.gain(measure.name, task_type=kind) for kind in kinds}
            for row, arm in arms.items()
        }
        sizes = {
            kind: max((gain.n for found in gains.values() if (gain := found[kind])), default=0)
            for kind in kinds
        }
        heading = [
            measure.heading,
            *(f"{kind.replace('_', ' ')} (n = {sizes[kind]})" for kind in kinds),
        ]
        rows = [
            [row, *(jobs.cell(found[kind], measure.digits) for kind in kinds)]
            for row, found in gains.items()
        ]
        lines += [*jobs.table(heading, rows), ""]
    return lines


def _by_seed(arms: dict[str, Arm]) -> list[str]:
    lines = []
    for row, arm in arms.items():
        reward, edit, background = (
            arm.by_seed(measure) for measure in ("reward", "instruction", PSNR)
        )
        seeds = (f"{s}: {reward[s]:+.3f}; {edit[s]:+.3f}; {background[s]:+.2f}" for s in arm.seeds)
        lines.append(f"- {row}: {' | '.join(seeds)}")
    return lines


def _record(whole: Comparison) -> dict[str, Any]:
    arms = {arm.label: arm for arm in whole.arms}
    effects = []
    for effect in EFFECTS:
        interval = effect.found(arms)
        told = {
            "claim": effect.claim,
            "one": effect.one,
            "other": effect.other or "base",
            "measure": effect.measure,
        }
        effects.append(
            {
                **told,
                "task_type": effect.task_type,
                "difference": optional_json(interval),
                "here": effect.verdict(interval),
            }
        )
    raised = {row: said(arm.gain("reward")) for row, arm in arms.items()}
    compared = whole.record()
    for arm in compared["arms"]:
        # Where runs lay on the machine that made the table is nobody's business.
        arm["runs"] = [Path(run).name for run in arm["runs"]]
    return {
        "commit": commit_name(),
        "command": jobs.settings(),
        **compared,
        "raises_training_reward": raised,
        "effects": effects,
    }


if __name__ == "__main__":
    jobs.command(main)
