"""/v1/kvmarket on a real server: publish, quote, buy, and prove it, all over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from types import SimpleNamespace

import httpx
import pytest
from conftest import NANO, ROOT, words

from vllm_kvmarket import Market
from vllm_kvmarket.api.keys import Keys
from vllm_kvmarket.market import DATABASE_FILE
from vllm_kvmarket.proofs import read_inclusion, verify, verify_with_proof
from vllm_kvmarket.signing import PublicKey

VLLM = ROOT / ".venv" / "bin" / "vllm"
WRITE_NANO_PER_MTOK = 1_000_000_000
TEXT = "The lighthouse keeper writes down every ship that passes the cape. "


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """A server that publishes over HTTP, at a price; pat can pay for it, and poe cannot."""
    home = tmp_path_factory.mktemp("routes")
    keys = Keys.open(home / DATABASE_FILE)
    secrets = {"boss": keys.create("boss", ["admin"])[0]}
    with Market.open(home) as market:
        for name, kind in (("pat", "publisher"), ("poe", "publisher"), ("bea", "buyer")):
            market.create_account(name, kind)
            secrets[name] = keys.create(name, [kind])[0]
        market.deposit("pat", 10 * NANO, "pat")
        market.deposit("bea", 10 * NANO, "bea")
        with serving(tiny(1), home) as base:
            yield SimpleNamespace(base=base, market=market, secrets=secrets)
    keys.close()


@contextlib.contextmanager
def serving(model, home):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {"home": str(home), "tariff": {"cache_write_nano_per_mtok": WRITE_NANO_PER_MTOK}}
    command = [VLLM, "serve", model, "--kv-connector", "kvmarket"]
    command += ["--kvmarket-config", json.dumps(config)]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", 4096, "--served-model-name", "tiny"]
    command += ["--enable-prompt-tokens-details"]
    log = home / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{base}/health", timeout=2).status_code == 200:
                    break
            time.sleep(0.5)
        yield base
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture
def of(server):
    """Clients by the name of whose key they use; None for nobody's."""
    with contextlib.ExitStack() as stack:

        def client(name=None):
            headers = {"authorization": f"Bearer {server.secrets[name]}"} if name else {}
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


def ask(server, prompt, buyer="bea"):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    body |= server.market.params(buyer)
    answer = httpx.post(
        f"{server.base}/v1/completions",
        json=body,
        headers={"authorization": f"Bearer {server.secrets[buyer]}"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_document_is_published_quoted_bought_and_proven_over_http(server, of):
    """The whole round, with no client ever touching the market's home."""
    document = publish(of("pat"), text=TEXT * 40, title="cape", royalty_ppm=400_000)
    assert document["state"] == "live", document
    assert document["publisher"] == "pat" and document["prices"]["royalty_ppm"] == 400_000
    question = TEXT * 40 + "\n\nWhich ships?"
    quote = of("bea").post("/quotes", json={"prompt": question}).json()
    assert quote["document"] == document["id"] and quote["affordable"]
    assert quote["matched_tokens"] == document["tokens"]
    time.sleep(1)  # until the engine sells what it has published
    answer = ask(server, question)
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


def test_a_chat_document_is_matched_by_chats_that_begin_with_it(server, of):
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
        answer = httpx.post(
            f"{server.base}/v1/chat/completions",
            json=body | server.market.params("bea"),
            headers={"authorization": f"Bearer {server.secrets['bea']}"},
            timeout=60,
        ).json()
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
    """Ten megabytes of text, a title of one, a body without end: a 4xx that says what to do."""
    pat = of("pat")
    for wish, status, param in (
        ({"text": TEXT * 160_000}, 413, "text"),
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
    """Every operation is described, and says in which shape it refuses."""
    told = httpx.get(f"{server.base}/openapi.json", timeout=60).json()
    ours = {path: methods for path, methods in told["paths"].items() if "kvmarket" in path}
    assert len(ours) >= 18
    for path, methods in ours.items():
        for method, operation in methods.items():
            assert {"4XX", "5XX"} <= set(operation["responses"]), (method, path)
            assert operation.get("description"), (method, path)
