"""The built-in editor: a stock pipeline that takes any text; its making resumes to the byte."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from statistics import fmean

import pytest
import torch
import typer
from diffusers import FluxKontextPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from rl_edit.cli.pretrain import pretrain_command
from rl_edit.data import shapes
from rl_edit.editors.location import BUILTIN_WEIGHTS
from rl_edit.editors.tiny import pretraining
from rl_edit.editors.tiny.architecture import new_editor
from rl_edit.editors.tiny.card import model_card
from rl_edit.editors.tiny.latent_tasks import LatentTasks, encode_images, flawed, latent_tasks
from rl_edit.editors.tiny.losses import flow_losses
from rl_edit.editors.tiny.measuring import EditMetrics, edit_images, measure
from rl_edit.editors.tiny.pretraining import Checkpoint, learning_rate, pretrain
from rl_edit.editors.tiny.recipe import (
    CHECKPOINT_DIR,
    LATENT_CHANNELS,
    MAX_TEXT_TOKENS,
    FlowStage,
    PretrainConfig,
    Stage,
    flow_stages,
)
from rl_edit.errors import InputError

MICRO = PretrainConfig(
    vae_steps=3,
    vae_batch=4,
    transformer_steps=3,
    flawed_steps=3,
    batch=4,
    num_tasks=8,
    num_eval_tasks=5,
    sample_every=0,
    snapshot_at=(2,),
)
CLEAN, FLAWED = flow_stages(MICRO)
ALL_MODELS = ("vae", "transformer", "text_encoder", "text_encoder_2")


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "editor"
    pretrain(out, MICRO, console=quiet())
    return out


@pytest.fixture(scope="module")
def untrained() -> FluxKontextPipeline:
    return new_editor(seed=0)


@pytest.fixture(scope="module")
def reloaded(
    untrained: FluxKontextPipeline, tmp_path_factory: pytest.TempPathFactory
) -> FluxKontextPipeline:
    folder = tmp_path_factory.mktemp("reloaded")
    untrained.save_pretrained(folder)
    return FluxKontextPipeline.from_pretrained(folder, local_files_only=True)


def encoded(pipeline: FluxKontextPipeline, stage: FlowStage, config: PretrainConfig) -> LatentTasks:
    return latent_tasks(pipeline, stage, config, lambda name, done, total: None)


def weights(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def test_stock_diffusers_loads_and_runs_what_pretrain_writes(made: Path) -> None:
    pipeline = FluxKontextPipeline.from_pretrained(made, local_files_only=True)
    classes = {
        name: type(getattr(pipeline, name)).__name__
        for name in (*ALL_MODELS, "scheduler", "tokenizer")
    }
    assert classes == {
        "vae": "AutoencoderKL",
        "transformer": "FluxTransformer2DModel",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "tokenizer": "CLIPTokenizer",
    }
    assert pipeline.transformer.config.guidance_embeds
    edits = edit_images(
        pipeline, [shapes.task("validation", i) for i in range(2)], seed=0, num_steps=2
    )
    assert edits.shape == (2, 64, 64, 3)
    assert edits.float().std() > 0


def test_pretraining_changes_every_model_it_should(
    made: Path, untrained: FluxKontextPipeline
) -> None:
    trained = FluxKontextPipeline.from_pretrained(made, local_files_only=True)
    for name in ALL_MODELS:
        before, after = getattr(untrained, name).state_dict(), getattr(trained, name).state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before), name


def test_saved_latents_have_mean_zero_and_spread_one(made: Path) -> None:
    vae = FluxKontextPipeline.from_pretrained(made, local_files_only=True).vae
    tasks = shapes.batch("pretrain", 0, MICRO.num_tasks, MICRO.seed)
    latents = encode_images(vae, tasks.target)
    assert abs(latents.mean().item()) < 1e-3
    assert latents.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("killed_at", [("vae", 2), ("flow", 2), ("flawed", 2)])
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(
    made: Path, tmp_path: Path, killed_at: tuple[Stage, int]
) -> None:
    out = tmp_path / "editor"
    assert pretrain(out, MICRO, console=quiet(), stop_after=killed_at) is None
    assert not (out / "model_index.json").exists()
    resumed = pretrain(out, MICRO, console=quiet())
    assert weights(out) == weights(made)
    assert json.loads((out / "metrics.json").read_text()) == json.loads(
        (made / "metrics.json").read_text()
    )
    assert resumed is not None
    assert not (out / CHECKPOINT_DIR).exists()


def test_a_checkpoint_cut_off_while_written_is_not_used(tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder=tmp_path, config=MICRO)
    checkpoint.write("vae", 1, {"a": torch.ones(1)})
    (tmp_path / ".vae-2.safetensors.77-0a0a.tmp").write_bytes(b"half")
    assert checkpoint.read() == ("vae", 1, {"a": torch.ones(1)})
    checkpoint.write("vae", 3, {"a": torch.zeros(1)})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["state.json", "vae-3.safetensors"], "the remainder is as large as a checkpoint"


def test_resuming_with_other_settings_is_refused_and_names_them(tmp_path: Path) -> None:
    pretrain(tmp_path / "editor", MICRO, console=quiet(), stop_after=("vae", 1))
    with pytest.raises(InputError, match=r"lr=0\.0015"):
        pretrain(tmp_path / "editor", MICRO.model_copy(update={"lr": 1e-4}), console=quiet())


def test_a_finished_editor_is_not_overwritten(made: Path) -> None:
    before = weights(made)
    with pytest.raises(InputError, match="already holds an editor"):
        pretrain(made, MICRO, console=quiet())
    assert weights(made) == before


def test_snapshot_is_a_complete_pipeline_of_the_averaged_weights_at_that_step(made: Path) -> None:
    snapshot = made.with_name("editor-step-2")
    early = FluxKontextPipeline.from_pretrained(
        snapshot, local_files_only=True
    ).transformer.state_dict()
    final = FluxKontextPipeline.from_pretrained(
        made, local_files_only=True
    ).transformer.state_dict()
    assert any(not torch.equal(early[key], final[key]) for key in final)
    card, last = ((folder / "README.md").read_text() for folder in (snapshot, made))
    assert "at transformer step 2, before the schedule of 6 steps ended" in card
    assert "flawed pairs" in last and "discolours" in last
    assert "flawed pairs" not in card and "discolours" not in card, "it has seen none"


def test_every_instruction_fits_and_known_words_are_single_tokens(
    untrained: FluxKontextPipeline,
) -> None:
    texts = shapes.batch("pretrain", 0, 900).instructions
    longest = max(len(ids) for ids in untrained.tokenizer_2(list(texts)).input_ids)
    assert longest <= MAX_TEXT_TOKENS
    for text in texts[:50]:
        words = len(text.split())
        assert len(untrained.tokenizer_2(text).input_ids) == words + 1
        assert len(untrained.tokenizer(text).input_ids) == words + 2


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from(shapes.vocabulary()).map(str.capitalize))
def test_both_tokenizers_encode_any_text_and_keep_their_ids_through_a_round_trip(
    untrained: FluxKontextPipeline, reloaded: FluxKontextPipeline, text: str
) -> None:
    for name, length in (("tokenizer", 77), ("tokenizer_2", MAX_TEXT_TOKENS)):
        ours, theirs = (
            getattr(pipeline, name)(
                text, padding="max_length", max_length=length, truncation=True
            ).input_ids
            for pipeline in (untrained, reloaded)
        )
        assert ours == theirs
        assert len(ours) == length
        assert max(ours) < len(getattr(untrained, name))
        assert getattr(untrained, name).eos_token_id in ours


def test_the_stock_prompt_encoder_takes_unicode(reloaded: FluxKontextPipeline) -> None:
    embeds, pooled, _ = reloaded.encode_prompt(
        "Ünïcode 日本語 🎉 “quotes” \u200d\n\t", max_sequence_length=MAX_TEXT_TOKENS
    )
    empty, *_ = reloaded.encode_prompt("", max_sequence_length=MAX_TEXT_TOKENS)
    assert embeds.isfinite().all()
    assert pooled.isfinite().all()
    assert not torch.equal(embeds, empty)


def test_clip_spells_any_bytes_back(untrained: FluxKontextPipeline) -> None:
    ids = untrained.tokenizer("zürich 東京 42").input_ids
    assert (
        untrained.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "zürich東京42"
    )


def test_a_new_editor_depends_on_its_seed_alone_and_leaves_global_randomness_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = new_editor(seed=3).transformer.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (
        new_editor(seed=3).transformer.state_dict(),
        new_editor(seed=4).transformer.state_dict(),
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_source_tokens_follow_target_tokens_and_the_loss_targets_noise_minus_clean(
    untrained: FluxKontextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MICRO.model_copy(update={"batch": 6})
    tasks = encoded(untrained, CLEAN, config)
    seen: dict[str, torch.Tensor] = {}

    def perfect(**inputs: torch.Tensor) -> tuple[torch.Tensor]:
        # A model that knows the clean target: x = clean + sigma * (noise - clean), so the velocity
        # is (x - clean) / sigma.
        seen.update(inputs)
        noisy, source = inputs["hidden_states"].split(64, dim=1)
        rows = [
            next(i for i, known in enumerate(tasks.sources) if torch.equal(known, row))
            for row in source
        ]
        velocity = (noisy - tasks.targets[rows]) / inputs["timestep"][:, None, None]
        return (torch.cat([velocity, torch.full_like(source, math.nan)], dim=1),)

    monkeypatch.setattr(untrained.transformer, "forward", perfect)
    (loss,) = flow_losses(untrained, tasks, CLEAN, config, range(5, 6))
    assert loss.item() < 1e-6
    assert seen["timestep"].min() > 0
    assert seen["timestep"].max() <= 1
    assert seen["img_ids"][:64, 0].tolist() == [0] * 64
    assert seen["img_ids"][64:, 0].tolist() == [1] * 64
    assert torch.equal(seen["img_ids"][:64, 1:], seen["img_ids"][64:, 1:])


def test_flawed_targets_show_no_edit_or_a_cast_in_the_shares_that_are_set(
    untrained: FluxKontextPipeline,
) -> None:
    config = PretrainConfig(failed_share=0.3, cast_share=0.2, cast_size=20)
    tasks = shapes.batch("pretrain", 0, 400, config.seed)
    images = flawed(tasks, config, torch.Generator().manual_seed(3))
    inside = tasks.mask[..., None]
    of_target, of_source = (
        images.float() - tasks.target.float(),
        images.float() - tasks.source.float(),
    )
    clean = [bool((shift == 0).all()) for shift in of_target]
    failed = [bool((shift == 0).all()) for shift in of_source]
    cast = [not a and not b for a, b in zip(clean, failed, strict=True)]
    assert fmean(failed) == pytest.approx(0.3 * 0.8, abs=0.06)
    assert fmean(cast) == pytest.approx(0.2, abs=0.06)
    assert of_target[~inside.expand_as(of_target)].abs().max() <= 20
    assert of_target[~inside.expand_as(of_target)].abs().max() > 15
    for row in (i for i, cast_here in enumerate(cast) if cast_here):
        outside = of_target[row][~tasks.mask[row]]
        assert (outside == outside.median(dim=0).values).float().mean() > 0.7, (
            "a cast shifts the complete image alike"
        )


def test_without_flaws_the_targets_are_untouched() -> None:
    tasks = shapes.batch("pretrain", 0, 16, 0)
    config = PretrainConfig(failed_share=0, cast_share=0)
    assert torch.equal(flawed(tasks, config, torch.Generator().manual_seed(0)), tasks.target)


def test_only_the_last_stage_learns_from_flawed_pairs(untrained: FluxKontextPipeline) -> None:
    config = MICRO.model_copy(update={"failed_share": 0.999, "cast_share": 0.0})
    clean, of_machines = (encoded(untrained, stage, config) for stage in (CLEAN, FLAWED))
    assert not torch.equal(clean.targets, clean.sources)
    assert torch.equal(of_machines.targets, of_machines.sources)
    assert torch.equal(clean.sources, of_machines.sources)
    assert [stage.name for stage in flow_stages(MICRO.model_copy(update={"flawed_steps": 0}))] == [
        "flow"
    ]


def test_edit_masks_cover_every_latent_that_the_edit_mask_touches() -> None:
    pipeline = new_editor(seed=0)
    tasks = encoded(pipeline, CLEAN, MICRO)
    drawn = shapes.batch("pretrain", 0, MICRO.num_tasks, MICRO.seed)
    packed = tasks.edit_masks.view(MICRO.num_tasks, 8, 8, LATENT_CHANNELS, 2, 2)
    for row in range(MICRO.num_tasks):
        for y, x in drawn.mask[row].nonzero()[::37].tolist():
            assert packed[row, y // 8, x // 8, :, y % 8 // 4, x % 8 // 4].all()
    assert 0 < tasks.edit_masks.float().mean() < 0.6


def test_the_command_on_a_card_is_one_the_command_line_takes_back_to_the_same_recipe(
    untrained: FluxKontextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "seed": 7,
        "vae_steps": 5,
        "vae_batch": 4,
        "vae_lr": 0.5,
        "transformer_steps": 6,
        "batch": 3,
        "lr": 0.25,
    }
    changes |= {
        "flawed_steps": 4,
        "flawed_lr": 0.125,
        "failed_share": 0.2,
        "cast_share": 0.1,
        "cast_size": 12,
    }
    config = PretrainConfig(
        **changes, num_tasks=9, edit_weight=2.5, ema_decay=0.5, num_eval_tasks=1
    )
    metrics = EditMetrics(
        num_tasks=1,
        vae_psnr=1,
        vae_background_psnr=1,
        progress=0.5,
        progress_by_type={"add": 0.5},
        background_psnr=1,
    )
    card = model_card(untrained, config, metrics, steps=10)
    command = next(line for line in card.splitlines() if line.startswith("rl-edit pretrain OUT"))
    taken: list[PretrainConfig] = []
    monkeypatch.setattr(pretraining, "pretrain", lambda out, config, **_: taken.append(config))
    app = typer.Typer()
    app.command()(pretrain_command)
    result = CliRunner().invoke(app, command.split()[2:])
    assert result.exit_code == 0, result.output
    assert taken == [config]


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    rates = [learning_rate(step, steps=1000, peak=1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (99, 100)
    assert rates[-1] < 1e-5


@pytest.mark.skipif(
    not (BUILTIN_WEIGHTS / "model_index.json").exists(),
    reason="the weights are not in this checkout",
)
class TestShippedWeights:
    def test_they_are_at_most_ten_megabytes(self) -> None:
        assert (
            sum(path.stat().st_size for path in BUILTIN_WEIGHTS.rglob("*") if path.is_file())
            <= 10_000_000
        )

    def test_stock_diffusers_runs_them_and_they_edit_better_than_leaving_the_source(self) -> None:
        pipeline = FluxKontextPipeline.from_pretrained(BUILTIN_WEIGHTS, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        metrics = measure(pipeline, PretrainConfig(), num_tasks=36)
        assert metrics.progress > 0.35
        assert metrics.background_psnr > 26
        assert metrics.vae_background_psnr > metrics.background_psnr

    def test_their_card_states_the_metrics_in_their_metrics_file(self) -> None:
        card, metrics = (
            (BUILTIN_WEIGHTS / "README.md").read_text(encoding="utf-8"),
            json.loads((BUILTIN_WEIGHTS / "metrics.json").read_text()),
        )
        assert f"| instruction progress | {metrics['progress']:.3f} |" in card
        for name, value in metrics["progress_by_type"].items():
            assert f"| instruction progress, {name} | {value:.3f} |" in card
        assert (
            f"| background PSNR, edit against source | {metrics['background_psnr']:.2f} dB |"
            in card
        )
        assert f"| autoencoder PSNR, whole targets | {metrics['vae_psnr']:.2f} dB |" in card
        assert "license: apache-2.0" in card
        assert "rl-edit pretrain OUT" in card

    def test_their_card_is_the_text_of_today_with_their_numbers(self) -> None:
        pipeline = FluxKontextPipeline.from_pretrained(BUILTIN_WEIGHTS, local_files_only=True)
        metrics = EditMetrics(**json.loads((BUILTIN_WEIGHTS / "metrics.json").read_text()))
        config = PretrainConfig()
        steps = config.transformer_steps + config.flawed_steps
        card = (BUILTIN_WEIGHTS / "README.md").read_text(encoding="utf-8")
        assert model_card(pipeline, config, metrics, steps=steps) == card

    def test_they_hold_no_checkpoint(self) -> None:
        assert not (BUILTIN_WEIGHTS / CHECKPOINT_DIR).exists()
