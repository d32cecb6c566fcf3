"""Log, check, statement and payout over a ledger in PostgreSQL: the same as over SQLite."""

import msgspec
import pytest

from tests.support.ledger_books import NANO, fresh_number, funded_ledger, hold, receipt
from vllm_kvmarket.ledger import post
from vllm_kvmarket.ledger.statements import payout, statement
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs import (
    ProofError,
    TransparencyLog,
    backup,
    check_ledger,
    check_new,
    read_inclusion,
    restore,
)

psycopg = pytest.importorskip("psycopg", reason="pip install vllm-kvmarket[postgres]")
from tests.support.postgres import running_postgres  # noqa: E402  # needs psycopg


@pytest.fixture(scope="module")
def server():
    yield from running_postgres()


@pytest.fixture
def url(server):
    return server.create_database(f"proofs-{fresh_number()}")


def fill(ledger, count, prefix="h"):
    for number in range(count):
        held = f"{prefix}{number}"
        sold = msgspec.structs.replace(hold(held, 3), code="reuse")
        charge = post(id=f"{held}:post", pending_id=held, amount_nano=2)
        ledger.submit([sold, charge], receipt=receipt(f"kvr_{held}", 2, charge.id)).result()


def test_the_log_is_the_same_on_every_database(url, tmp_path):
    """The same transfers at the same times: the same root, whatever keeps them."""
    roots = []
    for place in (url, tmp_path / "market.sqlite"):
        home = tmp_path / f"home{len(roots)}"
        with funded_ledger(place, clock=lambda: 1764000000.1234567) as ledger:
            fill(ledger, 20)
            checkpoint = TransparencyLog(ledger, home).checkpoint()
            assert checkpoint.size == 41
            roots.append(checkpoint.root)
            assert check_ledger(ledger, home).ok
            assert check_new(ledger, home).ok
            fill(ledger, 3, "more")
            report = check_new(ledger, home)
            assert (report.ok, report.since) == (True, report.transfers - 6)
    assert roots[0] == roots[1]


def test_machines_that_share_a_ledger_sign_the_same_root(url, tmp_path):
    """Each in its own name, with its own keys; proofs of one verify with its keys alone."""
    with funded_ledger(url) as ledger:
        fill(ledger, 5)
        logs = [TransparencyLog(ledger, tmp_path / name) for name in ("a", "b")]
        one, other = (log.checkpoint() for log in logs)
        assert (one.size, one.root) == (other.size, other.root)
        assert one.origin != other.origin
        for log in logs:
            proof = read_inclusion(log.prove("h3:post").text())
            assert proof.verify(log.keys.public_keys()).amount_nano == "2"
            log.prove_consistency(3).verify(log.keys.public_keys())


def test_statements_and_payouts(url):
    """Brought forward, lines, closing; a payout once."""
    with funded_ledger(url) as ledger:
        fill(ledger, 4)
        made = statement(ledger, "alice")
        assert made.closing_nano == ledger.account("alice").balance_nano
        assert [line.kind for line in made.lines] == ["deposit", *["purchase"] * 4]
        transfer, is_new = payout(ledger, "provider", "bank 1")
        assert (transfer.amount_nano, is_new) == (8, True)
        assert payout(ledger, "provider", "bank 1") == (transfer, False)


def test_a_market_with_its_ledger_in_postgresql_is_backed_up_whole(server, url, tmp_path):
    """Books, keys and log; restored into another home, or with a new database."""
    with Market.open(tmp_path / "home", {"ledger_url": url}) as market:
        market.create_account("alice")
        market.create_account("pat", "publisher")
        market.deposit("alice", NANO, "d1")
        fill(market.ledger, 30)
        market.ledger.transact(hold("open", 5))
        kept = TransparencyLog(market.ledger, market.home).checkpoint()
        made = backup(market, tmp_path / "backup")
        assert (made.check.ok, made.check.transfers, made.check.checkpoints) == (True, 62, 1)
        accounts, transfers = market.ledger.accounts(), market.ledger.transfers()
        due_at_s = market.ledger.due_at_s("open")
    fresh = server.create_database(f"restored-{fresh_number()}")
    for name, ledger_url in (("own", None), ("other", fresh)):
        restored = restore(tmp_path / "backup", tmp_path / name, ledger_url=ledger_url)
        assert restored.check.ok
        with Market.open(tmp_path / name, {"ledger_url": ledger_url}) as market:
            assert (market.ledger.accounts(), market.ledger.transfers()) == (accounts, transfers)
            assert market.ledger.due_at_s("open") == due_at_s
            assert check_ledger(market.ledger, market.home, [kept.note]).ok
    with funded_ledger(server.create_database(f"used-{fresh_number()}")) as used:
        used.deposit("alice", 1, "another")
    with pytest.raises(ProofError, match="give an empty database"):
        restore(tmp_path / "backup", tmp_path / "no", ledger_url=used._storage._url)
    assert not (tmp_path / "no").exists()
