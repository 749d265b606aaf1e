"""What OmniGen2 has and no other family: two scales, texts without padding, its own scheduler."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import omnigen2_family
import pytest
import torch
from conformance import loaded, noise_for, task_of, with_settings
from safetensors.torch import load_file, save_file

from rl_edit.editors import editor_config, inspect_editor, load_editor
from rl_edit.editors.omnigen2 import OmniGen2Config, TwoScales
from rl_edit.editors.omnigen2_parts import noise_levels, packed, unpacked
from rl_edit.editors.omnigen2_transformer import positions
from rl_edit.editors.tiny_families import write_tiny
from rl_edit.errors import InputError

FAMILY = omnigen2_family.FAMILY


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("omnigen2") / "editor"
    write_tiny("omnigen2", path)
    return path


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copied"))


def test_guidance_leads_from_nothing_to_the_source_and_on_to_the_instruction() -> None:
    everything, source, none = (torch.tensor([value]) for value in (5.0, 2.0, 1.0))
    # 1 + 2 (2 - 1) + 4 (5 - 2)
    assert TwoScales(4.0, 2.0)(everything, source, none).item() == 15
    # 1 + 4 (5 - 1)
    assert TwoScales(4.0, 1.0)(everything, none).item() == 17
    # Scales of 1 are no guidance.
    assert TwoScales(1.0, 1.0)(everything, source, none).item() == 5


def test_a_source_scale_of_one_leaves_a_forward_out(tiny: Path) -> None:
    for image_cfg, forwards in ((2.0, 3), (1.0, 2)):
        editor = loaded(FAMILY, tiny, true_cfg=4.0, image_cfg=image_cfg)
        lengths: list[int] = []
        editor.transformer.register_forward_hook(
            lambda _module, inputs, _output, lengths=lengths: lengths.append(len(inputs[3]))
        )
        conditioning = editor.encode(task_of())
        editor.velocity(noise_for(editor, conditioning, 2), torch.ones(2), conditioning)
        # Images that each forward reads beside the target: the last one reads none.
        assert lengths == [1] * (forwards - 1) + [0]


def test_one_setting_switches_all_guidance_off_and_contradictions_are_refused() -> None:
    assert OmniGen2Config(path="x/y", true_cfg=1).image_cfg == 1
    assert OmniGen2Config(path="x/y").image_cfg == 2 and OmniGen2Config(path="x/y").guided
    for further in ({"image_cfg": 2.0}, {"negative_prompt": "blurry"}, {"detach_negative": True}):
        with pytest.raises(ValueError, match="true_cfg 1 leaves out"):
            OmniGen2Config.model_validate({"path": "x/y", "true_cfg": 1.0, **further})


def test_the_source_scale_is_part_of_the_editors_name(tiny: Path) -> None:
    names = {editor_config({"path": str(tiny), "image_cfg": s}).identity() for s in (1.5, 2, 2.0)}
    assert len(names) == 2


def test_the_released_checkpoint_is_known_by_its_id() -> None:
    config = editor_config({"path": "OmniGen2/OmniGen2"})
    assert isinstance(config, OmniGen2Config)
    assert (config.dtype, config.resolution, config.max_text_tokens) == ("bfloat16", 1024, 1024)


def test_noise_levels_are_the_released_times_turned() -> None:
    for grid in ((64, 64), (20, 20), (8, 40)):
        m = (4 * grid[0] * grid[1]) ** 0.5 / 40
        uniform = [i / 7 for i in range(7)]
        times = torch.tensor([*(u / (m - m * u + u) for u in uniform), 1.0], dtype=torch.float64)
        assert float((1 - noise_levels(7, grid, shifted=True) - times).abs().max()) < 2e-7
    # 320 x 320 pixels: m is 1, and nothing is shifted.
    assert torch.allclose(
        noise_levels(7, (20, 20), shifted=True), noise_levels(7, (20, 20), shifted=False)
    )


def test_an_image_stands_behind_the_longer_side_of_the_one_before() -> None:
    places = positions(3, [(2, 4), (1, 1)], (2, 2)).tolist()
    assert places[:3] == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert places[3:5] == [[3, 0, 0], [3, 0, 1]] and places[10] == [3, 1, 3]
    assert places[11] == [7, 0, 0]
    assert places[12:] == [[8, 0, 0], [8, 0, 1], [8, 1, 0], [8, 1, 1]]


def test_two_references_are_told_apart(tiny: Path) -> None:
    transformer = loaded(FAMILY, tiny).transformer
    generator = torch.Generator().manual_seed(0)
    target, first, second = torch.randn(3, 2, 6, 16, generator=generator).unbind()
    text, time = torch.randn(2, 5, 24, generator=generator), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        out, swapped, alone = (
            transformer(target, time, text, images, ((2, 3),) * (len(images) + 1))
            for images in ((first, second), (second, first), (first,))
        )
    assert out.shape == target.shape
    assert not torch.allclose(out, swapped, atol=1e-3)
    assert not torch.allclose(out, alone, atol=1e-3)


def test_packing_is_inverted() -> None:
    image = torch.arange(2 * 4 * 6 * 8.0).view(2, 4, 6, 8)
    tokens = packed(image)
    assert tokens.shape == (2, 12, 16) and torch.equal(unpacked(tokens, (3, 4)), image)
    # Row, column, channel within a patch: the second number is the second channel.
    assert tokens[0, 0, 1] == image[0, 1, 0, 0] and tokens[0, 0, 4] == image[0, 0, 0, 1]


def test_texts_are_not_padded(tiny: Path) -> None:
    editor = loaded(FAMILY, tiny)
    short, long = (editor.encode(task_of(instruction=text)) for text in ("go", "go left and up"))
    lengths = [len(c.tensors["text_states"]) for c in (short, long)]
    assert lengths[0] < lengths[1] < editor.config.max_text_tokens
    assert [len(c.tensors["text_rows"]) for c in (short, long)] == lengths


def test_rows_come_back_in_their_order_although_those_of_one_length_run_together(
    tiny: Path,
) -> None:
    editor = with_settings(loaded(FAMILY, tiny), micro_batch=4)
    texts = ("go", "go left and up", "go", "go left and up")
    many = [editor.encode(task_of(instruction=text, seed=i)) for i, text in enumerate(texts)]
    noise, sigma = noise_for(editor, many[0], 4), torch.linspace(0.9, 0.3, 4)
    together = editor.velocity(noise, sigma, many)
    for row, conditioning in enumerate(many):
        assert torch.equal(
            editor.velocity(noise[[row]], sigma[[row]], conditioning)[0], together[row]
        )


# --- bad directories -----------------------------------------------------------------------------


def settings_of(path: Path) -> OmniGen2Config:
    config = editor_config({"path": str(path), "device": "cpu"})
    assert isinstance(config, OmniGen2Config)
    return config


def test_a_scheduler_of_diffusers_is_refused(copied: Path) -> None:
    file = copied / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    with pytest.raises(InputError, match="of diffusers, and OmniGen2 takes the noise levels of"):
        inspect_editor(settings_of(copied))
    file.unlink()
    with pytest.raises(InputError, match="the folder scheduler/ is missing or empty"):
        inspect_editor(settings_of(copied))


def test_another_patch_size_is_refused(copied: Path) -> None:
    file = copied / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_size": 4}))
    with pytest.raises(InputError, match="has patch_size 4, and tokens of OmniGen2 are 2 x 2"):
        inspect_editor(settings_of(copied))


def test_a_tensor_that_is_missing_is_named(copied: Path) -> None:
    file = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["layers.1.attn.norm_k.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.attn\.norm_k\.weight"):
        load_editor(settings_of(copied))
