"""The transparency log: what it has of a ledger, what it signs, what it refuses to sign."""

import base64
import itertools
import random
import subprocess
import sys
import threading
import time

import apsw
import pytest
import scitt_cose

from tests.support import ROOT
from tests.support.ledger_books import funded_ledger, hold
from tests.support.proof_market import open_shop, sell
from vllm_kvmarket.auth.signing_keys import SigningKeys
from vllm_kvmarket.core.errors import NotFoundError
from vllm_kvmarket.ledger import Ledger, post
from vllm_kvmarket.proofs import (
    ProofError,
    TransparencyLog,
    check_ledger,
    leaves,
    merkle,
    notes,
    read_inclusion,
    verify_checkpoint,
)


@pytest.fixture
def ledger(tmp_path):
    with funded_ledger(tmp_path / "market.sqlite") as ledger:
        yield ledger


@pytest.fixture
def log(ledger, tmp_path):
    return TransparencyLog(ledger, tmp_path)


def fill(ledger, count, prefix="h"):
    """Hold and settle: two transfers a time."""
    for number in range(count):
        held = f"{prefix}{number}"
        ledger.transact(hold(held, 3), post(id=f"{held}:post", pending_id=held, amount_nano=2))


def entries(ledger):
    return [leaves.entry_of(each).hex() for each in ledger.transfers()[::-1]]


def change(home, statement):
    """Change the books as an operator with an editor could, past the schema's triggers."""
    db = apsw.Connection(str(home / "market.sqlite"))
    rows = db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for (trigger,) in rows:
        db.execute(f"DROP TRIGGER {trigger}")
    db.execute(statement)
    db.close()


def test_the_root_is_that_of_all_transfers_in_the_order_of_effect(ledger, log):
    """Another implementation gets it from the transfers' entries; it grows with the ledger."""
    for count in (0, 1, 5):
        fill(ledger, count, f"{count}-")
        checkpoint = log.checkpoint()
        assert checkpoint.size == len(ledger.transfers())
        assert checkpoint.root.hex() == scitt_cose.merkle_root(entries(ledger))


def test_a_transfer_is_proved_to_be_in_the_log(ledger, log):
    """For every one; offline, from the text and the public key; by another implementation too."""
    fill(ledger, 6)
    keys = log.keys.public_keys() or [SigningKeys(log.folder.parent).current().public]
    for index, transfer in enumerate(ledger.transfers()[::-1]):
        text = log.prove(transfer.id).text()
        proof = read_inclusion(text)
        leaf = proof.verify(log.keys.public_keys() or keys)
        assert (proof.index, leaf.id) == (index, transfer.id)
        assert (leaf.amount_nano, leaf.debit) == (str(transfer.amount_nano), transfer.debit)
        assert scitt_cose.verify_inclusion(
            proof.entry.hex(),
            index,
            proof.checkpoint.size,
            [each.hex() for each in proof.path],
            proof.checkpoint.root.hex(),
        )
    with pytest.raises(NotFoundError):
        log.prove("nothing")


def test_a_log_of_two_times_is_proved_to_have_only_grown(ledger, log):
    """Between all sizes that it had, with the checkpoints that were signed then."""
    signed = []
    for count in (1, 2, 4):
        fill(ledger, count, f"{count}-")
        signed.append(log.checkpoint())
    for old in signed:
        for new in [each for each in signed if each.size >= old.size]:
            proof = log.prove_consistency(old.size, new.size)
            proof.verify(log.keys.public_keys())
            assert (proof.old_checkpoint, proof.new_checkpoint) == (old.note, new.note)
    assert log.prove_consistency(3).new_size == signed[-1].size
    for sizes in ((5, 4), (0, 99), (-1, 3)):
        with pytest.raises(ProofError):
            log.prove_consistency(*sizes)


def test_only_new_transfers_are_hashed(ledger, log, monkeypatch):
    """A checkpoint over a log that is known costs what was added, also in another process."""
    fill(ledger, 20)
    log.checkpoint()
    hashed = []
    real = leaves.entry_of
    monkeypatch.setattr(
        "vllm_kvmarket.proofs.log.entry_of", lambda each: hashed.append(each.id) or real(each)
    )
    fill(ledger, 1, "new")
    again = TransparencyLog(ledger, log.folder.parent)
    assert again.checkpoint().size == 43
    # The last one that was known is looked at again: is the ledger still the same?
    assert hashed == ["h19:post", "new0", "new0:post"]


def test_nothing_new_gives_the_same_checkpoint(ledger, log):
    """Signed once and kept once; a rotated key signs it again."""
    first = log.checkpoint()
    assert log.checkpoint() == first
    assert len(log.checkpoints()) == 1
    SigningKeys(log.folder.parent).rotate()
    second = log.checkpoint()
    assert (second.root, second.origin) == (first.root, first.origin)
    assert second.note != first.note
    assert len(log.checkpoints()) == 2


def test_checkpoints_of_before_a_rotation_verify(ledger, log):
    """With the home's JWK set; each key alone verifies what it signed, and nothing else."""
    old = log.checkpoint()
    SigningKeys(log.folder.parent).rotate()
    fill(ledger, 1)
    new = log.checkpoint()
    new_key, old_key = log.keys.public_keys()
    for note in (old.note, new.note):
        verify_checkpoint(note, [new_key, old_key])
    assert verify_checkpoint(old.note, [old_key]) == old
    for note, key in ((old.note, new_key), (new.note, old_key)):
        with pytest.raises(ProofError, match="not among the 1 known"):
            verify_checkpoint(note, [key])
    log.prove_consistency(old.size).verify([new_key, old_key])


@pytest.mark.parametrize("file", ["hashes", "head.json"])
@pytest.mark.parametrize("harm", ["gone", "empty", "garbage", "short"])
def test_lost_files_are_made_anew_from_the_transfers(ledger, log, file, harm):
    """A crash may leave any part of them: the root is the same, and was signed before."""
    fill(ledger, 9)
    before = log.checkpoint()
    path = log.folder / file
    content = {"empty": b"", "garbage": b"x" * 5000, "short": path.read_bytes()[:-40]}
    path.unlink() if harm == "gone" else path.write_bytes(content[harm])
    assert log.checkpoint() == before
    fill(ledger, 1, "more")
    log.prove_consistency(before.size).verify(log.keys.public_keys())


def test_half_a_line_of_checkpoints_was_never_told(ledger, log):
    """A crash while signing leaves what nobody was given; the next one takes its place."""
    first = log.checkpoint()
    path = log.folder / "checkpoints.jsonl"
    path.write_bytes(path.read_bytes() + b'{"at_s":1,"note":"kvmar')
    assert [signed.note for signed in log.checkpoints()] == [first.note]
    fill(ledger, 1)
    second = log.checkpoint()
    assert [signed.note for signed in log.checkpoints()] == [first.note, second.note]
    path.write_bytes(b"nonsense\n")
    with pytest.raises(ProofError, match="no checkpoint"):
        log.checkpoint()


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_a_changed_past_is_not_signed(ledger, log, tmp_path, forget, end):
    """Not at the end, which is looked at; elsewhere when the hashes are made anew, or checked."""
    fill(ledger, 9)
    log.checkpoint()
    changed = "h8:post" if end else "h2:post"
    change(tmp_path, f"UPDATE transfer SET user_data = 'other' WHERE id = '{changed}'")
    if forget:
        (log.folder / "hashes").unlink()
    if forget or end:
        with pytest.raises(ProofError, match="do not give the root that was signed"):
            log.checkpoint()
    else:
        with pytest.raises(ProofError, match="leads to another root"):
            log.prove(changed)
    report = check_ledger(ledger, tmp_path)
    assert any("are not those that were signed" in each for each in report.problems)


def test_an_older_ledger_is_not_signed(ledger, log, tmp_path):
    """Transfers that were signed for and are gone: nothing is signed until they are back."""
    fill(ledger, 3)
    log.checkpoint()
    change(tmp_path, "PRAGMA foreign_keys = OFF; DELETE FROM transfer WHERE sequence > 4")
    with pytest.raises(ProofError, match="restore a backup"):
        log.checkpoint()
    report = check_ledger(ledger, tmp_path)
    assert any("7 transfers were signed for, the ledger has 4" in each for each in report.problems)


def test_a_check_recomputes_roots_and_balances(ledger, log, tmp_path):
    """Good books are good; every signed size is checked, and what others kept."""
    fill(ledger, 4)
    kept = log.checkpoint()
    fill(ledger, 4, "more")
    log.checkpoint()
    report = check_ledger(ledger, tmp_path, [kept.note])
    assert (report.ok, report.checkpoints, report.transfers) == (True, 3, 17)
    assert base64.b64decode(report.root).hex() == scitt_cose.merkle_root(entries(ledger))
    change(tmp_path, "UPDATE account SET credits_posted = credits_posted + 1 WHERE id = 'pat'")
    problems = check_ledger(ledger, tmp_path).problems
    assert any("account pat: credits_posted" in each for each in problems)


def test_a_check_finds_and_heals_a_damaged_file_of_hashes(ledger, log, tmp_path):
    """One bit in the middle, which no checkpoint reads; the proof through it is not handed out."""
    fill(ledger, 8)
    log.checkpoint()
    path = log.folder / "hashes"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ProofError, match="leads to another root"):
        log.prove("d1")
    report = check_ledger(ledger, tmp_path)
    assert (report.ok, report.rebuilt) == (False, True)
    assert check_ledger(ledger, tmp_path).ok
    log.prove("d1")


def test_a_check_refuses_checkpoints_that_are_not_this_log_s(ledger, log, tmp_path):
    """Of another home, changed, or no checkpoint at all."""
    mine = log.checkpoint()
    (tmp_path / "other").mkdir()
    with Ledger.open(tmp_path / "other" / "market.sqlite") as other_ledger:
        other = TransparencyLog(other_ledger, tmp_path / "other").checkpoint()
    changed = mine.note.replace("\n1\n", "\n2\n")
    report = check_ledger(ledger, tmp_path, [other.note, changed, "hello"])
    assert [each.partition(": ")[2].partition(":")[0] for each in report.problems] == [
        "checkpoint of 0",
        "checkpoint of 2",
        "checkpoint 'hello'",
    ]


def test_threads_sign_one_history(ledger, log, tmp_path):
    """Sellers write while others sign: every two checkpoints are consistent."""
    done = threading.Event()

    def sign():
        own = TransparencyLog(ledger, tmp_path)
        while not done.is_set():
            own.checkpoint()

    signers = [threading.Thread(target=sign) for _ in range(3)]
    for thread in signers:
        thread.start()
    fill(ledger, 40)
    done.set()
    for thread in signers:
        thread.join()
    log.checkpoint()
    sizes = [notes.read_checkpoint(each.note).size for each in log.checkpoints()]
    assert sizes == sorted(set(sizes)), "each size is signed once"
    for old, new in itertools.pairwise(sizes):
        log.prove_consistency(old, new).verify(log.keys.public_keys())
    assert check_ledger(ledger, tmp_path).ok


SIGNER = """
import sys
from pathlib import Path
from tests.unit.proofs.test_log import fill
from vllm_kvmarket.ledger import Ledger
from vllm_kvmarket.proofs import TransparencyLog
home = Path(sys.argv[1])
with Ledger.open(home / "market.sqlite") as ledger:
    log = TransparencyLog(ledger, home)
    for number in range(100_000):
        fill(ledger, 3, f"{sys.argv[2]}-{number}-")
        print(log.checkpoint().size, flush=True)
"""


@pytest.mark.slow
def test_a_killed_signer_leaves_a_log_that_goes_on(ledger, log, tmp_path):
    """kill -9 at any moment: every reported size is kept, and everything signed is one history."""
    reported = set()
    rng = random.Random(4)
    for attempt in range(4):
        signer = subprocess.Popen(
            [sys.executable, "-c", SIGNER, str(tmp_path), str(attempt)],
            env={"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        reported.add(int(signer.stdout.readline()))
        time.sleep(rng.random() / 20)
        signer.kill()
        reported.update(int(line) for line in signer.communicate()[0].splitlines())
    log.checkpoint()
    sizes = [notes.read_checkpoint(each.note).size for each in log.checkpoints()]
    assert reported <= set(sizes)
    assert sizes == sorted(sizes)
    report = check_ledger(ledger, tmp_path)
    assert (report.problems, report.checkpoints) == ([], len(sizes))


def test_a_long_ledger_is_read_in_pages(ledger, log, tmp_path, monkeypatch):
    """The root does not depend on where pages end."""
    fill(ledger, 7)
    root = log.checkpoint().root
    for page in (1, 2, 7, 15, 16):
        monkeypatch.setattr(leaves, "PAGE", page)
        log.rebuild()
        assert log.update() == 15
        assert log.checkpoint().root == root
        assert check_ledger(ledger, tmp_path).ok


def test_a_sale_is_two_leaves(tmp_path):
    """The charge and, right behind it, the royalty."""
    with open_shop(tmp_path / "home") as market:
        receipt = sell(market, "p1")
        log = TransparencyLog(market.ledger, market.home)
        charge, royalty = (log.locate(each) for each in receipt.transfer_ids)
        assert royalty.log_index == charge.log_index + 1
        assert merkle.leaf_hash(log.prove(charge.id).entry).hex() == charge.leaf_hash
