"""The log's texts: entries of transfers, signed notes, checkpoints."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.ledger_books import funded_ledger
from vllm_kvmarket.auth.signing_keys import PublicKey
from vllm_kvmarket.ledger import Transfer
from vllm_kvmarket.proofs import ProofError, TransparencyLog, leaves, notes, verify_checkpoint


@pytest.fixture
def log(tmp_path):
    with funded_ledger(tmp_path / "market.sqlite") as ledger:
        yield TransparencyLog(ledger, tmp_path)


@given(st.builds(Transfer, kind=st.sampled_from(["plain", "post"]), id=st.text(), debit=st.text()))
def test_an_entry_is_canonical_json(transfer):
    """As RFC 8785 has it: another encoder writes the same bytes, and it comes back."""
    entry = leaves.entry_of(transfer)
    facts = json.loads(entry)
    spelled = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert spelled.encode() == entry
    assert set(map(type, facts.values())) == {str}
    leaf = leaves.read_entry(entry)
    assert (leaf.id, leaf.debit) == (transfer.id, transfer.debit)


def test_the_spelling_of_an_entry_never_changes():
    """Logs that exist hold these bytes."""
    transfer = Transfer(
        "pending", "p1", "alice", "provider", 7, "", 900, "reuse", "kvd_x", "", 1.25e9
    )
    entry = (
        b'{"amount_nano":"7","code":"reuse","created_at_s":"1250000000.0","credit":"provider",'
        b'"debit":"alice","id":"p1","kind":"pending","pending_id":"","receipt_digest":"",'
        b'"timeout_s":"900","type":"kvmarket/transfer/v1","user_data":"kvd_x"}'
    )
    assert leaves.entry_of(transfer) == entry
    for other in (entry.replace(b":", b": "), entry[:-1] + b',"x":""}', b"[]", b"\xff"):
        with pytest.raises(ProofError):
            leaves.read_entry(other)


def test_a_signed_note_of_another_implementation_verifies():
    """The example of Go's golang.org/x/mod/sumdb/note."""
    name, _, key = ["PeterNeumann", "c74f20a3", "ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"]
    public = PublicKey(base64.b64decode(key)[1:])
    note = (
        "If you think cryptography is the answer to your problem,\n"
        "then you don't know what your problem is.\n\n"
        "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngot"
        "pRZb6KE6RyyBwJnAM=\n"
    )
    assert notes.signer_of(note, [public]) == public
    assert notes.verifier_key(name, public) == f"PeterNeumann+c74f20a3+{key}"
    with pytest.raises(ProofError, match="the text was changed"):
        notes.signer_of(note.replace("answer", "Answer"), [public])


def test_a_note_with_other_signatures_verifies(log):
    """Witnesses may have signed as well, by algorithms that we do not know."""
    note = log.checkpoint().note
    witness = base64.b64encode(b"four" + bytes(80)).decode()
    assert (
        verify_checkpoint(note + f"— witness.example {witness}\n", log.keys.public_keys()).size == 1
    )


@pytest.mark.parametrize(
    "harm",
    [
        lambda _: "",
        lambda note: note[:-1],
        lambda note: note.replace("\n\n", "\n"),
        lambda note: note.replace("\n1\n", "\n01\n"),
        lambda note: note.replace("\n1\n", "\n1\nmore\n"),
        lambda note: note.replace("— ", "- "),
        lambda note: note + "\n",
        lambda note: note.replace("\n1\n", "\n1\r\n"),
        lambda note: "kvmarket/other" + note[note.index("\n") :],
        lambda note: note.replace("=", "", 1),
    ],
)
def test_a_changed_checkpoint_is_refused(log, harm):
    """Any change gives a reason, and no crash."""
    note = log.checkpoint().note
    with pytest.raises(ProofError):
        verify_checkpoint(harm(note), log.keys.public_keys())
