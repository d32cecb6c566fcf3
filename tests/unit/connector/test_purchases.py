"""Samples and retries share a purchase, and nobody else does; on a real market, without an
engine.
"""

from __future__ import annotations

from threading import Event
from types import SimpleNamespace
from uuid import uuid4

import apsw
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


@pytest.fixture
def purchases(market):
    return Purchases(market, "engine", "model")


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
    purchase, *_ = joined
    while purchase.state() is PurchaseState.RESERVING:
        pass
    return purchase


def bought(purchases, asking, usage, *, account="alice", match=None, key=None):
    """One request from its arrival to its end."""
    reserved(purchases.join(asking, account, match or matching(), key))
    return purchases.leave(asking, usage)


def spent(market, account="alice"):
    """Nano-units booked, when everything is written; nothing may be reserved any more."""
    market.ledger.submit([]).result()
    found = market.ledger.account(account)
    assert found.debits_pending == 0
    assert market.ledger.check_integrity() == []
    return found.debits_posted


def test_samples_pay_once_for_the_most_that_any_reused(market, purchases):
    """The last one to end books it, with the output of all; each answer names the receipt."""
    names = [f"{index}_x-0123abcd" for index in range(3)]
    bundle = {reserved(purchases.join(request(name), "alice", matching())) for name in names}
    assert len(bundle) == 1
    first = purchases.leave(request(names[1]), used(256))
    assert first.charge_nano == 256 * 500, "so far"
    assert market.receipts() == []
    assert purchases.leave(request(names[0]), None) == first, "this one was aborted"
    last = purchases.leave(request(names[2]), used(600, output=7))
    receipt = market.receipt(last.receipt_id)
    assert first.receipt_id == last.receipt_id == receipt.id
    assert (receipt.charge_nano, receipt.tokens_output) == (600 * 500, 12)
    assert (receipt.tokens_computed, receipt.tokens_failed) == (100, 0)
    assert receipt.request_id == "x"
    assert spent(market) == 600 * 500


def test_a_sample_that_reused_nothing_does_not_make_the_others_free(market, purchases):
    """Nor does a second request of the same id that computes everything: it is another purchase."""
    names = [f"{index}_x-0123abcd" for index in range(2)]
    for name in names:
        reserved(purchases.join(request(name), "alice", matching()))
    assert purchases.leave(request(names[0]), used(0)) is None
    charge = purchases.leave(request(names[1]), used())
    assert market.receipt(charge.receipt_id).charge_nano == 600 * 500
    one, other = request("y-0000000a", 2.0), request("y-0000000b", 3.0)
    for each in (one, other):
        reserved(purchases.join(each, "alice", matching()))
    charge = purchases.leave(one, used())
    assert purchases.leave(other, used(0)) is None
    assert market.receipt(charge.receipt_id).charge_nano == 600 * 500
    assert spent(market) == 2 * 600 * 500


def test_a_number_in_front_of_a_clients_own_id_is_no_sample(market, purchases):
    """`0_x` and `1_x` that arrived at different times are two requests, whatever they look like."""
    one, other = request("0_x", 1.0), request("1_x", 2.0)
    first = purchases.join(one, "alice", matching())
    second = purchases.join(other, "alice", matching())
    assert first[0] is not second[0]
    for each, joined in ((one, first), (other, second)):
        reserved(joined)
        charge = purchases.leave(each, used())
        assert market.receipt(charge.receipt_id).request_id == each.request_id
    assert spent(market) == 2 * 600 * 500


def test_the_same_id_again_is_another_request(market, purchases):
    """An id that a client chooses means nothing for money: it pays for each of its requests."""
    for number in range(3):
        bought(purchases, request(f"x-0000000{number}", float(number)), used())
    assert spent(market) == 3 * 600 * 500
    assert len(market.receipts()) == 3


def test_samples_of_another_prompt_share_nothing(market, purchases):
    """One prompt's blocks would be wrong for the other."""
    one = purchases.join(request("0_x"), "alice", matching())
    other = purchases.join(request("1_x", prompt=[*PROMPT, 1]), "alice", matching())
    assert one[0] is not other[0]


def test_a_request_that_is_repeated_with_its_key_is_paid_once_on_all_engines(market, purchases):
    """After its answer or beside it; all answers name one receipt, and the first one its price."""
    elsewhere = Purchases(market, "another engine", "model")
    one = bought(purchases, request("x-0000000a", 1.0), used(), key="k")
    again = bought(elsewhere, request("z-0000000b", 2.0), used(), key="k")
    assert (again.receipt_id, again.charge_nano) == (one.receipt_id, 0)
    ahead, behind = request("y-0000000a", 3.0), request("y-0000000b", 4.0)
    reserved(purchases.join(ahead, "alice", matching(), "k2"))
    reserved(elsewhere.join(behind, "alice", matching(), "k2"))
    paid = purchases.leave(ahead, used())
    assert elsewhere.leave(behind, used(500)).receipt_id == paid.receipt_id != one.receipt_id
    assert spent(market) == 2 * 600 * 500
    assert len(market.receipts()) == 2


def test_samples_on_two_engines_share_a_key(market, purchases):
    """As under data parallelism, where each sample may run on another rank."""
    elsewhere = Purchases(market, "another engine", "model")
    for number, engine in enumerate((purchases, elsewhere)):
        bought(engine, request(f"{number}_x-0123abcd"), used(), key="k")
    assert spent(market) == 600 * 500


def test_a_key_covers_one_prompt_of_one_account_whatever_its_price_is_now(market, purchases):
    """Also where one request has several prompts, and where two of them are equal. A retry is paid
    for, also where the catalogue has changed since.
    """
    bought(purchases, request("cmpl-x-0-0000000a"), used(), key="k")
    bought(purchases, request("cmpl-x-1-0000000a"), used(), key="k")
    bought(purchases, request("cmpl-y-1-0000000a", 2.0), used(), key="k")
    assert spent(market) == 2 * 600 * 500, "the third repeats the second"
    bought(purchases, request("x-0000000b"), used(), account="bob", key="k")
    assert spent(market, "bob") == 600 * 500
    bought(purchases, request("x-0000000c", prompt=[*PROMPT, 1]), used(), key="k")
    bought(purchases, request("x-0000000d"), used(), match=matching(document_id="kvd_y"), key="k")
    bought(purchases, request("x-0000000e"), used(500), match=matching(count=500), key="k")
    bought(purchases, request("x-0000000f"), used(), key="k")
    assert spent(market) == 4 * 600 * 500


def test_a_retry_at_other_terms_beside_its_first_request_is_not_sold(market, purchases):
    """The hold is for another amount; what the first one used is charged once."""
    first, retry = request("x-0000000a", 1.0), request("y-0000000b", 2.0)
    reserved(purchases.join(first, "alice", matching(count=500), "k"))
    assert reserved(purchases.join(retry, "alice", matching(), "k")).state() is (
        PurchaseState.REFUSED
    )
    purchases.leave(retry, None)
    purchases.leave(first, used(500))
    assert spent(market) == 500 * 500


def test_the_last_token_of_a_prompt_is_not_reserved(market, purchases):
    """It is always computed: funds for the quoted price are enough."""
    whole = request("x-0000000a", prompt=PROMPT[:600])
    purchase = reserved(purchases.join(whole, "alice", matching()))
    assert purchase.item.most_nano == 599 * 500
    purchases.leave(whole, None)


def test_a_key_is_no_free_ride_for_who_leaves_before_the_answer(market, purchases):
    """The hold stays for the repetition, which is charged; so is one beside it."""
    asking = request("x-0000000a")
    reserved(purchases.join(asking, "alice", matching(), "k"))
    beside = request("x-0000000b", 2.0)
    reserved(purchases.join(beside, "alice", matching(), "k"))
    assert purchases.leave(asking, None) is None
    market.ledger.submit([]).result()
    assert market.ledger.account("alice").debits_pending == 600 * 500
    charge = purchases.leave(beside, used())
    assert market.receipt(charge.receipt_id).charge_nano == 600 * 500
    again = bought(purchases, request("x-0000000c", 3.0), used(), key="k")
    assert again.receipt_id == charge.receipt_id
    assert spent(market) == 600 * 500


def test_a_repetition_that_gives_up_leaves_the_first_requests_hold(market, purchases, monkeypatch):
    """The database was slow for the second of two requests with one key: the first one pays."""
    first, second = request("a-0000000a", 1.0), request("b-0000000b", 2.0)
    reserved(purchases.join(first, "alice", matching(), "key"))
    write, let_go = market.ledger._storage.write, Event()
    monkeypatch.setattr(market.ledger, "_reservation_patience_s", 0.1)
    monkeypatch.setattr(
        market.ledger._storage, "write", lambda group: let_go.wait(10) and write(group)
    )
    given_up = reserved(purchases.join(second, "alice", matching(), "key"))
    assert given_up.refusal_reason == "ledger_unavailable"
    let_go.set()
    assert purchases.leave(second, used(0)) is None
    assert purchases.leave(first, used()).charge_nano == 600 * 500
    assert spent(market) == 600 * 500


def test_a_sample_that_arrives_after_the_others_end_pays_nothing_more(market, purchases):
    """It belongs to what was paid."""
    one = bought(purchases, request("0_x-0123abcd"), used())
    again = bought(purchases, request("1_x-0123abcd"), used())
    assert again.receipt_id == one.receipt_id
    assert spent(market) == 600 * 500


@pytest.mark.parametrize("usage", [None, used(0)])
def test_what_was_not_paid_is_reserved_and_paid_when_it_comes_again(market, purchases, usage):
    """No answer, or all of it computed, was voided."""
    assert bought(purchases, request("x-0000000a"), usage) is None
    charge = bought(purchases, request("x-0000000a"), used())
    assert market.receipt(charge.receipt_id).charge_nano == spent(market) == 600 * 500


def test_an_answer_that_reused_nothing_releases_the_hold_of_its_key(market, purchases):
    """Funds are not locked for what cannot be charged any more; a repetition is reserved anew."""
    assert bought(purchases, request("x-0000000a"), used(0), key="k") is None
    assert spent(market) == 0
    charge = bought(purchases, request("x-0000000b", 2.0), used(), key="k")
    assert market.receipt(charge.receipt_id).charge_nano == spent(market) == 600 * 500


def test_a_repetition_after_a_deposit_is_not_refused_for_the_first_times_sake(market, purchases):
    """The ledger is asked again."""
    market.create_account("carol")
    refused = request("x-0000000a")
    purchase = reserved(purchases.join(refused, "carol", matching(), "k"))
    assert purchase.state() is PurchaseState.REFUSED
    assert purchases.leave(refused, None) is None
    market.deposit("carol", NANO, "now")
    assert bought(purchases, request("x-0000000b", 2.0), used(), account="carol", key="k")
    assert spent(market, "carol") == 600 * 500


def test_nothing_is_remembered_of_requests_that_ended(market, purchases):
    """The ledger knows what was paid."""
    for number in range(30):
        bought(purchases, request(f"{number}", prompt=[number] * 64), used(1), match=matching(64))
    assert purchases._by_samples == purchases._by_request == {}


def test_a_session_whose_input_goes_on_is_forgotten_too(market, purchases):
    """vLLM gives it another time of arrival, and its prompt grows."""
    session = request("x-0123abcd")
    reserved(purchases.join(session, "alice", matching()))
    session.arrival_time = 2.0
    session.prompt_token_ids.append(1)
    assert purchases.leave(session, used())
    assert purchases._by_samples == purchases._by_request == {}
    assert spent(market) == 600 * 500


def test_what_is_under_way_is_held_once_and_nothing_else(purchases):
    """Only these reservations are renewed."""
    reserved(purchases.join(request("0_x-0123abcd"), "alice", matching()))
    purchase = reserved(purchases.join(request("1_x-0123abcd"), "alice", matching()))
    assert purchases.held() == [purchase.reservation_id]
    purchases.leave(request("0_x-0123abcd"), used())
    assert purchases.held() == [purchase.reservation_id]
    purchases.leave(request("1_x-0123abcd"), used())
    assert purchases.held() == []


def test_an_engine_that_ends_settles_what_was_answered_and_releases_the_rest(market, purchases):
    """One sample of the first request has its answer; the second request has none."""
    reserved(purchases.join(request("0_x-0123abcd"), "alice", matching()))
    reserved(purchases.join(request("1_x-0123abcd"), "alice", matching()))
    purchases.leave(request("0_x-0123abcd"), used())
    reserved(purchases.join(request("y", 2.0), "alice", matching()))
    purchases.close()
    assert spent(market) == 600 * 500
    assert len(market.receipts()) == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "answer", "abort"]),
        st.integers(0, 3),  # which request
        st.integers(0, 2),  # which sample
        st.integers(0, 600),
    ),
    max_size=30,
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
@given(steps=STEPS)
def test_whatever_the_order_each_request_pays_once_for_its_best_answer(market, steps):
    """Against a model: samples that run together pay once, for the answer that reused most."""
    before = spent(market)
    # The market outlives the example: a second engine of one name would meet the first one's ids.
    purchases = Purchases(market, f"engine-{uuid4().hex}", "model")
    under_way: dict[str, int] = {}
    most: dict[int, int] = {}
    paid: dict[int, int] = {}
    for what, number, sample, reused in steps:
        name = f"{sample}_c{number}-0000000a"
        if what == "join" and name not in under_way:
            reserved(purchases.join(request(name, float(number)), "alice", matching()))
            under_way[name] = number
        elif what != "join" and name in under_way:
            asking = request(name, float(number))
            purchases.leave(asking, used(reused) if what == "answer" else None)
            del under_way[name]
            if what == "answer":
                most[number] = max(most.get(number, 0), reused)
            if number not in under_way.values() and (best := most.pop(number, 0)):
                paid.setdefault(number, best)
    purchases.close()
    for number, best in most.items():
        paid.setdefault(number, best)
    assert spent(market) - before == sum(paid.values()) * 500


def test_a_request_under_a_key_never_goes_ahead_of_its_hold(market, purchases):
    """Another engine may have been paid for it; without a key, known funds are enough."""
    blocker = apsw.Connection(str(market.home / "market.sqlite"))
    blocker.execute("BEGIN IMMEDIATE")
    states = [
        purchases.join(request(name), "alice", matching(), key, may_go_ahead=ahead)[0].state()
        for name, key, ahead in (("a", None, True), ("b", "key", True), ("c", None, False))
    ]
    assert states == [PurchaseState.RESERVED, PurchaseState.RESERVING, PurchaseState.RESERVING]
    assert purchases.held() == []
    charge = purchases.leave(request("a"), used())
    blocker.execute("ROLLBACK")
    blocker.close()
    assert market.receipt(charge.receipt_id).charge_nano == 600 * 500
    for name in "bc":
        purchases.leave(request(name), used())
    assert spent(market) == 3 * 600 * 500
