"""What each part of RC-GRPO does to a picture, inside the mask and outside it: one table, resumable.

Every variant is a set of values in the same preset, trained with equal budgets and several seeds, and evaluated on the same
held-out tasks under the same noises as the base. Finished runs are kept under ``--work`` and never repeated::

    python benchmarks/ablation.py --base shipped=builtin:tiny-kontext --seeds 0 1 2

writes ``benchmarks/results/ablation.md`` and ``ablation.json``. Runs use the inline runtime, one thread each, side by side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

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

REGION = [*COMMON, "algorithm.initial_noise={kind: perturbation, inside: 0.7, outside: 0.05, keep_reference: true}"]
GLOBAL = [*COMMON, "algorithm.initial_noise={kind: perturbation, inside: 0.7, outside: 0.7, keep_reference: true}"]
MASKED = "algorithm.credit={{kind: group, normalise: {}, rows: {{kind: masked}}}}"
UNIFORM = "algorithm.credit={{kind: group, normalise: {}, rows: {{kind: uniform}}}}"
ACD = ["rewards.attention.weight=0.3"]
ANCHOR = [f"algorithm.objective={{kind: background_anchored, weight: 0.1, inner: {SURROGATE}}}"]
LIGHT_ANCHOR = [f"algorithm.objective={{kind: background_anchored, weight: 0.01, inner: {SURROGATE}}}"]
SPLIT = ["algorithm.credit={kind: split, edit_share: 0.5, normalise: group}", "rewards.preservation.weight=1"]

VARIANTS: dict[str, list[str]] = {
    "global": [*GLOBAL, UNIFORM.format("minibatch")],
    "region": [*REGION, MASKED.format("minibatch")],
    "region + ACD": [*REGION, MASKED.format("minibatch"), *ACD],
    "region, terms standardised per group": [*REGION, MASKED.format("group")],
    "region + source-latent anchor outside (0.1)": [*REGION, MASKED.format("minibatch"), *ANCHOR],
    "region + source-latent anchor outside (0.01)": [*REGION, MASKED.format("minibatch"), *LIGHT_ANCHOR],
    "region, areas judged apart": [*REGION, *SPLIT],
    "global, terms standardised per group": [*GLOBAL, UNIFORM.format("group")],
    "region, raw terms summed": [*REGION, MASKED.format("none"), "rewards.judge.weight=0.1"],
    "as shipped": [],
}
"""Values of each variant on top of the preset tiny-rc-grpo; "minibatch" is the paper's normalisation of terms."""

DEFAULT_VARIANTS = list(VARIANTS)[:7]

COMPARISONS = [
    ("region", "global"),
    ("region + ACD", "region"),
    ("region, terms standardised per group", "region"),
    ("region + source-latent anchor outside (0.1)", "region"),
    ("region + source-latent anchor outside (0.01)", "region"),
    ("region, areas judged apart", "region"),
]

METRICS = {
    "instruction": ("instruction", ".3f"),
    "background_psnr_masked": ("background PSNR, dB", ".3f"),
    "background_ssim": ("background SSIM", ".4f"),
    "reward": ("total reward", ".3f"),
    "concentration": ("ACD", ".3f"),
}


@dataclass(frozen=True)
class Job:
    """One training run of the table."""

    base: str
    editor: str
    variant: str
    seed: int

    def directory(self, work: Path) -> Path:
        slug = "".join(c if c.isalnum() else "-" for c in self.variant)
        return work / self.base / slug / f"seed_{self.seed}"


def main() -> None:
    arguments = _arguments()
    bases = dict(item.split("=", 1) for item in arguments.base)
    jobs = [Job(b, path, v, s) for s in arguments.seeds for b, path in bases.items() for v in arguments.variants]
    if arguments.one is not None:
        run_job(jobs[arguments.one], arguments)
        return
    for base, path in bases.items():
        evaluate_base(base, path, arguments)
    todo = [i for i, job in enumerate(jobs) if not _finished(job, arguments)]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} already done", flush=True)
    failed = _run_side_by_side(todo, jobs, arguments)
    write_table(bases, jobs, arguments)
    if failed:
        sys.exit(f"{failed} runs failed; their rows are missing above. Run the same command again to retry them.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=["shipped=builtin:tiny-kontext"], help="NAME=EDITOR pairs")
    parser.add_argument("--variants", nargs="+", default=DEFAULT_VARIANTS, choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--set", nargs="*", default=[], help="further overrides for every run")
    parser.add_argument("--tasks", type=int, default=256)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.md")
    parser.add_argument("--side-by-side", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _overrides(job: Job, arguments: argparse.Namespace) -> list[str]:
    return [
        f"editor.path={job.editor}",
        f"seed={job.seed}",
        f"train.updates={arguments.updates}",
        f"evaluation.num_tasks={arguments.tasks}",
        f"data.num_heldout={arguments.tasks}",
        "actors.runtime=inline",
        "actors.threads=1",
        *VARIANTS[job.variant],
        *arguments.set,
    ]


def run_job(job: Job, arguments: argparse.Namespace) -> None:
    """Trains (or resumes) one run and evaluates its adapter; ``rows.jsonl`` appears last."""
    import torch

    from rl_edit import adapters
    from rl_edit.cli.train import train
    from rl_edit.config import load_config

    torch.set_num_threads(1)
    directory = job.directory(arguments.work)
    config = load_config(preset="tiny-rc-grpo", overrides=_overrides(job, arguments))
    started = time.time()
    if not (directory / "adapter" / "adapter.json").is_file():
        train(config, directory, resume=directory.is_dir() and any(directory.iterdir()))
    trained_s = time.time() - started
    weights, lora = adapters.read(directory / "adapter")
    evaluation = _evaluate(config, weights, lora, ("trained",))
    seconds = {"train": trained_s, "evaluate": time.time() - started - trained_s}
    record = {"stamp": _stamp(config), "seconds": seconds, "adapter": str(weights.id), "commit": _commit()}
    (directory / "ablation.json").write_text(json.dumps(record) + "\n")
    _write_rows(directory / "rows.jsonl", evaluation.rows, "trained")


def evaluate_base(base: str, editor: str, arguments: argparse.Namespace) -> None:
    """The base's rows on the held-out tasks, once."""
    from rl_edit.config import load_config

    path = arguments.work / base / "base_rows.jsonl"
    config = load_config(preset="tiny-rc-grpo", overrides=_overrides(Job(base, editor, DEFAULT_VARIANTS[0], 0), arguments))
    stamp = _stamp(config, evaluation_only=True)
    stamp_file = path.with_name("base.json")
    if path.is_file():
        if json.loads(stamp_file.read_text())["stamp"] != stamp:
            sys.exit(f"{path} was made with other tasks, settings or editor weights: give another --work or remove {path.parent}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp_file.write_text(json.dumps({"stamp": stamp, "commit": _commit()}) + "\n")
    print(f"evaluating base {base}", flush=True)
    evaluation = _evaluate(config, None, config.lora, ("base",))
    _write_rows(path, evaluation.rows, "base")


def _stamp(config: Any, *, evaluation_only: bool = False) -> str:
    """Names what a finished run stands for, so that a rerun with other settings or weights never takes it for its own."""
    from rl_edit.editors import editor_identity

    settings = {"evaluation": config.evaluation.model_dump(mode="json"), "editor": editor_identity(config.editor)}
    if not evaluation_only:
        settings |= {"settings": config.sha256(), "updates": config.train.updates}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _evaluate(config: Any, weights: Any, lora: Any, variants: tuple[str, ...]) -> Any:
    from rl_edit import adapters
    from rl_edit.data import open_dataset
    from rl_edit.editors import load_editor
    from rl_edit.evaluation.evaluate import evaluate

    editor = load_editor(config.editor)
    adapters.attach(editor.transformer, lora, seed=0)
    if weights is not None:
        adapters.load(editor.transformer, weights)
    dataset = open_dataset(config.data, "heldout")
    return evaluate(
        editor, dataset, tuple(config.rewards.values()), config.evaluation, num_steps=config.rollout.num_steps, variants=variants
    )


def _write_rows(path: Path, rows: Any, variant: str) -> None:
    temporary = path.with_suffix(".tmp")
    lines = [json.dumps({"task_id": r.task_id, "task_type": r.task_type, "values": r.values[variant]}) for r in rows]
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)


def _finished(job: Job, arguments: argparse.Namespace) -> bool:
    """Whether a run is done; one that was done with other settings stops the command rather than being reported as this one."""
    from rl_edit.config import load_config

    directory = job.directory(arguments.work)
    if not (directory / "rows.jsonl").is_file():
        return False
    config = load_config(preset="tiny-rc-grpo", overrides=_overrides(job, arguments))
    if json.loads((directory / "ablation.json").read_text())["stamp"] != _stamp(config):
        sys.exit(f"{directory} was made with other settings or editor weights: give another --work or remove it")
    return True


def _run_side_by_side(todo: list[int], jobs: list[Job], arguments: argparse.Namespace) -> int:
    """Each run in a process of its own with one thread; a failed run is named and the others go on. Returns how many failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
    finished, failed, total, began = 0, 0, len(todo), time.time()
    queue = list(todo)
    while queue or running:
        while queue and len(running) < arguments.side_by_side:
            index = queue.pop(0)
            running[index] = (subprocess.Popen([sys.executable, *sys.argv, "--one", str(index)], env=environment), time.time())
        time.sleep(1)
        for index in [i for i, (process, _) in running.items() if process.poll() is not None]:
            process, start = running.pop(index)
            finished += 1
            failed += process.returncode != 0
            left = (time.time() - began) / finished * (total - finished)
            state = "done" if process.returncode == 0 else f"FAILED ({process.returncode})"
            job = jobs[index]
            print(
                f"[{finished}/{total}] {job.base} | {job.variant} | seed {job.seed}: "
                f"{state} in {time.time() - start:.0f} s, about {left / 60:.0f} min left",
                flush=True,
            )
    return failed


def write_table(bases: dict[str, str], jobs: list[Job], arguments: argparse.Namespace) -> None:
    """One row a variant: paired difference to base over all seeds, clustered by task, with 95 % intervals."""
    from rl_edit.evaluation.statistics import bootstrap, paired_bootstrap

    lines = [
        "# Ablation on the built-in editor",
        "",
        f"Commit `{_commit()}`, {time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, {os.cpu_count()} cores, torch {_torch()}. "
        f"{arguments.updates} updates x 8 groups x 8 candidates, {arguments.tasks} held-out tasks, seeds {arguments.seeds}; equal budgets.",
        "",
        f"Command: `python benchmarks/ablation.py {' '.join(_quoted(a) for a in _settings())}`",
        "",
        "Differences to base are paired by task and noise and averaged over seeds; "
        "brackets are 95 % bootstrap intervals over tasks (clusters). "
        "Total reward is judge / 10 + preservation, the same for every row. "
        "PSNR spread is the mean within-group standard deviation of the background PSNR during training.",
        "",
    ]
    record: dict[str, Any] = {"commit": _commit(), "command": _settings(), "bases": {}}
    for base in bases:
        base_rows = {r["task_id"]: _with_total(r["values"]) for r in _rows(arguments.work / base / "base_rows.jsonl")}
        lines += [f"## Base: {base}", "", "| variant | seeds | " + " | ".join(label for label, _ in METRICS.values()) + " | PSNR spread |"]
        lines += ["|---" * (len(METRICS) + 3) + "|"]
        means = {m: bootstrap([v[m] for v in base_rows.values()], seed=0) for m in METRICS}
        lines.append("| base | | " + " | ".join(f"{means[m].mean:{f}}" for m, (_, f) in METRICS.items()) + " | |")
        record["bases"][base] = {"base": {m: means[m].mean for m in METRICS}}
        for variant in arguments.variants:
            done = [j for j in jobs if j.base == base and j.variant == variant and (j.directory(arguments.work) / "rows.jsonl").is_file()]
            if not done:
                lines.append(f"| {variant} | none finished |" + " |" * (len(METRICS) + 1))
                continue
            pairs = [
                (r["task_id"], base_rows[r["task_id"]], _with_total(r["values"]))
                for j in done
                for r in _rows(j.directory(arguments.work) / "rows.jsonl")
            ]
            cells, deltas = [], {}
            for metric, (_, form) in METRICS.items():
                interval = paired_bootstrap(
                    [b[metric] for _, b, _ in pairs], [t[metric] for _, _, t in pairs], seed=0, groups=[name for name, _, _ in pairs]
                )
                deltas[metric] = {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}
                cells.append(f"{interval.mean:+{form}} [{interval.low:+{form}}, {interval.high:+{form}}]")
            spread = _spread([j.directory(arguments.work) for j in done])
            lines.append(f"| {variant} | {len(done)} | " + " | ".join(cells) + f" | {spread:.2f} |")
            record["bases"][base][variant] = {
                "seeds": [j.seed for j in done],
                "delta": deltas,
                "psnr_spread": spread,
                "overrides": VARIANTS[variant],
            }
        lines += ["", *_between(base, jobs, arguments, record["bases"][base])]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines))
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print("\n".join(lines))


def _between(base: str, jobs: list[Job], arguments: argparse.Namespace, record: dict[str, Any]) -> list[str]:
    """Variant against variant, paired by task and seed; and what each seed gave by itself."""
    from rl_edit.evaluation.statistics import paired_bootstrap

    rows: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for job in jobs:
        file = job.directory(arguments.work) / "rows.jsonl"
        if job.base == base and file.is_file():
            rows[(job.variant, job.seed)] = {row["task_id"]: _with_total(row["values"]) for row in _rows(file)}
    shown = ("instruction", "background_psnr_masked", "reward")
    lines = ["| comparison | " + " | ".join(METRICS[m][0] for m in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    record["comparisons"] = {}
    for one, other in COMPARISONS:
        seeds = [seed for seed in arguments.seeds if (one, seed) in rows and (other, seed) in rows]
        if not seeds:
            continue
        cells = []
        for metric in shown:
            tasks = [(name, seed) for seed in seeds for name in rows[(one, seed)]]
            before = [rows[(other, seed)][name][metric] for name, seed in tasks]
            after = [rows[(one, seed)][name][metric] for name, seed in tasks]
            interval = paired_bootstrap(before, after, seed=0, groups=[name for name, _ in tasks])
            form = METRICS[metric][1]
            cells.append(f"{interval.mean:+{form}} [{interval.low:+{form}}, {interval.high:+{form}}]")
            record["comparisons"].setdefault(f"{one} - {other}", {})[metric] = [interval.mean, interval.low, interval.high]
        lines.append(f"| {one} minus {other} | " + " | ".join(cells) + " |")
    lines += ["", "Means by seed (instruction; background PSNR, dB), to show what the intervals over tasks do not:", ""]
    for variant in arguments.variants:
        means = [
            f"{seed}: {_mean(values, 'instruction'):.3f}; {_mean(values, 'background_psnr_masked'):.2f}"
            for (name, seed), values in sorted(rows.items())
            if name == variant
        ]
        lines.append(f"- {variant}: {' | '.join(means)}")
    return [*lines, ""]


def _mean(values: dict[str, dict[str, float]], metric: str) -> float:
    return sum(row[metric] for row in values.values()) / len(values)


def _with_total(values: dict[str, float]) -> dict[str, float]:
    """The same total for every variant, whatever weights it trained with."""
    return {**values, "reward": values["reward/judge"] / 10 + values["reward/preservation"]}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _spread(directories: list[Path]) -> float:
    from rl_edit.telemetry import METRICS as FILE
    from rl_edit.telemetry import read_jsonl

    values = [line["background/psnr/spread"] for d in directories for line in read_jsonl(d / FILE) if "background/psnr/spread" in line]
    return sum(values) / max(1, len(values))


def _commit() -> str:
    result = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _torch() -> str:
    from importlib.metadata import version

    return version("torch")


def _settings() -> list[str]:
    """The command line without the places of files, which change nothing."""
    words = sys.argv[1:]
    places = {i for i, word in enumerate(words) if word in ("--work", "--out")}
    return [word for i, word in enumerate(words) if i not in places and i - 1 not in places]


def _quoted(argument: str) -> str:
    return f"'{argument}'" if " " in argument else argument


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
