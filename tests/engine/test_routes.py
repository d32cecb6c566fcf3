"""/v1/kvmarket on a real server: publish, quote, buy, and prove it, all over HTTP."""

from __future__ import annotations

import contextlib
import time

import httpx
import pytest

from tests.support.engines import NANO, words
from tests.support.serving import serving
from vllm_kvmarket.api.publication_queue import CLOSED, LOST
from vllm_kvmarket.auth.signing_keys import PublicKey
from vllm_kvmarket.proofs import read_inclusion, verify, verify_with_proof

WRITE_NANO_PER_MTOK = 1_000_000_000
TEXT = "The lighthouse keeper writes down every ship that passes the cape. "


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """A server that publishes over HTTP, at a price."""
    home = tmp_path_factory.mktemp("routes") / "home"
    config = {"tariff": {"cache_write_nano_per_mtok": WRITE_NANO_PER_MTOK}}
    with serving(tiny(1), home, config=config) as running:
        yield running


@pytest.fixture(scope="module")
def secrets(server):
    """Keys by name: pat can pay for publishing, and poe cannot."""
    made = {"boss": server.keys.create("boss", ["admin"])[0]}
    for name, kind, funds in (
        ("pat", "publisher", 10 * NANO),
        ("poe", "publisher", 0),
        ("bea", "buyer", 10 * NANO),
    ):
        server.market.create_account(name, kind)
        if funds:
            server.market.deposit(name, funds, f"first:{name}")
        made[name] = server.keys.create(name, [kind])[0]
    return made


@pytest.fixture
def of(server, secrets):
    """Clients by the name of whose key they use; None for nobody's."""
    with contextlib.ExitStack() as stack:

        def client(name=None):
            headers = {"authorization": f"Bearer {secrets[name]}"} if name else {}
            return stack.enter_context(
                httpx.Client(base_url=f"{server.base}/v1/kvmarket", headers=headers, timeout=60)
            )

        yield client


def publish(client, **wish):
    """Publish over HTTP and watch it until it is live or failed; the document."""
    posted = client.post("/documents", json=wish)
    assert posted.status_code == 202, posted.text
    accepted = posted.json()
    assert accepted["state"] == "publishing"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        document = client.get(f"/documents/{accepted['id']}").json()
        if document["state"] != "publishing":
            return document
        time.sleep(0.1)
    pytest.fail(f"{accepted['id']} is still being published")


def test_a_document_is_published_quoted_bought_and_proven_over_http(server, secrets, of):
    """The whole round, with no client ever touching the market's home."""
    text = (TEXT * 40).strip()
    document = publish(of("pat"), text=text, title="cape", royalty_ppm=400_000)
    assert document["state"] == "live", document
    assert document["publisher"] == "pat" and document["prices"]["royalty_ppm"] == 400_000
    question = f"{text}\n\nWhich ships?"
    quote = of("bea").post("/quotes", json={"prompt": question}).json()
    assert quote["document"] == document["id"] and quote["affordable"]
    assert quote["matched_tokens"] == document["tokens"]
    time.sleep(1)  # until the engine sells what it has published
    answer = server.complete(question, secrets["bea"])
    sold = answer["kv_transfer_params"]["kvmarket"]
    assert sold["reused_tokens"] == quote["matched_tokens"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == quote["matched_tokens"]
    receipt = of("bea").get(f"/receipts/{answer['id']}").json()
    assert receipt["id"] == sold["receipt_id"]
    assert receipt["charge_nano"] == quote["charge_nano"] > 0
    assert receipt["royalty_nano"] == receipt["charge_nano"] * 4 // 10
    # Proof: signature and log, by what the server publishes.
    keys = [PublicKey.of_jwk(each) for each in of().get("/jwks").json()["keys"]]
    signed = verify(receipt["signed"]["signature"], keys)
    for number, (who, transfer) in enumerate(
        zip(("bea", "pat"), receipt["transfer_ids"], strict=True)
    ):
        shown = of(who).get("/log/proof", params={"transfer": transfer})
        assert verify_with_proof(signed, read_inclusion(shown.text), keys) == number
    # The publisher's side of it.
    lines = of("pat").get("/accounts/me/statement").json()["lines"]
    assert [line["amount_nano"] for line in lines if line["kind"] == "royalty"] == [
        receipt["royalty_nano"]
    ]
    assert [line["amount_nano"] for line in lines if line["kind"] == "storage"] == [
        -document["write_nano"]
    ]


def test_a_chat_document_is_matched_by_chats_that_begin_with_it(server, secrets, of):
    """Published as text or as messages: what the server renders is what was published."""
    wishes = (
        ({"text": "Keep the lamp lit. " * 60, "as": "chat"}, "user"),
        ({"messages": [{"role": "system", "content": "You guard the cape. " * 60}]}, "system"),
    )
    for wish, role in wishes:
        document = publish(of("pat"), **wish)
        assert (document["state"], document["rendered_as"]) == ("live", "chat"), document
        text = wish.get("text") or wish["messages"][0]["content"]
        messages = [{"role": role, "content": text}]
        if role == "user":
            messages[0]["content"] += "\n\nIs it lit?"
        else:
            messages.append({"role": "user", "content": "Is it lit?"})
        quote = of("bea").post("/quotes", json={"messages": messages}).json()
        assert quote["matched_tokens"] == document["tokens"]
        time.sleep(1)
        body = {"model": "tiny", "messages": messages, "max_tokens": 2}
        answer = server.post("/v1/chat/completions", body, secrets["bea"]).json()
        assert answer["kv_transfer_params"]["kvmarket"]["reused_tokens"] == document["tokens"]
        receipt = of("bea").get(f"/receipts/{answer['id']}")
        assert receipt.status_code == 200, receipt.text


def test_a_publisher_that_cannot_pay_is_told_why_and_nothing_is_listed(of):
    """The document fails with the ledger's reason; it is on nobody's list."""
    document = publish(of("poe"), token_ids=words(700, 500), title="unpaid")
    assert document["state"] == "failed" and document["reason"], document
    assert document["id"] not in [each["id"] for each in of().get("/documents").json()["data"]]
    assert of().get(f"/documents/{document['id']}").status_code == 404


def test_documents_wait_in_line_and_a_withdrawn_one_is_never_published(of):
    """Three at once, the last taken back while it waits."""
    pat = of("pat")
    names = []
    for seed in (701, 702, 703):
        posted = pat.post("/documents", json={"token_ids": words(seed, 2000)})
        assert posted.status_code == 202
        names.append(posted.json()["id"])
    assert pat.delete(f"/documents/{names[2]}").status_code == 200
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        states = [pat.get(f"/documents/{name}").json()["state"] for name in names]
        if "publishing" not in states:
            break
        time.sleep(0.2)
    assert states == ["live", "live", "delisted"]


def test_what_is_too_big_is_refused_at_once_and_clearly(of):
    """Three megabytes of text, a title of one, a body of ten: a 4xx that says what to do."""
    pat = of("pat")
    for wish, status, param in (
        ({"text": TEXT * 48_000}, 413, "text"),
        ({"text": TEXT * 160_000}, 413, None),
        ({"text": "short", "title": "t" * 1_000_000}, 400, "title"),
        ({"text": "a" * (17 << 20)}, 413, None),
        ({"token_ids": words(1, 5000)}, 413, None),
        ({"token_ids": [4_000_000_000] * 500}, 400, "token_ids"),
        ({"text": "too short"}, 400, None),
    ):
        with contextlib.suppress(httpx.WriteError):
            refused = pat.post("/documents", json=wish)
            assert refused.status_code == status, refused.text
            error = refused.json()["error"]
            assert error["param"] == param and len(error["message"]) < 300


def test_our_routes_are_in_the_server_s_openapi_with_their_errors(server):
    """Every operation is described, with the shape of its refusals; the first tells the rest."""
    sold = httpx.get(f"{server.base}/v1/kvmarket", timeout=60).json()
    assert (sold["model"], sold["block_tokens"], sold["chunk_tokens"]) == ("tiny", 128, 256)
    assert {each.namespace.hex() for each in server.market.catalogue.listings()} == {
        sold["namespace"]
    }
    reply = httpx.get(f"{server.base}/openapi.json", timeout=60).json()
    ours = {path: methods for path, methods in reply["paths"].items() if "kvmarket" in path}
    assert len(ours) >= 17
    for path, methods in ours.items():
        for method, operation in methods.items():
            assert {"4XX", "5XX"} <= set(operation["responses"]), (method, path)
            assert operation.get("description"), (method, path)


def test_what_waits_when_the_server_stops_is_on_nobody_s_list(server, of):
    """The queue's documents fail with their reason, the engine's as its process has ended."""
    pat = of("pat")
    names = []
    for seed in (711, 712, 713):
        posted = pat.post("/documents", json={"token_ids": words(seed, 3000)})
        assert posted.status_code == 202, posted.text
        names.append(posted.json()["id"])
    server.process.terminate()
    server.process.wait(timeout=60)
    server.market.catalogue.fail_abandoned()
    listings = [server.market.catalogue.get(name) for name in names]
    assert all(listing.state in ("live", "failed") for listing in listings)
    assert listings[2].reason in (CLOSED, LOST)
    assert "Application shutdown complete" in server.log.read_text()
    server.market.ledger.expire_pending()
    assert server.market.ledger.check_integrity() == []
    assert server.market.catalogue.check_integrity() == []
