"""Fields that the market reads in a request's body."""

from __future__ import annotations

import pytest

from vllm_kvmarket.api.gate.request_fields import has_samples


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"n": 3}, True),
        ({"sampling_params": {"n": 2}}, True),
        ({"n": 1}, False),
        ({}, False),
        ({"n": None}, False),
        ({"n": "2"}, False),
        ({"sampling_params": None, "n": 2}, True),
        ({"sampling_params": {}, "n": 2}, False),
    ],
)
def test_a_request_for_several_answers_is_recognised(body, expected):
    """On engines of several ranks each answer may be another engine's."""
    assert has_samples(body) is expected
