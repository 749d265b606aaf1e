"""Presets of real editors train on the tiny editor of their family, put in by one override.

The judge's server is replaced by the built-in judge, and the sizes by small ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_edit.config import load_config, presets
from rl_edit.editors.tiny_families import write_tiny
from rl_edit.files import METRICS, read_json_lines
from rl_edit.training import train

REAL = sorted(name for name in presets() if not name.startswith("tiny-"))
SMALL = (
    "data.path=builtin:shapes",
    "train.updates=2",
    "train.groups_per_update=1",
    "train.max_lag=0",
    "train.ratio_tolerance=0",
    "rollout.group_size=6",
    "rollout.num_steps=5",
    "evaluation={num_tasks: 2, num_steps: 2}",
    "actors={runtime: inline, threads: 1, preflight: false}",
)


@pytest.mark.parametrize("preset", REAL)
def test_a_preset_trains_two_updates_on_the_tiny_editor_of_its_family(
    preset: str, tmp_path: Path
) -> None:
    raw = load_config(preset=preset)
    write_tiny(raw.editor.kind, tmp_path / "tiny")
    kept = {
        name: getattr(raw.editor, name)
        for name in ("attention_layers", "true_cfg")
        if hasattr(raw.editor, name)
    }
    # The tiny editor has fewer layers than the preset reads.
    kept["attention_layers"] = min(2, raw.editor.attention_layers)
    settings = ", ".join(f"{name}: {value}" for name, value in kept.items())
    # A rollout of five steps has four stochastic ones.
    trained = getattr(raw.algorithm.objective, "num_steps", None) or 0
    fewer = ["algorithm.objective.num_steps=3"] if trained > 4 else []
    judges = [name for name, term in raw.rewards.items() if hasattr(term, "transport")]
    config = load_config(
        preset=preset,
        overrides=[
            f"editor={{path: {tmp_path / 'tiny'}, dtype: float32, device: cpu, {settings}}}",
            *(f"rewards.{name}={{kind: shapes_judge, weight: 1.0}}" for name in judges),
            *fewer,
            *SMALL,
        ],
    )
    assert judges and config.editor.kind == raw.editor.kind
    train(config, tmp_path / "run", resume=False)
    updates = [each for each in read_json_lines(tmp_path / "run" / METRICS) if "update" in each]
    assert len(updates) == 2 and all(not each["step/skipped"] for each in updates)
    # The forward process has no policy ratio.
    if raw.algorithm.name not in ("diffusion-nft", "cocoedit"):
        assert [each["ratio/max_deviation"] for each in updates] == [0.0, 0.0]
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
