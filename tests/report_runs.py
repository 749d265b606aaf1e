"""Run directories with everything a report can show, without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TYPES = ("add", "recolour", "remove", "replace", "two regions")
INSTRUCTIONS = (
    "add a small red circle next to the blue square",
    "recolour the green triangle to yellow",
    "remove the orange square",
    "replace the purple circle with a white star",
)


def write_run(directory: Path, *, updates: int = 40, examples: int = 4) -> Path:
    """Writes a run directory with everything a report can show: smooth curves and rectangles."""
    rng = np.random.default_rng(7)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(
        directory / "run.json",
        {
            "name": "tiny-rc-grpo-seed1",
            "method": "rc-grpo",
            "editor": "tiny-kontext",
            "seed": 1,
            "status": "finished",
            "updates": 50,
            "versions": {
                "python": "3.11.9",
                "torch": "2.13.0",
                "diffusers": "0.42.1",
                "commit": "0123abc",
            },
            "hardware": {"cpu": "2 cores", "memory_gb": 8, "gpu": None},
            "command": "rl-edit train --preset tiny-rc-grpo",
            "started": 1735812000.0,
            "finished": 1735812390.0,
            "left_out_rewards": ["editscore: no endpoint configured"],
        },
    )
    (directory / "config.yaml").write_text(
        "method: rc-grpo\nrollout:\n  group_size: 8\nrewards:\n- kind: judge\n  weight: 1.0\n"
    )
    lines = [json.dumps(metrics_row(update, updates, rng)) for update in range(updates)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    events = [
        {"time": 1735812000.0 + i, "event": "update_done", "update": i} for i in range(updates)
    ]
    events.insert(
        5,
        {
            "time": 1735812004.5,
            "event": "group_dropped",
            "reason": "no spread: all candidates score 0.41",
            "task_id": "t-0012",
        },
    )
    events.insert(
        9,
        {"time": 1735812008.5, "event": "warning", "message": "reward actor answered after 9.5 s"},
    )
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_json(directory / "evaluation.json", evaluation())
    for index in range(examples):
        write_example(directory / "evaluation" / "images" / f"shapes-{index:04d}", index, rng)
    return directory


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def metrics_row(update: int, updates: int, rng: np.random.Generator) -> dict[str, Any]:
    gain, jitter = 1.0 - math.exp(-3.0 * update / updates), rng.normal(size=12)
    return {
        "update": update,
        "reward/total/mean": 0.9 + 0.25 * gain + 0.05 * jitter[0],
        "reward/total/spread": 0.12 + 0.02 * jitter[1],
        "reward/judge/mean": 0.5 + 0.2 * gain + 0.05 * jitter[2],
        "reward/judge/spread": 0.1 + 0.02 * jitter[3],
        "reward/preservation/mean": 0.8 + 0.03 * gain + 0.01 * jitter[4],
        "reward/preservation/spread": 0.01 + 0.002 * jitter[5],
        "reward/concentration/mean": 1.4 + 0.3 * gain + 0.05 * jitter[6],
        "component/judge.instruction/mean": 0.45 + 0.25 * gain + 0.05 * jitter[2],
        "component/judge.clean/mean": 0.9 + 0.01 * jitter[7],
        "background/psnr/mean": 31.8 + 0.4 * gain + 0.15 * jitter[8],
        "background/psnr/spread": 0.36 + 0.03 * jitter[9],
        "concentration/mean": 1.4 + 0.3 * gain + 0.05 * jitter[6],
        "ratio/mean": 1.0 + 0.002 * jitter[10],
        "ratio/max_deviation": 0.05 + 0.02 * abs(jitter[11]),
        "clip/share": 0.0 if update < 3 else 0.04 + 0.01 * abs(jitter[1]),
        "gradient/norm": 0.3 + 0.1 * abs(jitter[0]),
        "groups/used": 8 - (update % 9 == 4),
        "groups/dropped": int(update % 9 == 4),
        "adapter": f"{update + 1}:ab12cd34ef56",
        "staleness": update % 2,
        "seconds/rollout": 2.6 + 0.2 * abs(jitter[3]),
        "seconds/reward": 0.3,
        "seconds/learn": 1.4 + 0.1 * abs(jitter[4]),
        "seconds/publish": 0.05,
        "seconds/update": 4.0 + 0.2 * abs(jitter[5]),
    }


def interval(mean: float, half: float, n: int = 256) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def comparison(shift: float = 0.0, n: int = 256) -> dict[str, Any]:
    rows = {
        "instruction": (0.495, 0.131 + shift, 0.018),
        "reward": (1.102, 0.204 + shift, 0.025),
        "background_psnr_masked": (32.0, -0.03 + shift, 0.06),
        "background_psnr_zero_filled": (33.9, -0.31, 0.1),
        "background_ssim": (0.9412, 0.0005, 0.0011),
        "concentration": (1.41, 0.22, 0.03),
        "sharpness_index": (0.5, 0.01, 0.002),
    }
    return {
        "base": {name: interval(base, half, n) for name, (base, _, half) in rows.items()},
        "trained": {
            name: interval(base + delta, half, n) for name, (base, delta, half) in rows.items()
        },
        "delta": {name: interval(delta, half, n) for name, (_, delta, half) in rows.items()},
    }


def evaluation() -> dict[str, Any]:
    by_type = {kind: comparison(0.02 * (index - 2), 51) for index, kind in enumerate(TYPES)}
    meta = {
        "num_tasks": 256,
        "num_noises": 2,
        "seed": 3,
        "steps": 6,
        "adapter": "40:ab12cd34ef56",
        "psnr_convention": "masked: mean over pixels outside the mask only; "
        "zero-filled: inside set to zero in both",
    }
    return {**comparison(), "by_type": by_type, "meta": meta}


def write_example(
    directory: Path,
    index: int,
    rng: np.random.Generator,
    *,
    size: int = 64,
    instruction: str | None = None,
) -> None:
    directory.mkdir(parents=True)
    rows, columns = np.mgrid[0:size, 0:size]
    ground = np.stack([90 + rows, 120 + columns // 2, 150 - rows // 2], axis=2) + rng.integers(
        -8, 9, (size, size, 1)
    )
    source = np.clip(ground, 0, 255).astype(np.uint8)
    source[size // 8 : size // 3, size // 2 : size * 7 // 8] = (210, 180, 60)
    mask = (rows - size * 0.62) ** 2 + (columns - size * (0.3 + 0.1 * index % 0.4)) ** 2 < (
        size * 0.2
    ) ** 2
    target, base, trained = source.copy(), source.copy(), source.copy()
    target[mask], base[mask], trained[mask] = (210, 40, 40), (150, 90, 100), (200, 50, 48)
    trained = np.clip(trained.astype(int) + rng.integers(-4, 5, trained.shape), 0, 255).astype(
        np.uint8
    )
    images = {
        "source": source,
        "mask": mask.astype(np.uint8) * 255,
        "target": target,
        "base": base,
        "trained": trained,
    }
    tokens = mask[:: size // 16, :: size // 16].astype(float)
    images["attention_base"] = (40 + 90 * tokens + rng.uniform(0, 60, tokens.shape)).astype(
        np.uint8
    )
    images["attention_trained"] = (20 + 190 * tokens + rng.uniform(0, 30, tokens.shape)).astype(
        np.uint8
    )
    for name, pixels in images.items():
        Image.fromarray(pixels).save(directory / f"{name}.png")
    write_json(
        directory / "task.json",
        {
            "task_id": directory.name,
            "task_type": TYPES[index % len(TYPES)],
            "instruction": instruction or INSTRUCTIONS[index % len(INSTRUCTIONS)],
            "metrics": {
                "base": {"instruction": 0.31, "background_psnr_masked": 30.1, "reward": 0.9},
                "trained": {
                    "instruction": 0.72 + index / 100,
                    "background_psnr_masked": 31.0,
                    "reward": 1.3,
                },
            },
        },
    )
