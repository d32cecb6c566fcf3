"""Bodies with very many errors, and forms that take long to compile, are refused by the gate."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field

from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.api.gate import body_checks
from vllm_kvmarket.api.gate.body_checks import MOST_ERRORS, MOST_FORM_BYTES


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Call(BaseModel):
    name: str
    arguments: str
    id: str


class Message(BaseModel):
    role: str
    content: str | list[Part]


class Body(BaseModel):
    model: str
    messages: list[Message | Call]
    bias: dict[str, float] = Field(default_factory=dict)


PLAIN = {"role": "user", "content": "x"}


def check(**fields):
    """Check a body as the gate does."""
    body = {"model": "m", "messages": [], **fields}
    if body_checks.needs_check(body):
        body_checks.check(Body, json.dumps(body).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [PLAIN] * 1000},
        {"messages": [{"a": 1}] * 3},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 900},
        {"messages": [{"a": 1}] * (MOST_ERRORS // 5)},
        {"bias": {str(number): 1.0 for number in range(4000)}},
        {"bias": {str(number): "x" for number in range(MOST_ERRORS)}},
    ],
    ids=["plain", "few wrong", "right parts", "just few enough", "right values", "wrong values"],
)
def test_a_body_with_few_errors_is_left_to_vllm(fields):
    """Its own messages say more."""
    check(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"a": 1}] * (MOST_ERRORS // 5 + 1)},
        {"messages": [{**PLAIN, "content": [{"a": 1}] * 900}]},
        {"messages": [PLAIN] * 10 + [1] * 600},
        {"bias": {str(number): "x" for number in range(MOST_ERRORS + 1)}},
    ],
    ids=["wrong messages", "wrong parts", "no messages", "wrong values"],
)
def test_a_body_with_very_many_errors_is_refused(fields):
    """Describing them all would stop the event loop."""
    with pytest.raises(ApiError) as refused:
        check(**fields)
    assert refused.value.status == 400


def test_the_type_of_a_body_is_its_routes():
    """Whatever vLLM serves is known by its path."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(body: Body) -> int:
        return len(body.messages)

    assert body_checks.body_type(app, "/v1/chat/completions", {}) is Body
    assert body_checks.body_type(app, "/invocations", {"messages": []}) is Body
    assert body_checks.body_type(app, "/elsewhere", {}) is None


SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string"}}}
LONG = {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * MOST_FORM_BYTES]}}}


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ({"response_format": SCHEMA}, False),
        ({"structured_outputs": {"regex": "[a-z]{1,100}-[0-9]{4}"}}, False),
        ({"tools": [{"function": {"parameters": {"pattern": "a" * MOST_FORM_BYTES}}}]}, False),
        ({"response_format": LONG}, True),
        ({"sampling_params": {"structured_outputs": {"regex": "a" * MOST_FORM_BYTES}}}, True),
        ({"structured_outputs": {"regex": "a{1,1001}"}}, True),
        ({"structured_outputs": {"regex": "a{1001,}"}}, True),
        ({"structured_outputs": {"regex": "(a{1,50}b){30}" * 20}}, True),
        ({"tools": [{"function": {"parameters": {"pattern": "a{1,5000}"}}}]}, True),
    ],
)
def test_forms_that_take_long_to_compile_are_refused(body, refused):
    """One JSON schema with a pattern of 5,000 repetitions took more than a second."""
    if not refused:
        body_checks.check_forms(body)
        return
    with pytest.raises(ApiError) as error:
        body_checks.check_forms(body)
    assert (error.value.status, error.value.code) == (413, "form_too_long")
