"""/v1/kvmarket/accounts, /receipts, /transfers, /log, /jwks, on a real market; keys and rates."""

from __future__ import annotations

import csv
import io
import time

import msgspec
import pytest

from tests.support.api_server import NANO, as_, publish, running, text_of
from tests.support.purchases import reserve
from vllm_kvmarket.api.auth import Limiter, Rate
from vllm_kvmarket.api.paging import encode, newest_first
from vllm_kvmarket.auth.signing_keys import PublicKey
from vllm_kvmarket.market.purchase import PurchaseState, Usage
from vllm_kvmarket.proofs import ConsistencyProof, read_inclusion, verify, verify_checkpoint

BASE = "/v1/kvmarket"


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """Shared by tests in which nothing is done."""
    with running(tmp_path_factory.mktemp("home")) as opened:
        yield opened


def get(server, path, who=None, status=200, **query):
    headers = as_(server, who) if who else {}
    got = server.client.get(f"{BASE}{path}", params=query, headers=headers)
    assert got.status_code == status, got.text
    return got


def post(server, path, who=None, status=201, **body):
    headers = as_(server, who) if who else {}
    got = server.client.post(f"{BASE}{path}", json=body, headers=headers)
    assert got.status_code == status, got.text
    return got.json()


def buy(server, name, account, request_id):
    """Reuse a document as the engine does; the receipt's id."""
    market = server.market
    market.catalogue.refresh()
    listing = market.catalogue.get(name)
    match = market.match(listing.namespace, market.catalogue.tokens_of(name))
    purchase = reserve(
        market,
        key=f"e:{request_id}",
        request_id=request_id,
        account=account,
        match=match,
        model="words",
    )
    while purchase.state() is PurchaseState.RESERVING:
        time.sleep(0.001)
    usage = Usage(
        matched=match.token_count,
        reused=match.token_count,
        loaded=match.token_count,
        from_paged_cache=0,
        failed=0,
        computed=1,
        output=1,
    )
    # Settled a moment later, as in an engine.
    return market.receipt(purchase.settle(usage).id).id


def test_money_and_keys_are_an_admin_s(server):
    """Open an account, fund it, give it a key, end the key; nobody else may."""
    for who, status in ((None, 401), ("bea", 403), ("pat", 403)):
        post(server, "/accounts", who, status, id="new")
        post(server, "/accounts/bea/deposits", who, status, amount_nano=1, transfer_id="x")
        post(server, "/accounts/bea/keys", who, status, scopes=["admin"])
        get(server, "/accounts", who, status)
    opened = post(server, "/accounts", "admin", id="new", kind="buyer")
    assert (opened["id"], opened["balance_nano"], opened["currency"]) == ("new", 0, "USD")
    for _ in range(2):
        booked = post(
            server, "/accounts/new/deposits", "admin", amount_nano=5 * NANO, transfer_id="bank-1"
        )
        assert booked["amount_nano"] == 5 * NANO
    assert get(server, "/accounts/new", "admin").json()["available_nano"] == 5 * NANO
    post(server, "/accounts/new/deposits", "admin", 409, amount_nano=1, transfer_id="bank-1")
    made = post(server, "/accounts/new/keys", "admin", scopes=["buyer"], label="laptop")
    server.keys["new"] = made["secret"]
    assert get(server, "/accounts/me", "new").json()["scopes"] == ["buyer"]
    (listed,) = get(server, "/accounts/new/keys", "admin").json()["data"]
    assert (listed["id"], listed["label"], listed["revoked_at"]) == (made["id"], "laptop", None)
    assert "secret" not in listed
    away = server.client.delete(
        f"{BASE}/accounts/bea/keys/{made['id']}", headers=as_(server, "admin")
    )
    assert away.status_code == 404
    gone = server.client.delete(
        f"{BASE}/accounts/new/keys/{made['id']}", headers=as_(server, "admin")
    )
    assert gone.status_code == 204
    get(server, "/accounts/me", "new", 401)


def test_what_an_admin_changes_is_recorded(server):
    """Before it is done, with the key's id; others' own changes and looks are not."""
    post(server, "/accounts", "admin", id="logged", kind="buyer")
    post(server, "/accounts/logged/deposits", "admin", amount_nano=7, transfer_id="bank-9")
    made = post(server, "/accounts/logged/keys", "admin", scopes=["buyer"], label="laptop")
    url = f"{BASE}/accounts/logged/keys/{made['id']}"
    assert server.client.delete(url, headers=as_(server, "admin")).status_code == 204
    get(server, "/accounts", "admin")
    post(server, "/accounts", "bea", 403, id="other")
    entries = server.service.admin_log.entries(4)
    assert [(entry.action, entry.details.get("account", "logged")) for entry in entries] == [
        ("apikey revoke", "logged"),
        ("apikey create", "logged"),
        ("account deposit", "logged"),
        ("account create", "logged"),
    ]
    assert entries[2].details["amount_nano"] == 7
    (key,) = {entry.actor for entry in entries}
    assert server.service.keys.principal(key).scopes == {"admin"}


def test_a_key_has_limits_over_http(server):
    """They are listed with its spending; outside them the key is no key."""
    limits = {"day_budget_nano": 5, "consents": False, "networks": ["192.0.2.0/24"]}
    made = post(server, "/accounts/bea/keys", "admin", scopes=["buyer"], limits=limits)
    server.keys["bound"] = made["secret"]
    get(server, "/accounts/me", "bound", 401)
    ended = {"expires_at_s": time.time() - 1}
    made = post(server, "/accounts/bea/keys", "admin", scopes=["buyer"], limits=ended)
    server.keys["ended"] = made["secret"]
    get(server, "/accounts/me", "ended", 401)
    last, first = get(server, "/accounts/bea/keys", "admin").json()["data"][:2]
    assert last["limits"]["expires_at_s"] == ended["expires_at_s"]
    assert {name: first["limits"][name] for name in limits} == limits
    assert (first["spent_nano"], first["last_used_at"]) == (0, None)
    wrong = {"networks": ["everywhere"]}
    post(server, "/accounts/bea/keys", "admin", 400, scopes=["buyer"], limits=wrong)
    for reserved in ("world", "provider"):
        post(server, f"/accounts/{reserved}/keys", "admin", 400, scopes=["buyer"])


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/accounts", {"id": "a/b"}, 400),
        ("/accounts", {"id": "me"}, 400),
        ("/accounts", {"id": "pat", "kind": "buyer"}, 409),
        ("/accounts", {"id": "x", "kind": "provider"}, 400),
        ("/accounts/bea/deposits", {"amount_nano": 0, "transfer_id": "x"}, 400),
        ("/accounts/bea/deposits", {"amount_nano": 1.5, "transfer_id": "x"}, 400),
        ("/accounts/bea/deposits", {"amount_nano": 2**63, "transfer_id": "x"}, 400),
        ("/accounts/bea/deposits", {"amount_nano": 1}, 400),
        ("/accounts/bea/deposits", {"amount_nano": 1, "transfer_id": "a b"}, 400),
        ("/accounts/nobody/deposits", {"amount_nano": 1, "transfer_id": "x"}, 404),
        ("/accounts/nobody/keys", {"scopes": ["buyer"]}, 404),
        ("/accounts/bea/keys", {"scopes": []}, 400),
        ("/accounts/bea/keys", {"scopes": ["root"]}, 400),
    ],
)
def test_what_an_admin_asks_wrongly_is_refused(refusing, path, body, status):
    """With nothing booked."""
    post(refusing, path, "admin", status, **body)
    assert refusing.market.ledger.account("bea").balance_nano == 0


def test_keys_are_taken_from_either_header_and_never_guessed_between(server):
    """Bearer and x-api-key; two different keys, a wrong one and a revoked one are refused."""
    secret, other = server.keys["bea"], server.keys["pat"]
    for headers, status in (
        ({"authorization": f"Bearer {secret}"}, 200),
        ({"authorization": f"bearer {secret}"}, 200),
        ({"x-api-key": secret}, 200),
        ({"x-api-key": secret, "authorization": f"Bearer {secret}"}, 200),
        ({"x-api-key": secret, "authorization": f"Bearer {other}"}, 400),
        ({"x-api-key": secret, "authorization": "Bearer vllm-key"}, 200),
        ({"authorization": "Bearer none"}, 401),
        ({"authorization": f"Basic {secret}"}, 401),
        ({"x-api-key": "kvm_" + "a" * 43}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"x-api-key": ""}, 401),
    ):
        got = server.client.get(f"{BASE}/accounts/me", headers=headers)
        assert got.status_code == status, (headers, got.text)
    # Also on a public route.
    wrong = server.client.get(f"{BASE}/documents", headers={"x-api-key": "kvm_x"})
    assert wrong.json()["error"]["code"] == "invalid_api_key"
    assert secret not in wrong.text


def test_a_market_may_be_closed_to_the_anonymous(tmp_path):
    """Then the catalogue, too, needs a key; any will do."""
    with running(tmp_path, anonymous="refuse") as server:
        for path in ("/documents", "/log/checkpoint", "/jwks"):
            get(server, path, None, 401)
            get(server, path, "bea")


def test_accounts_see_their_own_affairs_only(server):
    """Receipts, transfers, statements and proofs of others are not there."""
    name = publish(server, text=text_of(300), title="x")["id"]
    server.market.deposit("bea", NANO, "d")
    receipt_id = buy(server, name, "bea", "cmpl-one-0")
    for wanted in (receipt_id, "cmpl-one", "cmpl-one-0"):
        found = get(server, f"/receipts/{wanted}", "bea").json()
        assert (found["id"], found["charge_nano"]) == (receipt_id, 150_000)
    get(server, f"/receipts/{receipt_id}", "admin")
    get(server, f"/receipts/{receipt_id}", "eve", 404)
    get(server, f"/receipts/{receipt_id}", None, 401)
    get(server, "/receipts", "eve", 403, account="bea")
    assert get(server, "/receipts", "eve").json()["data"] == []
    assert len(get(server, "/receipts", "admin", account="bea").json()["data"]) == 1
    get(server, "/accounts/bea", "eve", 403)
    get(server, "/accounts/bea/statement", "eve", 403)
    charge, royalty = found["transfer_ids"]
    for who, transfer, status in (
        ("bea", charge, 200),
        ("pat", royalty, 200),
        ("pat", charge, 404),
        ("eve", charge, 404),
        (None, charge, 401),
        ("bea", "no such", 404),
    ):
        get(server, "/log/proof", who, status, transfer=transfer)
    seen = {each["id"] for each in get(server, "/transfers", "pat").json()["data"]}
    assert royalty in seen and charge not in seen


def test_receipts_and_the_log_are_proven_by_the_published_keys(server):
    """The signature, the transfer's place in the log, and that the log only grew."""
    name = publish(server, text=text_of(300))["id"]
    server.market.deposit("bea", NANO, "d")
    keys = [PublicKey.of_jwk(each) for each in get(server, "/jwks").json()["keys"]]
    before = verify_checkpoint(get(server, "/log/checkpoint").text, keys)
    found = get(server, f"/receipts/{buy(server, name, 'bea', 'r')}", "bea").json()
    signed = verify(found["signed"]["signature"], keys)
    assert signed.payload.kvmarket.receipt.id == found["id"]
    proof = read_inclusion(get(server, "/log/proof", "bea", transfer=found["transfer_ids"][0]).text)
    assert proof.verify(keys).amount_nano == str(found["charge_nano"])
    reply = get(server, "/log/proof", old=before.size).json()
    assert reply.pop("object") == "kvmarket.log.consistency"
    consistency = msgspec.convert(reply, ConsistencyProof)
    consistency.verify(keys)
    assert consistency.new_size > before.size
    for query in ({}, {"old": 99}, {"new": 1}, {"old": 1, "new": 0}, {"transfer": "t", "old": 1}):
        get(server, "/log/proof", "bea", 400, **query)


def test_a_statement_adds_up_in_json_and_in_csv(server):
    """Brought forward + lines = closing; the publisher's royalty is on its own."""
    name = publish(server, text=text_of(300), title="=x")["id"]
    server.market.deposit("bea", NANO, "d")
    buy(server, name, "bea", "r")
    made = get(server, "/accounts/me/statement", "bea").json()
    assert (
        made["brought_forward_nano"] + sum(line["amount_nano"] for line in made["lines"])
        == made["closing_nano"]
    )
    assert made["closing_nano"] == NANO - 150_000
    assert get(server, "/accounts/bea/statement", "admin").json() == made
    later = get(server, "/accounts/me/statement", "bea", **{"from": time.time() + 9}).json()
    assert later["brought_forward_nano"] == later["closing_nano"] == made["closing_nano"]
    pat = get(server, "/accounts/me/statement", "pat").json()
    assert pat["totals_nano"] == {"royalty": 75_000}
    text = get(server, "/accounts/me/statement", "pat", format="csv")
    assert text.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(text.text)))
    assert [row["title"] for row in rows if row["kind"] == "royalty"] == ["'=x"]
    get(server, "/accounts/me/statement", "bea", 400, **{"from": 2, "to": 1})
    get(server, "/accounts/me/statement", "bea", 400, **{"from": "nan"})


def test_lists_of_transfers_and_accounts_are_paged_while_they_grow(server):
    """Every transfer that was there is seen once, though new ones come in between."""
    for number in range(7):
        server.market.deposit("bea", 1, f"d{number}")
    seen, cursor = [], None
    for page in range(5):
        query = {"limit": 3} if cursor is None else {"limit": 3, "after": cursor}
        reply = get(server, "/transfers", "bea", **query).json()
        seen += [each["id"] for each in reply["data"]]
        server.market.deposit("bea", 1, f"new{page}")
        cursor = reply["next_cursor"]
        if cursor is None:
            break
    assert seen == [f"d{number}" for number in reversed(range(7))]
    for after in ("nonsense", "WzAsIngiXQ", "IngieCI", encode("unknown")):
        get(server, "/transfers", "bea", 400, after=after)
    first = get(server, "/accounts", "admin", limit=2).json()
    rest = get(server, "/accounts", "admin", after=first["next_cursor"]).json()
    names = [each["id"] for each in first["data"] + rest["data"]]
    assert names == ["bea", "eve", "pat", "provider", "suspense", "world"]


def test_a_client_that_asks_too_often_learns_when_to_try_again(server):
    """By account; others are served meanwhile."""
    server.service.writes = Limiter(Rate(burst=2, per_s=0.01))
    for status in (404, 404, 429):
        refused = server.client.post(
            f"{BASE}/quotes", json={"document": "kvd_0"}, headers=as_(server, "bea")
        )
        assert refused.status_code == status
    assert int(refused.headers["retry-after"]) > 50
    assert refused.json()["error"]["type"] == "rate_limit_error"
    others = server.client.post(
        f"{BASE}/quotes", json={"document": "kvd_0"}, headers=as_(server, "eve")
    )
    assert others.status_code == 404


def test_a_bucket_refills_steadily_and_holds_no_more_than_its_burst():
    """By a clock of the test's own."""
    now = [0.0]
    limiter = Limiter(Rate(burst=3, per_s=2.0), clock=lambda: now[0])
    assert [limiter.wait_s("a") for _ in range(4)] == [0, 0, 0, 1]
    now[0] += 0.5
    assert [limiter.wait_s("a") for _ in range(2)] == [0, 1]
    now[0] += 1000
    assert [limiter.wait_s("a") for _ in range(4)] == [0, 0, 0, 1]
    assert limiter.wait_s("b") == 0


def test_pages_of_a_growing_list_neither_repeat_nor_skip():
    """Against a plain list, for every page size, with something new before every page."""
    for limit in (1, 2, 3, 10):
        items = [f"i{number}" for number in range(20)]
        seen, cursor, new = [], None, 0
        while True:
            now = [f"n{number}" for number in reversed(range(new))] + items

            def read(count, last, now=now):
                return now[now.index(last) + 1 if last else 0 :][:count]

            page, cursor = newest_first(read, str, str, limit, cursor)
            seen += page
            new += 7
            if cursor is None:
                break
        assert seen == items


def test_a_database_that_is_gone_is_an_outage_that_tells_nothing_of_the_server(server, tmp_path):
    """503, to come again; no paths, no SQL."""
    (tmp_path / "market.sqlite").rename(tmp_path / "away.sqlite")
    for path in ("/documents", "/documents/kvd_0"):
        down = get(server, path, None, 503)
        assert down.json()["error"]["code"] == "market_unavailable"
        assert down.headers["retry-after"]
        assert str(tmp_path) not in down.text and "sqlite" not in down.text
    (tmp_path / "away.sqlite").rename(tmp_path / "market.sqlite")
    get(server, "/documents", None, 200)
