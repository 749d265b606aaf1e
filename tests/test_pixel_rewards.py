"""Rewards of the kept region and of the edited place: PSNR, SSIM, LPIPS, CLIP, and any of them on
the composite."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from clip_files import write_tiny_clip
from rl_edit.audit.checks import expected_of
from rl_edit.data import shapes
from rl_edit.errors import InputError, ModelUnusable
from rl_edit.measures import pixels
from rl_edit.rewards import Reward, available, score_candidates
from rl_edit.rewards.clip import ClipSimilarity
from rl_edit.rewards.composite import Composite
from rl_edit.rewards.lpips import Lpips, distance
from rl_edit.rewards.networks import clip
from rl_edit.rewards.networks.lpips import PerceptualDistance, network
from rl_edit.rewards.pixel_terms import Psnr, Ssim
from rl_edit.rewards.preservation import Preservation, Similarity, released_ssim
from rl_edit.rewards.shapes_judge import ShapesJudge
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
    return Candidates(
        task=task,
        images=torch.stack(list(images)),
        attention=attention,
        token_mask=torch.arange(4) < 1,
    )


def values(term: Reward, images: Sequence[torch.Tensor], task: EditTask = TASK) -> list[float]:
    table = score_candidates([term], candidates(images, task), group_id="w")
    assert table.valid.all(), table.reasons
    return [float(value) for value in table.values[:, 0]]


# --- PSNR and SSIM
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["masked", "zero_filled", "cocoedit"])
def test_psnr_is_the_named_metric_outside_the_mask(convention: Any) -> None:
    images = [outside(level) for level in (0.02, 0.1, 0.5)]
    expected = pixels.psnr(torch.stack(images), TASK.source, KEEP, convention)
    assert values(Psnr(convention=convention), images) == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("convention", ["map_masked", "zero_filled"])
def test_ssim_is_the_named_metric_outside_the_mask(convention: Any) -> None:
    images = [outside(level) for level in (0.02, 0.1, 0.5)]
    expected = pixels.ssim(torch.stack(images), TASK.source, KEEP, convention)
    assert values(Ssim(convention=convention), images) == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_term_saturates_at_its_ceiling_and_says_so() -> None:
    images = [outside(0.001), outside(0.003), outside(0.1)]
    table = score_candidates(
        [Psnr(ceiling_db=35.0), Ssim(ceiling=0.9)], candidates(images), group_id="w"
    )
    assert table.values[:2].tolist() == [pytest.approx([35.0, 0.9])] * 2
    assert (
        table.components["psnr"]["saturated"]
        == table.components["ssim"]["saturated"]
        == (1.0, 1.0, 0.0)
    )
    assert table.components["psnr"]["keep_fraction"][0] == pytest.approx(KEEP.float().mean().item())


@pytest.mark.parametrize(
    "term",
    [
        Psnr(),
        Psnr(convention="cocoedit"),
        Psnr(convention="zero_filled"),
        Ssim(),
        Ssim(convention="zero_filled"),
    ],
)
def test_the_declared_range_holds_for_the_best_and_the_worst_image(term: Reward) -> None:
    black = replace(TASK, source=torch.zeros_like(TASK.source))
    white = torch.full_like(TASK.source, 255)
    worst, best = (score.value for score in term.score(candidates([white, black.source], black)))
    assert worst is not None and best is not None
    assert term.low <= worst < best <= term.high
    assert best == term.high


def test_what_happens_inside_the_mask_does_not_reach_psnr_and_zero_filled_ssim() -> None:
    for term in (
        Psnr(),
        Psnr(convention="zero_filled"),
        Psnr(convention="cocoedit"),
        Ssim(convention="zero_filled"),
    ):
        first, second = values(
            term, [outside(0.1), torch.where(INSIDE, 255 - TASK.source, outside(0.1))]
        )
        assert first == second


# --- CoCoEdit's similarity
# ------------------------------------------------------------------------------------------


def similarity(
    variant: Any, images: Sequence[torch.Tensor], task: EditTask = TASK
) -> dict[str, list[float]]:
    """Values and parts of the term, one per candidate."""
    scores = Similarity(variant=variant).score(candidates(images, task))
    return {
        "value": [score.value for score in scores if score.value is not None],
        **{part: [score.components[part] for score in scores] for part in ("psnr", "ssim")},
    }


def test_fixed_psnr_of_a_known_offset_outside_the_mask_is_the_analytic_one() -> None:
    """Every kept channel off by u of 255: PSNR = 20 log10(255 / u), whatever happens inside."""
    grey = replace(TASK, source=torch.full_like(TASK.source, 100))
    for u in (3, 12, 80):
        offset = torch.where(INSIDE, TASK.target, grey.source + u)
        assert similarity("fixed", [offset], grey)["psnr"] == pytest.approx(
            [20 * math.log10(255 / u)], rel=1e-9
        )


def test_fixed_is_the_releases_mixture_of_the_right_parts_and_paper_is_their_mean() -> None:
    images = [outside(level) for level in (0.02, 0.1, 0.5)]
    psnr = (pixels.psnr(torch.stack(images), TASK.source, KEEP, "masked") / 40).clamp(0, 1)
    ssim = pixels.ssim(torch.stack(images), TASK.source, KEEP, "map_masked")
    assert similarity("fixed", images)["value"] == pytest.approx(
        (0.65 * psnr + 0.35 * ssim).tolist()
    )
    assert similarity("paper", images)["value"] == pytest.approx((0.5 * psnr + 0.5 * ssim).tolist())
    assert values(Preservation(ssim_weight=0.5), images) == pytest.approx(
        similarity("paper", images)["value"]
    )
    assert Similarity().variant == "fixed"


def test_the_released_psnr_lies_ten_log_ten_three_below_the_fixed_one() -> None:
    images = [outside(level) for level in (0.02, 0.1, 0.5)]
    fixed, released = (
        torch.tensor(similarity(variant, images)["psnr"]) for variant in ("fixed", "release")
    )
    assert (fixed - released).tolist() == pytest.approx([10 * math.log10(3)] * 3, abs=1e-6)


def test_the_released_ssim_says_nearly_one_of_noise_and_of_a_flat_image() -> None:
    """On a textured source without a mask: noise of 0.1 and a flat grey."""
    generator = torch.Generator().manual_seed(0)
    texture = (255 * torch.rand(64, 64, 3, generator=generator)).byte()
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[0, 0] = True
    task = EditTask(task_id="t", task_type="edit", source=texture, instruction="x", edit_mask=mask)
    noisy = (texture + 25.5 * torch.randn(texture.shape, generator=generator)).clamp(0, 255).byte()
    flat = torch.full_like(texture, 128)
    fixed, released = (
        similarity(variant, [texture, noisy, flat], task)["ssim"]
        for variant in ("fixed", "release")
    )
    assert fixed[0] == pytest.approx(1.0) and released[0] == pytest.approx(1.0)
    assert fixed[1] < 0.95 and fixed[2] < 0.05
    assert released[1] > 0.98 and released[2] > 0.8
    assert fixed[0] - fixed[2] > 5 * (released[0] - released[2])


def test_the_released_ssim_is_its_formula_with_a_gaussian_over_a_box_of_ones() -> None:
    """Window by window, as two nested sums."""
    images, reach = outside(0.2), 5
    line = torch.exp(-(torch.arange(-reach, reach + 1).double() ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    a, b = (
        torch.nn.functional.pad(x.double().movedim(-1, 0) / 255, [reach] * 4)
        for x in (images, TASK.source)
    )
    keep = torch.nn.functional.pad(KEEP.double(), [reach] * 4)
    total = 0.0
    for row, column in KEEP.nonzero().tolist():
        at = (slice(None), slice(row, row + 11), slice(column, column + 11))
        share = window * keep[at[1:]] / keep[at[1:]].sum()
        x, y, xx, yy, xy = (
            (share * part[at]).sum(dim=(1, 2)) for part in (a, b, a * a, b * b, a * b)
        )
        top = (2 * x * y + 0.01**2) * (2 * (xy - x * y) + 0.03**2)
        total += float(
            (top / ((x * x + y * y + 0.01**2) * (xx - x * x + yy - y * y + 0.03**2))).mean()
        )
    assert released_ssim(images[None], TASK.source, KEEP).item() == pytest.approx(
        total / int(KEEP.sum()), rel=1e-9
    )


@pytest.mark.parametrize("variant", ["fixed", "paper", "release"])
def test_similarity_lies_in_its_range_from_the_source_to_its_negative(variant: Any) -> None:
    black = replace(TASK, source=torch.zeros_like(TASK.source))
    best, worst = values(
        Similarity(variant=variant), [black.source, torch.full_like(black.source, 255)], black
    )
    assert 0 <= worst < 0.4 and best == pytest.approx(1.0)


def test_similarity_is_a_reward_of_the_config_and_does_not_see_the_inside() -> None:
    parsed = TypeAdapter(Reward).validate_python({"kind": "similarity", "variant": "release"})
    assert isinstance(parsed, Similarity) and expected_of(parsed, None).sides == ("outside",)
    for term in (parsed, Composite(of=parsed)):
        first, second = values(
            term, [outside(0.1), torch.where(INSIDE, 255 - TASK.source, outside(0.1))]
        )
        assert first == second


# --- LPIPS
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights under the names that the lpips package gives them; channel weights not
    negative, as published."""
    torch.manual_seed(0)
    net, starts = PerceptualDistance(), (0, 2, 5, 8, 10, 11, 12, 13)
    stored = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for name, tensor in net.state_dict().items():
        part, index, rest = name.split(".", 2)
        number = sum(int(index) >= start for start in starts)
        stored[
            f"net.slice{number}.{index}.{rest}"
            if part == "features"
            else f"lin{index}.model.1.{rest}"
        ] = tensor.clone()
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
    assert torch.equal(
        net.features[12].expand3x3.weight, PerceptualDistance().features[12].expand3x3.weight
    )


@pytest.mark.parametrize("convention", ["masked", "zero_filled"])
def test_lpips_is_zero_for_the_source_symmetric_and_grows_with_damage(
    convention: Any, weights: str
) -> None:
    net, images = (
        network(weights),
        torch.stack([TASK.source, outside(0.02), outside(0.1), outside(0.3)]),
    )
    there = distance(net, images, TASK.source, KEEP, convention).tolist()
    assert there[0] == 0 < there[1] < there[2] < there[3]
    back = [distance(net, TASK.source[None], image, KEEP, convention).item() for image in images]
    # Symmetric where both images agree inside the mask, which only black there makes sure of.
    assert convention == "masked" or back == pytest.approx(there, rel=1e-5)


@pytest.mark.parametrize("convention", ["masked", "zero_filled"])
def test_what_happens_inside_the_mask_does_not_reach_lpips(convention: Any, weights: str) -> None:
    first, second = values(
        Lpips(weights=weights, convention=convention),
        [outside(0.1), torch.where(INSIDE, 255 - TASK.source, outside(0.1))],
    )
    assert first == second


def test_lpips_without_a_mask_is_the_published_mean_over_positions(weights: str) -> None:
    """With nothing masked, both conventions are sums over layers of a mean; zero_filled is the
    published one exactly."""
    net, everything = network(weights), torch.ones_like(TASK.edit_mask)
    a, b = (
        (2 * image.float() / 255 - 1).permute(2, 0, 1)[None] for image in (noise(0.2), TASK.source)
    )
    expected = 0.0
    first, second = ((picture - net.shift) / net.scale for picture in (a, b))
    for index, layer in enumerate(net.features):
        first, second = layer(first), layer(second)
        if index in (1, 4, 7, 9, 10, 11, 12):
            unit = [
                x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
                for x in (first, second)
            ]
            lin = net.lins[(1, 4, 7, 9, 10, 11, 12).index(index)].weight[0, :, 0, 0]
            expected += float(torch.einsum("nchw,c->nhw", (unit[0] - unit[1]) ** 2, lin).mean())
    found = distance(net, noise(0.2)[None], TASK.source, everything, "zero_filled").item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert distance(
        net, noise(0.2)[None], TASK.source, everything, "masked"
    ).item() == pytest.approx(expected, rel=0.1)


def test_lpips_is_negated_in_the_table_so_that_higher_is_better(weights: str) -> None:
    good, bad = values(Lpips(weights=weights), [outside(0.02), outside(0.3)])
    assert bad < good < 0


def test_lpips_without_its_weights_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"is no safetensors file here.*save_file"):
        Lpips(weights=str(tmp_path / "none.safetensors"))


def test_weights_that_are_not_lpips_are_refused(tmp_path: Path, weights: str) -> None:
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


def test_a_image_too_small_for_lpips_is_invalid_not_zero(weights: str) -> None:
    small = replace(
        TASK,
        source=TASK.source[:16, :16],
        target=TASK.target[:16, :16],
        edit_mask=torch.arange(256).reshape(16, 16) < 9,
        regions=(torch.arange(256).reshape(1, 16, 16) < 9),
    )
    table = score_candidates(
        [Lpips(weights=weights)], candidates([small.source], small), group_id="w"
    )
    assert not table.valid.any() and "too small for LPIPS" in table.reasons[0]


# --- CLIP
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_images_are_prepared_as_clips_own_processor_does() -> None:
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = pil.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    for shape in ((64, 64), (50, 77), (91, 33)):
        image = torch.randint(
            0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        expected = processor(images=image.numpy(), return_tensors="np")["pixel_values"][0]
        assert np.allclose(clip.pixel_values(image, 32).numpy(), expected, atol=1e-5)


def test_text_similarity_is_a_hundred_times_the_cosine_of_the_crop_and_the_caption(
    tiny_clip: str,
) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = (
        CLIPModel.from_pretrained(tiny_clip),
        AutoTokenizer.from_pretrained(tiny_clip),
    )
    rows, columns = (
        TASK.edit_mask.any(dim=1).nonzero()[:, 0],
        TASK.edit_mask.any(dim=0).nonzero()[:, 0],
    )
    crop = TASK.target[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    tokens = tokenizer([TASK.caption], return_tensors="pt", truncation=True, max_length=24)
    with torch.no_grad():
        expected = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=clip.pixel_values(crop, 32)[None],
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
    box[
        rows.nonzero().min() : rows.nonzero().max() + 1,
        columns.nonzero().min() : columns.nonzero().max() + 1,
    ] = True
    elsewhere = torch.where(box[..., None], TASK.target, 255 - TASK.target)
    first, second = values(
        ClipSimilarity(model=tiny_clip, compare=compare), [TASK.target, elsewhere]
    )
    assert first == second


def test_compbenchs_crop_leaves_out_the_last_row_and_column_of_the_box() -> None:
    mask = torch.zeros(512, 512, dtype=torch.bool)
    mask[100:151, 200:301] = True
    picture = (
        torch.arange(512)[:, None]
        .expand(512, 512)
        .remainder(256)
        .to(torch.uint8)[..., None]
        .expand(512, 512, 3)
    )
    assert ClipSimilarity(crop="exact")._crop(picture, mask).shape == (51, 101, 3)
    cropped = ClipSimilarity(crop="compbench")._crop(picture, mask)
    assert cropped.shape == (50, 100, 3) and cropped[0, 0, 0] == 100


def test_several_captions_count_by_their_mean_and_an_empty_one_is_invalid(tiny_clip: str) -> None:
    term = ClipSimilarity(model=tiny_clip)

    def cosine(caption: str) -> float:
        return term.score(candidates([TASK.target], replace(TASK, caption=caption)))[0].components[
            "cosine"
        ]

    assert cosine("a dog|a red ball") == pytest.approx((cosine("a dog") + cosine("a red ball")) / 2)
    table = score_candidates(
        [term], candidates([TASK.target], replace(TASK, caption="a dog|")), group_id="w"
    )
    assert not table.valid.any() and "caption of task" in table.reasons[0]


def test_clip_needs_what_it_compares_with_and_a_model_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the field caption"):
        available([ClipSimilarity()], {"target"})
    assert available([ClipSimilarity(compare="target")], {"target"})[0]
    with pytest.raises(InputError, match="cannot be loaded"):
        clip.loaded(str(tmp_path), "cpu")


def test_clip_gives_no_score_by_weights_that_are_not_stored(tmp_path: Path) -> None:
    write_tiny_clip(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("visual_projection.weight")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ModelUnusable, match=r"lacks 1 of the tensors.*visual_projection"):
        clip.loaded(str(tmp_path), "cpu")


# --- composite
# --------------------------------------------------------------------------------------------------


def test_the_composite_scores_the_edit_on_the_untouched_source() -> None:
    images = [torch.where(INSIDE, TASK.target, noise(0.2)), noise(0.2)]
    pasted = [torch.where(INSIDE, image, TASK.source) for image in images]
    assert values(Composite(of=ShapesJudge()), images) == values(ShapesJudge(), pasted)
    assert values(Composite(of=Psnr()), images) == [60.0, 60.0]


def test_the_composites_value_and_parts_are_components_under_the_terms_name() -> None:
    term = Composite(of=ShapesJudge(name="judge"))
    table = score_candidates([term], candidates([outside(0.2)]), group_id="w")
    assert table.names == ("composite",)
    assert table.components["composite"]["judge"] == pytest.approx(table.values[:, 0].tolist())
    assert table.components["composite"]["judge.not_over_edited"] == (10.0,)


def test_a_composite_is_a_reference_without_weight_that_asks_for_what_its_term_needs() -> None:
    parsed = TypeAdapter(Reward).validate_python(
        {"kind": "composite", "of": {"kind": "shapes_judge", "coarse": True}}
    )
    assert isinstance(parsed, Composite) and isinstance(parsed.of, ShapesJudge) and parsed.of.coarse
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
