"""Reading ahead for requests that wait, in threads of its own, while no load is under way."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

# More than this waits for its turn in vain: the requests are scheduled before it comes.
MAX_QUEUED_CHUNKS = 512
# Of the processors' time, when others want all of it: the kernel gives the least that it can.
_LEAST_PRIORITY = 19


class Prefetcher:
    """A short queue of chunks to read ahead, first come first served; thread-safe.

    `read(namespace, key)` does the work and raises nothing. Threads that are told to give way run
    when the processors have nothing else to do.
    """

    def __init__(
        self, read: Callable[[bytes, bytes], None], threads: int, *, gives_way: bool = False
    ) -> None:
        self._read = read
        self._gives_way = gives_way
        self._changed = threading.Condition()
        self._queue: OrderedDict[bytes, bytes] = OrderedDict()  # key -> namespace
        self._loads = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"kvmarket-prefetch-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, namespace: bytes, keys: Iterable[bytes]) -> int:
        """Queue chunks; returns how many found no room. What is queued already stays in place."""
        dropped = 0
        with self._changed:
            for key in keys:
                if key in self._queue:
                    continue
                if len(self._queue) >= MAX_QUEUED_CHUNKS:
                    dropped += 1
                    continue
                self._queue[key] = namespace
            self._changed.notify_all()
        return dropped

    def load_began(self, keys: Iterable[bytes]) -> None:
        """A load is under way: begin nothing until it has ended, and leave its chunks to it.

        Each call is paired with one of `load_ended`.
        """
        with self._changed:
            self._loads += 1
            for key in keys:
                self._queue.pop(key, None)

    def load_ended(self) -> None:
        """A load that `load_began` announced has ended."""
        with self._changed:
            self._loads -= 1
            if self._loads == 0 and self._queue:
                self._changed.notify_all()

    def close(self) -> None:
        """Forget what is queued, finish what is being read, end the threads."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        if self._gives_way:
            # A thread's own priority, on Linux. Without it the thread competes with the others.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._queue and not self._loads))
                if self._closed:
                    return
                key, namespace = self._queue.popitem(last=False)
            self._read(namespace, key)
