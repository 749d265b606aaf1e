"""Edit regions from change and attention: the finder on hand-made maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_edit.data.mask_finding import FoundRegions, MaskFinder, NotFound, agreement, otsu, smoothed

SIDE = 64
EVENLY = torch.full((8, 8), 1 / 64)
PLAIN: dict[str, Any] = {"attention_weight": 0.0, "smoothing": 0.0, "margin": 0.0}


def change(*places: tuple[int, int, int, int], level: float = 0.5, ground: float = 0.02) -> Tensor:
    """A map with raised rectangles (top, left, bottom, right) on a low ground."""
    result = torch.full((SIDE, SIDE), ground)
    for top, left, bottom, right in places:
        result[top:bottom, left:right] = level
    return result


def regions(automask: MaskFinder, changed: Tensor, attention: Tensor = EVENLY) -> Tensor:
    result = automask(changed, attention)
    assert isinstance(result, FoundRegions), result
    return result.regions


def refusal(automask: MaskFinder, changed: Tensor, attention: Tensor = EVENLY) -> NotFound:
    result = automask(changed, attention)
    assert isinstance(result, NotFound), result
    return result


def test_otsus_threshold_maximises_the_variance_between_both_sides() -> None:
    values = torch.rand(60, generator=torch.Generator().manual_seed(0)) ** 3
    cut = otsu(values)

    def between(threshold: float) -> float:
        low, high = values[values <= threshold].double(), values[values > threshold].double()
        return len(low) * len(high) * float(low.mean() - high.mean()) ** 2

    best = max(between(float(value)) for value in values.sort().values[:-1])
    assert between(cut) == pytest.approx(best, rel=1e-12)
    assert 0.1 < otsu(torch.tensor([0.0, 0.1, 0.9, 1.0])) < 0.9


def test_smoothing_keeps_a_constant_and_lowers_a_peak_and_none_changes_nothing() -> None:
    flat, peak = torch.full((20, 30), 0.3), torch.zeros(20, 30)
    peak[10, 15] = 1.0
    assert torch.allclose(smoothed(flat, 2.0), flat)
    assert 0 < float(smoothed(peak, 2.0).max()) == pytest.approx(1 / (2 * math.pi * 4), rel=0.02)
    assert torch.equal(smoothed(peak, 0.0), peak)


def test_the_region_is_where_the_image_changed() -> None:
    (region,) = regions(MaskFinder(**PLAIN), change((10, 20, 26, 40)))
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[10:26, 20:40] = True
    assert torch.equal(region, expected)


def test_the_margin_widens_a_region_to_every_side_by_its_share_of_the_image() -> None:
    (region,) = regions(MaskFinder(**{**PLAIN, "margin": 3 / SIDE}), change((10, 20, 26, 40)))
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[7:29, 17:43] = True
    assert torch.equal(region, expected)


def test_separate_places_are_regions_of_their_own_disjoint_and_in_reading_order() -> None:
    result = regions(MaskFinder(), change((4, 40, 16, 52), (30, 6, 44, 20)))
    assert len(result) == 2 and not bool((result[0] & result[1]).any())
    assert bool(result[0][10, 46]) and bool(result[1][37, 13])


def test_boxes_that_meet_become_one_and_without_boxes_outlines_stay() -> None:
    corner = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    corner[8:40, 8:12] = corner[36:40, 8:40] = True
    bar = torch.zeros_like(corner)
    bar[12:16, 30:36] = True
    changed = torch.where(corner | bar, 0.5, 0.02)
    outlined = regions(MaskFinder(**{**PLAIN, "box": False}), changed)
    assert len(outlined) == 2 and torch.equal(outlined.any(dim=0), corner | bar)
    (boxed,) = regions(MaskFinder(**PLAIN), changed)
    expected = torch.zeros_like(corner)
    expected[8:40, 8:40] = True
    assert torch.equal(boxed, expected)


def test_a_image_that_does_not_change_has_no_mask_and_the_reason_has_the_numbers() -> None:
    result = refusal(MaskFinder(), change((10, 20, 26, 40), level=0.06))
    assert (
        result.kind == "unchanged"
        and "rise 0.040 above the 0.020" in result.reason
        and "floor is 0.1" in result.reason
    )


def test_a_shift_of_the_whole_image_is_no_change_of_a_place() -> None:
    assert [refusal(MaskFinder(), change(ground=level)).kind for level in (0.05, 0.6)] == [
        "unchanged",
        "everywhere",
    ]
    place = (10, 20, 26, 40)
    shifted, still = (
        regions(MaskFinder(), change(place, level=ground + 0.4, ground=ground))
        for ground in (0.5, 0.0)
    )
    assert torch.equal(shifted, still)


def test_specks_are_dropped_and_nothing_but_specks_is_no_region() -> None:
    automask = MaskFinder(**PLAIN)
    result = regions(automask, change((10, 20, 26, 40), (50, 50, 52, 52)))
    assert len(result) == 1 and not bool(result[0][50:52, 50:52].any())
    specks = refusal(automask, change((50, 50, 52, 52)))
    assert specks.kind == "specks" and "0.10% of the image, the least is 0.50%" in specks.reason


def test_a_change_everywhere_or_in_too_many_places_is_no_region() -> None:
    assert refusal(MaskFinder(**PLAIN), change((0, 0, 64, 60))).kind == "everywhere"
    grown = refusal(MaskFinder(**{**PLAIN, "margin": 6 / SIDE}), change((8, 8, 52, 52)))
    assert grown.kind == "everywhere" and "cover 77% of the image, the most is 70%" in grown.reason
    (most_of_it,) = regions(MaskFinder(**PLAIN), change((0, 0, 64, 40)))
    assert float(most_of_it.float().mean()) == 40 / 64
    spots = [
        (6 + 18 * row, 6 + 18 * column, 14 + 18 * row, 14 + 18 * column)
        for row in range(3)
        for column in range(3)
    ]
    scattered = refusal(MaskFinder(**PLAIN), change(*spots))
    assert scattered.kind == "scattered" and "9 separate parts, the most is 8" in scattered.reason
    assert len(regions(MaskFinder(**PLAIN), change(*spots[:8]))) == 8


def test_a_mask_that_touches_every_token_is_no_region_however_small_it_is() -> None:
    """On a grid of 2 x 2 tokens, a cross in the middle."""
    crossing = change((28, 28, 36, 36))
    assert refusal(MaskFinder(**PLAIN), crossing, torch.full((2, 2), 0.25)).kind == "everywhere"
    assert len(regions(MaskFinder(**PLAIN), crossing)) == 1


def test_attention_decides_where_it_alone_has_weight_and_is_not_read_where_it_has_none() -> None:
    looked = EVENLY.clone()
    looked[1:3, 5:7] = 20 / 64
    changed = change((40, 8, 56, 24))
    attended = regions(MaskFinder(attention_weight=1.0), changed, looked)
    assert len(attended) == 1 and bool(attended[0][16, 48]) and not bool(attended[0][48, 16])
    unmeasured = torch.full((8, 8), math.nan)
    seen = regions(MaskFinder(attention_weight=0.0), changed, unmeasured)
    assert bool(seen[0][48, 16]) and not bool(seen[0][16, 48])
    with pytest.raises(ValueError, match=r"attention_weight is 0\.1 and no attention was measured"):
        MaskFinder()(changed, unmeasured)


def test_agreement_counts_pixels_and_places() -> None:
    result, true = torch.zeros(4, 8, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)
    result[:, 0:4] = true[:, 2:5] = True
    measured = agreement(result, true)
    assert (measured.iou, measured.precision, measured.recall) == (8 / 20, 8 / 16, 8 / 12)
    assert measured.same_number
    true[0, 7] = True
    assert not agreement(result, true).same_number
