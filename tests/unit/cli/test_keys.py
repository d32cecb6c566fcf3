"""`kvmarket apikey ...`: keys with limits; `kvmarket log admin`: what was changed."""

import getpass
import time

import pytest

from vllm_kvmarket import cli
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.market.market import DATABASE_FILE


def test_a_key_is_made_with_its_limits(run_json, home):
    """As options in currency units, spans and address ranges; the key is good at once."""
    made = run_json(
        *("apikey", "create", "alice", "--scope", "buyer", "--scope", "publisher"),
        *("--ttl", "7d", "--day-budget", "1.5", "--budget", "20", "--price-cap", "0.25"),
        *("--network", "10.0.0.0/8", "--network", "::1/128", "--label", "laptop"),
    )
    assert made["key"].startswith("kvm_")
    limits = made["limits"]
    assert 7 * 86_400 - 60 < limits.pop("expires_at_s") - time.time() <= 7 * 86_400
    assert limits == {
        "day_budget_nano": 1_500_000_000,
        "total_budget_nano": 20_000_000_000,
        "consents": True,
        "max_cache_read_nano_per_mtok": 250_000_000,
        "networks": ["10.0.0.0/8", "::1/128"],
    }
    keys = Keys(home / DATABASE_FILE)
    assert keys.check(made["key"], "10.0.0.1").account == "alice"
    assert keys.check(made["key"], "192.0.2.1") is None
    keys.close()


def test_keys_are_listed_without_their_secrets(run, run_json, home):
    """With their last use, their spending and their end."""
    made = run_json("apikey", "create", "alice", "--no-consent", "--budget", "1")
    keys = Keys(home / DATABASE_FILE)
    assert keys.check(made["key"]) is not None
    assert keys.spend(made["key_id"], 250_000_000)
    keys.close()
    (listed,) = run_json("apikey", "list")["keys"]
    assert (listed["account"], listed["scopes"], listed["spent_nano"]) == (
        "alice",
        ["buyer"],
        250_000_000,
    )
    assert listed["last_used_at_s"] > time.time() - 60
    assert not listed["limits"]["consents"]
    shown = run("apikey", "list", "--account", "alice").out
    assert made["key_id"] in shown and "0.25" in shown
    assert made["key"] not in shown
    run("apikey", "revoke", made["key_id"])
    assert "revoked 2" in run("apikey", "list").out
    assert "no keys" in run("apikey", "list", "--account", "bob").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["world"], "is an account of the market itself"),
        (["provider", "--scope", "admin"], "is an account of the market itself"),
        (["a b"], "is no account"),
        (["alice", "--network", "10.0.0.1/8"], "give one like 10.0.0.0/8"),
        (["alice", "--price-cap", "1", "--no-consent"], "not allowed with"),
        (["alice", "--budget", "-1"], "--budget: expected"),
    ],
)
def test_a_key_that_cannot_be_is_a_usage_error(run, options, message):
    """One line, and no key."""
    assert message in run("apikey", "create", *options, code=2).err


def test_changes_are_in_the_admin_log(run, run_json, sold):
    """Each command that changes something, with its arguments; what only looks is not there."""
    run("account", "deposit", "alice", "2.5", "--id", "bank-1")
    made = run_json("apikey", "create", "alice", "--label", "laptop")
    run("account", "list")
    run("document", "delist", sold.document_id)
    run("document", "delist", sold.document_id, code=1)
    entries = run_json("log", "admin")["entries"]
    assert [entry["action"] for entry in entries] == [
        "document delist",
        "document delist",
        "apikey create",
        "account deposit",
    ]
    assert {entry["actor"] for entry in entries} == {f"cli:{getpass.getuser()}"}
    assert entries[-1]["details"] == {"account": "alice", "amount": 2_500_000_000, "id": "bank-1"}
    assert entries[-2]["details"] == {"account": "alice", "label": "laptop"}
    shown = run("log", "admin", "--limit", "2").out
    assert sold.document_id in shown and "deposit" not in shown
    assert made["key"] not in run("log", "admin").out


def test_every_command_that_writes_is_recorded():
    """A new command is a change or is named here as one that only looks."""
    looking = {
        *("document list", "document show", "document audit", "account list", "apikey list"),
        *("ledger show", "ledger statement", "ledger check", "receipt list", "receipt show"),
        *("receipt verify", "log checkpoint", "log prove", "log consistency", "log verify"),
        *("log admin", "key show", "trust list", "store check"),
        # They need no market, or make their own.
        *("env", "demo", "backup restore", "database init"),
        # It asks a server, which records it.
        "document preload",
    }
    assert {command.name for command in cli.commands() if not command.changes} == looking
