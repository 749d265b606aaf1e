"""``rl-edit export`` writes adapters that act in other programs as in the run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import Family, loaded, noise_for, task_of
from safetensors import safe_open
from safetensors.torch import load_file
from test_conformance import attached, edited, run_of

from commands import Command, assert_refused
from rl_edit.config import load_config
from rl_edit.editors import lora
from rl_edit.editors.adapter_export import acts_alike

FORMS = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "comfyui": "lora_comfyui.safetensors",
    "peft": "adapter_model.safetensors",
}


@pytest.fixture(scope="module")
def run(family: Family, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with an adapter of rank 4 and alpha 10, as after 3 updates."""
    path = tmp_path_factory.mktemp("run")
    editor = loaded(family, directory)
    config = run_of(editor, rank=4, alpha=10)
    (path / "config.yaml").write_text(config.to_yaml())
    (path / "metrics.jsonl").write_text('{"update": 3, "reward/mean": 1.0}\n')
    attached(editor, config.lora)
    lora.save(path / "adapter", lora.export(editor.transformer, step=3), config.lora)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_adapter_makes_the_image_of_the_run_in_the_stock_pipeline(
    rl_edit: Command, family: Family, directory: Path, run: Path, tmp_path: Path, form: str
) -> None:
    out = tmp_path / "out"
    code, said, errors = rl_edit("export", run, "--format", form, "--out", out)
    assert code == 0, errors
    # A folded scale rounds otherwise than one that is applied.
    levels = 1 if form == "comfyui" else 0
    assert FORMS[form] in said
    assert any(f"differs by at most {level} of 255" in said for level in range(levels + 1))
    assert {FORMS[form], "README.md"} <= {path.name for path in out.iterdir()}
    ours, theirs = loaded(family, directory), loaded(family, directory)
    weights, config = lora.read(run / "adapter", pipeline=family.pipeline)
    lora.attach(ours.transformer, config, seed=0)
    lora.load(ours.transformer, weights)
    task = task_of()
    conditioning = ours.encode(task)
    noise = noise_for(ours, conditioning, 1)
    latents = edited(ours, conditioning, noise)
    if form == "peft":
        from peft import PeftModel

        PeftModel.from_pretrained(theirs.transformer, out)
        stock = edited(theirs, conditioning, noise)
    else:
        family.load_adapter(theirs, out, FORMS[form])
        stock = family.stock(theirs, task, noise, 3).latents
    assert torch.allclose(stock, latents, atol=1e-4)
    one, two = (ours.decode(x, conditioning).numpy().astype(int) for x in (stock, latents))
    assert int(np.abs(one - two).max()) <= levels


def test_comfyui_gets_the_scale_within_the_matrices_and_no_settings(
    rl_edit: Command, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert rl_edit("export", run, "--format", "comfyui", "--out", out, "--no-check")[0] == 0
    exported = load_file(out / FORMS["comfyui"])
    own = load_file(run / "adapter" / FORMS["diffusers"])
    assert exported.keys() == own.keys()
    for name, value in own.items():
        expected = value * (10 / 4) if "lora_B" in name else value
        assert torch.equal(exported[name], expected)
    with safe_open(out / FORMS["comfyui"], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_adapter_that_lost_its_scale_or_a_module_is_noticed(run: Path) -> None:
    weights, config = lora.read(run / "adapter", pipeline="Flux2KleinPipeline")
    other = config.model_copy(update={"settings": {**config.settings, "lora_alpha": 4}})
    assert acts_alike((weights, config), (weights, config))
    assert not acts_alike((weights, config), (weights, other))
    fewer = dict(list(weights.tensors.items())[2:])
    assert not acts_alike((weights, config), (replace(weights, tensors=fewer), config))


def evaluated(run: Path, adapter: str) -> None:
    entry = {"mean": 4.0, "low": 3.5, "high": 4.5, "n": 8}
    change = {"mean": 0.25, "low": 0.125, "high": 0.375, "n": 8}
    content: dict[str, Any] = {
        side: {"reward": entry, "background_ssim": entry} for side in ("base", "trained")
    }
    content["delta"] = {"reward": change, "background_ssim": change}
    content["meta"] = {"num_tasks": 8, "adapter": adapter}
    (run / "evaluation.json").write_text(json.dumps(content))


def test_the_card_names_base_method_data_seed_and_intervals_of_this_adapter(
    rl_edit: Command, run: Path, tmp_path: Path
) -> None:
    note = json.loads((run / "adapter" / "adapter.json").read_text())
    names = (f"3:{note['sha256'][:12]}", "9:other")
    for place, adapter in enumerate(names):
        evaluated(run, adapter)
        out = tmp_path / str(place)
        assert rl_edit("export", run, "--out", out, "--no-check")[0] == 0
        card = (out / "README.md").read_text()
        assert card.startswith("---\nbase_model: ") and "Flow-GRPO, arXiv 2505.05470" in card
        assert "3 updates; rank 4, alpha 10" in card and "**Seed** 0" in card
        assert "Not compared with the run's own adapter" in card
        shown = "| reward | 4 | 4 | +0.25 [+0.125, +0.375] |" in card
        assert shown == (place == 0)
        assert ("of adapter `9:other`, not of this one" in card) == (place == 1)
    (run / "evaluation.json").unlink()


def test_the_card_names_only_rewards_that_acted(
    rl_edit: Command, run: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "run"
    shutil.copytree(run, trained)
    config = load_config(trained / "config.yaml")
    missing, *others = config.rewards
    record = {"left_out_rewards": [f"{missing}: the data has no target"]}
    (trained / "run.json").write_text(json.dumps(record))
    assert rl_edit("export", trained, "--out", tmp_path / "out", "--no-check")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("- **Rewards**")]
    acted, _, left_out = line.partition(" Left out for want of data: ")
    assert left_out == f"{missing}." and f" {missing} " not in acted
    assert all(f" {name} " in acted for name in others)


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    rl_edit: Command, run: Path, tmp_path: Path
) -> None:
    assert_refused(
        rl_edit("export", tmp_path / "none", "--out", tmp_path / "out"),
        tmp_path / "out",
        "no run at",
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert_refused(rl_edit("export", run, "--out", tmp_path / "full"), None, "is there already")
    assert_refused(
        rl_edit("export", run, "--out", run / "config.yaml" / "out"), None, "cannot write"
    )
