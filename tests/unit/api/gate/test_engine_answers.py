"""What a key's budget gets back after an answer, without an engine."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from vllm_kvmarket.api.gate.engine_answers import MarketResponse, watch

SOLD = {"receipt_id": "kvr_1", "charge_nano": 30}


def outputs(*answers, fails=False):
    """vLLM's outputs of one answer: each with the market's part or None, the last finished."""

    async def generate():
        for number, answer in enumerate(answers):
            yield SimpleNamespace(
                kv_transfer_params=answer and {"kvmarket": answer},
                finished=number == len(answers) - 1,
            )
        if fails:
            raise ValueError("the engine cannot do this")

    return generate


def refunded(generate, *, most=None):
    """What a budget that was charged 100 gets back; the client reads at most `most` outputs."""
    client = SimpleNamespace(generate=generate)
    watch(client)
    refunds = []

    async def app(scope, receive, send):
        number = 0
        # Suspended where the client left it, as a task that was cancelled leaves it.
        kept.append(client.generate())
        async for _ in kept[-1]:
            number += 1
            if number == most:
                raise asyncio.CancelledError

    async def run():
        keys = SimpleNamespace(refund=lambda _, amount: refunds.append(amount))
        request = SimpleNamespace(spent_nano=100, caller=SimpleNamespace(key_id="key_1"))
        service = SimpleNamespace(keys=keys)
        response = MarketResponse({}, None, None, service, request)
        await response.follow(app, {}, None)

    kept = []
    with contextlib.suppress(asyncio.CancelledError, ValueError):
        asyncio.run(run())
    return sum(refunds)


@pytest.mark.parametrize(
    ("generate", "most", "back"),
    [
        (outputs(None, SOLD), None, 70),
        (outputs(None, {"receipt_id": None}), None, 100),
        (outputs({"error": {}}), None, 100),
        (outputs(fails=True), None, 100),
        (outputs(None, None), None, 0),  # a stop string, which the engine does not see
        (outputs(None, None, SOLD), 2, 0),  # the client left the stream before its end
    ],
)
def test_a_budget_gets_back_only_what_is_known_not_to_be_charged(generate, most, back):
    """Who stops reading, or ends the answer by a stop string, is charged: so is the budget."""
    assert refunded(generate, most=most) == back
