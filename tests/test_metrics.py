"""Masked image metrics against closed forms, and the statistics that turn them into intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rl_edit.errors import InputError
from rl_edit.evaluation.evaluate import summarise
from rl_edit.evaluation.record import Row
from rl_edit.measures.intervals import Interval, bootstrap, paired_bootstrap
from rl_edit.measures.pixels import MAX_PSNR, gaussian_mean, keep_fraction, psnr, ssim


def textured(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def left_half_edited(height: int, width: int) -> torch.Tensor:
    keep = torch.ones(height, width, dtype=torch.bool)
    keep[:, : width // 2] = False
    return keep


@pytest.mark.parametrize("shift", [0.01, 0.1, 0.5])
def test_masked_psnr_of_a_constant_shift_is_minus_twenty_log10_of_the_shift(shift: float) -> None:
    image = textured(12, 16, 3) * 0.5
    assert psnr(image + shift, image, left_half_edited(12, 16), "masked").item() == pytest.approx(
        -20 * math.log10(shift)
    )


def test_uint8_psnr_has_peak_255() -> None:
    image = torch.full((8, 8, 3), 100, dtype=torch.uint8)
    expected = 20 * math.log10(255 / 10)
    assert psnr(
        image + 10, image, torch.ones(8, 8, dtype=torch.bool), "masked"
    ).item() == pytest.approx(expected)


def test_psnr_ignores_what_happens_outside_the_kept_pixels() -> None:
    image, keep = textured(10, 10, 3), left_half_edited(10, 10)
    spoiled = image + 0.05
    wild = torch.where(keep[..., None], spoiled, torch.zeros(()))
    for convention in ("masked", "zero_filled", "cocoedit"):
        assert psnr(wild, image, keep, convention).item() == pytest.approx(
            psnr(spoiled, image, keep, convention).item()
        )


@pytest.mark.parametrize("share", [1, 3, 7])
def test_zero_filled_psnr_is_masked_plus_ten_log10_of_area_over_kept(share: int) -> None:
    a, b = textured(8, 8, 3, seed=1), textured(8, 8, 3, seed=2)
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[:share] = False
    gap = psnr(a, b, keep, "zero_filled") - psnr(a, b, keep, "masked")
    assert gap.item() == pytest.approx(10 * math.log10(64 / keep.sum().item()))
    blackened = psnr(a * keep[..., None], b * keep[..., None], torch.ones_like(keep), "masked")
    assert psnr(a, b, keep, "zero_filled").item() == pytest.approx(blackened.item())


def test_cocoedit_psnr_is_masked_minus_ten_log10_of_three() -> None:
    a, b = textured(8, 8, 3, seed=1), textured(8, 8, 3, seed=2)
    gap = psnr(a, b, left_half_edited(8, 8), "cocoedit") - psnr(
        a, b, left_half_edited(8, 8), "masked"
    )
    assert gap.item() == pytest.approx(-10 * math.log10(3))


def test_masked_psnr_of_uniform_noise_does_not_depend_on_the_edit_area_and_zero_filled_does() -> (
    None
):
    image = textured(64, 64, 3)
    noisy = image + 0.05 * torch.randn(
        64, 64, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    masked, zero_filled = [], []
    for rows in (0, 16, 32, 57):
        keep = torch.ones(64, 64, dtype=torch.bool)
        keep[:rows] = False
        masked.append(psnr(noisy, image, keep, "masked").item())
        zero_filled.append(psnr(noisy, image, keep, "zero_filled").item())
    assert masked == pytest.approx([20 * math.log10(1 / 0.05)] * 4, abs=0.3)
    assert np.diff(zero_filled).min() > 1.0
    assert zero_filled[-1] - zero_filled[0] == pytest.approx(9.6, abs=0.5)


def test_identical_images_have_the_capped_psnr() -> None:
    image = textured(6, 6, 3)
    for convention in ("masked", "zero_filled", "cocoedit"):
        assert psnr(image, image, left_half_edited(6, 6), convention).item() == MAX_PSNR


def test_ssim_of_an_image_with_itself_is_one() -> None:
    image = textured(20, 24, 3)
    for convention in ("map_masked", "zero_filled"):
        assert ssim(image, image, left_half_edited(20, 24), convention).item() == pytest.approx(
            1.0, abs=1e-12
        )


def test_ssim_of_flat_against_textured_is_low() -> None:
    image = textured(32, 32, 3)
    flat = torch.full_like(image, 0.5)
    assert ssim(flat, image, torch.ones(32, 32, dtype=torch.bool), "map_masked").item() < 0.2


def test_ssim_of_two_flat_images_is_the_luminance_term() -> None:
    a = torch.full((16, 16, 3), 0.2, dtype=torch.float64)
    b = torch.full((16, 16, 3), 0.6, dtype=torch.float64)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(a, b, left_half_edited(16, 16), "map_masked").item() == pytest.approx(
        expected, rel=1e-9
    )


def test_zero_filled_ssim_counts_the_blackened_part_as_agreement() -> None:
    image = textured(48, 48, 3)
    noisy = image + 0.8 * textured(48, 48, 3, seed=5)
    keep = left_half_edited(48, 48)
    assert ssim(noisy, image, keep, "zero_filled") > ssim(noisy, image, keep, "map_masked") + 0.05


@pytest.mark.parametrize("size", [1, 2, 5, 10])
def test_images_smaller_than_the_window_have_an_ssim_below_one_for_different_images(
    size: int,
) -> None:
    a, b = textured(size, size, 3, seed=1) * 0.2, 0.8 + textured(size, size, 3, seed=2) * 0.2
    value = ssim(a, b, torch.ones(size, size, dtype=torch.bool), "map_masked").item()
    assert -1.0 <= value < 0.5


def test_a_group_against_one_source_gives_each_candidate_its_own_value() -> None:
    group, source, keep = (
        textured(4, 12, 12, 3, seed=1),
        textured(12, 12, 3, seed=2),
        left_half_edited(12, 12),
    )
    for metric, convention in (
        (psnr, "masked"),
        (psnr, "zero_filled"),
        (ssim, "map_masked"),
        (ssim, "zero_filled"),
    ):
        together = metric(group, source, keep, convention)
        apart = torch.stack([metric(image, source, keep, convention) for image in group])
        assert together.shape == (4,)
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


def test_keep_fraction_is_the_share_of_kept_pixels() -> None:
    keep = torch.zeros(2, 4, 5, dtype=torch.bool)
    keep[1, :, :2] = True
    assert keep_fraction(keep).tolist() == pytest.approx([0.0, 0.4])


def test_gaussian_mean_keeps_a_flat_image_flat_up_to_the_border() -> None:
    flat = torch.full((9, 7, 2), 0.37, dtype=torch.float64)
    torch.testing.assert_close(gaussian_mean(flat, sigma=1.5, radius=5), flat)


def test_metrics_refuse_what_would_give_wrong_numbers() -> None:
    image, keep = textured(6, 6, 3), torch.ones(6, 6, dtype=torch.bool)
    with pytest.raises(InputError, match="keeps no pixel"):
        psnr(image, image, ~keep, "masked")
    with pytest.raises(InputError, match="differ in size"):
        ssim(image, textured(6, 7, 3), keep, "map_masked")
    with pytest.raises(InputError, match="bool mask"):
        psnr(image, image, keep.float(), "masked")
    with pytest.raises(InputError, match="no known range"):
        psnr(image.to(torch.int64), image, keep, "masked")
    with pytest.raises(InputError, match="not known"):
        psnr(image, image, keep, "average")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not known"):
        ssim(image, image, keep, "average")  # type: ignore[arg-type]


def test_a_95_percent_interval_covers_the_true_mean_about_95_percent_of_the_time() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        interval = bootstrap(generator.normal(1.5, 2.0, size=60), seed=trial, resamples=500)
        hits += interval.low <= 1.5 <= interval.high
    assert 0.91 <= hits / 400 <= 0.98


def test_bootstrap_width_agrees_with_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap(values, seed=0)
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert interval.n == 400


def test_pairing_narrows_the_interval_of_correlated_measurements() -> None:
    generator = np.random.default_rng(2)
    difficulty = generator.normal(size=100)
    a = difficulty + 0.1 * generator.normal(size=100)
    b = difficulty + 0.05 + 0.1 * generator.normal(size=100)
    paired = paired_bootstrap(a, b, seed=0)
    unpaired_width = math.hypot(*((lambda i: i.high - i.low)(bootstrap(x, seed=0)) for x in (a, b)))
    assert paired.mean == pytest.approx((b - a).mean())
    assert paired.high - paired.low < unpaired_width / 4
    assert paired.low > 0


def test_paired_bootstrap_has_the_sign_of_b_minus_a() -> None:
    interval = paired_bootstrap([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], seed=0)
    assert interval == Interval(1.0, 1.0, 1.0, 3)


def test_repeating_each_task_does_not_narrow_a_clustered_interval() -> None:
    per_task = np.random.default_rng(3).normal(size=50)
    repeated, tasks = np.repeat(per_task, 8), np.repeat(np.arange(50), 8).tolist()
    once = bootstrap(per_task, seed=4)
    clustered = bootstrap(repeated, seed=4, groups=tasks)
    naive = bootstrap(repeated, seed=4)
    assert (clustered.low, clustered.high, clustered.n) == pytest.approx((once.low, once.high, 50))
    assert naive.high - naive.low < 0.5 * (clustered.high - clustered.low)


def test_a_clustered_mean_weighs_observations_not_clusters() -> None:
    assert bootstrap([0.0, 0.0, 0.0, 4.0], seed=0, groups=["a", "a", "a", "b"]).mean == 1.0


def test_one_value_has_a_mean_and_says_nothing_about_its_error() -> None:
    assert bootstrap([0.25], seed=0) == Interval(0.25, -math.inf, math.inf, 1)
    assert bootstrap([0.25, 0.75], seed=0, groups=["same", "same"]) == Interval(
        0.5, -math.inf, math.inf, 1
    )


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(5).normal(size=30)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_resamples_drawn_in_blocks_keep_the_width_of_the_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(6).normal(size=200)
    whole = bootstrap(values, seed=0)
    monkeypatch.setattr("rl_edit.measures.intervals._BLOCK", 999)
    blocked = bootstrap(values, seed=0)
    assert (blocked.low, blocked.high) == pytest.approx((whole.low, whole.high))


def test_statistics_refuse_what_has_no_interval() -> None:
    with pytest.raises(InputError, match="not finite"):
        bootstrap([1.0, math.nan], seed=0)
    with pytest.raises(InputError, match="at least one"):
        bootstrap([], seed=0)
    with pytest.raises(InputError, match="same tasks"):
        paired_bootstrap([1.0], [1.0, 2.0], seed=0)
    with pytest.raises(InputError, match="groups has 1"):
        bootstrap([1.0, 2.0], seed=0, groups=["a"])
    with pytest.raises(InputError, match="level"):
        bootstrap([1.0, 2.0], seed=0, level=95)
    with pytest.raises(InputError, match="resamples"):
        bootstrap([1.0, 2.0], seed=0, resamples=1)


def test_a_comparison_has_every_metric_of_any_task_and_counts_tasks_with_both_sides() -> None:
    values = [
        ({"reward": 1.0}, {"reward": 2.0}),
        ({"reward": 2.0, "instruction": 4.0}, {"reward": 4.0, "instruction": 7.0}),
        ({"reward": math.nan, "instruction": 5.0}, {"reward": 9.0, "instruction": 6.0}),
    ]
    rows = [
        Row(task_id=f"t{i}", task_type="add", values={"base": base, "trained": after})
        for i, (base, after) in enumerate(values)
    ]
    summary = summarise(rows, {})
    assert {metric: (delta.mean, delta.n) for metric, delta in summary.delta.items()} == {
        "reward": (1.5, 2),
        "instruction": (2.0, 2),
    }
    assert summary.base["reward"].mean == 1.5
    assert summary.by_type["add"].delta == summary.delta
