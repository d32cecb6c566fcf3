"""Fields that the market reads in a request's body."""

from __future__ import annotations

import pytest

from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.api.gate.request_fields import MOST_ANSWERS, samples_of


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"n": 3}, 3),
        ({"sampling_params": {"n": 2}}, 2),
        ({"n": 1}, 1),
        ({}, 1),
        ({"n": None}, 1),
        ({"sampling_params": None, "n": 2}, 2),
        ({"sampling_params": {}, "n": 2}, 1),
        ({"prompt": [1] * 1000, "n": MOST_ANSWERS}, MOST_ANSWERS),
        ({"prompt": [[1]] * MOST_ANSWERS}, 1),
        ({"messages": [{"role": "user"}] * 200, "n": 2}, 2),
    ],
)
def test_the_samples_of_a_request_are_counted(body, expected):
    """On engines of several ranks each answer may be another engine's."""
    assert samples_of(body) == expected


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"n": "2"}, 400),  # vLLM would read it as a number
        ({"n": 2.0}, 400),
        ({"n": True}, 400),
        ({"n": 0}, 400),
        ({"sampling_params": {"n": "2"}}, 400),
        ({"n": MOST_ANSWERS + 1}, 413),
        ({"prompt": [[1]] * (MOST_ANSWERS // 2 + 1), "n": 2}, 413),
        ({"prompt": ["x"] * (MOST_ANSWERS + 1)}, 413),
        ({"messages": [[]] * (MOST_ANSWERS + 1)}, 413),
        ({"items": ["x"] * (MOST_ANSWERS + 1)}, 413),
        ({"questions": {str(number): {} for number in range(MOST_ANSWERS + 1)}}, 413),
    ],
)
def test_a_request_for_too_many_answers_is_refused(body, status):
    """vLLM would make them all at once; and what it reads as a number is one for us too."""
    with pytest.raises(ApiError) as refused:
        samples_of(body)
    assert refused.value.status == status
