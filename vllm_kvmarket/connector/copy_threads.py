"""Threads that copy: each may use every core that vLLM's worker had before it was pinned."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path


def unpinned_cores() -> frozenset[int]:
    """The cores that this process and its parent may use; empty where there are no such masks.

    vLLM's CPU backend starts a worker with OMP_PLACES or GOMP_CPU_AFFINITY set. OpenMP then pins
    the main thread to one core when torch is imported, which is before any plugin runs, and
    every later thread inherits that core. The parent was started without them.
    """
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    mine = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):
        return frozenset(mine | os.sched_getaffinity(os.getppid()))
    return frozenset(mine)


def begin_thread(cores: frozenset[int]) -> None:
    """Let the calling thread use `cores`, and show its Python name to `top -H`."""
    with contextlib.suppress(OSError):
        if cores:
            os.sched_setaffinity(0, cores)
        thread = threading.current_thread()
        Path(f"/proc/self/task/{thread.native_id}/comm").write_text(thread.name[:15], "utf-8")
