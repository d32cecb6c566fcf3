"""`vllm serve MODEL --kv-connector kvmarket`, driven by the openai client and by the shell."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, words
from openai import OpenAI

VLLM = ROOT / ".venv" / "bin" / "vllm"
KVMARKET = ROOT / ".venv" / "bin" / "kvmarket"


@pytest.fixture(scope="module")
def server(llm, tiny, market, tmp_path_factory):
    """A server beside the shared engine, on the same market and model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [VLLM, "serve", tiny(1), "--kv-connector", "kvmarket"]
    command += ["--kvmarket-config", json.dumps({"home": str(market.home)})]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "4096", "--served-model-name", "tiny"]
    command += ["--enable-prompt-tokens-details"]
    with log.open("w") as out:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    base = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(base, process, log)
        yield base
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_healthy(base, process, log):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{base}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(log.read_text()[-3000:])


@pytest.fixture
def client(server):
    with OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def complete(client, prompt, **extra_body):
    return client.completions.create(
        model="tiny", prompt=prompt, max_tokens=8, temperature=0, extra_body=extra_body
    )


def test_a_document_published_by_another_process_is_bought_over_http(client, llm, market):
    """Found within a second, reused to the token, charged, and counted in the usage."""
    document = words(90, 600)
    prompt = document + words(91, 12)
    full = complete(client, prompt)
    market.publish(llm, token_ids=document, title="over http")
    time.sleep(1)
    bought = complete(client, prompt, **market.params("alice"))
    assert bought.choices[0].text == full.choices[0].text
    sold = bought.kv_transfer_params["kvmarket"]
    assert sold["reused_tokens"] == 600
    assert bought.usage.prompt_tokens_details.cached_tokens == 600
    receipt = market.receipt(sold["receipt_id"])
    assert (receipt.account, receipt.charge_nano) == ("alice", 600 * 500)
    assert receipt.request_id.startswith("cmpl-")


def test_a_client_cannot_name_an_account_or_publish_without_a_token(client, market):
    """Whatever the body says: no reuse on somebody else's account, and no listing."""
    document = words(90, 600)
    listed = len(market.catalogue.listings())
    for wish in (
        {"account": "alice"},
        {"account": "alice", "token": "0" * 64},
        {"publish": {"title": "spam"}},
        {"preload": True},
        {"nonsense": 1},
    ):
        answer = complete(client, document + words(92, 9), kv_transfer_params={"kvmarket": wish})
        sold = answer.kv_transfer_params["kvmarket"]
        assert sold["declined"]
        assert sold["reused_tokens"] == sold["charge_nano"] == 0
    assert len(market.catalogue.listings()) == listed


def test_chat_requests_hit_a_document_published_as_chat(client, llm, market):
    """Plain and streamed; the stream is charged too, though it has no field for the object."""
    text = "Ships leave the harbour at dawn. " * 50
    listing = market.publish(llm, text, as_="chat", title="harbour")
    time.sleep(1)
    ask = {
        "model": "tiny",
        "messages": [{"role": "user", "content": text + "\n\nWhen do ships leave?"}],
        "max_tokens": 6,
        "temperature": 0,
        "extra_body": market.params("alice"),
    }
    answer = client.chat.completions.create(**ask)
    assert answer.kv_transfer_params["kvmarket"]["reused_tokens"] == listing.token_count
    streamed = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**ask, stream=True)
        if chunk.choices
    )
    assert streamed == answer.choices[0].message.content
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        receipts = market.ledger.receipts(document_id=listing.document_id)
        if len(receipts) == 2:
            break
        time.sleep(0.05)
    assert [receipt.tokens_reused for receipt in receipts] == [listing.token_count] * 2


def test_the_server_says_what_it_sells(server):
    """GET /v1/kvmarket."""
    with urllib.request.urlopen(f"{server}/v1/kvmarket", timeout=10) as response:
        told = json.load(response)
    assert told["model"] == "tiny"
    assert told["tariff"]["cache_read_nano_per_mtok"] == 500_000_000


def test_the_command_line_publishes_what_a_new_engine_reuses(tiny, tmp_path):
    """As a user types it: publish a file, list it, and look after it."""
    text = tmp_path / "tides.md"
    text.write_text("# Tides\n\n" + "The tide turns every six hours. " * 40)
    home = ["--home", str(tmp_path / "home")]

    def kvmarket(*words_):
        command = [str(KVMARKET), *words_, *home, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    kvmarket("publish", str(text), "--model", str(tiny(1)), "--publisher", "moon")
    (listed,) = kvmarket("list")["documents"]
    assert listed["publisher"] == "moon"
    assert kvmarket("show", listed["document_id"])["state"] == "live"
    kvmarket("fsck")
    kvmarket("delist", listed["document_id"])


def test_an_unknown_connector_ends_the_server_with_one_clear_line(tiny):
    """Before any engine starts; see test_flags for the other ways to be wrong."""
    command = [str(VLLM), "serve", str(tiny(1)), "--kv-connector", "kvmarked"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "unknown connector 'kvmarked'" in last, done.stderr[-2000:]
    assert "EngineCore" not in done.stdout
