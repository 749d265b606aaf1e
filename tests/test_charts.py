"""The charts of the pages: averages, ticks, numbers, dots and bars."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rl_edit.report.axes import nice_ticks
from rl_edit.report.charts import Series, line_chart, moving_average, stacked_chart
from rl_edit.report.numbers import format_number, format_signed


def test_moving_average_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert moving_average([2.0, 2.0, 2.0], 5) == pytest.approx([2.0, 2.0, 2.0])
    weight = 2.0 / 4.0
    expected = ((1 - weight) * weight * 1.0 + weight * 3.0) / (1 - (1 - weight) ** 2)
    assert moving_average([1.0, 3.0], 3) == pytest.approx([1.0, expected])


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (-3.2, 17.0), (31.91, 32.04), (5.0, 5.0), (0.0, 0.0), (1e-9, 3e-9), (-2e6, 4e6)],
)
def test_ticks_are_even_enclose_the_data_and_stay_few(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    slack = 1e-6 * (ticks[1] - ticks[0])
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_numbers_have_real_minus_signs_and_no_negative_zero() -> None:
    assert (
        format_number(-0.5),
        format_number(-0.0004, 3),
        format_number(12.0),
        format_number(123456.0),
        format_number(2e-7),
    ) == (
        "\u22120.5",
        "0.000",
        "12",
        "1.23e+05",
        "2.00e-07",
    )
    assert (format_signed(0.25, 2), format_signed(-0.25, 2), format_signed(0.001, 2)) == (
        "+0.25",
        "\u22120.25",
        "0.00",
    )


def test_a_single_update_draws_a_dot_and_no_data_draws_no_chart() -> None:
    chart = line_chart(title="t", unit="dB", series=[Series(label="t", points=((0.0, 1.5),))])
    assert chart is not None and chart.svg.count("<circle") == 1 and chart.legend[0].last == "1.5"
    assert line_chart(title="t", unit="dB", series=[Series(label="t", points=())]) is None
    assert stacked_chart(title="t", unit="s", phases={"a": ()}) is None


def test_stacked_bars_add_up_to_the_height_of_their_sum() -> None:
    chart = stacked_chart(title="t", unit="s", phases={"a": ((0.0, 1.0),), "b": ((0.0, 3.0),)})
    assert chart is not None
    heights = [
        float(height) for height in re.findall(r'<rect class="bar[^>]*height="([\d.]+)"', chart.svg)
    ]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.3)
    assert "a: 1 s\nb: 3 s" in chart.svg
