"""The money pages: one's own account, its receipts, and their proof."""

from __future__ import annotations

import html
import re

import pytest

from tests.support.api_server import publish, running, text_of
from tests.support.page_visitor import Visitor, sell, text_in
from tests.support.purchases import reserve
from vllm_kvmarket.api.pages import money_pages
from vllm_kvmarket.auth.signing_keys import SigningKeys
from vllm_kvmarket.core.pricing import format_nano
from vllm_kvmarket.ledger import PROVIDER
from vllm_kvmarket.proofs import verify

TEXT = text_of(600)


@pytest.fixture
def server(tmp_path):
    with running(tmp_path) as served:
        publish(served, title="The Licence", text=TEXT)
        yield served


def visitor_of(server, name):
    visitor = Visitor(server.app)
    assert visitor.sign_in(server.keys[name]).status_code == 303
    return visitor


def receipt_links(page):
    table = re.search(r'<table id="receipts">.*?</table>', page.text, re.DOTALL)
    links = re.findall(r'href="/kvmarket(/money/receipt[^"]*)"', table[0]) if table else []
    return [html.unescape(link) for link in links]


def test_an_account_sees_its_money(server):
    """Balance, holds and what is left are the ledger's; a hold that stands is listed."""
    sell(server, TEXT)
    match = server.market.match(server.engine.namespace, server.engine.prompt(TEXT, None))
    open_one = reserve(
        server.market, key="k2", request_id="r2", account="bea", match=match, model="words"
    )
    open_one._reservation.result()
    page = visitor_of(server, "bea").get("/money")
    account = server.market.ledger.account("bea")
    assert account.debits_pending > 0
    assert text_in(page, "balance").split()[0] == format_nano(account.balance_nano)
    assert text_in(page, "available").split()[0] == format_nano(account.available_nano)
    holds = re.search(r'<table id="holds">.*?</table>', page.text, re.DOTALL)[0]
    assert holds.count("<tr>") == 2 and format_nano(account.debits_pending) in holds


def test_a_receipt_is_shown_and_verified(server):
    """Its signature and its place in the log are checked; the command to do so is there."""
    sold = sell(server, TEXT)
    visitor = visitor_of(server, "bea")
    (link,) = receipt_links(visitor.get("/money"))
    page = visitor.get(link)
    assert page.status_code == 200 and "The signature is valid" in text_in(page, "verified")
    assert format_nano(sold.charge_nano) in page.text
    assert re.search(r"kvmarket receipt verify \S+\.jws --jwks provider\.jwks", page.text)


def test_the_signed_receipt_is_a_file_that_verifies(server):
    """The download holds under the keys that the page gives, and says what was charged."""
    sold = sell(server, TEXT)
    visitor = visitor_of(server, "bea")
    answer = visitor.get("/money/receipt.jws", id=sold.id)
    assert answer.headers["content-disposition"].startswith("attachment")
    checked = verify(answer.text.strip(), SigningKeys(server.market.home).public_keys())
    assert checked.payload.kvmarket.receipt.charge_nano == sold.charge_nano
    reply = Visitor(server.app).get("/keys.jwks").json()
    assert [key["kid"] for key in reply["keys"]] == [checked.kid]


def test_a_receipt_that_does_not_hold_is_called_so(server, monkeypatch):
    """Keys that did not sign it give a warning, not a good mark."""
    sold = sell(server, TEXT)
    visitor = visitor_of(server, "bea")
    assert "valid" in text_in(visitor.get("/money/receipt", id=sold.id), "verified")
    foreign = SigningKeys(server.market.home / "elsewhere")
    foreign.current()
    monkeypatch.setattr(server.market.signing_keys, "public_keys", foreign.public_keys)
    page = visitor.get("/money/receipt", id=sold.id)
    assert page.status_code == 200 and "does not verify" in text_in(page, "verified")


def test_another_accounts_receipt_is_missing(server):
    """Like one that never was, for a buyer and for the publisher; not for admins."""
    sold = sell(server, TEXT)
    for name in ("pat", "eve"):
        visitor = visitor_of(server, name)
        for path in ("/money/receipt", "/money/receipt.jws"):
            found, never = (visitor.get(path, id=id) for id in (sold.id, "kvr_never"))
            assert found.status_code == never.status_code == 404 and found.text == never.text
    assert visitor_of(server, "admin").get("/money/receipt", id=sold.id).status_code == 200


def test_another_account_is_for_admins(server):
    """Whoever asks for one that is not theirs finds nothing; admins choose from a list."""
    sell(server, TEXT)
    assert visitor_of(server, "eve").get("/money", account="bea").status_code == 404
    page = visitor_of(server, "admin").get("/money", account="bea")
    assert "Account <strong>bea</strong>" in page.text and len(receipt_links(page)) == 1
    assert f'<option value="{PROVIDER}"' in page.text


def test_nobody_sees_money_without_a_session(server):
    """A key in a header opens the API, not the pages; every money page leads to signing in."""
    sold = sell(server, TEXT)
    visitor = Visitor(server.app)
    for path in ("/money", f"/money/receipt?id={sold.id}", f"/money/receipt.jws?id={sold.id}"):
        answer = visitor.client.get(
            f"/kvmarket{path}", headers={"authorization": f"Bearer {server.keys['bea']}"}
        )
        assert answer.status_code == 303 and "/signin" in answer.headers["location"]


def test_a_publisher_sees_its_royalties(server):
    """By document, with their sum; not whose request paid them."""
    royalties = [sell(server, TEXT, key=f"k{number}").royalty_nano for number in range(3)]
    page = visitor_of(server, "pat").get("/money")
    table = re.search(r'<table id="royalties">.*?</table>', page.text, re.DOTALL)[0]
    assert format_nano(sum(royalties)) in table and '<td class="number">3</td>' in table
    assert text_in(page, "royalties-total").split()[0] == format_nano(sum(royalties))
    assert not re.search(r"\bbea\b", page.text) and receipt_links(page) == []


def test_receipts_and_transfers_have_pages(server, monkeypatch):
    """Older ones follow, each once, and a list keeps its account."""
    monkeypatch.setattr(money_pages, "PAGE_ROWS", 2)
    sold = {sell(server, TEXT, key=f"k{number}").id for number in range(5)}
    visitor = visitor_of(server, "admin")
    page, seen = visitor.get("/money", account="bea"), []
    while True:
        seen += [link.partition("id=")[2] for link in receipt_links(page)]
        older = re.search(r'href="/kvmarket(/money\?receipts_after=[^"#]*)', page.text)
        if older is None:
            break
        page = visitor.get(html.unescape(older[1]))
        assert "Account <strong>bea</strong>" in page.text
    assert len(seen) == 5 and set(seen) == sold


@pytest.mark.parametrize(
    "query",
    [
        {"receipts_after": "nonsense"},
        {"transfers_after": "bnVsbA"},
        {"account": "a b"},
        {"account": "x" * 200},
    ],
)
def test_what_makes_no_sense_is_refused(server, query):
    """With a page that says so, never with an error of the server."""
    answer = visitor_of(server, "bea").get("/money", **query)
    assert answer.status_code in (400, 404) and "<h1>" in answer.text


@pytest.mark.parametrize("id", ["", "x" * 600, "../../etc", "<b>", "kvr_\0"])
def test_a_receipt_that_never_was_is_missing(server, id):
    """Any name is possible."""
    answer = visitor_of(server, "bea").get("/money/receipt", id=id)
    assert answer.status_code in (400, 404) and "<b>" not in answer.text
