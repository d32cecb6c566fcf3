"""Two machines of one market: whatever is killed, every answer is exact and every account right.

The tests follow each other on the same machines; the last one looks at all that they left.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.engines import words
from tests.support.fleet import BUYERS, FUNDS_NANO, PUBLISHERS, Fleet, running_fleet
from tests.support.serving import PRICE_NANO, cached
from vllm_kvmarket.core.pricing import MTOK
from vllm_kvmarket.ledger import PROVIDER

pytestmark = pytest.mark.long  # minutes, and two engines at once

KVMARKET = ROOT / ".venv" / "bin" / "kvmarket"
LENGTH = 700  # two whole chunks and a short one
FIRST, SECOND, ABANDONED, LAST = (words(9100 + number, LENGTH) for number in range(4))
LONG = 250  # tokens of an answer during which something is killed
# Machines look for changes so seldom that what they know in time was announced to them;
# benchmarks/fleet.py measures how soon.
LOOKED_EVERY_S, PATIENCE_S = 60, 45


@pytest.fixture(scope="module")
def servers(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet").resolve()
    config = {"reservation_timeout_s": 5, "refresh_interval_s": LOOKED_EVERY_S}
    with running_fleet(folder, tiny(1), **config) as running:
        yield running


@pytest.fixture(scope="module")
def fleet(servers):
    return servers[0]


@pytest.fixture(scope="module")
def first(fleet):
    """A document that the first machine has published."""
    return fleet.publish(0, FIRST, "acme")


@pytest.fixture(scope="module")
def second(fleet):
    """One of the second machine."""
    return fleet.publish(1, SECOND, "zenith")


def question(number: int) -> list[int]:
    return words(9200 + number, 9)


def sells(
    fleet: Fleet,
    machine: int,
    prompt: list[int],
    tokens: int = LENGTH,
    *,
    price_nano: int = PRICE_NANO,
    account: str = "alice",
) -> dict[str, Any]:
    """Wait until a machine sells so many tokens of a prompt at this price; its answer then."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        answer = fleet.buy(machine, prompt, account)
        got = answer["reused_tokens"], answer["charge_nano"]
        if got == (tokens, tokens * price_nano):
            return answer
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_machine_sells_what_the_other_published(fleet, first, second):
    """Fetched from the bucket, charged once, with a receipt that both machines show and sign."""
    for machine, prompt in ((1, FIRST + question(0)), (0, SECOND + question(0))):
        answer = sells(fleet, machine, prompt)
        assert answer["loaded_tokens"] == LENGTH
        for asked in (0, 1):
            path = f"/v1/kvmarket/receipts/{answer['receipt_id']}"
            shown = fleet.send(asked, "GET", path, "alice").json()
            assert (shown["charge_nano"], shown["account"]) == (LENGTH * PRICE_NANO, "alice")
            assert shown["signed"]


def test_a_price_that_changes_on_one_machine_holds_on_both(fleet, first):
    """Its publisher may ask either of them; other documents keep theirs."""
    for machine, price_nano in ((1, 300), (0, None)):
        change = {"cache_read_nano_per_mtok": price_nano and price_nano * MTOK}
        path = f"/v1/kvmarket/documents/{first}"
        fleet.send(machine, "PATCH", path, "acme", json=change).raise_for_status()
        for asked in (0, 1):
            price_now_nano = price_nano or PRICE_NANO
            sells(fleet, asked, FIRST + question(1), price_nano=price_now_nano, account="bob")


def test_what_one_machine_delists_the_other_sells_no_more(fleet, first):
    """Until it is published again, by whichever."""
    path = f"/v1/kvmarket/documents/{first}"
    assert fleet.send(1, "DELETE", path, "zenith").status_code == 403
    fleet.send(1, "DELETE", path, "acme").raise_for_status()
    for machine in (0, 1):
        sells(fleet, machine, FIRST + question(2), 0)
    assert fleet.publish(1, FIRST, "acme") == first
    sells(fleet, 0, FIRST + question(2))


def test_an_object_that_is_damaged_is_sold_nowhere_until_it_is_repaired(fleet, second):
    """Found by the machine that fetches it; what lies before it is sold; the other machine repairs
    it, and old copies are not used.
    """
    key = fleet.market.catalogue.get(second).chunk_keys[1]
    objects = fleet.market.store.objects
    (name,) = (each for each in objects.names() if key.hex() in each)
    objects.put_bytes(name, b"nonsense")
    fleet.forget(second)
    answer = fleet.buy(0, SECOND + question(3))
    assert answer["reused_tokens"] == 256
    assert answer["charge_nano"] == 256 * PRICE_NANO
    until(lambda: fleet.document(1, second, "zenith")["state"] == "damaged")
    sells(fleet, 1, SECOND + question(3), 256)
    assert fleet.publish(1, SECOND, "zenith") == second
    for machine in (0, 1):
        sells(fleet, machine, SECOND + question(3))
    fleet.market.store.verify(key)


def test_without_the_bucket_answers_are_computed_and_nobody_pays(servers, fleet, first):
    """What a disk has is sold; afterwards everything is."""
    _, _, seaweed = servers
    fleet.buy(0, FIRST + question(4))  # its disk has it now
    fleet.machines[1].forget(fleet.market.catalogue.get(first).chunk_keys)
    seaweed.kill()
    assert fleet.buy(0, FIRST + question(4))["reused_tokens"] == LENGTH
    for _ in range(2):
        answer = fleet.buy(1, FIRST + question(4))
        assert (answer["reused_tokens"], answer["charge_nano"]) == (0, 0)
    seaweed.start()
    sells(fleet, 1, FIRST + question(4))
    assert fleet.document(0, first)["state"] == "live", "nothing said that it was bad"


def test_without_the_database_answers_go_on_and_what_was_sold_is_booked(servers, fleet, first):
    """PostgreSQL crashes during a sale: the answer is complete, and paid once when it is back."""
    _, postgres, _ = servers
    before, known = fleet.settled("bob"), len(fleet.streamed)
    prompt = FIRST + question(5)
    with fleet.streaming(1, prompt, "bob", LONG) as pieces:
        text = next(pieces)
        postgres.stop(signal.SIGQUIT)
        text += "".join(pieces)
    fleet.remember(prompt, LONG, text)
    assert len(fleet.streamed) == known + 1, "it was sold"
    computed = fleet.ask(0, prompt, is_emptied=False)
    assert cached(computed) == 0
    # Nobody is let in whose key cannot be checked.
    refused = fleet.send(0, "GET", "/v1/kvmarket/receipts", "bob")
    assert refused.status_code == 503, refused.text
    postgres.start()
    until(lambda: fleet.send(1, "GET", "/v1/kvmarket/receipts", "bob").status_code == 200)
    # A buyer with ample funds may be served before the reservation is durable: nothing is pending.
    until(lambda: fleet.settled("bob") > before)
    assert fleet.settled("bob") == before + LENGTH * PRICE_NANO
    for machine in (0, 1):
        sells(fleet, machine, FIRST + question(5))
    document = words(9110, LENGTH)
    fleet.publish(0, document, "acme")
    sells(fleet, 1, document + question(5))


def test_a_machine_that_dies_in_mid_answer_costs_its_buyer_one_price(fleet, first):
    """The client asks the other machine, under the same Idempotency-Key."""
    before = fleet.settled("bob")
    prompt = FIRST + question(6)
    key = {"idempotency-key": "once"}
    with fleet.streaming(0, prompt, "bob", LONG, **key) as pieces:
        next(pieces)
        fleet.machines[0].kill()
    known = len(fleet.streamed)
    with fleet.streaming(1, prompt, "bob", LONG, **key) as pieces:
        fleet.remember(prompt, LONG, "".join(pieces))
    # Not before: a start takes all cores, and who cannot reserve within a second computes.
    fleet.machines[0].start()
    assert len(fleet.streamed) == known + 1, fleet.machines[1].log.read_text()[-3000:]
    fleet.machines[0].wait()
    assert fleet.settled("bob") == before + LENGTH * PRICE_NANO
    sells(fleet, 0, FIRST + question(6))


def test_a_machine_that_dies_while_it_publishes_leaves_nothing_half_on_offer(fleet, first):
    """After the lease of its process, the document can be published on the other machine."""
    body = {"token_ids": ABANDONED, "title": "abandoned"}
    answer = fleet.send(1, "POST", "/v1/kvmarket/documents", "zenith", json=body)
    fleet.machines[1].kill()
    document_id = answer.json()["id"]
    live = [
        each.stored_bytes
        for each in fleet.market.catalogue.listings("live")
        if each.document_id != document_id
    ]
    # For the next test: room for this document, but not for one more.
    fleet.machines[1].start(object_store_quota_bytes=sum(live) + live[0] * 3 // 2)
    assert fleet.publish(0, ABANDONED, "zenith") == document_id
    fleet.machines[1].wait()
    sells(fleet, 1, ABANDONED + question(7))


def test_what_one_machine_evicts_the_other_sells_no_more(fleet, first):
    """The bucket is full for the second machine's new document, so a least useful one goes."""
    catalogue = fleet.market.catalogue
    live = {each.document_id for each in catalogue.listings("live")}
    fleet.publish(1, LAST, "zenith")
    evicted = {each.document_id for each in catalogue.listings("evicted")}
    assert evicted and evicted < live
    for document_id in evicted:
        tokens = catalogue.tokens_of(document_id)
        for machine in (0, 1):
            sells(fleet, machine, tokens + question(8), 0)
    sells(fleet, 0, LAST + question(8))


def test_every_answer_was_exact_and_every_account_equals_its_receipts(fleet, first):
    """Each prompt is computed in full once more, by whichever machine; then the books."""
    for number, ((prompt, max_tokens), texts) in enumerate(fleet.answers.copy().items()):
        full = fleet.ask(number % 2, prompt, max_tokens=max_tokens)
        assert cached(full) == 0
        assert texts == {full["choices"][0]["text"]}

    ledger = fleet.market.ledger
    receipts = {}
    for account in BUYERS:
        paid = fleet.settled(account)
        own = fleet.market.receipts(account)
        receipts |= {each.id: each for each in own}
        assert paid == sum(each.charge_nano for each in own)
        assert ledger.account(account).balance_nano == FUNDS_NANO - paid
    assert len(fleet.receipts) >= 20
    assert fleet.streamed <= receipts.keys()
    assert (
        fleet.receipts.items() <= {key: each.charge_nano for key, each in receipts.items()}.items()
    )
    lines = [line for each in receipts.values() for line in each.all_lines()]
    for publisher in PUBLISHERS:
        royalties = sum(line.royalty_nano for line in lines if line.publisher == publisher)
        assert ledger.account(publisher).balance_nano == royalties > 0
    kept = sum(line.charge_nano - line.royalty_nano for line in lines)
    assert ledger.account(PROVIDER).balance_nano == kept
    assert ledger.check_integrity() == []
    assert fleet.market.catalogue.check_integrity() == []
    for machine in fleet.machines:
        line = [str(KVMARKET), "store", "check", "--json", "--config", json.dumps(machine.config)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
