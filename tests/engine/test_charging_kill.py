"""An engine that outlives its reservations, and one that is killed between load and settlement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.support.engines import NANO
from vllm_kvmarket import Market

pytestmark = pytest.mark.long

TIMEOUT_S = 3

# Answers one request for longer than a reservation lives (with a model that is not too fast), then,
# on command, loads for another and is killed.
CHILD = """
import sys, time
from tests.support.asking import Requests
from tests.support.engines import words
from vllm_kvmarket import Market
from vllm_kvmarket.connector.offline_engine import open_llm
from vllm_kvmarket.market.timed_requests import empty_prefix_cache

market = Market.open(sys.argv[2], {"reservation_timeout_s": int(sys.argv[3])})
llm = open_llm(sys.argv[1], market, max_model_len=4096)
document = words(7000, 600)
market.publish(llm, token_ids=document, publisher="pat")
empty_prefix_cache(llm)
for name in ("long", "killed"):
    requests = Requests(llm)
    started = time.monotonic()
    requests.start(name, document + words(1, 9), market.params("alice"), max_tokens=3000)
    requests.until_tokens(name, 3)
    print("answering", name, flush=True)
    while time.monotonic() < started + 2 * int(sys.argv[3]):
        requests.until_tokens(name, requests._tokens[name] + 1)
    requests.abort(name)
    requests.finish()
    print("ended", name, flush=True)
    input()
"""


def test_a_hold_lives_as_long_as_its_engine_and_no_longer(smollm, tmp_path):
    """Renewed while the answer is being written, then settled; after a kill it expires, and the
    buyer has paid nothing for an answer that never came.
    """
    with Market.open(tmp_path) as market:
        market.create_account("alice")
        market.deposit("alice", NANO, "d")
        command = [sys.executable, "-c", CHILD, str(smollm), str(tmp_path)]
        command += [str(TIMEOUT_S)]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as child:
            try:
                watch(market, child)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)


def watch(market: Market, child: subprocess.Popen[str]) -> None:
    """Look at the money at each step of the child's life, and kill it in its last."""
    expect(child, "answering long")
    assert held(market) == 600 * 500
    expect(child, "ended long")
    deadline = time.monotonic() + 10
    while held(market) and time.monotonic() < deadline:
        time.sleep(0.05)
    (receipt,) = market.receipts("alice")
    assert receipt.request_id == "long"
    paid = market.ledger.account("alice").debits_posted
    assert paid == receipt.charge_nano == 600 * 500
    renewals = [each for each in market.ledger.transfers() if each.kind == "renew"]
    assert renewals, "it took twice as long as its reservation lives"

    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    expect(child, "answering killed")
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert held(market) == 600 * 500
    time.sleep(TIMEOUT_S + 0.1)
    # Any engine that starts on the market, or lives there, does this.
    assert market.ledger.expire_pending() == 1
    assert held(market) == 0
    assert market.ledger.account("alice").balance_nano == NANO - paid
    assert len(market.receipts()) == 1
    assert market.ledger.check_integrity() == []


def held(market: Market) -> int:
    """Nano-units of alice's that are reserved."""
    return market.ledger.account("alice").debits_pending


def expect(child: subprocess.Popen[str], line: str) -> None:
    """Read on until the child says so."""
    assert child.stdout is not None
    assert child.stderr is not None
    for said in child.stdout:
        if said.strip() == line:
            return
    raise AssertionError(f"no {line!r}: {child.stderr.read()[-3000:]}")
