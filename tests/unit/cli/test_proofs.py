"""`receipt`, `log`, `ledger check`, `ledger statement`, `account payout`, `backup`."""

import base64
import csv
import io
import json
import subprocess

import apsw
import pytest


@pytest.fixture
def jwks(run, sold, tmp_path):
    """The market's public keys, in a file that others have."""
    run("receipt", "show", "kvr_p1")
    path = tmp_path / "market.jwks"
    path.write_text(run("key", "show", "--all").out)
    return path


@pytest.fixture
def signed(run, sold, tmp_path):
    path = tmp_path / "receipt.jws"
    path.write_text(run("receipt", "show", "kvr_p1", "--jws").out)
    return path


@pytest.fixture
def elsewhere(tmp_path):
    """A machine without a market."""
    return ("--home", tmp_path / "elsewhere")


@pytest.fixture
def offline(jwks, elsewhere):
    """The same, with the market's public keys."""
    return ("--jwks", jwks, *elsewhere)


def test_a_receipt_is_shown(run, run_json, sold):
    """For people, as a JWS alone, as JSON with the JWS in x402's shape."""
    shown = run("receipt", "show", "kvr_p1").out
    assert "600 reused" in shown and "The Licence" in shown
    document = run_json("receipt", "show", "kvr_p1")
    assert document["format"] == "jws"
    assert document["signature"] == run("receipt", "show", "kvr_p1", "--jws").out.strip()
    assert document["payload"]["payer"] == "alice"
    assert "no receipt 'kvr_x'" in run("receipt", "show", "kvr_x", code=1).err


def test_a_receipt_is_verified_with_the_public_key_alone(run, run_json, signed, jwks, elsewhere):
    """Where there is no market; nothing is made there."""
    shown = run("receipt", "verify", signed, "--jwks", jwks, *elsewhere).out
    assert "good: signed by the market" in shown
    assert run_json("receipt", "verify", signed, "--jwks", jwks, *elsewhere)["valid"] is True
    assert run("receipt", "verify", signed).out, "at home, by its own keys"
    assert not elsewhere[1].exists()
    missing = run("receipt", "verify", signed, *elsewhere, code=2).err
    assert "give the market's with --jwks" in missing


def test_a_changed_receipt_is_refused_with_the_reason(run, run_json, signed, jwks):
    """On one line, and as JSON."""
    head, body, signature = signed.read_text().strip().split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    claims["payer"] = "bob"
    changed = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    signed.write_text(f"{head}.{changed}.{signature}")
    refused = run("receipt", "verify", signed, "--jwks", jwks, code=1)
    assert "is wrong: the receipt was changed" in refused.err
    document = run_json("receipt", "verify", signed, "--jwks", jwks, code=1)
    assert document["valid"] is False
    assert document["reason"] in refused.err
    signed.write_bytes(b"\xff\xfe")
    assert "is not text" in run("receipt", "verify", signed, "--jwks", jwks, code=1).err


def test_a_receipt_of_before_a_rotation_is_verified(run, signed, jwks, tmp_path):
    """By the keys of then and of now; a stranger's do not do."""
    run("key", "rotate")
    now = tmp_path / "now.jwks"
    now.write_text(run("key", "show", "--all").out)
    for keys in (jwks, now):
        run("receipt", "verify", signed, "--jwks", keys)
    newest = tmp_path / "newest.jwk"
    newest.write_text(run("key", "show").out)
    assert (
        "kvmarket key show --all" in run("receipt", "verify", signed, "--jwks", newest, code=1).err
    )


def test_a_receipt_is_found_in_the_log(run, run_json, signed, offline, tmp_path):
    """With proofs of its charge and its royalty, offline."""
    options = []
    for transfer in ("p1:settle", "p1:royalty:0"):
        path = tmp_path / f"{transfer}.tlog-proof"
        path.write_text(run("log", "prove", transfer).out)
        assert transfer in run("log", "verify", path, *offline).out
        options += ["--proof", path]
    document = run_json("receipt", "verify", signed, *options, *offline)
    assert document["in_log"] == ["p1:settle", "p1:royalty:0"]
    other = tmp_path / "other.tlog-proof"
    other.write_text(run("log", "prove", "p1:reserve").out)
    refused = run("receipt", "verify", signed, *offline, "--proof", other, code=1).err
    assert "which is none of the receipt's" in refused
    assert run_json("log", "prove", "p1:settle")["transfer"]["credit"] == "provider"
    assert "no transfer 'x'" in run("log", "prove", "x", code=1).err


def test_checkpoints_are_kept_and_compared(run, run_json, offline, tmp_path):
    """Two checkpoints that somebody kept, and the proof that the log only grew between them."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text(run("log", "checkpoint").out)
    run("account", "deposit", "alice", "1")
    new.write_text(run("log", "checkpoint").out)
    facts = run_json("log", "checkpoint")
    assert facts["note"] == new.read_text()
    assert facts["verifier_key"].startswith(f"{facts['origin']}+")
    between = tmp_path / "proof.json"
    for arguments in ((old, new), (old,), (facts["size"] - 1, facts["size"])):
        between.write_text(run("log", "consistency", *arguments).out)
        assert "begins with that of" in run("log", "verify", between, *offline).out
    assert "has 5 transfers" in run("log", "verify", new, *offline).out
    assert "cannot lead from 5 to 4" in run("log", "consistency", new, old, code=1).err
    run("ledger", "check", "--checkpoint", old, "--checkpoint", new)
    changed = between.read_text().replace('"new_size": 5', '"new_size": 6')
    between.write_text(changed)
    assert run_json("log", "verify", between, *offline, code=1)["valid"] is False


def test_an_audit_says_good_or_bad(run, run_json, sold, home):
    """Exit code 0 and 1; balances and signed roots are recomputed."""
    run("log", "checkpoint")
    assert "good: 5 accounts, 4 transfers, 1 receipts, 1 checkpoints" in run("ledger", "check").out
    assert "the first 4 transfers were checked before" in run("ledger", "check").out
    report = run_json("ledger", "check", "--from-the-start")
    assert (report["ok"], report["since"]) == (True, 0)
    assert report["debits_nano"] == report["credits_nano"]
    db = apsw.Connection(str(home / "market.sqlite"))
    db.execute("UPDATE account SET credits_posted = credits_posted + 1 WHERE id = 'publisher'")
    db.execute("DROP TRIGGER transfer_is_final; UPDATE transfer SET user_data = 'x'")
    db.close()
    bad = run("ledger", "check", code=1).out
    assert "account publisher: credits_posted is" in bad
    assert "are not those that were signed" in bad


def test_a_statement_is_printed(run, run_json, sold):
    """As a table, as JSON with the log's checkpoint, as CSV."""
    shown = run("ledger", "statement", "--account", "publisher").out
    assert "royalty" in shown and "The Licence" in shown and "1 sales of 600 tokens" in shown
    made = run_json("ledger", "statement", "--account", "publisher")
    assert [line["log_index"] for line in made["lines"]] == [3]
    assert made["checkpoint"].startswith("kvmarket/")
    rows = list(
        csv.DictReader(io.StringIO(run("ledger", "statement", "--account", "alice", "--csv").out))
    )
    assert [row["kind"] for row in rows] == ["brought forward", "deposit", "purchase", "closing"]
    later = run_json("ledger", "statement", "--account", "alice", "--from", "2999-01-01T00:00:00Z")
    assert later["lines"] == []
    assert later["brought_forward_nano"] == later["closing_nano"] > 0
    assert (
        run_json("ledger", "statement", "--account", "alice", "--to", "2000-01-01")["closing_nano"]
        == 0
    )


@pytest.mark.parametrize(
    "options",
    [
        ("--csv", "--json"),
        ("--from", "2026-02-30"),
        ("--from", "2026-02-01", "--to", "2026-02-01"),
    ],
)
def test_a_statement_that_cannot_be_is_a_usage_error(run, sold, options):
    """Exit code 2, one line."""
    refused = run("ledger", "statement", "--account", "alice", *options, code=2)
    assert refused.err.count("\n") == 1
    assert refused.out == ""


def test_a_payout_is_made_once(run, run_json, sold):
    """All that there is, under a reference; the same again changes nothing."""
    made = run_json("account", "payout", "publisher", "--reference", "bank 1")
    assert made["new"] is True and made["account"]["balance_nano"] == 0
    again = run_json("account", "payout", "publisher", "--reference", "bank 1")
    assert again["new"] is False and again["transfer"] == made["transfer"]
    assert (
        "nothing is changed" in run("account", "payout", "publisher", "--reference", "bank 1").out
    )
    assert (
        "exceeds credits"
        in run("account", "payout", "publisher", "5", "--reference", "b", code=1).err
    )
    assert run("account", "payout", "publisher", code=2).err
    run("ledger", "check")


def test_a_market_is_backed_up_and_restored(run, run_json, sold, tmp_path):
    """The copy passes the audit, and sells the same document."""
    folder, other = tmp_path / "backup", ("--home", tmp_path / "other")
    made = run_json("backup", "create", folder, "--chunks")
    assert (made["chunks"], made["check"]["ok"]) == (3, True)
    assert "good: " in run("ledger", "check", "--backup", folder).out
    assert "restored" in run("backup", "restore", folder, *other).out
    assert "good: " in run("ledger", "check", *other).out
    assert run_json("store", "check", *other)["chunks_verified"] == 3
    assert "not empty" in run("backup", "restore", folder, *other, code=1).err
    assert "not empty" in run("backup", "create", folder, code=1).err
    assert "no backup" in run("backup", "restore", tmp_path, "--home", tmp_path / "x", code=1).err


def test_a_backups_keys_need_a_passphrase(run, run_json, sold, tmp_path):
    """From a file; restored without it, the market signs with a new key."""
    before = run_json("key", "show")["kid"]
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse battery staple\n")
    made = run("backup", "create", tmp_path / "backup", "--passphrase-file", secret)
    assert "with its secret keys" in made.out
    home = ("--home", tmp_path / "other")
    run("backup", "restore", tmp_path / "backup", "--passphrase-file", secret, *home)
    assert run_json("key", "show", *home)["kid"] == before
    home = ("--home", tmp_path / "third")
    shown = run("backup", "restore", tmp_path / "backup", *home).out
    assert "without its secret keys" in shown
    assert run_json("key", "show", *home)["kid"] != before
    secret.write_text("wrong horse battery staple")
    words = ("backup", "restore", tmp_path / "backup", "--passphrase-file", secret)
    assert "passphrase is wrong" in run(*words, "--home", tmp_path / "x", code=2).err


def test_proofs_go_through_pipes(sold, home, program, jwks):
    """`kvmarket receipt show ID --jws | kvmarket receipt verify -`, as users type it."""
    shown = subprocess.run(
        [program, "receipt", "show", "kvr_p1", "--jws"], capture_output=True, check=True
    )
    subprocess.run(
        [program, "receipt", "verify", "-", "--jwks", jwks], input=shown.stdout, check=True
    )
