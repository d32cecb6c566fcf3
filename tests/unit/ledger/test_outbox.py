"""The outbox with real files, processes and kills: what was sold is booked after a restart."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time

import apsw
import pytest

from tests.support.ledger_books import NANO, funded_ledger, hold, receipt
from vllm_kvmarket.core.errors import LedgerPostponedError
from vllm_kvmarket.ledger import Ledger, Outcome, post
from vllm_kvmarket.ledger.outbox import Outbox

SELL = """
import math, sys, time
from pathlib import Path
from tests.support.ledger_books import receipt
from vllm_kvmarket.ledger import Ledger, post
place, outbox = map(Path, sys.argv[1:])
ledger = Ledger.open(place, outbox=outbox)
print("ready", flush=True)
sys.stdin.readline()
sold = [post(id="p", pending_id="h", amount_nano=60)]
ledger.submit(sold, receipt=receipt("kvr_1", 60, "p"), patience_s=math.inf)
print("sold", flush=True)
time.sleep(60)
"""


def wait_for(condition):
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "market.sqlite"


@pytest.fixture
def outbox(tmp_path):
    return tmp_path / "outbox"


def test_a_sale_survives_kill_9_while_the_database_is_away(place, outbox):
    """Another process of the home books it, once, when the first one is gone."""
    with funded_ledger(place) as ledger:
        ledger.submit([hold("h", 100)]).result()
    command = [sys.executable, "-c", SELL, str(place), str(outbox)]
    seller = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert seller.stdout.readline() == "ready\n"
    other = apsw.Connection(str(place))
    other.execute("BEGIN IMMEDIATE")
    print(file=seller.stdin, flush=True)
    assert seller.stdout.readline() == "sold\n"
    seller.send_signal(signal.SIGKILL)
    seller.communicate()
    other.execute("ROLLBACK")
    other.close()
    with Ledger.open(place, outbox=outbox) as ledger:
        wait_for(lambda: ledger.account("alice").balance_nano == NANO - 60)
        assert [each.id for each in ledger.receipts()] == ["kvr_1"]
        assert ledger.book_outbox() == 0
        assert ledger.check_integrity() == []
    assert list(outbox.iterdir()) == []


def test_a_living_process_keeps_its_outbox(place, outbox):
    """Its entries are booked by itself alone; when they are, the file goes with the process."""
    with funded_ledger(place, outbox=outbox) as ledger, Ledger.open(place, outbox=outbox) as other:
        ledger.submit([hold("h", 100)]).result()
        blocker = apsw.Connection(str(place))
        blocker.execute("BEGIN IMMEDIATE")
        sold = ledger.submit(
            [post(id="p", pending_id="h", amount_nano=60)],
            receipt=receipt("kvr_1", 60, "p"),
            patience_s=math.inf,
        )
        assert len(list(outbox.iterdir())) == 1
        assert other.book_outbox() == 0
        blocker.execute("ROLLBACK")
        blocker.close()
        assert sold.result(30)[0].outcome is Outcome.OK
    assert list(outbox.iterdir()) == []


def test_a_sale_behind_the_close_is_booked_by_the_next_process(place, outbox):
    """A closed ledger takes it into the outbox, and says so."""
    with funded_ledger(place, outbox=outbox) as ledger:
        ledger.submit([hold("h", 100)]).result()
    sold = ledger.submit(
        [post(id="p", pending_id="h", amount_nano=60)],
        receipt=receipt("kvr_1", 60, "p"),
        patience_s=math.inf,
    )
    with pytest.raises(LedgerPostponedError, match="booked later"):
        sold.result(0)
    ledger._outbox.close()
    with Ledger.open(place, outbox=outbox) as again:
        wait_for(again.receipts)
        assert again.account("alice").balance_nano == NANO - 60


def test_a_sale_that_the_rules_refuse_is_recorded(place, outbox):
    """It is not lost without a trace: a file says what was sold, and why it is not booked."""
    with funded_ledger(place, outbox=outbox) as ledger:
        sold = [post(id="p", pending_id="none", amount_nano=60)]
        answer = ledger.submit(sold, receipt=receipt("kvr_1", 60, "p"), patience_s=math.inf)
        assert answer.result()[0].outcome is Outcome.PENDING_NOT_FOUND
    (record,) = (outbox / "refused.txt").read_text().splitlines()
    assert record.startswith("PENDING_NOT_FOUND")
    assert "kvr_1" in record


def test_half_an_entry_is_passed_over(outbox, caplog):
    """A process that died while it wrote has not acknowledged this one."""
    outbox.mkdir()
    (outbox / "0123456789abcdef.jsonl").write_bytes(b'{"operations": [], "linked": true, "re')
    assert list(Outbox(outbox).abandoned()) == [[]]
    assert "half an entry" in caplog.text
    assert list(outbox.iterdir()) == []
