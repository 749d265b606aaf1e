"""What Qwen-Image-Edit has beyond the checks of every family."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen_family
import torch
from conformance import INSTRUCTION, loaded, task_of, with_settings
from diffusers import QwenImageEditPlusPipeline
from test_conformance import require_stock

from rl_edit.editors import editor_config
from rl_edit.editors.guidance import NEGATIVE, NormRescaled
from rl_edit.editors.qwen_latents import PROMPT
from rl_edit.editors.tiny_families import _qwen_edit_parts as parts
from rl_edit.editors.tiny_families import write_tiny
from rl_edit.errors import InputError


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny editor of one image. No test changes it."""
    directory = tmp_path_factory.mktemp("single") / "editor"
    write_tiny("qwen_image_edit", directory)
    return loaded(qwen_family.EDIT, directory)


@pytest.mark.parametrize("kind", ["edit", "edit_plus"])
@pytest.mark.parametrize("size", [(1024, 1024), (1248, 832), (832, 1248)])
def test_the_stock_pipelines_leave_a_source_of_their_own_area_as_it_is(
    kind: str, size: tuple[int, int]
) -> None:
    """So the checks, which set their area to that of the canvas, set nothing at this size."""
    stock = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{kind}")
    width, height = size
    assert stock.calculate_dimensions(qwen_family.STOCK_AREA, width / height)[:2] == size


def test_a_single_step_is_refused_where_the_grid_ends_above_zero(single: Any) -> None:
    with pytest.raises(InputError, match=r"takes at least 2 solver steps, got 1"):
        single.sigmas(1, single.encode(task_of()))


def test_zero_time_for_the_source_is_the_stock_pipelines_bitwise(tmp_path: Path) -> None:
    """Qwen-Image-Edit-2511 modulates the source's tokens as at time zero."""
    made = parts.make_pipeline(QwenImageEditPlusPipeline, seed=0, zero_cond_t=True)
    parts.save(made, tmp_path / "editor")
    editor = loaded(qwen_family.PLUS, tmp_path / "editor", true_cfg=4.0)
    assert editor.transformer.zero_cond_t
    require_stock(qwen_family.PLUS, editor, (64, 96), rows=2)


def test_what_is_left_of_the_template_begins_with_the_image(single: Any) -> None:
    embeds = single.encode(task_of()).tensors[PROMPT]
    before, after = single.pipeline.prompt_template_encode.split("{}")
    tokenizer = single.pipeline.tokenizer
    behind = len(tokenizer(INSTRUCTION + after).input_ids)
    # Start mark, four tokens of the image, end mark.
    assert len(embeds) == 6 + behind
    dropped = single.pipeline.prompt_template_encode_start_idx
    assert len(tokenizer(before.partition("<|vision_start|>")[0]).input_ids) == dropped


def test_texts_are_not_padded_and_the_negative_one_sees_the_image_too(single: Any) -> None:
    guided = with_settings(single, true_cfg=4.0)
    short, long = (guided.encode(task_of(instruction=t)).tensors for t in ("dim", INSTRUCTION))
    assert len(short[PROMPT]) < len(long[PROMPT])
    assert torch.equal(short[NEGATIVE + PROMPT], long[NEGATIVE + PROMPT])
    other = guided.encode(task_of(seed=1)).tensors
    assert not torch.equal(other[NEGATIVE + PROMPT], long[NEGATIVE + PROMPT])


def test_rescaled_guidance_keeps_the_length_of_every_token() -> None:
    positive, negative = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    guided = NormRescaled(4.0)(positive, negative)
    assert torch.allclose(guided.norm(dim=-1), positive.norm(dim=-1), atol=1e-5)
    joint = (negative + 4.0 * (positive - negative)).numpy()
    cosines = (joint * guided.numpy()).sum(-1) / (
        np.linalg.norm(joint, axis=-1) * guided.norm(dim=-1).numpy()
    )
    assert np.allclose(cosines, 1, atol=1e-5)


def test_an_instruction_over_the_limit_is_read_up_to_it(single: Any) -> None:
    cut = with_settings(single, max_text_tokens=4)
    long = cut.encode(task_of(instruction=f"{INSTRUCTION} and the blue square"))
    assert torch.equal(long.tensors[PROMPT], single.encode(task_of()).tensors[PROMPT])
    (reading,) = cut.config.read_text([f"{INSTRUCTION} and the blue square"])
    assert reading.lost == "and the blue square"


def test_an_instruction_with_the_mark_of_an_image_is_refused(single: Any) -> None:
    with pytest.raises(InputError, match=r"holds <\|image_pad\|>, which the editor takes for"):
        single.encode(task_of(instruction="add <|image_pad|>"))


@pytest.mark.parametrize("kind", ["qwen_image_edit", "qwen_image_edit_plus"])
def test_settings_of_a_negative_forward_need_one(kind: str) -> None:
    settings = {"kind": kind, "path": "Qwen/x"}
    assert editor_config(settings).guided
    for further in ({"negative_prompt": "blurred"}, {"detach_negative": True}):
        with pytest.raises(ValueError, match="which true_cfg 1 leaves out"):
            editor_config({**settings, "true_cfg": 1.0, **further})
