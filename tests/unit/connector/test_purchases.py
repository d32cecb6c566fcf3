"""Who shares a purchase: samples and retries, and nobody else; on a real market, without an
engine.
"""

from __future__ import annotations

from types import SimpleNamespace
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_kvmarket import Market
from vllm_kvmarket.catalogue import Listing, Match, Segment
from vllm_kvmarket.connector.purchases import Purchases
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.market.purchase import PurchaseState, Usage

NANO = 1_000_000_000
PROMPT = list(range(700))


@pytest.fixture
def market(tmp_path):
    with Market.open(tmp_path) as opened:
        for account in ("alice", "bob"):
            opened.create_account(account)
            opened.deposit(account, NANO, f"for {account}")
        opened.create_account("pat", "publisher")
        yield opened


class Clock:
    """A clock that the test sets."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def purchases(market, clock):
    return Purchases(market, "engine", "model", clock)


def matching(count=600, document_id="kvd_x"):
    listing = Listing(
        document_id=document_id,
        namespace=b"n" * 32,
        token_count=count,
        terms=ListingTerms(publisher="pat"),
        created_at_s=1.0,
    )
    return Match((Segment(listing, 0, count),), count, ())


def request(request_id, arrival_time=1.0, prompt=PROMPT):
    return SimpleNamespace(
        request_id=request_id, arrival_time=arrival_time, prompt_token_ids=list(prompt)
    )


def used(reused=600, output=5):
    return Usage(
        matched=600,
        reused=reused,
        loaded=reused,
        from_paged_cache=0,
        failed=600 - reused,
        computed=700 - reused,
        output=output,
    )


def reserved(joined):
    """Wait for the ledger's answer."""
    purchase, _ = joined
    while purchase.state() is PurchaseState.RESERVING:
        pass
    return purchase


def bought(purchases, asking, usage, account="alice", match=None):
    """One request from its arrival to its end."""
    reserved(purchases.join(asking, account, match or matching()))
    return purchases.leave(asking.request_id, usage)


def spent(market, account="alice"):
    """Nano-units booked, when everything is written; nothing may be reserved any more."""
    market.ledger.submit([]).result()
    found = market.ledger.account(account)
    assert found.debits_pending == 0
    assert market.ledger.check_integrity() == []
    return found.debits_posted


def test_samples_pay_once_for_what_none_of_them_computed(market, purchases):
    """The last one to end books it, with the tokens of all; each answer names the receipt."""
    names = [f"{index}_x-0123abcd" for index in range(3)]
    bundle = {reserved(purchases.join(request(name), "alice", matching())) for name in names}
    assert len(bundle) == 1
    first = purchases.leave(names[1], used(600))
    assert first.charge_nano == 600 * 500, "so far"
    assert market.receipts() == []
    assert purchases.leave(names[0], None) == first, "this one was aborted"
    last = purchases.leave(names[2], used(256, output=7))
    receipt = market.receipt(last.receipt_id)
    assert first.receipt_id == last.receipt_id == receipt.id
    assert (receipt.charge_nano, receipt.tokens_output) == (256 * 500, 12)
    assert (receipt.tokens_computed, receipt.tokens_failed) == (444, 344)
    assert receipt.request_id == "x"
    assert spent(market) == 256 * 500


def test_a_number_in_front_of_a_clients_own_id_is_no_sample(market, purchases):
    """`0_x` and `1_x` that arrived at different times are two requests, whatever they look like."""
    one, other = request("0_x", 1.0), request("1_x", 2.0)
    first = purchases.join(one, "alice", matching())
    second = purchases.join(other, "alice", matching())
    assert first[0] is not second[0]
    for each, joined in ((one, first), (other, second)):
        reserved(joined)
        charge = purchases.leave(each.request_id, used())
        assert market.receipt(charge.receipt_id).request_id == each.request_id
    assert spent(market) == 2 * 600 * 500


def test_the_same_id_for_another_account_prompt_or_document_is_another_request(market, purchases):
    """A client that always sends one id, or somebody else's, pays for each of its requests."""
    bought(purchases, request("x-0000000a"), used())
    bought(purchases, request("x-0000000b"), used(), account="bob")
    bought(purchases, request("x-0000000c", prompt=[*PROMPT, 1]), used())
    bought(purchases, request("x-0000000d"), used(), match=matching(document_id="kvd_y"))
    bought(purchases, request("x-0000000e"), used(500), match=matching(count=500))
    assert spent(market) == (3 * 600 + 500) * 500
    assert spent(market, "bob") == 600 * 500
    assert len(market.receipts()) == 5


def test_a_retry_is_not_paid_again_after_its_answer_or_beside_it(market, purchases):
    """The same account, id and prompt: one charge, one receipt, which every answer names."""
    one = bought(purchases, request("x-0000000a", 1.0), used())
    assert bought(purchases, request("x-0000000b", 2.0), used()) == one
    reserved(purchases.join(request("y-0000000a", 3.0), "alice", matching()))
    reserved(purchases.join(request("y-0000000b", 4.0), "alice", matching()))
    ahead = purchases.leave("y-0000000a", used())
    assert purchases.leave("y-0000000b", used()) == ahead
    assert ahead.receipt_id != one.receipt_id
    assert spent(market) == 2 * 600 * 500
    assert len(market.receipts()) == 2


def test_a_retry_of_several_samples_is_one_retry(market, purchases):
    """Its samples find the purchase too, though only the first one has the id in its books."""
    for suffix, arrived_s in (("0000000a", 1.0), ("0000000b", 2.0)):
        names = [f"{index}_x-{suffix}" for index in range(2)]
        for name in names:
            reserved(purchases.join(request(name, arrived_s), "alice", matching()))
        for name in names:
            purchases.leave(name, used())
    assert spent(market) == 600 * 500
    assert [receipt.request_id for receipt in market.receipts()] == ["x"]


def test_a_sample_that_arrives_after_the_others_end_pays_nothing_more(market, purchases):
    """It belongs to what was paid."""
    one = bought(purchases, request("0_x-0123abcd"), used())
    assert bought(purchases, request("1_x-0123abcd"), used()) == one
    assert spent(market) == 600 * 500


@pytest.mark.parametrize("usage", [None, used(0)])
def test_a_retry_of_what_was_not_paid_is_a_purchase_of_its_own(market, purchases, usage):
    """No answer, or all of it computed, was voided: the retry is reserved again, and paid."""
    assert bought(purchases, request("x-0000000a"), usage) is None
    charge = bought(purchases, request("x-0000000b", 2.0), used())
    assert market.receipt(charge.receipt_id).charge_nano == spent(market) == 600 * 500


def test_a_retry_after_a_deposit_is_not_refused_for_the_first_times_sake(market, purchases):
    """The ledger is asked again."""
    market.create_account("carol")
    refused = purchases.join(request("x-0000000a"), "carol", matching())
    assert reserved(refused).state() is PurchaseState.REFUSED
    assert purchases.leave("x-0000000a", None) is None
    market.deposit("carol", NANO, "now")
    assert bought(purchases, request("x-0000000b", 2.0), used(), account="carol")
    assert spent(market, "carol") == 600 * 500


def test_a_retry_is_known_for_as_long_as_a_reservation_lives(market, purchases, clock):
    """Nobody reuses for nothing for longer than that, however often an id is sent."""
    bought(purchases, request("x-0000000a"), used())
    clock.now_s += market.config.reservation_timeout_s
    bought(purchases, request("x-0000000b", 2.0), used())
    assert spent(market) == 600 * 500
    clock.now_s += 1
    bought(purchases, request("x-0000000c", 3.0), used())
    assert spent(market) == 2 * 600 * 500


def test_what_is_remembered_is_bounded(market, purchases, monkeypatch):
    """By number, whatever the clock says."""
    monkeypatch.setattr("vllm_kvmarket.connector.purchases.MAX_REMEMBERED", 20)
    for number in range(30):
        purchases.join(request(f"{number}", prompt=[number] * 64), "alice", matching(64))
        purchases.leave(f"{number}", used(1))
    assert len(purchases._recent) <= 20
    assert len(purchases._by_samples) <= 20
    assert purchases._by_request == {}


def test_what_is_under_way_is_held_once_and_nothing_else(purchases):
    """Only these reservations are renewed."""
    reserved(purchases.join(request("0_x-0123abcd"), "alice", matching()))
    purchase = reserved(purchases.join(request("1_x-0123abcd"), "alice", matching()))
    assert purchases.held() == [purchase.reservation_id]
    purchases.leave("0_x-0123abcd", used())
    assert purchases.held() == [purchase.reservation_id]
    purchases.leave("1_x-0123abcd", used())
    assert purchases.held() == []


def test_an_engine_that_ends_settles_what_was_answered_and_releases_the_rest(market, purchases):
    """One sample of the first request has its answer; the second request has none."""
    reserved(purchases.join(request("0_x-0123abcd"), "alice", matching()))
    reserved(purchases.join(request("1_x-0123abcd"), "alice", matching()))
    purchases.leave("0_x-0123abcd", used())
    reserved(purchases.join(request("y", 2.0), "alice", matching()))
    purchases.close()
    assert spent(market) == 600 * 500
    assert len(market.receipts()) == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "answer", "abort"]),
        st.integers(0, 3),  # which of the client's ids
        st.integers(0, 2),  # which attempt
        st.integers(0, 2),  # which sample
        st.integers(0, 600),
    ),
    max_size=30,
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
@given(steps=STEPS)
def test_whatever_the_order_each_id_pays_once_for_what_it_did_not_compute(market, steps):
    """Against a model: a client's id pays for the answer that reused least while it was under way,
    and nothing for a retry once it has paid.
    """
    before = spent(market)
    # The market outlives the example: a second engine of one name would meet the first one's ids.
    purchases = Purchases(market, f"engine-{uuid4().hex}", "model", Clock())
    under_way: dict[str, int] = {}
    least: dict[int, int] = {}
    paid: dict[int, int] = {}
    for what, client, attempt, sample, reused in steps:
        name = f"{sample}_c{client}-0000000{attempt}"
        # All samples of an attempt begin with sample 0, as vLLM's do.
        if what == "join" and name not in under_way:
            started = any(n.endswith(f"_c{client}-0000000{attempt}") for n in under_way)
            if sample and not started:
                continue
            reserved(purchases.join(request(name, float(attempt)), "alice", matching()))
            under_way[name] = client
        elif what != "join" and name in under_way:
            purchases.leave(name, used(reused) if what == "answer" else None)
            del under_way[name]
            if what == "answer":
                least[client] = min(least.get(client, 600), reused)
            if client not in under_way.values():
                paid.setdefault(client, least.pop(client, 0))
                least.pop(client, None)
                if not paid[client]:
                    del paid[client]
    purchases.close()
    for client, reused in least.items():
        paid.setdefault(client, reused)
    assert spent(market) - before == sum(paid.values()) * 500
