"""The interval that benchmarks/miss_cost.py gives beside its ratio."""

from __future__ import annotations

import random

import pytest

from benchmarks.miss_cost import interval


@pytest.mark.parametrize("cost", [0.0, 0.01])
def test_the_interval_holds_the_cost_and_narrows_with_rounds(cost):
    """Rounds that differ by 2 %: some of them tell little, many tell whether 1 % is there."""
    source = random.Random(3)
    ratios = [1 + cost + source.gauss(0, 0.02) for _ in range(2000)]
    low, high = interval(ratios[:20])
    assert low < 1 + cost < high
    many_low, many_high = interval(ratios)
    assert many_low < 1 + cost < many_high
    assert many_high - many_low < (high - low) / 3


def test_equal_rounds_leave_no_doubt():
    """The same ratio each time."""
    assert interval([1.5] * 20) == (1.5, 1.5)
