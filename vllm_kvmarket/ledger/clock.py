"""The ledger's time on SQLite: the machine's clock, but it never goes back, and it cannot jump.

The time is stored with each group of transfers, together with the machine's uptime. During one boot
the ledger's time follows the uptime, which nobody can set, and is corrected towards the wall clock
by at most half of what has passed. So a clock that is set wrong cannot expire everybody's holds. At
a new boot, when no request of before is running any more, the wall clock is taken as it is, unless
it lies in the past of the ledger.
"""

from __future__ import annotations

import functools
import time

import msgspec

from vllm_kvmarket.core.durable_files import OS_FILES

MOST_CORRECTION = 0.5  # seconds a second


class Reading(msgspec.Struct, frozen=True):
    """One look at the machine's clocks; `boot_id` changes with each boot."""

    wall_s: float
    uptime_s: float
    boot_id: str


class Mark(msgspec.Struct, frozen=True):
    """The ledger's time, in seconds of the epoch, and when it was taken."""

    at_s: float
    uptime_s: float
    boot_id: str


def machine_clock() -> Reading:
    """Read the clocks of this machine."""
    return Reading(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), _boot_id())


@functools.cache
def _boot_id() -> str:
    return OS_FILES.boot_id().strip()


def advance(mark: Mark | None, now: Reading) -> Mark:
    """The ledger's time now, after `mark`; pure, and never below the mark's time."""
    if mark is None:
        at_s = now.wall_s
    elif mark.boot_id != now.boot_id:
        # At least the uptime has passed: a wall clock in the past must not stop the time.
        at_s = max(mark.at_s + now.uptime_s, now.wall_s)
    else:
        passed_s = max(0.0, now.uptime_s - mark.uptime_s)
        most_s = MOST_CORRECTION * passed_s
        wrong_s = now.wall_s - (mark.at_s + passed_s)
        at_s = mark.at_s + passed_s + min(max(wrong_s, -most_s), most_s)
    return Mark(at_s, now.uptime_s, now.boot_id)
