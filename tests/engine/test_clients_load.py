"""Two accounts at once under load: afterwards the money adds up, to the nano-unit."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter

import httpx

from tests.engine.test_gate_http import events_of
from tests.support.engines import words
from tests.support.serving import DOCUMENT, MODEL, PRICE_NANO, cached, sold

pytest_plugins = ("tests.support.gate_server", "tests.support.clients_server")

REQUESTS = 96
AT_ONCE = 12
KINDS = ("whole", "stream", "samples", "dropped stream", "dropped answer", "computed")


def body_of(kind, index):
    """A request; each asks something else, so that nothing but the document is reused."""
    body = {
        "model": MODEL,
        "prompt": DOCUMENT + words(9000 + index, 9),
        "max_tokens": 3,
        "ignore_eos": True,
        "stream": kind in ("stream", "dropped stream"),
        "stream_options": {"include_usage": True} if kind == "stream" else None,
    }
    if kind == "samples":
        body |= {"n": 2, "temperature": 1}
    if kind.startswith("dropped"):
        body["max_tokens"] = 2000
    if kind == "computed":
        body["kvmarket"] = {"reuse": "never"}
    return body


async def ask(client, kind, index):
    """Send one request; tokens that its usage says were reused, and what it says it cost. None for
    the answers that clients missed because they left.
    """
    body = body_of(kind, index)
    if kind == "dropped stream":
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            await anext(response.aiter_raw())
        return None
    if kind == "dropped answer":
        with_patience = client.post("/v1/completions", json=body, timeout=1.5)
        try:
            await with_patience
        except httpx.ReadTimeout:
            return None
        raise AssertionError("2000 tokens came in no time")
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if kind != "stream":
        answer = response.json()
        return cached(answer), sold(answer)["charge_nano"]
    events = [(event, json.loads(data)) for event, data in events_of(response) if data != "[DONE]"]
    (usage,) = [data["usage"] for event, data in events if event is None and data.get("usage")]
    # The last event waits a moment only for a receipt that is not on the disk yet.
    (receipt_id,) = events[-1][1]["receipt_ids"]
    receipt = (await client.get(f"/v1/kvmarket/receipts/{receipt_id}")).json()
    for told in events[-1][1]["receipts"]:
        assert (told["id"], told["charge_nano"]) == (receipt["id"], receipt["charge_nano"])
    return usage["prompt_tokens_details"]["cached_tokens"], receipt["charge_nano"]


async def load(base, keys, plan):
    """Send a plan's requests, so many at once; returns each one's answer."""
    free = asyncio.Semaphore(AT_ONCE)

    async def one(clients, index, name, kind):
        async with free:
            return name, kind, await ask(clients[name], kind, index)

    clients = {
        name: httpx.AsyncClient(
            base_url=base, headers={"authorization": f"Bearer {key}"}, timeout=120
        )
        for name, key in keys.items()
    }
    try:
        return await asyncio.gather(
            *(one(clients, index, *each) for index, each in enumerate(plan))
        )
    finally:
        for client in clients.values():
            await client.aclose()


def test_under_load_charges_are_receipts_are_reused_tokens(shop, ann, ben, tokens_on_offer):
    """Whole answers, streams, samples, clients that leave, prompts that are not to be reused: what
    clients got, the receipts, and the ledger's transfers say the same, and no hold is left.
    """
    keys = {"ann": ann, "ben": ben}
    before = {name: shop.spent(name) for name in keys}
    known = {each.id for name in keys for each in shop.market.receipts(name)}
    plan = [(name, KINDS[number % len(KINDS)]) for name in keys for number in range(REQUESTS // 2)]
    random.Random(20261124).shuffle(plan)
    answers_of = asyncio.run(load(shop.base, keys, plan))
    assert Counter(kind for _, kind, _ in answers_of) == dict.fromkeys(
        KINDS, REQUESTS // len(KINDS)
    )
    for name in keys:
        spent = shop.spent(name) - before[name]
        receipts = [each for each in shop.market.receipts(name) if each.id not in known]
        assert spent == sum(each.charge_nano for each in receipts)
        assert spent == sum(each.tokens_reused for each in receipts) * PRICE_NANO
        assert {each.tokens_reused for each in receipts} == {600}
        answers = [
            (kind, each) for who, kind, each in answers_of if who == name and each is not None
        ]
        for kind, (tokens, charge) in answers:
            if kind == "computed":  # at most vLLM's hit on what the account computed before
                assert (charge, tokens) in ((0, 0), (0, 512))
            else:
                assert tokens * PRICE_NANO == charge == 300_000, kind
        # A stream that was left has cost; an answer that was never sent has not.
        left = sum(who == name and kind == "dropped stream" for who, kind, _ in answers_of)
        assert spent == sum(charge for _, (_, charge) in answers) + left * 300_000
        assert shop.market.ledger.account(name).debits_pending == 0
    accounts = shop.market.ledger.accounts()
    assert sum(each.balance_nano for each in accounts) == 0
    assert shop.market.ledger.check_integrity() == []
