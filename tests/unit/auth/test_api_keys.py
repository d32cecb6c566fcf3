"""API keys: made, checked, revoked, and seen so by other processes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time

import apsw
import pytest

from vllm_kvmarket import ledger
from vllm_kvmarket.api.auth import Caller
from vllm_kvmarket.auth import api_keys
from vllm_kvmarket.auth.api_keys import (
    DAY_S,
    KEEP_PURCHASES_S,
    REFRESH_S,
    RESERVED_ACCOUNTS,
    KeyLimits,
    Keys,
    KeysUnavailableError,
    Principal,
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
def place(path):
    return path


@pytest.fixture
def keys(place):
    opened = Keys(place)
    yield opened
    opened.close()


def test_a_key_names_its_account_and_scopes(keys):
    """And has an id."""
    secret, key_id = keys.create("alice", ["buyer", "publisher"])
    assert keys.check(secret) == Principal("alice", frozenset({"buyer", "publisher"}), key_id)


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
    """The database's files hold only its digest."""
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
    (listed_key,) = keys.listed(key_id=key_id)
    keys.revoke(key_id)
    assert keys.check(secret) is None
    assert keys.check(other) is not None
    assert keys.listed(key_id=key_id) == [listed_key]
    assert listed_key.revoked_at_s is not None


def test_a_revocation_by_another_process_is_seen_within_a_second(place):
    """A remembered key is looked up again after half a second."""
    clock = Clock()
    mine, theirs = Keys(place, clock), Keys(place)
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
        "print(Keys(Path(sys.argv[1])).create('bob', ['read-only'])[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    principal = keys.check(done.stdout.strip())
    assert principal is not None
    assert principal.account == "bob"


def test_a_scope_allows_what_it_says(keys):
    """An admin's key allows everything."""
    may = {
        scope: {
            asked
            for asked in ("admin", "publisher", "buyer")
            if Caller.of_key(keys.check(keys.create("alice", [scope])[0])).may(asked)
        }
        for scope in ("admin", "publisher", "buyer", "read-only")
    }
    assert may == {
        "admin": {"admin", "publisher", "buyer"},
        "publisher": {"publisher"},
        "buyer": {"buyer"},
        "read-only": set(),
    }


@pytest.mark.parametrize(
    ("account", "scopes"),
    [
        ("", ["buyer"]),
        ("a b", ["buyer"]),
        ("a" * 129, ["buyer"]),
        ("alice", []),
        ("alice", ["root"]),
        ("world", ["buyer"]),
        ("provider", ["admin"]),
    ],
)
def test_no_key_is_made_for_what_cannot_be(keys, account, scopes):
    """An account that cannot exist or is the market's own, an unknown scope."""
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
    """A remembered key may have been revoked meanwhile."""
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


def test_the_markets_own_accounts_are_known_by_name():
    """A key for `world`, which may go below zero, would be free money."""
    assert {ledger.WORLD, ledger.PROVIDER} <= RESERVED_ACCOUNTS


@pytest.fixture
def wall():
    clock = Clock()
    clock.now_s = 20_000 * DAY_S + 100.0
    return clock


@pytest.fixture
def dated(place, wall):
    """Keys under a clock that the test moves."""
    opened = Keys(place, wall_clock=wall)
    yield opened
    opened.close()


def test_a_key_ends_at_its_expiry(dated, wall):
    """At that moment, without a look at the database."""
    secret, key_id = dated.create("alice", limits=KeyLimits(expires_at_s=wall.now_s + 10))
    assert dated.check(secret) is not None
    wall.now_s += 10
    assert dated.check(secret) is None
    assert dated.principal(key_id) is None


@pytest.mark.parametrize(
    ("address", "is_let_in"),
    [
        ("10.1.2.3", True),
        ("11.1.2.3", False),
        ("2001:db8::7", True),
        ("2001:db9::7", False),
        ("::ffff:10.9.9.9", True),
        ("", False),
        ("testclient", False),
    ],
)
def test_a_key_may_be_bound_to_networks(keys, address, is_let_in):
    """An unknown address is in none of them."""
    limits = KeyLimits(networks=("10.0.0.0/8", "2001:db8::/32"))
    secret, key_id = keys.create("alice", limits=limits)
    assert (keys.check(secret, address) is not None) is is_let_in
    assert (keys.principal(key_id, address) is not None) is is_let_in


@pytest.mark.parametrize("network", ["10.0.0.1/8", "somewhere", "10.0.0.0/33", ""])
def test_an_address_range_that_is_none_is_refused(network):
    """With an example of one."""
    with pytest.raises(ConfigError, match=r"10\.0\.0\.0/8"):
        KeyLimits(networks=(network,))


def test_a_keys_limits_are_known_to_every_process(keys, place):
    """With the principal, and in the list."""
    limits = KeyLimits(day_budget_nano=5, max_cache_read_nano_per_mtok=7, consents=False)
    secret, key_id = keys.create("alice", limits=limits)
    other = Keys(place)
    assert other.check(secret).limits == other.listed(key_id=key_id)[0].limits == limits
    assert other.principal(key_id) == other.check(secret)
    keys.revoke(key_id)
    other.close()


def test_a_session_that_was_ended_has_ended_on_every_server(keys, place):
    """Also where a machine has nothing but the database in common; old ones are forgotten."""
    keys.end_session("a", 100.0, 0.0)
    keys.end_session("a", 101.0, 0.0)
    with contextlib.closing(Keys(place)) as others:
        assert (others.has_ended("a"), others.has_ended("b")) == (True, False)
        others.end_session("b", 200.0, 150.0)
    assert (keys.has_ended("a"), keys.has_ended("b")) == (False, True)


def test_a_budget_of_a_day_ends_with_the_day(dated, wall):
    """At midnight UTC there is a new one; the budget in all goes on."""
    limits = KeyLimits(day_budget_nano=10, total_budget_nano=15)
    _, key_id = dated.create("alice", limits=limits)
    assert dated.spend(key_id, 6)
    assert not dated.spend(key_id, 5)
    assert dated.spend(key_id, 4)
    assert dated.budget_left_nano(key_id) == 0
    wall.now_s += DAY_S - 101
    assert not dated.spend(key_id, 1)
    wall.now_s += 1
    assert dated.budget_left_nano(key_id) == 5
    assert not dated.spend(key_id, 6)
    assert dated.spend(key_id, 5)
    assert not dated.spend(key_id, 1)
    (info,) = dated.listed()
    assert (info.spent_today_nano, info.spent_nano) == (5, 15)


def test_a_key_for_some_addresses_has_a_budget_too(dated):
    """Its requests' addresses were checked when they came."""
    limits = KeyLimits(day_budget_nano=10, networks=("10.0.0.0/8",))
    _, key_id = dated.create("alice", limits=limits)
    assert dated.spend(key_id, 10)
    assert not dated.spend(key_id, 1)


def test_what_was_not_charged_is_given_back(dated, wall):
    """To the budget in all, and to the day's if it is still that day."""
    _, key_id = dated.create("alice", limits=KeyLimits(day_budget_nano=10, total_budget_nano=20))
    assert dated.spend(key_id, 10)
    dated.answered(key_id, 10, 6)
    assert dated.budget_left_nano(key_id) == 4
    wall.now_s += DAY_S
    dated.answered(key_id, 10, 4)
    dated.answered(key_id, 10, None)
    assert dated.spend(key_id, 10)
    assert dated.listed()[0].spent_nano == 10


# The attempts of one purchase at a price of 10: how each ends, and what is left of 25 then. The
# engine says what it charged: 0 where the purchase was paid before or nothing was sold, None where
# nobody knows.
ATTEMPTS = [
    ([8, 0, 0], [17, 17, 17]),
    ([0, 8], [25, 17]),
    ([None, 0, 10], [15, 15, 15]),
    ([0, None, 0], [25, 15, 15]),
]


@pytest.mark.parametrize(("charges", "left"), ATTEMPTS)
def test_the_retries_of_a_purchase_are_counted_once(dated, charges, left):
    """As the ledger charges them; another purchase is counted for itself."""
    _, key_id = dated.create("alice", limits=KeyLimits(day_budget_nano=25))
    for charged, expected in zip(charges, left, strict=True):
        assert dated.spend(key_id, 10, "one")
        dated.answered(key_id, 10, charged, "one")
        assert dated.budget_left_nano(key_id) == expected
    assert dated.spend(key_id, 10, "two")
    assert dated.budget_left_nano(key_id) == left[-1] - 10


@pytest.mark.parametrize("charges", [(10, 0), (0, 10), (10, 10), (None, 0)])
def test_a_retry_beside_the_first_attempt_is_counted_with_it(dated, place, charges):
    """Whichever of them is charged, whichever ends first, and whichever machine serves it."""
    _, key_id = dated.create("alice", limits=KeyLimits(total_budget_nano=10))
    other = Keys(place, wall_clock=dated._wall_clock)
    assert dated.spend(key_id, 10, "one")
    assert other.spend(key_id, 10, "one")
    assert not dated.spend(key_id, 1, "two")
    for charged, server in zip(charges, (other, dated), strict=True):
        server.answered(key_id, 10, charged, "one")
        assert dated.budget_left_nano(key_id) == 0
    assert dated.spend(key_id, 10, "one"), "it is paid"
    other.close()


def test_a_purchase_is_remembered_as_long_as_it_can_be_repeated(dated, wall):
    """Then its row goes."""
    _, key_id = dated.create("alice", limits=KeyLimits(total_budget_nano=30))
    assert dated.spend(key_id, 10, "one")
    wall.now_s += KEEP_PURCHASES_S + 1
    assert dated.spend(key_id, 10, "two")
    assert dated.spend(key_id, 10, "one")
    assert dated.budget_left_nano(key_id) == 0


def test_a_budget_holds_for_all_processes_together(place):
    """Several threads, each with its own connection, spend no more than there is."""
    first = Keys(place)
    _, key_id = first.create("alice", limits=KeyLimits(total_budget_nano=50))
    spent = []

    def buy():
        own = Keys(place)
        spent.extend(1 for _ in range(20) if own.spend(key_id, 1))
        own.close()

    threads = [threading.Thread(target=buy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(spent) == 50
    assert first.budget_left_nano(key_id) == 0
    first.close()


def test_a_purchase_does_not_wait_long_for_its_budget(keys, path):
    """Another process holds the database: the keys are unavailable, after a second."""
    _, key_id = keys.create("alice", limits=KeyLimits(total_budget_nano=50))
    with contextlib.closing(apsw.Connection(str(path))) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(KeysUnavailableError):
            keys.spend(key_id, 1)
        assert time.monotonic() - began < 5
        other.execute("ROLLBACK")
    assert keys.spend(key_id, 50)


def test_a_key_without_a_budget_has_no_end(keys):
    """None is left to say; an unknown key may spend nothing."""
    _, key_id = keys.create("alice")
    assert keys.budget_left_nano(key_id) is None
    assert not keys.spend("key_0", 1)


def test_the_last_use_is_written_by_a_thread(place, monkeypatch):
    """Not by the check itself, and at the latest when the keys are closed."""
    monkeypatch.setattr(api_keys, "WRITE_USES_S", 0.05)
    keys = Keys(place)
    secret, key_id = keys.create("alice")
    assert keys.listed()[0].last_used_at_s is None
    keys.check(secret)
    until = time.monotonic() + 10
    while keys.listed()[0].last_used_at_s is None and time.monotonic() < until:
        time.sleep(0.02)
    used_at_s = keys.listed()[0].last_used_at_s
    assert time.time() - 10 < used_at_s <= time.time()
    monkeypatch.setattr(api_keys, "WRITE_USES_S", 60.0)
    time.sleep(0.2)
    keys.check(secret)
    keys.close()
    later = Keys(place)
    assert later.listed(key_id=key_id)[0].last_used_at_s > used_at_s
    later.close()
    assert "kvmarket-key-uses" not in [thread.name for thread in threading.enumerate()]


def test_a_check_does_not_wait_for_a_writer(path, monkeypatch):
    """Another process holds the database, and a thread of ours waits for it."""
    monkeypatch.setattr(api_keys, "WRITE_PATIENCE_MS", 60_000)
    keys = Keys(path)
    secret, _ = keys.create("alice")
    with contextlib.closing(apsw.Connection(str(path))) as other:
        other.execute("BEGIN IMMEDIATE")
        writer = threading.Thread(target=keys.create, args=("bob",))
        writer.start()
        time.sleep(0.1)
        slowest_s = 0.0
        for _ in range(20):
            began = time.perf_counter()
            assert keys.check(secret) is not None
            assert keys.check("kvm_" + "a" * 43) is None
            slowest_s = max(slowest_s, time.perf_counter() - began)
            time.sleep(0.03)
        assert writer.is_alive()
        other.execute("ROLLBACK")
    writer.join()
    keys.close()
    assert slowest_s < 0.05


def test_a_change_among_many_keys_is_read_alone(path):
    """With 100,000 keys a revocation does not hold up the next check."""
    keys = Keys(path)
    secret, key_id = keys.create("alice")
    rows = (
        (f"key_{number}", number.to_bytes(32), "bob", "buyer", "", "{}", 0.0, number)
        for number in range(100_000)
    )
    with apsw.Connection(str(path)) as db:
        db.executemany("INSERT INTO api_key VALUES (?, ?, ?, ?, ?, ?, ?, NULL, ?)", rows)
        db.execute("UPDATE api_key_revision SET revision = 200000")
    keys.close()
    keys, other = Keys(path), Keys(path)
    assert keys.check(secret) is not None
    other.revoke(key_id)
    time.sleep(REFRESH_S)
    began = time.perf_counter()
    assert keys.check(secret) is None
    assert time.perf_counter() - began < 0.05
    keys.close()
    other.close()


def test_keys_of_an_older_database_replace_those_in_memory(path):
    """A revision that went back, as after a restore, is read as a whole."""
    clock = Clock()
    keys = Keys(path, clock)
    secret, _ = keys.create("alice")
    with apsw.Connection(str(path)) as db:
        db.execute("UPDATE api_key_revision SET revision = 0")
        db.execute("DELETE FROM api_key")
    clock.now_s += REFRESH_S + 0.001
    assert keys.check(secret) is None
    keys.close()
