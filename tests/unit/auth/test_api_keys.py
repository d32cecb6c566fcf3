"""API keys: made, checked, revoked, and seen so by other processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import apsw
import pytest

from vllm_kvmarket.auth.api_keys import (
    REFRESH_S,
    Keys,
    KeysUnavailableError,
    Principal,
    secret_in,
)
from vllm_kvmarket.core.errors import ConfigError, NotFoundError


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def path(tmp_path):
    return tmp_path / "market.sqlite"


@pytest.fixture
def keys(path):
    opened = Keys.open(path)
    yield opened
    opened.close()


def test_a_key_names_its_account_and_scopes(keys):
    """As an Authorization header has it, or alone; in any case of `bearer`."""
    secret, key_id = keys.create("alice", ["buyer", "publisher"])
    principal = Principal("alice", frozenset({"buyer", "publisher"}), key_id)
    for header in (secret, f"Bearer {secret}", f"bearer  {secret} ", f"BEARER {secret}"):
        assert keys.check(header) == principal


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "kvm_", "Bearer none", "Basic kvm_x", "kvm_" + "a" * 43, "kvm_é"],
)
def test_what_is_no_key_is_nobody(keys, header):
    """Also what looks like one."""
    keys.create("alice")
    assert keys.check(header) is None


def test_a_part_of_a_key_or_more_than_it_is_no_key(keys):
    """Nothing is cut off or trimmed inside."""
    secret, _ = keys.create("alice")
    for wrong in (
        secret[:-1],
        secret + "A",
        secret.upper(),
        f"Basic {secret}",
        f"{secret} {secret}",
    ):
        assert keys.check(wrong) is None


def test_a_secret_is_not_in_the_database(keys, path):
    """Only its digest is kept, whoever reads the files of the database."""
    secret, key_id = keys.create("alice", label="laptop")
    stored = b"".join(each.read_bytes() for each in path.parent.iterdir())
    assert key_id.encode() in stored
    assert secret.encode() not in stored
    assert secret.removeprefix("kvm_").encode() not in stored


def test_a_revoked_key_is_nobody_at_once(keys):
    """In the process that revoked it; a second time changes nothing, and it stays listed."""
    secret, key_id = keys.create("alice")
    other, _ = keys.create("alice")
    keys.revoke(key_id)
    (told,) = keys.listed(key_id=key_id)
    keys.revoke(key_id)
    assert keys.check(secret) is None
    assert keys.check(other) is not None
    assert keys.listed(key_id=key_id) == [told]
    assert told.revoked_at_s is not None


def test_a_revocation_by_another_process_is_seen_within_a_second(path):
    """What was remembered is asked for again when it is half a second old."""
    clock = Clock()
    mine, theirs = Keys(path, clock), Keys.open(path)
    secret, key_id = theirs.create("alice")
    assert mine.check(secret) is not None
    theirs.revoke(key_id)
    clock.now_s += REFRESH_S + 0.001
    assert mine.check(secret) is None
    assert REFRESH_S < 1
    mine.close()
    theirs.close()


def test_a_key_that_another_process_makes_is_known_at_once(keys, path):
    """A real second process."""
    keys.check("kvm_" + "a" * 43)
    program = (
        "import sys; from pathlib import Path; from vllm_kvmarket.auth.api_keys import Keys\n"
        "print(Keys.open(Path(sys.argv[1])).create('bob', ['read-only'])[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    principal = keys.check(done.stdout.strip())
    assert principal is not None
    assert principal.account == "bob"


def test_a_scope_allows_what_it_says(keys):
    """An admin's key allows everything; every key allows reading."""
    may = {
        scope: {
            asked
            for asked in ("admin", "publisher", "buyer", "read-only")
            if keys.check(keys.create("alice", [scope])[0]).may(asked)
        }
        for scope in ("admin", "publisher", "buyer", "read-only")
    }
    assert may == {
        "admin": {"admin", "publisher", "buyer", "read-only"},
        "publisher": {"publisher", "read-only"},
        "buyer": {"buyer", "read-only"},
        "read-only": {"read-only"},
    }


@pytest.mark.parametrize(
    ("account", "scopes"),
    [
        ("", ["buyer"]),
        ("a b", ["buyer"]),
        ("a" * 129, ["buyer"]),
        ("alice", []),
        ("alice", ["root"]),
    ],
)
def test_no_key_is_made_for_what_cannot_be(keys, account, scopes):
    """Neither for an account that cannot exist nor for an unknown scope."""
    with pytest.raises(ConfigError):
        keys.create(account, scopes)
    assert keys.listed() == []


def test_an_unknown_key_cannot_be_revoked(keys):
    """It says which."""
    with pytest.raises(NotFoundError, match="key_0"):
        keys.revoke("key_0")


def test_keys_are_listed_newest_first_by_account(keys):
    """Without their secrets."""
    ids = [keys.create(account)[1] for account in ("alice", "bob", "alice")]
    assert [each.key_id for each in keys.listed()] == ids[::-1]
    assert [each.key_id for each in keys.listed("alice")] == [ids[2], ids[0]]


def test_nobody_is_let_in_when_the_keys_cannot_be_read(path):
    """What is remembered may have been revoked meanwhile."""
    clock = Clock()
    keys = Keys(path, clock)
    secret, _ = keys.create("alice")
    assert keys.check(secret) is not None
    with apsw.Connection(str(path)) as other:
        other.execute("DROP TABLE api_key_revision")
    clock.now_s += REFRESH_S + 0.001
    with pytest.raises(KeysUnavailableError, match=r"market\.sqlite"):
        keys.check(secret)
    keys.close()


def test_checking_takes_microseconds(keys):
    """A thousand checks, by several threads, beside one that makes keys."""
    secret, _ = keys.create("alice")
    wrong = []

    def check():
        wrong.extend(None for _ in range(500) if keys.check(secret) is None)

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        keys.create("bob")
    for thread in threads:
        thread.join()
    assert wrong == []
    began = time.perf_counter()
    for _ in range(1000):
        keys.check(secret)
    print(f"check: {(time.perf_counter() - began) * 1000:.1f} us")


def test_a_secret_is_found_in_a_header_only_when_it_is_one():
    """Of the right length and alphabet."""
    secret = "kvm_" + "aB-_" * 10 + "abc"
    assert secret_in(f"Bearer {secret}") == secret_in(secret) == secret
    assert secret_in(f"Bearer {secret}=") is None
