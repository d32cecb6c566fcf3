"""Attacks on a real server, as a table: the attack, who tries it, and what must come of it.

Each row is a function that attacks and then checks the effect. Those that load the server, or use
up a limit of this address, stand last.
"""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import pytest

from tests.support.engines import NANO, words
from tests.support.serving import DOCUMENT, MODEL, PRICE_NANO, Server, cached, sold
from vllm_kvmarket.core.errors import KVMarketError

pytest_plugins = ("tests.support.gate_server",)

INPUT_NANO = 5_000  # a computed token, on the default tariff
MTOK = 1_000_000
BODY_LIMIT = 4 << 20  # the default
LAG_S = 0.05  # on a quiet core
# Processor time of the reference on a quiet core of the machine on which the bounds were found.
REFERENCE_S = 0.008
ASKS = {"reuse": "prefer"}  # what wants to buy, whatever its key has agreed to

_numbers = count(1)


@dataclass(frozen=True)
class Attack:
    """A row of the table."""

    name: str
    attacker: str
    expected: str
    run: Callable[[Attacked], None]


ATTACKS: list[Attack] = []


def attack(attacker: str, expected: str) -> Callable[[Callable[[Attacked], None]], None]:
    """Add a function to the table; its name is the attack's."""

    def add(run: Callable[[Attacked], None]) -> None:
        ATTACKS.append(Attack(run.__name__.replace("_", " "), attacker, expected, run))

    return add


@dataclass
class Attacked:
    """The server under attack, with documents and accounts that nothing else uses."""

    server: Server
    document: str
    """The id of DOCUMENT, at the tariff's price."""
    accounts: dict[str, str] = field(default_factory=dict)

    def buyer(self, *, funds_nano: int = NANO) -> tuple[str, str]:
        """A new account and its key."""
        name = f"attacker{next(_numbers)}"
        return name, self.server.key(name, funds_nano=funds_nano)

    def publish(self, tokens: list[int], publisher: str, **terms: Any) -> str:
        """A listing of a publisher's, on the server."""
        self.server.market.create_account(publisher, "publisher")
        return self.server.publish(tokens, publisher, publisher=publisher, **terms)

    def earned(self, account: str) -> int:
        """The amount that an account has received."""
        return self.server.market.ledger.account(account).credits_posted

    def generate(
        self, key: str | None, prompt: Any, headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        """A completion, whatever its status."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0, **more}
        return self.server.post("/v1/completions", body, key, headers)

    def refused(self, response: httpx.Response, *statuses: int) -> None:
        """Check that an answer is a refusal and holds no token of a document's."""
        assert response.status_code in statuses, (response.status_code, response.text[:300])
        assert "choices" not in response.json()


@pytest.fixture(scope="module")
def attacked(server, document):
    return Attacked(server, document)


# Who is paid, and what a buyer pays


@attack("a publisher", "the original is paid at its price; the copy earns nothing")
def a_copy_with_one_word_more(on: Attacked) -> None:
    original, price = words(8000, 600), 400
    on.publish(original, "acme", cache_read_nano_per_mtok=price * MTOK)
    on.publish([*original, 77], "mallory", cache_read_nano_per_mtok=INPUT_NANO * MTOK)
    before = on.earned("acme")
    name, key = on.buyer()
    answer = on.server.complete([*original, 77, *words(8001, 20)], key, kvmarket=ASKS)
    assert on.server.spent(name) == sold(answer)["charge_nano"] == 600 * price
    assert on.earned("acme") > before
    assert on.earned("mallory") == 0


@attack("a publisher", "each range of tokens is paid to the listing that offered it first")
def a_longer_edition(on: Attacked) -> None:
    original, added = words(8010, 600), words(8011, 200)
    on.publish(original, "first", cache_read_nano_per_mtok=300 * MTOK, royalty_ppm=500_000)
    on.publish(original + added, "second", cache_read_nano_per_mtok=450 * MTOK, royalty_ppm=500_000)
    name, key = on.buyer()
    on.server.complete(original + added + words(8012, 20), key)
    assert on.server.spent(name) == 600 * 300 + 200 * 450
    assert on.earned("first") == 600 * 300 // 2
    assert on.earned("second") == 200 * 450 // 2


@attack("a publisher", "a document that is named is what is bought, at its price")
def a_copy_of_a_named_original(on: Attacked) -> None:
    original = words(8020, 600)
    named = on.publish(original, "author", cache_read_nano_per_mtok=200 * MTOK)
    more = words(8021, 100)
    on.publish(original + more, "copier", cache_read_nano_per_mtok=INPUT_NANO * MTOK)
    name, key = on.buyer()
    on.server.complete(more + words(8022, 20), key, kvmarket={"document": named})
    assert on.server.spent(name) == 600 * 200
    assert on.earned("copier") == 0


@attack("a publisher", "a listing dearer than computing is not sold")
def a_listing_dearer_than_computing(on: Attacked) -> None:
    tokens = words(8030, 600)
    terms = {"cache_read_nano_per_mtok": 2 * INPUT_NANO * MTOK}
    on.publish(tokens, "usurer", **terms)
    name, key = on.buyer()
    answer = on.server.complete(tokens + words(8031, 20), key, kvmarket=ASKS)
    assert sold(answer)["charge_nano"] == 0
    assert on.server.spent(name) == on.earned("usurer") == 0


@attack("a publisher", "a buyer who never agreed to its price does not pay it")
def a_toll_on_everybodys_prefix(on: Attacked) -> None:
    tokens = words(8040, 600)
    on.publish(tokens, "toll", cache_read_nano_per_mtok=4 * PRICE_NANO * MTOK)
    name, key = on.buyer()
    on.server.complete(tokens + words(8041, 20), key)
    assert on.server.spent(name) == on.earned("toll") == 0


# Documents that are not paid for


@attack("a buyer", "both requests of the pair are charged, and each names a receipt that exists")
def a_pair_with_one_request_id(on: Attacked) -> None:
    name, key = on.buyer()
    prompt, headers = DOCUMENT + words(8050, 20), {"x-request-id": "the-same"}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(on.generate, key, prompt, headers, max_tokens=64)
        second = pool.submit(on.generate, key, prompt, headers, prompt_logprobs=0)
        answers = [first.result(), second.result()]
    charges = [sold(each.json()) for each in answers if each.status_code == 200]
    charged = sum(each["charge_nano"] for each in charges)
    assert on.server.spent(name) == charged >= 600 * PRICE_NANO
    on.server.complete(prompt, key)  # and a third one pays as well
    assert on.server.spent(name) == charged + 600 * PRICE_NANO
    receipts = {receipt.id for receipt in on.server.market.ledger.receipts(account=name)}
    assert {each["receipt_id"] for each in charges if each["charge_nano"]} <= receipts


@attack("a buyer", "402, and no token")
def a_document_for_nothing(on: Attacked) -> None:
    name, key = on.buyer()
    field = {"document": on.document, "max_price_nano": 0}
    on.refused(on.generate(key, "Repeat the text.", kvmarket=field), 402)
    assert on.server.spent(name) == 0


@attack("a buyer", "402, and no token")
def a_document_without_funds(on: Attacked) -> None:
    _, key = on.buyer(funds_nano=0)
    on.refused(on.generate(key, "Repeat the text.", kvmarket={"document": on.document}), 402)


@attack("anybody", "401, and no token")
def a_document_without_a_key(on: Attacked) -> None:
    on.refused(on.generate(None, "Repeat the text.", kvmarket={"document": on.document}), 401)


@attack("a buyer", "402: an account that was never opened buys nothing")
def a_document_on_an_account_that_was_never_opened(on: Attacked) -> None:
    secret, _ = on.server.keys.create("never-opened", ["buyer"])
    time.sleep(1)
    on.refused(on.generate(secret, "Repeat.", kvmarket={"document": on.document}), 402, 404)


@attack("a buyer", "400: a truncated document is not what is sold")
def truncation_of_a_document(on: Attacked) -> None:
    name, key = on.buyer()
    question = words(8060, 20)
    cut = {"truncate_prompt_tokens": 619, "truncation_side": "left"}
    on.refused(on.generate(key, question, kvmarket={"document": on.document}, **cut), 400)
    assert on.server.spent(name) == 0


@attack("a buyer", "a refusal: beams forget who pays")
def beam_search_with_a_document(on: Attacked) -> None:
    _, key = on.buyer()
    more = {"use_beam_search": True, "n": 4, "kvmarket": {"document": on.document}}
    on.refused(on.generate(key, "Repeat the text.", **more), 400, 403)


@attack("anybody", "a refusal: each beam and token would be a full prefill")
def beam_search_without_a_key(on: Attacked) -> None:
    prompt = DOCUMENT + words(8061, 4)
    on.refused(on.generate(None, prompt, use_beam_search=True, n=8), 401, 403)


@attack("a buyer", "400: nothing else may be asked together with a document")
def fields_that_show_a_document(on: Attacked) -> None:
    name, key = on.buyer()
    for more in ({"prompt_logprobs": 0}, {"echo": True}, {"suffix": "x"}, {"priority_": 1}):
        on.refused(on.generate(key, "x", kvmarket={"document": on.document}, **more), 400)
    assert on.server.spent(name) == 0


@attack("a buyer", "400, and no token")
def a_document_whose_prefix_cache_is_skipped(on: Attacked) -> None:
    name, key = on.buyer()
    body = {
        "model": MODEL,
        "token_ids": words(8062, 8),
        "sampling_params": {"max_tokens": 4, "skip_reading_prefix_cache": True},
        "kvmarket": {"document": on.document},
    }
    on.refused(on.server.post("/inference/v1/generate", body, key), 400)
    assert on.server.spent(name) == 0


@attack("a buyer", "the header is dropped: the document is bought")
def another_model_by_a_header_of_sagemakers(on: Attacked) -> None:
    name, key = on.buyer()
    body = {"prompt": words(8063, 8), "model": MODEL, "max_tokens": 2}
    body["kvmarket"] = {"document": on.document}
    headers = {"x-amzn-sagemaker-adapter-identifier": "another"}
    answer = on.server.post("/invocations", body, key, headers)
    assert answer.status_code == 200, answer.text
    assert sold(answer.json())["reused_tokens"] == 600
    assert on.server.spent(name) == 600 * PRICE_NANO


@attack("a buyer", "a retry is free once; another body, or a fifth answer, is 409")
def one_idempotency_key_for_everything(on: Attacked) -> None:
    name, key = on.buyer()
    prompt, headers = DOCUMENT + words(8070, 20), {"idempotency-key": "one-for-all"}
    for _ in range(4):
        assert on.generate(key, prompt, headers).status_code == 200
    assert on.server.spent(name) == 600 * PRICE_NANO
    on.refused(on.generate(key, prompt, headers), 409)
    on.refused(on.generate(key, DOCUMENT + words(8071, 20), headers), 409)
    other, key_of_other = on.buyer()
    assert on.generate(key_of_other, prompt, headers).status_code == 200
    assert on.server.spent(other) == 600 * PRICE_NANO


@attack("a buyer", "a stream's last event is about this request, whatever id it has")
def a_stream_that_shows_old_receipts(on: Attacked) -> None:
    _, key = on.buyer()
    shown = []
    for question in (8072, 8073):
        body = {"model": MODEL, "prompt": DOCUMENT + words(question, 20), "max_tokens": 2}
        headers = {"x-request-id": "the-same-stream"}
        text = on.server.post("/v1/completions", {**body, "stream": True}, key, headers).text
        shown.append({part.split('"')[0] for part in text.split('"id":"')[1:] if "kvr" in part[:4]})
    assert all(len(receipts) == 1 for receipts in shown), shown
    assert shown[0].isdisjoint(shown[1])


# Keys, tokens and secrets


@attack("an operator by mistake", "no key is made: that account's money has no end")
def a_key_for_world(on: Attacked) -> None:
    admin = on.server.keys.create("boss", ["admin"])[0]
    time.sleep(1)
    for account in ("world", "provider"):
        with pytest.raises(KVMarketError):
            on.server.keys.create(account, ["buyer"])
        path = f"/v1/kvmarket/accounts/{account}/keys"
        answer = on.server.post(path, {"scopes": ["buyer"]}, admin)
        assert 400 <= answer.status_code < 500, answer.text


@attack("a reader of logs", "a token is good for its own request, for a minute")
def a_replayed_token(on: Attacked) -> None:
    name, _ = on.buyer()
    credentials = on.server.market.credentials
    bound = credentials.sign_params({"account": name, "request_id": "cmpl-another-0"})
    old = {**bound, "expires_at_s": time.time() + 3600}
    plain = {"account": name, "token": credentials.sign("request", f"account:{name}")}
    for params in (bound, old, plain):
        given = {"kv_transfer_params": {"kvmarket": params}}
        answer = on.server.complete(DOCUMENT + words(8080, 20), None, **given)
        assert cached(answer) == 0
    assert on.server.spent(name) == 0


@attack("another user of the machine", "nothing in the home can be read by anybody else")
def reading_the_database(on: Attacked) -> None:
    home = on.server.market.home
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    open_to_others = [
        path.relative_to(home).as_posix()
        for path in home.iterdir()
        if path.is_file() and path.stat().st_mode & 0o077
    ]
    assert open_to_others == []


@attack("anybody", "no figure of the provider's money")
def finances_in_metrics(on: Attacked) -> None:
    text = httpx.get(f"{on.server.base}/metrics", timeout=60).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:kvmarket")]
    assert lines, "the other figures of the market are there"
    assert [line for line in lines if "_nano" in line.partition("{")[0]] == []


# What is shared


@attack("a customer of a reseller", "two salts of one account share nothing; one salt shares")
def a_clients_salts(on: Attacked) -> None:
    _, key = on.buyer()
    prompt = words(8090, 1500)
    found = [
        cached(on.server.complete(prompt, key, max_tokens=1, cache_salt=salt))
        for salt in ("one", "two", "one")
    ]
    assert found[:2] == [0, 0]
    assert found[2] > 1000


@attack("a buyer", "dropped, for those who are no admins")
def priority_and_ranks(on: Attacked) -> None:
    _, key = on.buyer()
    headers = {"x-vllm-priority": "-5", "x-data-parallel-rank": "7"}
    # vLLM itself refuses a priority without a scheduler for it, and a rank that it does not have.
    assert on.generate(key, [5, 6, 7], headers, priority=-5).status_code == 200


@attack("anybody", "an admin's key is asked for, also by routes that only read")
def routes_that_tell_of_the_server(on: Attacked) -> None:
    for path in ("/server_info", "/tokenizer_info", "/kv_event_sources", "/v1/responses/resp_1"):
        answer = httpx.get(f"{on.server.base}{path}", timeout=60)
        assert answer.status_code in (401, 403, 404), path
    body = {"weights_path": "x"}
    for path in ("/reload_weights", "/collective_rpc", "/sleep", "/scale_elastic_ep"):
        assert on.server.post(path, body).status_code in (401, 403, 404), path


@attack("another publisher", "what is somebody else's stays as it is")
def changing_anothers_document(on: Attacked) -> None:
    on.server.market.create_account("eve", "publisher")
    key = on.server.keys.create("eve", ["publisher"])[0]
    time.sleep(1)
    path = f"{on.server.base}/v1/kvmarket/documents/{on.document}"
    headers = {"authorization": f"Bearer {key}"}
    for method, body in (("DELETE", None), ("PATCH", {"cache_read_nano_per_mtok": 0})):
        answer = httpx.request(method, path, json=body, headers=headers, timeout=60)
        assert answer.status_code in (403, 404), answer.text
    assert on.server.market.catalogue.get(on.document).state == "live"


# Load


WATCH = """
import http.client, json, sys, threading, time
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
server = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
seconds = []

def for_a_core():
    waited_ns = 0
    for process in (sys.argv[2], "self"):
        thread = process if process != "self" else str(threading.main_thread().native_id)
        with open(f"/proc/{process}/task/{thread}/schedstat") as of_thread:
            waited_ns += int(of_thread.read().split()[1])
    return waited_ns / 1e9

while not ended.is_set():
    waited, began = for_a_core(), time.perf_counter()
    server.request("GET", "/health")
    server.getresponse().read()
    took = time.perf_counter() - began
    seconds.append(took - (for_a_core() - waited))
    if len(seconds) == 1:
        print("ready", flush=True)
    time.sleep(0.002)
print(json.dumps(seconds[1:]))
"""


@contextmanager
def lag(server: Server) -> Iterator[list[float]]:
    """How long /health takes again and again, while something else goes on; filled at the end.

    Measured by a process that does nothing else: the one that attacks has its own work. The time
    is left out in which the server's event loop, or the watcher, could run and had no core:
    attacker and engine share the machine.
    """
    command = [sys.executable, "-c", WATCH, str(server.port), str(server.process.pid)]
    seconds: list[float] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as watch:
        assert watch.stdout is not None
        assert watch.stdout.readline() == "ready\n"
        yield seconds
        output, _ = watch.communicate()
    seconds += json.loads(output)


def reference_s() -> float:
    """How long reading a list of numbers takes now, beside whatever else runs here."""
    text = json.dumps([12_345] * 200_000)
    started = time.perf_counter()
    for _ in range(5):
        json.loads(text)
    return (time.perf_counter() - started) / 5


# Compiling this took vLLM more than a second, on its event loop.
SLOW_FORM = {"structured_outputs": {"json": {"type": "string", "pattern": "a{1,5000}"}}}


def deep(depth: int) -> bytes:
    """JSON whose prompt is nested."""
    return b'{"model":"tiny","prompt":' + b"[" * depth + b"]" * depth + b"}"


def sent(server: Server, path: str, content: bytes, key: str | None = None) -> int:
    """The status of an answer to these bytes; 413 if the server hangs up on a long body."""
    headers = {"content-type": "application/json"}
    headers |= {"authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.post(
            f"{server.base}{path}", content=content, headers=headers, timeout=120
        ).status_code
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        return 413


@attack("anybody", "413, on every route that reads a body")
def forty_megabytes(on: Attacked) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a " * (20 << 20)}).encode()
    for path in ("/tokenize", "/detokenize", "/v1/completions", "/v1/kvmarket/quotes"):
        assert sent(on.server, path, body) == 413, path


@attack("anybody", "400, and the server goes on")
def json_of_any_depth(on: Attacked) -> None:
    for depth in (500, 5_000, 400_000):
        for path in ("/v1/completions", "/tokenize", "/v1/kvmarket/quotes"):
            status = sent(on.server, path, deep(depth))
            assert 400 <= status < 500, (path, depth, status)
    assert httpx.get(f"{on.server.base}/health", timeout=60).status_code == 200


def waits(on: Attacked, send: Callable[[], None]) -> None:
    """Check that others wait at most LAG_S longer while something is sent."""
    longer = []
    for _ in range(8):  # the machine itself may be busy; one quiet round shows the server's part
        slowness = max(1.0, reference_s() / REFERENCE_S)
        with lag(on.server) as quiet:
            time.sleep(2)
        with lag(on.server) as busy:
            send()
        longer.append((max(busy) - max(quiet)) / slowness)
        print(f"others wait {longer[-1] * 1000:.1f} ms longer, slowness {slowness:.2f}")
        if longer[-1] < LAG_S:
            return
    raise AssertionError(longer)


@attack("a buyer", "others wait at most 50 ms longer")
def bodies_that_stop_the_event_loop(on: Attacked) -> None:
    _, key = on.buyer()
    rest = BODY_LIMIT - 4096
    bodies = [
        json.dumps({"model": MODEL, "prompt": [[1]] * (rest // 5)}).encode(),
        json.dumps({"model": MODEL, "prompt": "x", "stop": ["\\"] * (rest // 6)}).encode(),
        json.dumps({"model": MODEL, "messages": [{"a": 1}] * (rest // 10)}).encode(),
        json.dumps({"model": MODEL, "prompt": "\n" * (rest // 2)}).encode(),
        json.dumps({"model": MODEL, "messages": [{"role": 1, "content": 1}] * 999}).encode(),
        json.dumps({"model": MODEL, "prompt": "x", "n": 16_384}).encode(),
        json.dumps({"model": MODEL, "prompt": "x", **SLOW_FORM}).encode(),
        deep(rest // 2 - 64),
    ]

    def send() -> None:
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/kvmarket/quotes"):
            for body in bodies:
                assert 400 <= sent(on.server, path, body, key) < 500

    waits(on, send)


@attack("anybody", "429 before long; after the wait that it names, a good key works again")
def a_flood_of_wrong_keys(on: Attacked) -> None:
    _, key = on.buyer()
    answers = [on.generate(f"kvm_{number:043d}", "x", max_tokens=1) for number in range(60)]
    assert {answer.status_code for answer in answers} == {401, 429}
    time.sleep(int(answers[-1].headers["retry-after"]))
    assert on.generate(key, [5, 6, 7], max_tokens=1).status_code == 200


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row.name)
def test_an_attack_has_no_effect_but_the_expected_one(attacked, row):
    """The row's function attacks, and fails if anything but `expected` came of it."""
    row.run(attacked)
    assert attacked.server.process.poll() is None
    assert attacked.server.market.ledger.check_integrity() == []
