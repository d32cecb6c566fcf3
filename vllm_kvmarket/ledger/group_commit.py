"""The one thread that writes the ledger: group commit, futures, patience.

A caller only enqueues. The thread takes every batch that waits, has the storage apply and commit
them in one transaction, and then answers all of them: one fsync pays for many batches. While the
database is away, it keeps what it took and tries again, each batch as long as its caller has
patience: the ids make sure that what did take effect does not do so twice.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from vllm_kvmarket.core.errors import LedgerBusyError, LedgerError, LedgerUnavailableError
from vllm_kvmarket.ledger.model import Result
from vllm_kvmarket.ledger.storage import Batch, MalformedBatchError, Storage

MAX_GROUP = 1024  # batches a commit: bounds how long the first of them waits
MAX_QUEUED = 100_000  # batches, of some kilobytes each, while the database is away
CLOSE_PATIENCE_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0

Answer = list[Result] | LedgerError


class Writer:
    """Writes to a storage until it is closed. `start=False` is for tests: they call `step`."""

    def __init__(
        self,
        storage: Storage,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        start: bool = True,
    ) -> None:
        # Told how long each commit took, in seconds, on the writer's thread; must be quick.
        self.on_commit: Callable[[float], object] | None = None
        self._storage = storage
        self._monotonic = monotonic
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._kept: list[Batch] = []  # taken from the queue, but the database was away
        self._pause_s = FIRST_PAUSE_S
        self._closing = threading.Event()
        self._close_by_s = float("inf")
        self._ended = False
        # Held for an enqueuing only: behind the end of the queue nothing may follow.
        self._queue_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kvmarket-ledger", daemon=True)
        if start:
            self._thread.start()

    def enqueue(self, batch: Batch) -> LedgerError | None:
        """Take a batch to write; else return why nothing was taken."""
        with self._queue_lock:
            if self._closing.is_set():
                return LedgerUnavailableError("the ledger is closed")
            if self._queue.qsize() >= MAX_QUEUED:
                return LedgerBusyError(
                    f"the ledger is {MAX_QUEUED} batches behind; see whether its database works"
                )
            self._queue.put(batch)
        return None

    @property
    def queue_depth(self) -> int:
        """How many batches wait, also those that are tried again; never waits."""
        return self._queue.qsize() + len(self._kept)

    def close(self) -> None:
        """Write what is queued and answer for it; while the database is away, for 10 s at most."""
        with self._queue_lock:
            if not self._closing.is_set():
                self._close_by_s = self._monotonic() + CLOSE_PATIENCE_S
                self._closing.set()
                self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._kept or not self._ended:
            pause_s = self.step()
            if pause_s:
                # Whoever closes does not wait for the whole pause.
                self._closing.wait(pause_s)
                if self._closing.is_set():
                    time.sleep(FIRST_PAUSE_S)

    def step(self) -> float:
        """Write one group; how long to wait before the next step, because the database is away."""
        group = self._take()
        if not group:
            return 0.0
        started_s = time.perf_counter()
        answers = self._commit(group)
        if self.on_commit and any(isinstance(answer, list) for answer in answers):
            self.on_commit(time.perf_counter() - started_s)
        self._kept = []
        for batch, answer in zip(group, answers, strict=True):
            if isinstance(answer, LedgerUnavailableError) and self._patient(batch):
                self._kept.append(batch)
            elif isinstance(answer, LedgerError):
                batch.future.set_exception(answer)
            else:
                batch.future.set_result(answer)
        if not self._kept:
            self._pause_s = FIRST_PAUSE_S
            return 0.0
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s

    def _patient(self, batch: Batch) -> bool:
        return self._monotonic() < min(batch.give_up_at_s, self._close_by_s)

    def _take(self) -> list[Batch]:
        """What was kept, and what waits, in the order of submission."""
        group = self._kept
        while not self._ended and len(group) < MAX_GROUP and not (group and self._queue.empty()):
            batch = self._queue.get()
            if batch is None:
                self._ended = True
            else:
                group.append(batch)
        return group

    def _commit(self, group: list[Batch]) -> list[Answer]:
        """Write a group; when one of its batches is malformed, the halves apart, and so on.

        Nothing of a group is written when that fails, so that each half finds what it would have
        found. Commits are few: a malformed batch in a full group costs twenty.
        """
        try:
            return list(self._storage.write(group))
        except MalformedBatchError as error:
            if len(group) == 1:
                return [error]
            middle = len(group) // 2
            answers = self._commit(group[:middle])
            if isinstance(answers[-1], LedgerUnavailableError):  # the order of submission is kept
                return answers + [answers[-1]] * (len(group) - middle)
            return answers + self._commit(group[middle:])
        except Exception as error:  # noqa: BLE001
            # The thread outlives a full disk and a lost connection: callers decide.
            failure = error if isinstance(error, LedgerError) else unavailable(error)
            return [failure] * len(group)


def unavailable(error: Exception) -> LedgerUnavailableError:
    """What a caller is told whose batch could not be written."""
    failure = LedgerUnavailableError(
        f"the ledger could not be written ({error}); submit the same again: what took effect does "
        "not do so twice"
    )
    failure.__cause__ = error
    return failure


def malformed(error: Exception) -> MalformedBatchError:
    """What a caller is told whose batch the database refuses."""
    failure = MalformedBatchError(
        f"the ledger could not be written, nothing of this batch took effect: {error}"
    )
    failure.__cause__ = error
    return failure
