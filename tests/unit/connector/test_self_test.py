"""How the self-test compares two answers; what it asks an engine is in tests/engine."""

from __future__ import annotations

import math

import pytest

from vllm_kvmarket.connector.self_test import Answer


def answer(*steps):
    """Each step: the log-probabilities of the best tokens, the chosen one first."""
    return Answer([next(iter(best)) for best in steps], [dict(best) for best in steps])


FULL = answer({1: -0.1, 2: -0.3}, {3: -0.5, 4: -0.6})


@pytest.mark.parametrize(
    ("other", "apart"),
    [
        (FULL, 0.0),
        (answer({1: -0.12, 2: -0.3}, {3: -0.5}), 0.02),
        # They part at a near tie; what comes after is another text.
        (answer({1: -0.1, 2: -0.3}, {4: -0.55, 3: -0.56}), 0.1),
        (answer({2: -0.1, 1: -0.11}, {9: -0.5}), 0.2),
        # Neither is among the other's best.
        (answer({7: -0.1}, {3: -0.5}), math.inf),
        (answer({1: math.nan}, {3: -0.5}), math.inf),
    ],
)
def test_two_answers_are_as_far_apart_as_their_worst_step(other, apart):
    """Where they choose another token, as far as that choice costs."""
    assert FULL.distance(other) == pytest.approx(apart, abs=1e-9)
    assert math.isinf(other.distance(FULL)) == math.isinf(apart)


def test_answers_of_another_length_cannot_be_compared():
    """Rather than that the shorter one agrees with all."""
    with pytest.raises(ValueError, match="shorter"):
        FULL.distance(answer({1: -0.1, 2: -0.3}))
