"""The ledger's time on SQLite: it follows the machine, never goes back, and cannot jump."""

from __future__ import annotations

import pytest

from tests.support.ledger_books import hold
from vllm_kvmarket.ledger import GRACE_S, Ledger
from vllm_kvmarket.ledger.clock import Mark, Reading, advance
from vllm_kvmarket.ledger.sqlite import SqliteStorage

AT = Mark(1_000.0, 50.0, "boot")


@pytest.mark.parametrize(
    ("wall_s", "uptime_s", "boot_id", "expected_s"),
    [
        (1_010.0, 60.0, "boot", 1_010.0),
        (1_012.0, 60.0, "boot", 1_012.0),  # a little wrong: corrected at once
        (1_910.0, 60.0, "boot", 1_015.0),  # 15 minutes fast: half of what passed
        (110.0, 60.0, "boot", 1_005.0),  # 15 minutes slow
        (1_910.0, 50.0, "boot", 1_000.0),  # no time has passed
        (500.0, 40.0, "boot", 1_000.0),  # an uptime that goes back moves nothing
        (5_000.0, 3.0, "another", 5_000.0),  # a new boot: the wall clock is believed ...
        (500.0, 3.0, "another", 1_003.0),  # ... but not back, and the uptime has passed
    ],
)
def test_the_time_follows_the_uptime_and_is_corrected_slowly(wall_s, uptime_s, boot_id, expected_s):
    """A jump of the wall clock moves it by at most half of the time that has passed."""
    assert advance(AT, Reading(wall_s, uptime_s, boot_id)).at_s == expected_s


def test_a_new_ledger_starts_with_the_wall_clock():
    """There is nothing to compare it with."""
    assert advance(None, Reading(1_764_000_000.0, 5.0, "boot")).at_s == 1_764_000_000.0


def test_time_never_goes_back_between_processes(tmp_path):
    """The clock's row is not written with each group: the transfers' times stand for it."""
    place, now = tmp_path / "ledger.sqlite", [0.0, 0.0]

    def clock():
        return Reading(1_000.0 + now[0], 100.0 + now[1], "boot")

    booked = []
    with (
        Ledger(SqliteStorage(place, clock)) as ledger,
        Ledger(SqliteStorage(place, clock)) as other,
    ):
        ledger.create_account("alice", "buyer")
        # The wall clock runs ahead of the uptime, and falls back.
        for number, (wall_s, passed_s) in enumerate([(0, 0), (5, 0.4), (0, 0.41), (-5, 0.42)]):
            now[:] = wall_s, passed_s
            moved = (ledger, other)[number % 2].deposit("alice", 1, f"d{number}")
            booked.append(moved.created_at_s)
    assert booked == sorted(booked)
    assert booked[2] >= booked[1] > booked[0]


def test_a_fast_clock_expires_nobodys_holds(tmp_path):
    """Every process of the machine shares the stored time: none jumps ahead of it."""
    now = {"wall": 10_000.0, "up": 100.0}

    def clock():
        return Reading(now["wall"], now["up"], "boot")

    place = tmp_path / "market.sqlite"
    with Ledger(SqliteStorage(place, clock)) as ledger:
        ledger.create_account("alice", "buyer")
        ledger.deposit("alice", 100, "d")
        ledger.submit([hold("h", 60, timeout_s=900)]).result()
        now["wall"] += 900 + GRACE_S  # fifteen minutes fast, and more
        now["up"] += 10
        assert ledger.expire_pending() == 0
        with Ledger(SqliteStorage(place, clock)) as another:
            assert another.expire_pending() == 0
        now["wall"] -= 5_000
        ledger.deposit("alice", 1, "d2")
        times = [each.created_at_s for each in ledger.transfers_after(0, 9)]
        assert times == sorted(times)
        now["up"] += 900 + GRACE_S
        now["wall"] = 10_000.0 + 910 + GRACE_S
        assert ledger.expire_pending() == 1
        assert ledger.check_integrity() == []
