"""Checks of what was booked since the last one: what they find, and which record they believe."""

from __future__ import annotations

import apsw
import pytest

from tests.support.ledger_books import funded_ledger, hold, receipt
from tests.support.proof_market import open_shop, sell
from vllm_kvmarket.auth.signing_keys import SigningKeys
from vllm_kvmarket.ledger import GRACE_S, Ledger, expire, plain, post, renew, void
from vllm_kvmarket.ledger.integrity import CheckedBooks
from vllm_kvmarket.proofs import TransparencyLog, check_ledger, check_new
from vllm_kvmarket.proofs.notes import encode_base64, sign_checkpoint


@pytest.fixture
def now():
    return [1000.0]


@pytest.fixture
def ledger(tmp_path, now):
    with funded_ledger(tmp_path / "market.sqlite", clock=lambda: now[0]) as ledger:
        yield ledger


@pytest.fixture
def record(tmp_path):
    return tmp_path / "log" / "checked"


def sale(ledger, name, *, royalty=30):
    """A hold, its charge and royalty with a receipt: three transfers."""
    sold = [
        hold(name, 60),
        post(id=f"{name}:post", pending_id=name, amount_nano=60),
        plain(
            id=f"{name}:pay", debit="provider", credit="pat", amount_nano=royalty, code="royalty"
        ),
    ]
    paid = receipt(f"kvr_{name}", 60, f"{name}:post", f"{name}:pay", royalty=royalty)
    ledger.submit(sold, receipt=paid).result()


def change(home, *statements):
    """Change the books as an operator with an editor could, past the schema's triggers."""
    db = apsw.Connection(str(home / "market.sqlite"))
    for (trigger,) in db.execute(
        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    ).fetchall():
        db.execute(f"DROP TRIGGER {trigger}")
    for statement in statements:
        db.execute(statement)
    db.close()


def test_a_check_goes_on_where_the_last_one_ended(ledger, tmp_path, monkeypatch):
    """It reads new transfers only, and reports as the one from the start does."""
    sale(ledger, "a")
    TransparencyLog(ledger, tmp_path).checkpoint()
    first = check_new(ledger, tmp_path)
    assert (first.ok, first.since, first.transfers, first.receipts) == (True, 0, 4, 1)
    sale(ledger, "b")
    kept = TransparencyLog(ledger, tmp_path).checkpoint()
    sale(ledger, "c")
    read = []
    real = Ledger.check_behind

    def check_behind(self, start, on_page):
        return real(self, start, lambda page: read.extend(page) or on_page(page))

    monkeypatch.setattr(Ledger, "check_behind", check_behind)
    second = check_new(ledger, tmp_path)
    assert [each.id for each in read] == ["b", "b:post", "b:pay", "c", "c:post", "c:pay"]
    whole = check_ledger(ledger, tmp_path)
    assert (second.ok, second.since, second.checkpoints) == (True, 4, 1)
    assert (whole.ok, whole.since, whole.checkpoints) == (True, 0, 2)
    for field in ("accounts", "transfers", "receipts", "root", "debits_nano"):
        assert getattr(second, field) == getattr(whole, field), field
    third = check_new(ledger, tmp_path, [kept.note])
    assert (third.ok, third.since, third.checkpoints) == (True, 10, 1)


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE transfer SET amount_nano = 20 WHERE id = 'b:pay'", "owes pat 30, b:pay is 20"),
        ("DELETE FROM receipt WHERE id = 'kvr_b'", "transfer b:post: its receipt is missing"),
        ("DELETE FROM hold WHERE pending_id = 'old'", "hold old: is due at None"),
        ("UPDATE account SET debits_pending = 0 WHERE id = 'alice'", "account alice: debits_pend"),
        ("UPDATE transfer SET created_at_s = 1 WHERE id = 'late:e'", "hold late was not due"),
        ("UPDATE transfer SET pending_id = 'b' WHERE id = 'n'", "n: cannot resolve b"),
        (
            "INSERT INTO receipt SELECT 99, 'kvr_copy', request_id, account, document_id, "
            "charge_nano, replace(body, 'kvr_b', 'kvr_copy') FROM receipt WHERE id = 'kvr_b'",
            "receipt kvr_copy: is for transfer b:post, as kvr_b is",
        ),
        (
            "INSERT INTO receipt SELECT 99, 'kvr_copy', request_id, account, document_id, "
            "charge_nano, replace(body, 'kvr_a', 'kvr_copy') FROM receipt WHERE id = 'kvr_a'",
            "receipt kvr_copy: is for transfer a:post, as kvr_a is",
        ),
    ],
)
def test_a_fault_in_a_new_part_is_found(ledger, tmp_path, now, statement, problem):
    """Also where it is about what began in the old part; and again, until it is mended."""
    sale(ledger, "a")
    ledger.submit([hold("old", 5), hold("kept", 5), hold("late", 5, timeout_s=1)]).result()
    assert check_new(ledger, tmp_path).ok
    record = tmp_path / "log" / "checked"
    before = record.read_bytes()
    now[0] += 10 + GRACE_S
    sale(ledger, "b")
    for operation in (
        renew(id="n", pending_id="old", timeout_s=900),
        expire(id="late:e", pending_id="late"),
        post(id="late:post", pending_id="late", amount_nano=0),
        void(id="v", pending_id="kept"),
    ):
        assert ledger.submit([operation]).result()[0].outcome.good
    change(tmp_path, statement)
    for _ in range(2):
        report = check_new(ledger, tmp_path)
        assert any(problem in each for each in report.problems), report.problems
        assert (report.ok, report.since) == (False, 7)
    assert record.read_bytes() == before


def test_a_fault_in_an_old_part_is_found_from_the_start(ledger, tmp_path, record):
    """What was checked is not read again; once a whole check has failed, every check is whole."""
    sale(ledger, "a")
    TransparencyLog(ledger, tmp_path).checkpoint()
    assert check_new(ledger, tmp_path).ok
    sale(ledger, "b")
    change(tmp_path, "UPDATE transfer SET user_data = 'other' WHERE id = 'a:post'")
    assert check_new(ledger, tmp_path).ok
    for from_the_start in (True, False):
        report = check_new(ledger, tmp_path, from_the_start=from_the_start)
        assert (report.ok, report.since) == (False, 0)
        assert any("are not those that were signed" in each for each in report.problems)
        assert not record.exists()
    change(tmp_path, "UPDATE transfer SET user_data = '' WHERE id = 'a:post'")
    assert check_new(ledger, tmp_path).rebuilt  # the file of hashes was that of the changed books
    assert check_new(ledger, tmp_path).ok


def test_balances_are_compared_whenever_they_were_changed(ledger, tmp_path):
    """An account that nobody used since the last check, or that is gone."""
    sale(ledger, "a")
    assert check_new(ledger, tmp_path).ok
    change(tmp_path, "UPDATE account SET credits_posted = 31 WHERE id = 'pat'")
    assert "ledger: account pat: credits_posted is 31, transfers say 30" in (
        check_new(ledger, tmp_path).problems
    )
    change(tmp_path, "PRAGMA foreign_keys = OFF", "DELETE FROM account WHERE id = 'pat'")
    assert "ledger: account pat: is missing" in check_new(ledger, tmp_path).problems


@pytest.mark.parametrize("harm", ["changed", "unsigned", "empty", "another home's"])
def test_a_record_that_this_home_did_not_sign_is_not_believed(ledger, tmp_path, record, harm):
    """Everything is checked then, which finds the fault that the record was to hide."""
    sale(ledger, "a")
    assert check_new(ledger, tmp_path).ok
    change(tmp_path, "UPDATE account SET credits_posted = 3030 WHERE id = 'pat'")
    signature, _, body = record.read_bytes().partition(b"\n")
    forged = body.replace(b'"pat":[0,0,0,30,0]', b'"pat":[0,0,0,3030,0]')
    assert forged != body
    if harm == "another home's":
        key = SigningKeys(tmp_path / "other").current()
        signature = encode_base64(key.sign(b"kvmarket-checked/1\n" + forged)).encode()
    content = {"unsigned": forged, "empty": b""}
    record.write_bytes(content.get(harm, signature + b"\n" + forged))
    report = check_new(ledger, tmp_path)
    assert (report.ok, report.since) == (False, 0)
    assert any("is not signed by this home" in each for each in report.problems)
    assert any("account pat: credits_posted is 3030" in each for each in report.problems)


def test_an_older_record_is_as_good(ledger, tmp_path, record):
    """Somebody who puts one back makes the next check longer, and hides nothing."""
    sale(ledger, "a")
    assert check_new(ledger, tmp_path).ok
    older = record.read_bytes()
    sale(ledger, "b")
    assert check_new(ledger, tmp_path).since == 4
    record.write_bytes(older)
    change(tmp_path, "UPDATE transfer SET amount_nano = 20 WHERE id = 'b:pay'")
    report = check_new(ledger, tmp_path)
    assert (report.ok, report.since) == (False, 4)


def test_a_record_of_books_that_are_no_more_is_not_believed(ledger, tmp_path):
    """The ledger was rolled back: the first transfers are not those that were checked."""
    sale(ledger, "a")
    sale(ledger, "b")
    assert check_new(ledger, tmp_path).ok
    change(tmp_path, "PRAGMA foreign_keys = OFF", "DELETE FROM transfer WHERE sequence > 4")
    report = check_new(ledger, tmp_path)
    assert (report.ok, report.since) == (False, 0)
    assert any("7 are expected; everything was checked" in each for each in report.problems)


def test_a_record_outlives_a_rotated_key_and_not_a_revoked_one(ledger, tmp_path):
    """Somebody else may have a revoked key: what it signed is ignored, without an alarm."""
    sale(ledger, "a")
    assert check_new(ledger, tmp_path).ok
    keys = SigningKeys(tmp_path)
    old = keys.current()
    keys.rotate()
    assert check_new(ledger, tmp_path).since == 4
    keys.rotate()
    keys.revoke(keys.public_keys()[1].kid, "lost")
    report = check_new(ledger, tmp_path)
    assert (report.ok, report.since) == (True, 0)
    assert old.kid in {key.kid for key in keys.public_keys()}


def test_a_given_checkpoint_of_the_old_part_is_compared(ledger, tmp_path):
    """By its hashes: a market that signed another past is found without reading it again."""
    sale(ledger, "a")
    log = TransparencyLog(ledger, tmp_path)
    kept = log.checkpoint()
    other = sign_checkpoint(log.origin, 3, b"\1" * 32, SigningKeys(tmp_path).current())
    sale(ledger, "b")
    assert check_new(ledger, tmp_path).ok
    assert check_new(ledger, tmp_path, [kept.note]).ok
    (problem,) = check_new(ledger, tmp_path, [other.note]).problems
    assert "checkpoint of 3: the log of 7 leaves does not begin with the one of 3" in problem


def test_checks_in_any_steps_lead_to_the_same(tmp_path):
    """After each booking, as at once: sums, holds and what may be paid late."""
    with open_shop(tmp_path) as market:
        sold = [sell(market, f"p{number}") for number in range(3)]
        market.ledger.submit([hold("x", 5), hold("y", 5)], linked=False).result()
        step = CheckedBooks()
        for _ in range(2):
            problems, step = market.ledger.check_behind(step)
            assert problems == []
        market.ledger.submit([void(id="v", pending_id="x")]).result()
        problems, step = market.ledger.check_behind(step)
        assert problems == []
        whole = market.ledger.check_behind()
        assert whole == ([], step)
        assert (step.receipts, step.size) == (len(sold), len(market.ledger.transfers()))
        assert set(step.holds) == {"y"}


def test_receipts_that_are_read_before_their_transfers_count_once(ledger, monkeypatch):
    """Pages of both end at different sales."""
    for number in range(7):
        sale(ledger, f"s{number}")
    whole = ledger.check_behind()
    monkeypatch.setattr("vllm_kvmarket.ledger.integrity.PAGE", 8)
    assert ledger.check_behind() == whole
    assert (whole[0], whole[1].receipts, whole[1].early) == ([], 7, [])
