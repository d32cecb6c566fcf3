"""CPU seconds of an engine's processes, to the nanosecond."""

from __future__ import annotations

import ctypes
import os
import time

import psutil


class EngineClock:
    """The CPU clocks of this process and of all that it has started: client, engine core, workers.

    Make it when the engine runs. User and system time of every thread, also of ended ones.
    Source: clock_getcpuclockid(3), which reads what psutil's cpu_times() shows in ticks of 10 ms.
    """

    def __init__(self) -> None:
        children = psutil.Process().children(recursive=True)
        self._clocks = [_clock_of(pid) for pid in (os.getpid(), *(each.pid for each in children))]

    def seconds(self) -> float:
        """CPU seconds used so far."""
        return sum(map(time.clock_gettime, self._clocks))


def _clock_of(pid: int) -> int:
    """The id of a process's CPU clock. Raises OSError."""
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(ctypes.c_int(pid), ctypes.byref(clock))
    if error:
        raise OSError(error, os.strerror(error))
    return clock.value
