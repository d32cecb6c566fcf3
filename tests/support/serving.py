"""A real `vllm serve ... --kv-connector kvmarket`, and what tests say to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import ROOT
from tests.support.engines import NANO, words
from tests.support.forked import ForkedCommand, forks
from vllm_kvmarket import Market
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.market.market import DATABASE_FILE

ServerProcess = subprocess.Popen[bytes] | ForkedCommand
VLLM = ROOT / ".venv" / "bin" / "vllm"
MODEL = "tiny"
# Documents that tests publish; the second one as chat: a few tokens more than three blocks, so that
# an account's own earlier questions do not add another cached block.
DOCUMENT = words(7000, 600)
TEXT = ("Ships leave the harbour at dawn. " * 52).strip()
PRICE_NANO = 500  # a reused token, on the default tariff


@dataclass(frozen=True)
class Server:
    """A running server, its market as its operator sees it, and some keys."""

    base: str
    port: int
    process: ServerProcess
    market: Market
    keys: Keys
    log: Path

    def key(self, account: str, *scopes: str, funds_nano: int = NANO) -> str:
        """Open an account where there is none, and make a key for it: its secret."""
        self.market.create_account(account)
        if funds_nano:
            self.market.deposit(account, funds_nano, f"first:{account}")
        return self.keys.create(account, scopes or ("buyer",))[0]

    def post(
        self, path: str, body: Any, key: str | None = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """A request with a JSON body."""
        given = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.post(
            f"{self.base}{path}", json=body, headers=given | (headers or {}), timeout=120
        )

    def complete(self, prompt: Any, key: str | None = None, **more: Any) -> Any:
        """A greedy completion's answer."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0, **more}
        response = self.post("/v1/completions", body, key)
        assert response.status_code == 200, response.text
        return response.json()

    def publish(
        self, tokens: Sequence[int], title: str = "", as_: str = "text", **terms: Any
    ) -> str:
        """Put a document on offer, as the operator does; its id, when the server sells it."""
        wish = {"publish": {"terms": {"title": title, "rendered_as": as_, **terms}}}
        params = {"kv_transfer_params": {"kvmarket": self.market.credentials.sign_params(wish)}}
        answer = self.complete(list(tokens), max_tokens=1, **params)["kv_transfer_params"]
        listing = self.market.wait_for_listing(answer["kvmarket"]["document_id"])
        time.sleep(0.6)  # two of the server's intervals between looking for new listings
        return listing.document_id

    def spent(self, account: str) -> int:
        """Nano-units booked to an account, once nothing is reserved; the books must be right."""
        deadline = time.monotonic() + 15
        while self.market.ledger.account(account).debits_pending:
            assert time.monotonic() < deadline, "something stays reserved"
            time.sleep(0.02)
        assert self.market.ledger.check_integrity() == []
        return self.market.ledger.account(account).debits_posted


def sold(answer: Any) -> Any:
    """The market's part of an answer."""
    return answer["kv_transfer_params"]["kvmarket"]


def cached(answer: Any) -> int:
    """Tokens that the usage says were not computed."""
    return (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0


@contextmanager
def serving(
    model: Path, home: Path, *arguments: str, config: dict[str, Any] | None = None
) -> Iterator[Server]:
    """A server on the market at `home`; gone, process and all, afterwards."""
    port = free_port()
    settings = {"home": str(home), **(config or {})}
    log = home.parent / f"serve-{port}.log"
    command = serve_command(model, settings, port, *arguments)
    process = start(command, log)
    base = f"http://127.0.0.1:{port}"
    try:
        with Market.open(config=settings) as market:
            keys = Keys(market.home / DATABASE_FILE)
            wait_until_healthy(base, process, log)
            yield Server(base, port, process, market, keys, log)
            keys.close()
    finally:
        process.terminate()
        process.wait(timeout=60)


def free_port() -> int:
    """A port of the loopback interface that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serve_command(model: Path, settings: dict[str, Any], port: int, *arguments: str) -> list[str]:
    """The command line of a server with a market of these settings."""
    command = [str(VLLM), "serve", str(model), "--kv-connector", "kvmarket"]
    command += ["--kvmarket-config", json.dumps(settings), "--served-model-name", MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    return [*command, "--max-model-len", "4096", "--enforce-eager", *arguments]


def start(command: list[str], log: Path) -> ServerProcess:
    """Start a server, as a fork if tests may."""
    if forks():
        return ForkedCommand(command, log, {"HF_HUB_OFFLINE": "1"})
    with log.open("wb") as out:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)


def wait_until_healthy(base: str, process: ServerProcess, log: Path) -> None:
    """Fails with the server's log when it ends, or does not answer in time."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{base}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(log.read_text()[-3000:])
