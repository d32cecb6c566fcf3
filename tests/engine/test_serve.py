"""`vllm serve MODEL --kv-connector kvmarket`, driven by the openai client and by the shell."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.support import ROOT
from tests.support.engines import words
from tests.support.serving import VLLM, start
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.connector.housekeeping import INTERVAL_S
from vllm_kvmarket.connector.metric_definitions import METRICS, PREFIX
from vllm_kvmarket.market.market import DATABASE_FILE

KVMARKET = ROOT / ".venv" / "bin" / "kvmarket"


@pytest.fixture
def server(open_server):
    return open_server


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
    """No body gives a reuse on somebody else's account, or a listing."""
    document = words(90, 600)
    listed = len(market.catalogue.listings())
    for wish in (
        {"account": "alice"},
        {"account": "alice", "token": "0" * 64},
        {"publish": {"terms": {"title": "spam"}}},
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
        reply = json.load(response)
    assert reply["model"] == "tiny"
    assert reply["tariff"]["cache_read_nano_per_mtok"] == 500_000_000


def scrape(server):
    """kvmarket's samples as they are now: (name, label value) -> number."""
    with urllib.request.urlopen(f"{server}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith(PREFIX):
            for sample in family.samples:
                labels = {
                    k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")
                }
                found[sample.name.removeprefix(PREFIX), "".join(labels.values())] = sample.value
    return found


def settled(server):
    """The same, when what earlier tests did has been seen by the housekeeping."""
    time.sleep(INTERVAL_S + 0.5)
    return scrape(server)


def more(server, before, *names):
    """By how much figures, named as in METRICS, have grown."""
    now = scrape(server)
    keys = [(exported(name), label) for name, label in names]
    return [now[key] - before[key] for key in keys]


def exported(name):
    """The name that Prometheus knows, without the prefix; of a histogram one names a series."""
    return METRICS[name].exported(name).removeprefix(PREFIX) if name in METRICS else name


def eventually(server, before, name, amount):
    """Wait for a figure that comes when the ledger, or the housekeeping, is done."""
    deadline = time.monotonic() + 15
    while more(server, before, name) != [amount]:
        assert time.monotonic() < deadline, (name, more(server, before, name))
        time.sleep(0.2)


def test_a_purchase_is_counted_when_it_is_booked(server, client, llm, market):
    """Without any further request: a scrape wakes the engine. Money to the nano-unit."""
    document = words(94, 600)
    before = settled(server)
    market.publish(llm, token_ids=document, title="counted", publisher="moon")
    # Nobody has asked this server for anything since another process published.
    eventually(server, before, ("documents", ""), 1)
    eventually(server, before, ("chunks", ""), 3)
    assert scrape(server)["stored_bytes", "chunks"] > before["stored_bytes", "chunks"]
    before = scrape(server)
    complete(client, document + words(95, 12), **market.params("alice"))
    eventually(server, before, ("receipts", ""), 1)
    (receipt,) = market.ledger.receipts(account="alice", limit=1)
    names = ("matched_tokens", "reused_tokens", "loaded_tokens")
    assert more(server, before, *((name, "") for name in names)) == [600] * 3
    money = more(server, before, ("charged_nano", "reuse"), ("royalties_nano", ""))
    assert money == [receipt.charge_nano, receipt.royalty_nano]
    assert receipt.royalty_nano > 0
    eventually(
        server,
        before,
        ("provider_balance_nano", ""),
        receipt.charge_nano - receipt.royalty_nano,
    )
    loaded = more(
        server,
        before,
        ("chunks_loaded", "disk"),
        ("chunk_load_seconds", "disk"),
        ("load_seconds_count", ""),
    )
    assert loaded[0] + loaded[2] == 3 + 1
    assert loaded[1] > 0
    assert more(server, before, ("ledger_commit_seconds_count", ""))[0] >= 2
    assert scrape(server)["ledger_queue_batches", ""] == 0
    assert more(server, before, ("recomputed_tokens", "declined"), ("charges_refused", "")) == [
        0,
        0,
    ]


def test_declined_reuse_is_counted_by_reason(server, client, llm, market):
    """Each of them: tokens that matched, and were computed."""
    document = words(96, 600)
    market.publish(llm, token_ids=document, title="declined")
    time.sleep(1)
    keys = Keys(market.home / DATABASE_FILE)
    key = keys.create("alice", ("buyer",))[0]
    keys.close()
    bearer = {"Authorization": f"Bearer {key}"}
    never = {"extra_body": {"kvmarket": {"reuse": "never"}}, "extra_headers": bearer}
    dear = {"extra_body": {"kvmarket": {"max_price_nano": 1}}, "extra_headers": bearer}
    cases = [
        ("no_account", {}),
        ("no_funds", {"extra_body": market.params("dave")}),
        ("unknown_account", {"extra_body": market.params("nobody")}),
        ("never", never),
        ("max_price", dear),
    ]
    for number, (reason, more_) in enumerate(cases):
        before = scrape(server)
        client.completions.create(
            model="tiny",
            prompt=document + words(97 + number, 9),
            max_tokens=2,
            temperature=0,
            **more_,
        )
        eventually(server, before, ("declined_requests", reason), 1)
        names = (("matched_tokens", ""), ("recomputed_tokens", "declined"), ("receipts", ""))
        assert more(server, before, *names) == [600, 600, 0], reason
    # Fewer tokens than are sold at all.
    before = scrape(server)
    complete(client, document[:40] + words(93, 9), **market.params("alice"))
    eventually(server, before, ("declined_requests", "below_minimum"), 1)
    assert more(server, before, ("matched_tokens", "")) == [0]


def test_a_plain_request_is_in_no_figure(server, client, llm):
    """Nothing of the market's is counted, stored or timed for it."""
    before = settled(server)
    complete(client, words(89, 200))
    assert scrape(server) == before


def test_the_dashboard_asks_for_what_a_running_server_exports(server):
    """No panel's name is missing from /metrics, and no figure of kvmarket's has no panel."""
    there = {name for name, _ in scrape(server)}
    dashboard = json.loads((ROOT / "docs" / "grafana" / "kvmarket.json").read_text())
    shown = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            asked = set(re.findall(PREFIX + r"(\w+)", target["expr"]))
            assert asked <= there, panel["title"]
            shown |= asked
    families = {re.sub("_(total|created|bucket|sum|count)$", "", name) for name in there}
    assert families == set(METRICS)
    assert {re.sub("_(total|bucket|sum|count)$", "", name) for name in shown} == families


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

    kvmarket("document", "publish", str(text), "--model", str(tiny(1)), "--publisher", "moon")
    (listed,) = kvmarket("document", "list")["documents"]
    assert listed["publisher"] == "moon"
    assert kvmarket("document", "show", listed["document_id"])["state"] == "live"
    kvmarket("store", "check")
    kvmarket("document", "delist", listed["document_id"])


def test_an_unknown_connector_ends_the_server_with_one_clear_line(tiny, tmp_path):
    """Before any engine starts; see test_flags for the other ways to be wrong."""
    command = [str(VLLM), "serve", str(tiny(1)), "--kv-connector", "kvmarked"]
    log = tmp_path / "serve.log"
    assert start(command, log).wait(timeout=120) == 2
    text = log.read_text()
    assert "unknown connector 'kvmarked'" in text.strip().splitlines()[-1], text[-2000:]
    assert "EngineCore" not in text
