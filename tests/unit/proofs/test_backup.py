"""Backup of a live market: whole, consistent, and an equal market once it is restored."""

import json
import stat
import subprocess
import sys
import threading

import pytest

from tests.support import ROOT
from tests.support.catalogue_documents import NAMESPACE
from tests.support.proof_market import DOCUMENT, open_shop, sell
from vllm_kvmarket.auth.signing_keys import SigningKeys, TrustedKeys
from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.ledger import Ledger, pending, renew, void
from vllm_kvmarket.market import check_and_repair
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs import (
    ProofError,
    TransparencyLog,
    backup,
    check_backup,
    check_ledger,
    restore,
    signed_receipt,
    verify,
    verify_checkpoint,
)
from vllm_kvmarket.proofs.replay import replay

PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def market(tmp_path):
    with open_shop(tmp_path / "home") as market:
        yield market


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "backup"


def names(folder):
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found)


def test_a_restored_market_is_the_same_market(market, folder, tmp_path):
    """Money, documents, chunks, keys, tokens, receipts, log: it sells on where the other was."""
    receipt = sell(market, "p1")
    jws = signed_receipt(market, receipt.id).jws
    checkpoint = TransparencyLog(market.ledger, market.home).checkpoint()
    SigningKeys(market.home).rotate()
    TrustedKeys(market.home).add(SigningKeys(tmp_path / "friend").current().public)
    token = market.credentials.sign("salt", "account:alice")
    made = backup(market, folder, with_chunks=True, passphrase=PASSPHRASE)
    assert (made.check.ok, made.chunks, made.chunks_missing) == (True, 3, [])
    accounts, transfers = market.ledger.accounts(), market.ledger.transfers()
    restored = restore(folder, tmp_path / "new", passphrase=PASSPHRASE)
    assert (restored.check.ok, restored.files) == (True, made.files)
    with Market.open(tmp_path / "new") as other:
        assert (other.ledger.accounts(), other.ledger.transfers()) == (accounts, transfers)
        assert other.receipt(receipt.id) == receipt
        assert other.credentials.sign("salt", "account:alice") == token
        assert TrustedKeys(other.home).all().keys() == TrustedKeys(market.home).all().keys()
        assert check_and_repair.check(other).chunks_verified == 3
        keys = SigningKeys(other.home).public_keys()
        verify(jws, keys)
        assert verify_checkpoint(checkpoint.note, keys) == checkpoint
        log = TransparencyLog(other.ledger, other.home)
        assert other.match(NAMESPACE, DOCUMENT).token_count == 600
        sell(other, "p2")
        assert log.origin == checkpoint.origin
        log.prove_consistency(checkpoint.size).verify(keys)
        assert check_ledger(other.ledger, other.home, [checkpoint.note]).ok


def test_without_chunks_the_books_alone_are_kept(market, folder, tmp_path):
    """Small; documents are published again, or repaired, where chunks were lost."""
    made = backup(market, folder)
    assert (made.chunks, made.check.ok) == (0, True)
    assert names(folder) == ["backup.json", "database", *names_of_keys(folder)]
    restore(folder, tmp_path / "new")
    assert not (tmp_path / "new" / "chunks").exists()
    with Market.open(tmp_path / "new") as other:
        assert other.ledger.accounts() == market.ledger.accounts()


def secrets_of(home):
    """The lines of the home's key files that nobody else may have."""
    pems = [line for path in home.glob("signing/*.pem") for line in path.read_bytes().splitlines()]
    return [json.loads((home / "operator.key").read_text())["secret"].encode(), pems[2]]


def test_a_backup_without_a_passphrase_has_no_secret_key(market, folder, tmp_path):
    """Restored, it verifies old receipts and has the same log; a new key signs another log."""
    receipt = sell(market, "p1")
    jws = signed_receipt(market, receipt.id).jws
    log = TransparencyLog(market.ledger, market.home)
    checkpoint = log.checkpoint()
    made = backup(market, folder)
    assert (made.check.ok, made.with_keys) == (True, False)
    content = b"".join((folder / name).read_bytes() for name in names(folder))
    assert [secret for secret in secrets_of(market.home) if secret in content] == []
    assert restore(folder, tmp_path / "new").check.ok
    with Market.open(tmp_path / "new") as other:
        keys = SigningKeys(other.home)
        assert keys.current().kid not in [key.kid for key in SigningKeys(market.home).public_keys()]
        verify(jws, keys.public_keys())
        restored = TransparencyLog(other.ledger, other.home)
        # Without the first key nobody can sign in its market's name.
        assert restored.origin != checkpoint.origin
        assert verify_checkpoint(checkpoint.note, keys.public_keys()).size == checkpoint.size
        sell(other, "p2")
        later = restored.checkpoint()
        assert verify_checkpoint(later.note, [keys.current().public]) == later
        assert check_ledger(other.ledger, other.home, [checkpoint.note]).ok
    with pytest.raises(ProofError, match="no secret keys"):
        restore(folder, tmp_path / "other", passphrase=PASSPHRASE)


def test_a_backups_keys_are_sealed_with_a_passphrase(market, folder, tmp_path):
    """In no file in the clear; a wrong passphrase opens nothing and makes no home."""
    sell(market, "p1")
    TransparencyLog(market.ledger, market.home).checkpoint()
    made = backup(market, folder, passphrase=PASSPHRASE)
    assert (made.check.ok, made.with_keys) == (True, True)
    content = b"".join((folder / name).read_bytes() for name in names(folder))
    assert [secret for secret in secrets_of(market.home) if secret in content] == []
    with pytest.raises(ConfigError, match="passphrase is wrong"):
        restore(folder, tmp_path / "new", passphrase=PASSPHRASE + "!")
    assert not (tmp_path / "new").exists()
    assert not restore(folder, tmp_path / "new").with_keys
    assert restore(folder, tmp_path / "other", passphrase=PASSPHRASE).with_keys
    assert secrets_of(tmp_path / "other") == secrets_of(market.home)
    with pytest.raises(ConfigError, match="too short"):
        backup(market, tmp_path / "short", passphrase="secret")


def names_of_keys(folder):
    return [name for name in names(folder) if name.startswith("signing/")]


def test_what_is_secret_stays_so(market, folder, tmp_path):
    """Keys and books are the operator's alone, in the backup and restored."""
    sell(market, "p1")
    TransparencyLog(market.ledger, market.home).checkpoint()
    backup(market, folder)
    restore(folder, tmp_path / "new")
    for place in (folder, tmp_path / "new"):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        secrets = [place / name for name in names(place) if "chunks" not in name]
        assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}


SELLER = """
import sys
from pathlib import Path
from tests.support.proof_market import sell
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs import TransparencyLog
with Market.open(Path(sys.argv[1])) as market:
    log = TransparencyLog(market.ledger, market.home)
    print("selling", flush=True)
    for number in range(100_000):
        sell(market, f"{sys.argv[2]}-{number}", 16)
        if number % 10 == 0:
            log.checkpoint()
"""


@pytest.mark.slow
def test_a_backup_beside_engines_that_charge_is_consistent(market, folder, tmp_path):
    """Two processes sell and sign meanwhile; each of three backups is of one moment, and later
    ones have more. What was acknowledged before a backup began is in it.
    """
    sellers = [
        subprocess.Popen(
            [sys.executable, "-c", SELLER, str(market.home), name],
            env={"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    try:
        for seller in sellers:
            assert seller.stdout.readline() == "selling\n"
        sizes = []
        for number in range(3):
            receipt = sell(market, f"mine-{number}", 16)
            made = backup(market, tmp_path / f"backup{number}", with_chunks=True)
            assert made.check.problems == []
            sizes.append(made.check.transfers)
            restore(tmp_path / f"backup{number}", tmp_path / f"new{number}")
            with Ledger.open(tmp_path / f"new{number}" / "market.sqlite") as copy:
                assert copy.receipt(receipt.id) == receipt
    finally:
        for seller in sellers:
            seller.kill()
            seller.communicate()
    assert sizes == sorted(set(sizes))
    assert check_ledger(market.ledger, market.home).ok


def test_a_backup_while_documents_leave_says_what_it_lacks(market, folder):
    """A chunk that is gone or damaged is named; the books are whole all the same."""
    keys = market.catalogue.listings()[0].chunk_keys
    market.store.disk.path(keys[0]).unlink()
    damaged = market.store.disk.path(keys[1])
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    made = backup(market, folder, with_chunks=True)
    assert (made.chunks, made.check.ok) == (1, True)
    assert sorted(missing[:64] for missing in made.chunks_missing) == sorted(
        key.hex() for key in keys[:2]
    )


def test_a_folder_in_use_is_not_touched(market, folder, tmp_path):
    """Neither by a backup nor by a restore."""
    backup(market, folder)
    before = names(folder)
    with pytest.raises(ProofError, match="not empty"):
        backup(market, folder)
    with pytest.raises(ProofError, match="not empty"):
        restore(folder, market.home)
    assert names(folder) == before
    (tmp_path / "empty").mkdir()
    assert restore(folder, tmp_path / "empty").check.ok
    assert not list(tmp_path.glob(".*restoring*"))


@pytest.mark.parametrize("file", ["database", "keys.sealed", "log/checkpoints.jsonl", "chunk"])
@pytest.mark.parametrize("harm", ["change", "remove", "longer"])
def test_a_damaged_backup_is_not_restored(market, folder, tmp_path, file, harm):
    """Every byte is checked before there is a home."""
    TransparencyLog(market.ledger, market.home).checkpoint()
    backup(market, folder, with_chunks=True, passphrase=PASSPHRASE)
    path = next((folder / "chunks").rglob("*.kv")) if file == "chunk" else folder / file
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        changed = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes(changed if harm == "change" else content + b"x")
    with pytest.raises(ProofError, match=r"damaged or changed|is missing"):
        restore(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*restoring*"))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "other", "signing/../../x", ""])
def test_a_hostile_manifest_is_refused(market, folder, tmp_path, name):
    """A backup names its own kinds of files, below its folder."""
    backup(market, folder)
    path = folder / "backup.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["name"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(ProofError, match="no file of a backup"):
        restore(folder, tmp_path / "new")
    path.write_text("{")
    with pytest.raises(ProofError, match="damaged"):
        restore(folder, tmp_path / "new")
    path.unlink()
    with pytest.raises(ProofError, match="no backup, or an unfinished one"):
        restore(folder, tmp_path / "new")


def test_a_check_of_a_backup_changes_nothing(market, folder):
    """It can be checked again and again, and restored afterwards."""
    sell(market, "p1")
    checkpoint = TransparencyLog(market.ledger, market.home).checkpoint()
    backup(market, folder)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    for _ in range(2):
        report = check_backup(folder, [checkpoint.note])
        assert (report.ok, report.checkpoints) == (True, 2)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


def test_a_ledger_in_another_database_is_not_forgotten(market, folder, tmp_path):
    """A copy without the newest transfer is no backup of the market, and says so."""
    own = market.ledger
    with Ledger.open(tmp_path / "elsewhere.sqlite") as market.ledger:
        market.create_account("alice")
        market.deposit("alice", 1, "elsewhere")
        with pytest.raises(ProofError, match=r"elsewhere is not in the copy"):
            backup(market, folder)
    market.ledger = own


def test_replayed_books_are_the_same_books(market, tmp_path, monkeypatch):
    """Accounts, transfers, receipts, holds and the log's root; once more changes nothing."""
    for number in range(5):
        sell(market, f"p{number}", 600 if number else 0)
    ledger = market.ledger
    held = {"debit": "alice", "credit": "provider", "amount_nano": 9, "code": "reuse"}
    ledger.transact(*(pending(id=f"h{each}", timeout_s=60, **held) for each in range(3)))
    ledger.transact(void(id="v", pending_id="h0"), renew(id="r", pending_id="h1", timeout_s=90))
    monkeypatch.setattr("vllm_kvmarket.proofs.replay.WINDOW", 4)
    for _ in range(2):
        assert replay(ledger, tmp_path / "copy.sqlite") == len(ledger.transfers())
        with Ledger.open(tmp_path / "copy.sqlite") as copy:
            assert copy.accounts() == ledger.accounts()
            assert copy.transfers() == ledger.transfers()
            assert copy.receipts() == ledger.receipts()
            assert [copy.due_at_s(f"h{each}") for each in range(3)] == [
                ledger.due_at_s(f"h{each}") for each in range(3)
            ]
            assert check_ledger(copy, tmp_path).root == check_ledger(ledger, market.home).root
    with Ledger.open(tmp_path / "copy.sqlite") as copy:
        copy.deposit("alice", 1, "another")
    with pytest.raises(ProofError, match="other transfers as well"):
        replay(ledger, tmp_path / "copy.sqlite")


def test_threads_of_the_market_go_on_meanwhile(market, folder):
    """A backup takes no lock that a settlement waits for."""
    sold = []
    done = threading.Event()

    def seller():
        while not done.is_set():
            sold.append(sell(market, f"t{len(sold)}", 16).id)

    thread = threading.Thread(target=seller)
    thread.start()
    try:
        while not sold:
            done.wait(0.01)
        before = len(sold)
        made = backup(market, folder)
        assert made.check.ok
        assert len(sold) >= before
    finally:
        done.set()
        thread.join()
    assert market.ledger.check_integrity() == []
