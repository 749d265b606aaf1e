"""The drift panel: each measure answers to its own kind of damage to the background, in its unit,
and to nothing in the edit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.reward import RewardActor
from rl_edit.measures import drift
from rl_edit.report import render_report
from rl_edit.types import Candidates, EditTask
from runs import small_config

SIZE = 64


def masked() -> Tensor:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[20:40, 24:44] = True
    return mask


def textured() -> Tensor:
    """A smooth image with some grain, away from the ends of the range."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    grain = torch.randint(-8, 9, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0))
    return (torch.stack([80 + rows, 90 + columns, 120 - rows // 2], dim=-1) + grain).to(torch.uint8)


SOURCE, MASK = textured(), masked()


def panel(
    *pictures: Tensor, source: Tensor = SOURCE, mask: Tensor = MASK
) -> dict[str, tuple[float, ...]]:
    task = EditTask(
        task_id="t", task_type="edit", source=source, instruction="edit", edit_mask=mask
    )
    images = torch.stack(pictures).clamp(0, 255).to(torch.uint8)
    count = len(images)
    return drift.drift(
        Candidates(
            task=task,
            images=images,
            attention=torch.ones(count, 4) / 4,
            token_mask=torch.ones(4, dtype=torch.bool),
        )
    )


def one(picture: Tensor, **more: Tensor) -> dict[str, float]:
    return {name: value for name, (value,) in panel(picture, **more).items()}


def changed(where: Tensor, amount: Tensor | int) -> Tensor:
    return SOURCE.int() + torch.where(where[..., None], amount, 0)


def waves(period: int, amplitude: float) -> Tensor:
    return (
        (amplitude * torch.sin(2 * math.pi * torch.arange(SIZE) / period))
        .round()
        .int()[None, :, None]
        .expand(SIZE, SIZE, 1)
    )


def test_an_untouched_background_has_no_drift_whatever_the_edit_is() -> None:
    edit = torch.where(
        MASK[..., None],
        torch.randint(0, 256, SOURCE.shape, generator=torch.Generator().manual_seed(1)),
        SOURCE.int(),
    )
    assert one(edit) == {
        "seam": 0.0,
        "brightness": 0.0,
        "edges": 1.0,
        "entropy": 0.0,
        "spectrum": 0.0,
    }


def test_a_change_just_outside_the_mask_is_a_seam_and_one_everywhere_is_not() -> None:
    ring = torch.zeros_like(MASK)
    ring[16:44, 20:48] = True
    assert one(changed(ring & ~MASK, 51))["seam"] == pytest.approx(0.2, abs=1e-6)
    assert one(changed(~MASK, 51))["seam"] == pytest.approx(0.0, abs=1e-6)
    assert one(changed(~ring, 51))["seam"] == pytest.approx(-0.2, abs=1e-6)


def test_a_seam_is_unknown_where_nothing_lies_further_away() -> None:
    mask = torch.ones_like(MASK)
    mask[:, :3] = False
    assert math.isnan(one(SOURCE.int(), mask=mask)["seam"])


@pytest.mark.parametrize("levels", [-20, 30])
def test_brightness_is_the_shift_of_the_background_with_its_sign(levels: int) -> None:
    found = one(changed(~MASK, levels))
    assert found["brightness"] == pytest.approx(levels / 255, abs=1e-6)
    assert found["edges"] == pytest.approx(1.0, abs=1e-4) and found["spectrum"] == pytest.approx(
        0.0, abs=1e-6
    )


def test_blurring_lowers_the_edge_density_and_noise_raises_it() -> None:
    planes = SOURCE.float().permute(2, 0, 1)
    blurred = torch.nn.functional.avg_pool2d(
        planes, 5, stride=1, padding=2, count_include_pad=False
    ).permute(1, 2, 0)
    noisy = changed(
        ~MASK, torch.randint(-25, 26, SOURCE.shape, generator=torch.Generator().manual_seed(2))
    )
    assert one(blurred)["edges"] < 0.6 < 1.5 < one(noisy)["edges"]


def test_a_flat_background_has_a_finite_edge_ratio() -> None:
    flat = torch.full_like(SOURCE, 100)
    assert one(flat.int(), source=flat)["edges"] == 1.0


def test_entropy_counts_bits_lost_and_gained() -> None:
    flat, halves = torch.full((SIZE, SIZE, 3), 100), torch.full((SIZE, SIZE, 3), 100)
    halves[:, ::2] = 200
    assert one(halves, source=flat.to(torch.uint8))["entropy"] == pytest.approx(1.0, abs=1e-3)
    assert one(flat, source=halves.to(torch.uint8))["entropy"] == pytest.approx(-1.0, abs=1e-3)


@pytest.mark.parametrize("period", [4, 8, 16])
def test_a_grid_is_a_peak_of_its_amplitude_and_noise_of_the_same_size_is_none(period: int) -> None:
    grid = waves(period, 10.0)
    shuffled = grid.flatten()[
        torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(3))
    ].reshape(SIZE, SIZE, 1)
    assert one(changed(~MASK, grid))["spectrum"] == pytest.approx(10 / 255, rel=0.05)
    assert one(changed(~MASK, shuffled))["spectrum"] < 2.5 / 255


def test_candidates_of_a_group_are_measured_as_if_each_were_alone() -> None:
    pictures = [changed(~MASK, 9), changed(MASK, 90), changed(~MASK, waves(8, 12.0)), SOURCE.int()]
    together = panel(*pictures)
    for row, picture in enumerate(pictures):
        for name, value in one(picture).items():
            assert together[name][row] == pytest.approx(value, abs=1e-6)


def test_a_image_need_not_be_square_nor_even() -> None:
    source, mask = SOURCE[:33, :47], MASK[:33, :47]
    assert all(
        math.isfinite(value) for value in one(source.int() + 3, source=source, mask=mask).values()
    )


def test_the_panel_of_drift_has_a_place_of_its_own_in_the_report(
    tmp_path: Path,
) -> None:
    keys = [
        f"background/{name}/{what}" for name in panel(SOURCE.int()) for what in ("mean", "spread")
    ]
    rows = [
        {
            "update": update,
            **{key: 0.1 * update for key in (*keys, "reward/lpips/mean", "background/ssim/mean")},
        }
        for update in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = render_report(tmp_path).read_text()
    outside, own = page[page.index("<h3>Outside the mask") :].split("<h3>Background drift")
    assert (
        "Reward term: lpips" in outside
        and "Background ssim, mean" in outside
        and "<h3>Inside the mask" not in page
    )
    titles = (
        "Seam around the mask",
        "Brightness shift",
        "Edge density",
        "Entropy difference",
        "Strongest wave in the change",
    )
    assert [own.count(f'aria-label="{title}"') for title in titles] == [1] * 5
    assert page.count('class="plot"') == 7


def test_the_panel_is_part_of_every_reward_table() -> None:
    actor = RewardActor(small_config("builtin:tiny-kontext"), frozenset(), 1)
    task = EditTask(
        task_id="t", task_type="edit", source=SOURCE, instruction="edit", edit_mask=MASK
    )
    images = torch.stack([SOURCE, SOURCE])
    candidates = Candidates(
        task=task,
        images=images,
        attention=torch.ones(2, 4) / 4,
        token_mask=torch.tensor([True, False, False, False]),
    )
    table = actor.table(candidates, group_id="w")
    assert set(panel(SOURCE.int())) <= set(table.measures.background)
    assert table.measures.background["edges"] == (1.0, 1.0)
