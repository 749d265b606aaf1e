"""Attention mass of the FLUX.1-Kontext editor: the joint softmax, at no cost in bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from kontext import noise_for, shipped_editor, task_of, with_settings
from rl_edit.editors import (
    EditorFamily,
    inspect_editor,
    load_editor,
)
from rl_edit.editors.flux_kontext import FluxKontextEditor
from rl_edit.errors import InputError
from rl_edit.method.attention import MassTally
from rl_edit.types import Conditioning

Find = Callable[[EditorFamily], object]


@pytest.fixture
def editor() -> FluxKontextEditor:
    return shipped_editor()


def reference_masses(
    editor: FluxKontextEditor, latents: Tensor, sigma: Tensor, conditioning: Conditioning
) -> list[Tensor]:
    """Masses per joint layer: the full softmax in float64, renormalised over target tokens."""
    transformer, inputs = editor.transformer, []
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    handles = [
        b.attn.register_forward_pre_hook(lambda m, a, k: inputs.append((m, a, k)), with_kwargs=True)
        for b in blocks
    ]
    with torch.no_grad():
        editor.velocity(latents, sigma, conditioning)
    for handle in handles:
        handle.remove()
    masses, (num_text, tokens) = [], (len(conditioning.tensors["text_rows"]), latents.shape[1])
    for attn, args, kwargs in inputs:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        text = kwargs.get("encoder_hidden_states")
        heads = lambda x: x.unflatten(-1, (attn.heads, -1))  # noqa: E731, B023
        with torch.no_grad():
            query, key = (
                attn.norm_q(heads(attn.to_q(hidden))),
                attn.norm_k(heads(attn.to_k(hidden))),
            )
            if text is not None:
                query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), query], dim=1)
                key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), key], dim=1)
        rotary = kwargs["image_rotary_emb"]
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1).double() for x in (query, key))
        assert query.shape[1] == num_text + 2 * tokens
        joint = (
            torch.einsum("bshd,blhd->bhsl", query, key).div(query.shape[-1] ** 0.5).softmax(dim=-1)
        )
        target = joint[:, :, :num_text, num_text : num_text + tokens]
        target = (target / target.sum(dim=-1, keepdim=True)).mean(dim=1)
        masses.append(target[:, conditioning.tensors["text_rows"]].mean(dim=1))
    return masses


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_captured_mass_is_the_joint_softmax_renormalised_over_target_keys_in_all_blocks(
    editor: FluxKontextEditor, last: int
) -> None:
    watching = with_settings(editor, attention_layers=last)
    conditioning = editor.encode(task_of(48, 80))
    latents, sigma = noise_for(editor, conditioning, 4), torch.tensor([1.0, 0.8, 0.5, 0.2])
    tally = MassTally()
    with torch.no_grad():
        watching.velocity(latents, sigma, conditioning, tally)
    references = reference_masses(editor, latents, sigma, conditioning)
    assert len(references) == 4
    expected = torch.stack(references[-last:]).mean(dim=0)
    assert float((tally.mean().double() - expected).abs().max()) < 1e-6
    assert float((expected - 1 / expected.shape[1]).abs().max()) > 1e-5


def test_rows_of_mass_sum_to_one_for_any_number_of_rows(editor: FluxKontextEditor) -> None:
    conditioning = editor.encode(task_of())
    tally = MassTally()
    for sigma in (1.0, 0.4):
        editor.velocity(
            noise_for(editor, conditioning, 5), torch.full((5,), sigma), conditioning, tally
        )
    assert torch.allclose(tally.mean().sum(dim=1), torch.ones(5), atol=1e-5)


def test_capture_changes_no_bit_and_its_hooks_are_gone_afterwards(
    editor: FluxKontextEditor,
) -> None:
    conditioning = editor.encode(task_of())
    latents, sigma = noise_for(editor, conditioning, 3), torch.full((3,), 0.5)
    before = editor.velocity(latents, sigma, conditioning)
    assert torch.equal(editor.velocity(latents, sigma, conditioning, MassTally()), before)
    assert torch.equal(editor.velocity(latents, sigma, conditioning), before)
    assert not any(module._forward_hooks for module in editor.transformer.modules())


def test_hooks_are_gone_after_a_forward_that_failed(editor: FluxKontextEditor) -> None:
    conditioning = editor.encode(task_of())
    with pytest.raises(RuntimeError):
        editor.velocity(
            noise_for(editor, conditioning, 2)[..., :-1], torch.ones(2), conditioning, MassTally()
        )
    assert not any(module._forward_hooks for module in editor.transformer.modules())


def test_attention_that_was_not_measured_is_no_number(editor: FluxKontextEditor) -> None:
    conditioning = editor.encode(task_of())
    tally = MassTally()
    with_settings(editor, attention_layers=0).velocity(
        noise_for(editor, conditioning, 2), torch.ones(2), conditioning, tally
    )
    assert tally.mean().shape == (2, 64) and bool(tally.mean().isnan().all())


@pytest.mark.parametrize("use", [load_editor, inspect_editor])
def test_more_attention_layers_than_the_editor_has_are_refused(
    editor: FluxKontextEditor, use: Find
) -> None:
    with pytest.raises(
        InputError, match=r"attention_layers is 5, but .* has 4 joint layers: use at most that"
    ):
        use(editor.config.model_copy(update={"attention_layers": 5}))


def test_text_rows_are_the_tokens_of_the_instruction_without_end_and_padding(
    editor: FluxKontextEditor,
) -> None:
    rows = editor.encode(task_of(instruction="remove the red circle")).tensors["text_rows"]
    pieces = editor.pipeline.tokenizer_2(
        "remove the red circle", add_special_tokens=False
    ).input_ids
    assert rows.tolist() == [i < len(pieces) for i in range(editor.config.max_text_tokens)]


def test_an_empty_instruction_reads_every_row_rather_than_none(editor: FluxKontextEditor) -> None:
    assert bool(editor.encode(task_of(instruction="")).tensors["text_rows"].all())
