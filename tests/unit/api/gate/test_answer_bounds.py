"""How many answers a request asks for, and how much may come with them."""

from __future__ import annotations

import pytest

from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.api.gate.answer_bounds import (
    MOST_ANSWERS,
    MOST_LOGPROBS,
    MOST_RETURNED,
    MOST_STOP_CHARACTERS,
    MOST_STOPS,
    check_answers,
    samples_of,
)

CONTEXT = 100_000
CHAT = {"messages": [{"role": "user", "content": "x"}]}


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


# Each is accepted as it stands, and refused with one more of the field that is named.
LARGEST = [
    ({"prompt": "x", "logprobs": 1}, "max_tokens", MOST_LOGPROBS // 2),
    ({"prompt": "x", "logprobs": 0, "n": 10, "stream": True}, "max_tokens", None),
    ({"prompt": "x", "logprobs": 0, "max_tokens": 100}, "n", MOST_LOGPROBS // 100),
    ({"prompt": "x", "max_tokens": 1}, "logprobs", MOST_LOGPROBS - 1),
    ({"prompt": "x" * 100}, "prompt_logprobs", MOST_LOGPROBS // 100 - 1),
    ({"prompt": [1] * 100, "echo": True, "max_tokens": 100}, "logprobs", MOST_LOGPROBS // 200 - 1),
    ({"prompt": "x", "max_tokens": 1, "logprobs": 5}, "logprob_token_ids", MOST_LOGPROBS - 1),
    ({**CHAT, "logprobs": True, "max_tokens": 100}, "top_logprobs", MOST_LOGPROBS // 100 - 1),
    ({**CHAT, "logprobs": True, "top_logprobs": 1}, "max_tokens", MOST_LOGPROBS // 2),
    ({"sampling_params": {"logprobs": 4}, "token_ids": [1]}, "max_tokens", MOST_LOGPROBS // 5),
    (
        {"input": "x", "include": ["message.output_text.logprobs"], "max_output_tokens": 10},
        "top_logprobs",
        MOST_LOGPROBS // 10 - 1,
    ),
    ({"prompt": "x", "n": 10}, "stop", MOST_STOPS // 10),
    ({"prompt": "x", "stop": "x" * (MOST_STOP_CHARACTERS // 8)}, "n", 8),
    ({"messages": [], "stop_sequences": ["x" * (MOST_STOP_CHARACTERS // 8)]}, "n", 8),
    ({"prompt": [1] * (MOST_RETURNED // 20), "echo": True}, "n", 20),
    ({"prompt": "x", "n": 100, "return_token_ids": True}, "max_tokens", MOST_RETURNED // 100 - 1),
]


def with_field(body, name, value):
    lists = {"logprob_token_ids": [1], "stop": ["x"]}
    return {**body, name: lists[name] * value if name in lists else value}


@pytest.mark.parametrize(("body", "name", "most"), LARGEST)
def test_what_comes_with_answers_is_bounded(body, name, most):
    """Log-probabilities, stop strings, and tokens that are sent back."""
    if most is None:
        check_answers(with_field(body, name, CONTEXT), CONTEXT)
        return
    check_answers(with_field(body, name, most), CONTEXT)
    with pytest.raises(ApiError) as refused:
        check_answers(with_field(body, name, most + 1), CONTEXT)
    assert (refused.value.status, refused.value.code) == (413, "answer_too_large")


@pytest.mark.parametrize(
    "body",
    [
        {**CHAT, "logprobs": True},  # an answer may fill the context
        {**CHAT, "echo": True},
        {**CHAT, "prompt_logprobs": 0},
        {"prompt": "x", "logprobs": -1, "max_tokens": 1},  # the whole vocabulary
    ],
)
def test_what_may_fill_the_context_is_counted_so(body):
    """Where the request names no length."""
    with pytest.raises(ApiError):
        check_answers(body, CONTEXT)


@pytest.mark.parametrize(
    "body",
    [
        CHAT,
        {"prompt": None},
        {"prompt": []},
        {"prompt": "x", "stop": "x"},
        {"prompt": "x", "stop": 5, "logprobs": "all", "max_tokens": "many"},
        {"input": "x", "include": ["reasoning"], "top_logprobs": 5},
    ],
)
def test_what_vllm_judges_is_let_through(body):
    """Plain requests, and fields of a wrong type."""
    check_answers(body, CONTEXT)
