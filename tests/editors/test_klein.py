"""What only FLUX.2-klein has: distilled and base checkpoints, and guidance of a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import klein_family
import pytest
import torch
from conformance import loaded, noise_for, task_of, with_settings
from pydantic import ValidationError
from test_conformance import attached, run_of

from rl_edit.editors import Flux2KleinConfig, editor_config, inspect_editor, load_editor, lora
from rl_edit.editors.tiny_families import write_tiny
from rl_edit.errors import InputError

FAMILY = klein_family.FAMILY


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("klein") / "base"
    write_tiny("flux2_klein", path)
    return path


@pytest.fixture
def distilled(base: Path) -> Any:
    """The same editor, marked as distilled; marked as a base again afterwards."""
    index = base / "model_index.json"
    before = index.read_text()
    index.write_text(json.dumps({**json.loads(before), "is_distilled": True}))
    yield base
    index.write_text(before)


def test_a_base_checkpoint_is_guided_by_default_and_a_note_says_where_it_is_not(
    base: Path,
) -> None:
    config = editor_config({"path": str(base), "device": "cpu"})
    assert isinstance(config, Flux2KleinConfig)
    assert config.true_cfg == 4.0 and config.guided and config.edit_steps == 50
    assert inspect_editor(config).notes == ()
    (note,) = inspect_editor(config.model_copy(update={"true_cfg": 1.0})).notes
    assert "is a base checkpoint" in note and "Set editor.true_cfg=4" in note


@pytest.mark.parametrize("use", [inspect_editor, load_editor])
def test_a_distilled_checkpoint_takes_no_guidance_and_few_steps(distilled: Path, use: Any) -> None:
    config = editor_config({"path": str(distilled), "device": "cpu"})
    assert isinstance(config, Flux2KleinConfig)
    assert config.true_cfg == 1.0 and not config.guided and config.edit_steps == 4
    assert inspect_editor(config).notes == ()
    with pytest.raises(InputError, match=r"true_cfg is 4, but .* is distilled .*true_cfg=1"):
        use(config.model_copy(update={"true_cfg": 4.0}))


def test_a_text_encoder_of_too_few_layers_is_refused(base: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    file = copy / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 12}))
    with pytest.raises(InputError, match=r"has 12 layers, but a Flux2KleinPipeline reads .* 27"):
        inspect_editor(editor_config({"path": str(copy)}))


def test_detached_the_gradient_is_the_positive_branch_s_times_the_scale(base: Path) -> None:
    both = loaded(FAMILY, base, true_cfg=3.0)
    parameters = attached(both, run_of(both, rank=4, alpha=8).lora)
    detached = with_settings(both, detach_negative=True)
    unguided = with_settings(both, true_cfg=1.0)
    latents = noise_for(both, both.encode(task_of()), 2)
    sigma = torch.tensor([0.8, 0.4])
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))

    def gradient(run: Any) -> tuple[torch.Tensor, torch.Tensor]:
        lora.set_active(run.transformer, True)
        velocity = run.velocity(latents, sigma, run.encode(task_of()))
        parts = torch.autograd.grad((velocity * weights).sum(), parameters)
        return velocity.detach(), torch.cat([part.flatten() for part in parts])

    full, half, positive = gradient(both), gradient(detached), gradient(unguided)
    assert torch.equal(full[0], half[0])
    size = float(positive[1].abs().max())
    assert torch.allclose(half[1], 3 * positive[1], rtol=1e-3, atol=1e-4 * size)
    assert not torch.allclose(full[1], half[1], rtol=1e-2)


def test_a_setting_of_the_negative_forward_that_is_left_out_is_refused() -> None:
    with pytest.raises(ValidationError, match="raise true_cfg above 1, or leave it out"):
        Flux2KleinConfig(detach_negative=True)
