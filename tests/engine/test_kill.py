"""kill -9 at random moments of publishing and loading: nothing sold is lost, nothing listed is bad.

`KVMARKET_KILL_ROUNDS=50 pytest tests/engine/test_kill.py` is the long form; docs/faults.md has what
it showed.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.engines import NANO
from vllm_kvmarket import Market
from vllm_kvmarket.core.errors import StoreError
from vllm_kvmarket.market.garbage_collection import collect_garbage

ROUNDS = int(os.environ.get("KVMARKET_KILL_ROUNDS", "2"))
SEED = int(os.environ.get("KVMARKET_KILL_SEED", "1"))
FIXED = 7000  # the document that every round publishes again

# Publishes and buys long documents without end: at most moments something is under way.
CHILD = """
import sys
from tests.support.engines import words
from vllm_kvmarket import Market
from vllm_kvmarket.connector.offline_engine import open_llm
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache

model, home, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
market = Market.open(home, {"host_cache_bytes": 0})
llm = open_llm(model, market, max_model_len=4096)
listing = market.publish(llm, token_ids=words(7000, 3000), title="fixed")
assert listing.state == "live", listing
answer = ask(llm, words(7000, 3000) + words(1, 9), market.params("alice"), max_tokens=4, rest_s=0)
assert answer.market["reused_tokens"] == 3000, answer
print("ready", *answer.token_ids, flush=True)
seed = 7001 + 1000 * number
while True:
    seed += 1
    document = words(seed, 3000)
    market.publish(llm, token_ids=document, title=str(seed))
    empty_prefix_cache(llm)
    answer = ask(llm, document + words(2, 9), market.params("alice"), max_tokens=4, rest_s=0)
    assert answer.market["reused_tokens"] == 3000, answer
"""


def run_until_killed(model: Path, home: Path, number: int, pause_s: float) -> list[str]:
    """One engine's life: started, at work, killed `pause_s` after it was ready; its answer."""
    log = home / "child.log"
    facts = [str(model), str(home), str(number)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *facts],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout as output:
        ready = next((line for line in output if line.startswith("ready")), "")
        if ready:
            time.sleep(pause_s)
        assert ready and process.poll() is None, log.read_text()[-3000:]
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # A process that is writing takes a moment to die.
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            while member.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
    return ready.split()[1:]


def check(home: Path) -> int:
    """Check a home after a death, before any repair; returns how many documents are live."""
    with Market.open(home) as market:
        market.ledger.expire_pending()
        assert market.ledger.check_integrity() == []
        assert market.catalogue.check_integrity() == []
        live = market.catalogue.listings(state="live")
        for listing in live:
            for key in listing.chunk_keys:
                try:
                    market.store.verify(key)
                except StoreError as error:
                    raise AssertionError(f"{listing.terms.title} is listed, but {error}") from error
        assert not [
            listing for listing in market.catalogue.listings() if listing.state == "damaged"
        ]
        # A killed process may be a zombie while one of its threads still waits for the disk, and
        # holds its draft.
        deadline = time.monotonic() + 20
        while market.store.disk.sweep_temporary() or market.store.disk.usage().drafts:
            assert time.monotonic() < deadline, "a dead writer's draft stays"
            time.sleep(0.05)
        return len(live)


@pytest.mark.long
@pytest.mark.timeout(120 * ROUNDS + 300)
def test_an_engine_that_is_killed_at_any_moment_loses_and_spoils_nothing(tiny, tmp_path):
    """Seeded rounds of kill -9: listings whole, ledger balanced, no rubbish, next publish works."""
    chance = random.Random(SEED)
    with Market.open(tmp_path) as market:
        market.create_account("alice")
        market.deposit("alice", 1000 * NANO, "d")
    answers = set()
    listed = 0
    for number in range(ROUNDS):
        pause_s = chance.uniform(0.0, 6.0)
        answers.add(tuple(run_until_killed(tiny(1), tmp_path, number, pause_s)))
        now = check(tmp_path)
        print(f"round {number}: killed after {pause_s:.2f} s, {now} documents listed")
        assert now >= max(listed, 1), "a listed document is gone"
        listed = now
    assert len(answers) == 1, "the same document, the same answer, in every engine"
    with Market.open(tmp_path) as market:
        kept = {key for listing in market.catalogue.listings("live") for key in listing.chunk_keys}
        collect_garbage(market)
        assert set(market.store.disk.keys()) == kept
        assert len(market.receipts()) >= ROUNDS - 1
