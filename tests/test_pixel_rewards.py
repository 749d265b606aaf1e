"""Rewards of the kept region and of the edited place: PSNR, SSIM, LPIPS, CLIP, and any of them on the composite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from rl_edit.data import shapes
from rl_edit.errors import InputError
from rl_edit.evaluation import metrics
from rl_edit.judges import clip
from rl_edit.rewards import ClipSimilarity, Composite, Judge, Lpips, Preservation, Psnr, Reward, Ssim, available, score_candidates
from rl_edit.rewards.lpips import PerceptualDistance, distance, network
from rl_edit.types import Candidates, EditTask

TASK = shapes.task("validation", 0)
INSIDE = TASK.edit_mask[..., None]
KEEP = ~TASK.edit_mask


def noise(level: float, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(TASK.source.shape, generator=torch.Generator().manual_seed(seed))
    return (TASK.source + 255 * level * drawn).clamp(0, 255).round().to(torch.uint8)


def outside(level: float, seed: int = 0) -> torch.Tensor:
    return torch.where(INSIDE, TASK.target, noise(level, seed))


def inside(level: float, seed: int = 0) -> torch.Tensor:
    return torch.where(INSIDE, noise(level, seed), TASK.source)


def candidates(images: Sequence[torch.Tensor], task: EditTask = TASK) -> Candidates:
    attention = torch.full((len(images), 4), 0.25)
    return Candidates(task=task, images=torch.stack(list(images)), attention=attention, token_mask=torch.arange(4) < 1)


def values(term: Reward, images: Sequence[torch.Tensor], task: EditTask = TASK) -> list[float]:
    table = score_candidates([term], candidates(images, task), group_id="w")
    assert table.valid.all(), table.reasons
    return [float(value) for value in table.values[:, 0]]


# --- PSNR and SSIM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["masked", "zero_filled", "cocoedit"])
def test_psnr_is_the_named_metric_outside_the_mask(convention: Any) -> None:
    images = [outside(level) for level in (0.02, 0.1, 0.5)]
    expected = metrics.psnr(torch.stack(images), TASK.source, KEEP, convention)
    assert values(Psnr(convention=convention), images) == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("convention", ["map_masked", "zero_filled"])
def test_ssim_is_the_named_metric_outside_the_mask(convention: Any) -> None:
    images = [outside(level) for level in (0.02, 0.1, 0.5)]
    expected = metrics.ssim(torch.stack(images), TASK.source, KEEP, convention)
    assert values(Ssim(convention=convention), images) == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_term_saturates_at_its_ceiling_and_says_so() -> None:
    images = [outside(0.001), outside(0.003), outside(0.1)]
    table = score_candidates([Psnr(ceiling_db=35.0), Ssim(ceiling=0.9)], candidates(images), group_id="w")
    assert table.values[:2].tolist() == [pytest.approx([35.0, 0.9])] * 2
    assert table.components["psnr.saturated"] == table.components["ssim.saturated"] == (1.0, 1.0, 0.0)
    assert table.components["psnr.keep_fraction"][0] == pytest.approx(KEEP.float().mean().item())


@pytest.mark.parametrize(
    "term", [Psnr(), Psnr(convention="cocoedit"), Psnr(convention="zero_filled"), Ssim(), Ssim(convention="zero_filled")]
)
def test_the_declared_range_holds_for_the_best_and_the_worst_picture(term: Reward) -> None:
    black = replace(TASK, source=torch.zeros_like(TASK.source))
    white = torch.full_like(TASK.source, 255)
    worst, best = (score.value for score in term.score(candidates([white, black.source], black)))
    assert worst is not None and best is not None
    assert term.low <= worst < best <= term.high
    assert best == term.high


def test_what_happens_inside_the_mask_does_not_reach_psnr_and_zero_filled_ssim() -> None:
    for term in (Psnr(), Psnr(convention="zero_filled"), Psnr(convention="cocoedit"), Ssim(convention="zero_filled")):
        first, second = values(term, [outside(0.1), torch.where(INSIDE, 255 - TASK.source, outside(0.1))])
        assert first == second


# --- LPIPS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights under the names that the lpips package gives them; channel weights not negative, as published."""
    torch.manual_seed(0)
    net, starts = PerceptualDistance(), (0, 2, 5, 8, 10, 11, 12, 13)
    stored = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for name, tensor in net.state_dict().items():
        part, index, rest = name.split(".", 2)
        number = sum(int(index) >= start for start in starts)
        stored[f"net.slice{number}.{index}.{rest}" if part == "features" else f"lin{index}.model.1.{rest}"] = tensor.clone()
    for number in range(7):
        stored[f"lin{number}.model.1.weight"] = stored[f"lin{number}.model.1.weight"].abs()
        stored[f"lins.{number}.model.1.weight"] = stored[f"lin{number}.model.1.weight"].clone()
    path = tmp_path_factory.mktemp("lpips") / "lpips_squeeze.safetensors"
    save_file(stored, path)
    return str(path)


def test_the_network_is_squeezenet_1_1_with_seven_taps() -> None:
    net = PerceptualDistance()
    # squeezenet1_1 has 1235496 parameters, 513000 of them in the classifier that is not used here.
    assert sum(parameter.numel() for parameter in net.features.parameters()) == 1_235_496 - 513_000
    picture = torch.zeros(1, 3, 64, 64)
    assert [tuple(layer.shape) for layer in net(picture, picture)] == [
        (1, 1, 31, 31),
        (1, 1, 15, 15),
        (1, 1, 7, 7),
        *[(1, 1, 3, 3)] * 4,
    ]
    assert [lin.weight.shape[1] for lin in net.lins] == [64, 128, 256, 384, 384, 512, 512]


def test_every_parameter_of_the_file_is_used(weights: str) -> None:
    net = network(weights)
    assert all(bool((lin.weight >= 0).all()) for lin in net.lins)
    torch.manual_seed(0)
    assert torch.equal(net.features[12].expand3x3.weight, PerceptualDistance().features[12].expand3x3.weight)


@pytest.mark.parametrize("convention", ["masked", "zero_filled"])
def test_lpips_is_zero_for_the_source_symmetric_and_grows_with_damage(convention: Any, weights: str) -> None:
    net, images = network(weights), torch.stack([TASK.source, outside(0.02), outside(0.1), outside(0.3)])
    there = distance(net, images, TASK.source, KEEP, convention).tolist()
    assert there[0] == 0 < there[1] < there[2] < there[3]
    back = [distance(net, TASK.source[None], image, KEEP, convention).item() for image in images]
    # Symmetric where both pictures agree inside the mask, which only black there makes sure of.
    assert convention == "masked" or back == pytest.approx(there, rel=1e-5)


@pytest.mark.parametrize("convention", ["masked", "zero_filled"])
def test_what_happens_inside_the_mask_does_not_reach_lpips(convention: Any, weights: str) -> None:
    first, second = values(
        Lpips(weights=weights, convention=convention), [outside(0.1), torch.where(INSIDE, 255 - TASK.source, outside(0.1))]
    )
    assert first == second


def test_lpips_without_a_mask_is_the_published_mean_over_positions(weights: str) -> None:
    """With nothing masked, both conventions are sums over layers of a mean; zero_filled is the published one exactly."""
    net, everything = network(weights), torch.ones_like(TASK.edit_mask)
    a, b = ((2 * image.float() / 255 - 1).permute(2, 0, 1)[None] for image in (noise(0.2), TASK.source))
    expected = 0.0
    first, second = ((picture - net.shift) / net.scale for picture in (a, b))
    for index, layer in enumerate(net.features):
        first, second = layer(first), layer(second)
        if index in (1, 4, 7, 9, 10, 11, 12):
            unit = [x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10) for x in (first, second)]
            lin = net.lins[(1, 4, 7, 9, 10, 11, 12).index(index)].weight[0, :, 0, 0]
            expected += float(torch.einsum("nchw,c->nhw", (unit[0] - unit[1]) ** 2, lin).mean())
    found = distance(net, noise(0.2)[None], TASK.source, everything, "zero_filled").item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert distance(net, noise(0.2)[None], TASK.source, everything, "masked").item() == pytest.approx(expected, rel=0.1)


def test_lpips_is_negated_in_the_table_so_that_higher_is_better(weights: str) -> None:
    good, bad = values(Lpips(weights=weights), [outside(0.02), outside(0.3)])
    assert bad < good < 0


def test_lpips_without_its_weights_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"is no safetensors file here.*save_file"):
        Lpips(weights=str(tmp_path / "none.safetensors"))


def test_weights_that_are_not_lpips_are_refused(tmp_path: Path, weights: str) -> None:
    from safetensors.torch import load_file

    wrong, negative = tmp_path / "wrong.safetensors", tmp_path / "negative.safetensors"
    save_file({"features.0.weight": torch.zeros(1)}, wrong)
    with pytest.raises(InputError, match=r"lack 'features\.0\.bias'"):
        network(str(wrong))
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, negative)
    with pytest.raises(InputError, match="negative channel weights"):
        network(str(negative))
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        network(str(tmp_path / "torn.safetensors"))


def test_a_picture_too_small_for_lpips_is_invalid_not_zero(weights: str) -> None:
    small = replace(TASK, source=TASK.source[:16, :16], target=TASK.target[:16, :16], edit_mask=torch.arange(256).reshape(16, 16) < 9)
    table = score_candidates([Lpips(weights=weights)], candidates([small.source], small), group_id="w")
    assert not table.valid.any() and "too small for LPIPS" in table.reasons[0]


# --- CLIP -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the real classes with random weights and a byte vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    start, end = len(alphabet), len(alphabet) + 1
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)]
    )
    directory = tmp_path_factory.mktemp("clip")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(vocabulary), "max_position_embeddings": 24, "bos_token_id": start, "eos_token_id": end},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(directory)
    return str(directory)


def test_pictures_are_prepared_as_clips_own_processor_does() -> None:
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = pil.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for shape in ((64, 64), (50, 77), (91, 33)):
        image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        expected = processor(images=image.numpy(), return_tensors="np")["pixel_values"][0]
        assert np.allclose(clip.pixel_values(image, 32).numpy(), expected, atol=1e-5)


def test_text_similarity_is_a_hundred_times_the_cosine_of_the_crop_and_the_caption(tiny_clip: str) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(tiny_clip), AutoTokenizer.from_pretrained(tiny_clip)
    rows, columns = TASK.edit_mask.any(dim=1).nonzero()[:, 0], TASK.edit_mask.any(dim=0).nonzero()[:, 0]
    crop = TASK.target[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    tokens = tokenizer([TASK.caption], return_tensors="pt", truncation=True, max_length=24)
    with torch.no_grad():
        expected = model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=clip.pixel_values(crop, 32)[None]
        )
        cosine = torch.cosine_similarity(expected.text_embeds, expected.image_embeds).item()
    (score,) = ClipSimilarity(model=tiny_clip).score(candidates([TASK.target]))
    assert score.components["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert score.value == pytest.approx(max(100 * cosine, 0.0), abs=1e-3)


def test_image_similarity_is_one_for_the_target_and_less_for_another_edit(tiny_clip: str) -> None:
    term = ClipSimilarity(model=tiny_clip, compare="target")
    same, other = values(term, [TASK.target, inside(0.5)])
    assert same == pytest.approx(1.0) and other < same
    assert other >= -1


@pytest.mark.parametrize("compare", ["caption", "target"])
def test_clip_looks_at_the_box_of_the_mask_only(compare: Any, tiny_clip: str) -> None:
    box = torch.zeros_like(TASK.edit_mask)
    rows, columns = TASK.edit_mask.any(dim=1), TASK.edit_mask.any(dim=0)
    box[rows.nonzero().min() : rows.nonzero().max() + 1, columns.nonzero().min() : columns.nonzero().max() + 1] = True
    elsewhere = torch.where(box[..., None], TASK.target, 255 - TASK.target)
    first, second = values(ClipSimilarity(model=tiny_clip, compare=compare), [TASK.target, elsewhere])
    assert first == second


def test_compbenchs_crop_leaves_out_the_last_row_and_column_of_the_box() -> None:
    mask = torch.zeros(512, 512, dtype=torch.bool)
    mask[100:151, 200:301] = True
    picture = torch.arange(512)[:, None].expand(512, 512).remainder(256).to(torch.uint8)[..., None].expand(512, 512, 3)
    assert ClipSimilarity(crop="exact")._crop(picture, mask).shape == (51, 101, 3)
    cropped = ClipSimilarity(crop="compbench")._crop(picture, mask)
    assert cropped.shape == (50, 100, 3) and cropped[0, 0, 0] == 100


def test_several_captions_count_by_their_mean_and_an_empty_one_is_invalid(tiny_clip: str) -> None:
    term = ClipSimilarity(model=tiny_clip)

    def cosine(caption: str) -> float:
        return term.score(candidates([TASK.target], replace(TASK, caption=caption)))[0].components["cosine"]

    assert cosine("a dog|a red ball") == pytest.approx((cosine("a dog") + cosine("a red ball")) / 2)
    table = score_candidates([term], candidates([TASK.target], replace(TASK, caption="a dog|")), group_id="w")
    assert not table.valid.any() and "caption of task" in table.reasons[0]


def test_clip_needs_what_it_compares_with_and_a_model_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the field caption"):
        available([ClipSimilarity()], {"target"})
    assert available([ClipSimilarity(compare="target")], {"target"})[0]
    with pytest.raises(InputError, match="cannot be loaded"):
        clip.loaded(str(tmp_path), "cpu")


# --- composite ------------------------------------------------------------------------------------------------------


def test_the_composite_scores_the_edit_on_the_untouched_source() -> None:
    images = [torch.where(INSIDE, TASK.target, noise(0.2)), noise(0.2)]
    pasted = [torch.where(INSIDE, image, TASK.source) for image in images]
    assert values(Composite(of=Judge()), images) == values(Judge(), pasted)
    assert values(Composite(of=Psnr()), images) == [60.0, 60.0]


def test_the_composites_value_and_parts_are_components_under_the_terms_name() -> None:
    term = Composite(of=Judge(name="judge"))
    table = score_candidates([term], candidates([outside(0.2)]), group_id="w")
    assert table.names == ("composite",)
    assert table.components["composite.judge"] == pytest.approx(table.values[:, 0].tolist())
    assert table.components["composite.judge.not_over_edited"] == (10.0,)


def test_a_composite_is_a_reference_without_weight_that_asks_for_what_its_term_needs() -> None:
    parsed = TypeAdapter(Reward).validate_python({"kind": "composite", "of": {"kind": "shapes_judge", "coarse": True}})
    assert isinstance(parsed, Composite) and isinstance(parsed.of, Judge) and parsed.of.coarse
    assert (parsed.weight, parsed.requires, parsed.low, parsed.high) == (0.0, {"target"}, 0.0, 10.0)
    assert TypeAdapter(Reward).validate_python(json.loads(parsed.model_dump_json())) == parsed


def test_a_composite_of_a_composite_and_of_an_unknown_kind_are_refused() -> None:
    inner = {"kind": "composite", "of": {"kind": "preservation"}}
    for kind in (inner, {"kind": "sharpness"}):
        with pytest.raises(ValidationError):
            TypeAdapter(Reward).validate_python({"kind": "composite", "of": kind})


def test_a_composite_of_a_lower_is_better_term_is_negated_once(weights: str) -> None:
    lpips = Lpips(weights=weights, convention="zero_filled")
    assert Composite(of=lpips).lower_is_better and not Composite(of=Preservation()).lower_is_better
    assert values(Composite(of=lpips), [outside(0.2)]) == [0.0]
