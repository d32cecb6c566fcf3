"""The one thread that writes the ledger: group commit, futures, patience.

A caller only enqueues. The thread takes every batch that waits, has the storage apply and commit
them in one transaction, and then answers all of them: one fsync pays for many batches. While the
database is away, it tries the same batches again: their ids make sure that nothing takes effect
twice. A second thread looks after the batches that wait: it answers a caller whose patience is
over, even while the first thread waits for the database, and syncs the outbox.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from vllm_kvmarket.core.errors import (
    LedgerBusyError,
    LedgerError,
    LedgerPostponedError,
    LedgerUnavailableError,
)
from vllm_kvmarket.ledger.model import Outcome, Result, void
from vllm_kvmarket.ledger.outbox import Outbox
from vllm_kvmarket.ledger.storage import Batch, MalformedBatchError, RowsHeldError, Storage

logger = logging.getLogger(__name__)

MAX_GROUP = 1024  # batches a commit: bounds how long the first of them waits
MAX_QUEUED = 100_000  # batches, of some kilobytes each, while the database is away
CLOSE_PATIENCE_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0
WATCH_S = 0.05  # how often waiting batches are looked at
OUTBOX_SYNC_S = 1.0  # while a batch waits longer, the outbox is synced

# Another request with the same key has paid: this one is not lost.
PAID = (Outcome.EXISTS_WITH_DIFFERENT_FIELDS, Outcome.ALREADY_POSTED)

Answer = list[Result] | LedgerError


class Writer:
    """Writes to a storage until it is closed. `start=False` is for tests: they call `step`."""

    def __init__(
        self,
        storage: Storage,
        *,
        outbox: Outbox | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        start: bool = True,
    ) -> None:
        # Called with the seconds of each commit, on the writer's thread; must be quick.
        self.on_commit: Callable[[float], object] | None = None
        self._storage = storage
        self._outbox = outbox
        self._monotonic = monotonic
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._kept: list[Batch] = []  # taken from the queue, but the database was away
        # Batches without an answer, and since when they wait. Who takes one out answers it.
        self._waiting: dict[Batch, float] = {}
        self._give_up_at_s = float("inf")  # no waiting batch gives up before
        self._in_outbox: set[Batch] = set()
        self._is_behind = False  # the oldest batch waits for long: the ledger is away, or slow
        self._some_wait = threading.Event()
        self._pause_s = FIRST_PAUSE_S
        self._closing = threading.Event()
        self._close_by_s = float("inf")
        self._ended = False
        # Held for an enqueuing only: behind the end of the queue nothing may follow.
        self._queue_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kvmarket-ledger", daemon=True)
        self._watcher = threading.Thread(
            target=self._watch, name="kvmarket-ledger-watch", daemon=True
        )
        if start:
            self._thread.start()
            self._watcher.start()

    def enqueue(self, batch: Batch, *, sync: bool = True) -> LedgerError | None:
        """Take a batch to write; else return why nothing was taken.

        A batch that must be booked is in the outbox on return. While the ledger is away it is
        durable there: then this waits for the disk, unless the caller syncs many at once.
        """
        now_s, must_be_booked = self._monotonic(), batch.must_be_booked
        with self._queue_lock:
            if self._closing.is_set():
                if must_be_booked and self._outbox is not None and self._outbox.add(batch):
                    self._sync_outbox()
                    return postponed()
                return LedgerUnavailableError("the ledger is closed")
            if not must_be_booked and self._queue.qsize() >= MAX_QUEUED:
                return LedgerBusyError(
                    f"the ledger is {MAX_QUEUED} batches behind; see whether its database works"
                )
            if must_be_booked and self._outbox is not None and self._outbox.add(batch):
                self._in_outbox.add(batch)
            self._waiting[batch] = now_s
            self._give_up_at_s = min(self._give_up_at_s, batch.give_up_at_s)
            self._queue.put(batch)
        if must_be_booked and sync and self._is_behind:
            self._sync_outbox()
        if not self._some_wait.is_set():
            self._some_wait.set()
        return None

    @property
    def queue_depth(self) -> int:
        """How many batches wait, also those that are tried again; never waits."""
        return len(self._waiting)

    def close(self) -> None:
        """Write what is queued and answer for it; while the database is away, for 10 s at most."""
        with self._queue_lock:
            if not self._closing.is_set():
                self._close_by_s = self._monotonic() + CLOSE_PATIENCE_S
                self._closing.set()
                self._queue.put(None)
        self._some_wait.set()
        if self._thread.ident is not None:
            self._thread.join()
            self._watcher.join()
        if self._outbox is not None:
            self._outbox.close()

    def _run(self) -> None:
        while self._kept or not self._ended:
            pause_s = self.step()
            if pause_s:
                # A close does not wait for the whole pause.
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
        self._kept, away = [], False
        for batch, answer in zip(group, answers, strict=True):
            if type(answer) is list and batch not in self._in_outbox:
                # As _answer does; spelled out, since this is nearly every batch.
                if self._waiting.pop(batch, None) is not None:
                    batch.future.set_result(answer)
            elif isinstance(answer, LedgerUnavailableError) and self._patient(batch):
                self._kept.append(batch)
                away = away or not isinstance(answer, RowsHeldError)
            else:
                self._answer(batch, answer)
        if not away:
            self._pause_s = FIRST_PAUSE_S
            return FIRST_PAUSE_S if self._kept and self._queue.empty() else 0.0
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s

    def _answer(self, batch: Batch, answer: Answer) -> None:
        """Answer a batch once; undo it where its caller cannot know whether it took effect."""
        waited = self._waiting.pop(batch, None) is not None
        away = isinstance(answer, LedgerUnavailableError)
        if batch in self._in_outbox and not away:
            self._in_outbox.discard(batch)
            assert self._outbox is not None
            if not isinstance(answer, list):
                self._outbox.refused(batch, str(answer))
            elif answer[0].outcome not in PAID and not all(each.outcome.good for each in answer):
                self._outbox.refused(batch, ", ".join(each.outcome.name for each in answer))
            self._outbox.booked()
        if not waited:
            return  # its caller gave up, and the batch was undone
        if away and batch in self._in_outbox:
            batch.future.set_exception(postponed())
            return
        if isinstance(answer, list):
            batch.future.set_result(answer)
            return
        if away and batch.undo:
            self._undo(batch)
        batch.future.set_exception(answer)

    def _undo(self, batch: Batch) -> None:
        future: Future[list[Result]] = Future()
        undone = tuple(
            void(id=f"{each.id}:unknown", pending_id=each.id) for each in batch.operations
        )
        # Once closed: the next process of this home does it.
        self.enqueue(Batch(undone, False, None, future, batch.at_s, float("inf")))

    def _watch(self) -> None:
        while self._thread.is_alive():
            if not self._closing.is_set():
                self._some_wait.clear()
                if not self._waiting:
                    self._some_wait.wait()
            self.watch()
            self._thread.join(WATCH_S)

    def watch(self) -> None:
        """Answer the callers whose patience is over; sync the outbox while the ledger is away."""
        now_s = self._monotonic()
        if now_s >= self._give_up_at_s:
            with self._queue_lock:
                waiting = list(self._waiting)
                left = [each.give_up_at_s for each in waiting if each.give_up_at_s > now_s]
                self._give_up_at_s = min(left, default=float("inf"))
            for batch in waiting:
                if now_s >= batch.give_up_at_s:
                    self._answer(batch, unavailable(TimeoutError("the database did not answer")))
        try:
            oldest_s = next(iter(self._waiting.values()), now_s)
        except RuntimeError:  # it changed meanwhile, so the writer makes progress
            oldest_s = now_s
        self._is_behind = now_s - oldest_s >= OUTBOX_SYNC_S
        if self._is_behind:
            self._sync_outbox()

    def _sync_outbox(self) -> None:
        if self._outbox is not None:
            try:
                self._outbox.sync()
            except OSError as error:
                logger.error("kvmarket: the outbox cannot be synced: %s", error)

    def _patient(self, batch: Batch) -> bool:
        return batch in self._waiting and self._monotonic() < min(
            batch.give_up_at_s, self._close_by_s
        )

    def _take(self) -> list[Batch]:
        """Take the next batches, those of a failed attempt first; in the order of submission."""
        group = [batch for batch in self._kept if batch in self._waiting]
        while not self._ended and len(group) < MAX_GROUP and not (group and self._queue.empty()):
            batch = self._queue.get()
            if batch is None:
                self._ended = True
            elif batch in self._waiting:
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
    """The error of a batch that could not be written."""
    failure = LedgerUnavailableError(
        f"the ledger could not be written ({error}); submit the same again: what took effect does "
        "not do so twice"
    )
    failure.__cause__ = error
    return failure


def postponed() -> LedgerPostponedError:
    """The error of a batch that this process cannot book, and that the next one will."""
    return LedgerPostponedError("the ledger is closed; this is in the outbox, and booked later")


def malformed(error: Exception) -> MalformedBatchError:
    """The error of a batch that the database refuses."""
    failure = MalformedBatchError(
        f"the ledger could not be written, nothing of this batch took effect: {error}"
    )
    failure.__cause__ = error
    return failure
