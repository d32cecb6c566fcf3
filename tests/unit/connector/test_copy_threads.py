"""Threads that copy may use every core, also in a process that was pinned to one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from vllm_kvmarket.connector.copy_threads import begin_thread

# As libgomp does when torch is imported: the main thread is pinned before the plugin runs.
_PINNED = """
import os, threading
mine = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(mine)})
from vllm_kvmarket.connector.copy_threads import begin_thread, unpinned_cores
masks = []
def run(cores):
    begin_thread(cores)
    masks.append(os.sched_getaffinity(0))
for cores in (frozenset(), unpinned_cores()):
    thread = threading.Thread(target=run, args=(cores,))
    thread.start()
    thread.join()
assert masks[0] == {min(mine)}, masks
print(*sorted(masks[1]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no masks")
def test_threads_of_a_pinned_process_use_the_parents_cores():
    """Without the masks of its own they inherit the main thread's one core."""
    printed = subprocess.run(
        [sys.executable, "-c", _PINNED], capture_output=True, text=True, check=True
    )
    assert {int(core) for core in printed.stdout.split()} == os.sched_getaffinity(0)


def test_cores_that_are_not_there_change_nothing():
    """A mask from before a core was taken away must not end the thread."""
    before = os.sched_getaffinity(0)
    seen = []

    def run() -> None:
        begin_thread(frozenset({1000}))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run, name="kvmarket-test_0")
    thread.start()
    thread.join()
    assert seen == [before]
