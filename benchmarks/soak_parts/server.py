"""The real `vllm serve ... --kv-connector kvmarket` that is soaked, and its accounts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.soak_parts.plan import (
    BLOCKS,
    CONTEXT,
    MODEL_NAME,
    MOST_SEQUENCES,
    NANO,
    Plan,
)
from vllm_kvmarket import Market
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.market.market import DATABASE_FILE

BIN = Path(sys.executable).parent
STARTS_WITHIN_S = 300
STOPS_WITHIN_S = 90
# Two that can pay for everything, one whose funds end on the way, one that never had any.
BUYERS = {"alice": 1000 * NANO, "bob": 1000 * NANO, "carol": NANO // 50, "dave": 0}
PUBLISHERS = {"acme": 1000 * NANO, "zenith": 1000 * NANO, "penniless": 0}


@dataclass(slots=True)
class Soaked:
    """The server under soak; `market` is the operator's view, from this process."""

    plan: Plan
    base: str
    process: subprocess.Popen[bytes]
    log: Path
    market: Market
    keys: dict[str, str] = field(default_factory=dict)

    def family(self) -> list[psutil.Process]:
        """The server's processes: the API server first, then the engine's."""
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def metrics(self) -> dict[str, float]:
        """/metrics: each sample by its name, summed over labels, and by name and labels."""
        found: dict[str, float] = {}
        lines = httpx.get(f"{self.base}/metrics", timeout=30).text.splitlines()
        for line in lines:
            if line.startswith("#") or " " not in line:
                continue
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
            bare = name.partition("{")[0]
            found[bare] = found.get(bare, 0.0) + float(value) if bare != name else float(value)
        return found

    def command(self, *arguments: str) -> tuple[int, str]:
        """Run a `kvmarket` command on this market: exit code and what it printed."""
        config = json.dumps(self.plan.config())
        done = subprocess.run(
            [str(BIN / "kvmarket"), *arguments, "--config", config],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout + (done.stderr if done.returncode > 1 else "")


@contextmanager
def soaked(plan: Plan) -> Iterator[Soaked]:
    """Start the server, open accounts and keys; gone, process and all, afterwards.

    Raises RuntimeError when it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = plan.home.parent / "server.log"
    command = [str(BIN / "vllm"), "serve", str(plan.model), "--kv-connector", "kvmarket"]
    command += ["--kvmarket-config", json.dumps(plan.config()), "--served-model-name", MODEL_NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", str(CONTEXT), "--enforce-eager", "--generation-config", "vllm"]
    command += ["--num-gpu-blocks-override", str(BLOCKS), "--max-num-seqs", str(MOST_SEQUENCES)]
    command += ["--max-num-batched-tokens", "512", "--disable-uvicorn-access-log"]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    base = f"http://127.0.0.1:{port}"
    try:
        with Market.open(config=plan.config()) as market:
            server = Soaked(plan, base, process, log, market)
            _open_accounts(server)
            _wait_until_healthy(server)
            yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> bool:
    """End a server; whether it ended by itself in time."""
    if process.poll() is not None:
        return True
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(timeout=STOPS_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
    _, left = psutil.wait_procs(family, timeout=15)
    for each in left:
        each.kill()
    return not left and process.returncode is not None


def _open_accounts(server: Soaked) -> None:
    keys = Keys(server.market.home / DATABASE_FILE)
    for kind, accounts, scope in (
        ("buyer", BUYERS, "buyer"),
        ("publisher", PUBLISHERS, "publisher"),
    ):
        for account, funds_nano in accounts.items():
            server.market.create_account(account, kind)
            if funds_nano:
                server.market.deposit(account, funds_nano, f"first:{account}")
            server.keys[account] = keys.create(account, (scope,))[0]
    server.keys["operator"] = keys.create("operator", ("admin",))[0]
    keys.close()


def _wait_until_healthy(server: Soaked) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.base}/health", timeout=2).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{server.log.read_text()[-3000:]}")


def account_facts(market: Market) -> dict[str, dict[str, Any]]:
    """Every account's balances, for the report."""
    return {
        account.id: {
            "kind": account.kind,
            "balance_nano": account.balance_nano,
            "debits_posted": account.debits_posted,
            "credits_posted": account.credits_posted,
            "held": account.debits_pending,
        }
        for account in market.ledger.accounts()
    }
