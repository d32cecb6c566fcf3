"""The one thread that writes the ledger: group commit, futures.

A caller only enqueues. The thread takes every batch that waits, applies each by the rules inside
one transaction, commits once, and then answers all of them: one fsync pays for many batches.
Balances are read inside the transaction, never remembered beyond it, so that several processes can
share the file.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

import apsw
import msgspec

from vllm_kvmarket.errors import LedgerError
from vllm_kvmarket.ledger import tables
from vllm_kvmarket.ledger.receipts import Receipt
from vllm_kvmarket.ledger.rules import Operation, Outcome, Result, apply

MAX_GROUP = 1024  # batches a commit: bounds how long the first of them waits

Answer = list[Result] | LedgerError


class Batch(msgspec.Struct, frozen=True):
    """What takes effect together, and the future that is told."""

    operations: tuple[Operation, ...]
    linked: bool
    receipt: Receipt | None
    future: Future[list[Result]]


class Writer:
    """Owns the connection that it writes to, and closes it."""

    def __init__(self, db: apsw.Connection, clock: Callable[[], float]) -> None:
        self._db = db
        self._clock = clock
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._closed = False
        # Held for an enqueuing only: behind the end of the queue nothing may follow.
        self._queue_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kvmarket-ledger", daemon=True)
        self._thread.start()

    def enqueue(self, batch: Batch) -> bool:
        """Take a batch to write; False, and nothing is taken, once the writer is closing."""
        with self._queue_lock:
            if not self._closed:
                self._queue.put(batch)
            return not self._closed

    def close(self) -> None:
        """Write what is queued, answer for it, and close the connection."""
        with self._queue_lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        """Commit group after group until the end of the queue."""
        open_ended = True
        while open_ended:
            first = self._queue.get()
            group: list[Batch] = []
            while first is not None:
                group.append(first)
                if len(group) == MAX_GROUP or self._queue.empty():
                    break
                first = self._queue.get()
            open_ended = first is not None
            if group:
                self._answer(group, self._commit(group))
        self._db.close()

    def _answer(self, group: list[Batch], answers: list[Answer]) -> None:
        for batch, answer in zip(group, answers, strict=True):
            if isinstance(answer, LedgerError):
                batch.future.set_exception(answer)
            else:
                batch.future.set_result(answer)

    def _commit(self, group: list[Batch]) -> list[Answer]:
        """Write a group in one transaction; when that fails, nothing of it is written."""
        try:
            try:
                return self._transaction(group, self._apply_all)
            except Exception as error:
                if not _is_a_batch_s(error):
                    raise
                return self._transaction(group, self._apply_each)
        except Exception as error:  # noqa: BLE001
            # The thread outlives a full disk and a locked file: callers decide.
            return [_unwritten(error)] * len(group)

    def _transaction(
        self, group: list[Batch], work: Callable[[list[Batch]], list[Answer]]
    ) -> list[Answer]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            answers = work(group)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite may have rolled back already, as on a full disk
                self._db.execute("ROLLBACK")
            raise
        return answers

    def _apply_all(self, group: list[Batch]) -> list[Answer]:
        """Apply every batch; the first that the schema refuses ends it, by an exception."""
        books = tables.StoredBooks(self._db)
        answers: list[Answer] = [self._apply(books, batch) for batch in group]
        books.flush()
        return answers

    def _apply_each(self, group: list[Batch]) -> list[Answer]:
        """Apply each batch, or undo it alone when the schema refuses what it contains.

        Savepoints make the work a third slower, so that this is for the rare group with a malformed
        batch in it.
        """
        answers: list[Answer] = []
        for batch in group:
            self._db.execute("SAVEPOINT batch")
            try:
                answers += self._apply_all([batch])
            except Exception as error:
                if not _is_a_batch_s(error):
                    raise
                answers.append(_unwritten(error))
                self._db.execute("ROLLBACK TO batch")
            self._db.execute("RELEASE batch")
        return answers

    def _apply(self, books: tables.StoredBooks, batch: Batch) -> list[Result]:
        results = apply(books, batch.operations, self._clock(), linked=batch.linked)
        outcomes = [result.outcome for result in results]
        if batch.receipt is not None and Outcome.OK in outcomes and max(outcomes).good:
            tables.put_receipt(self._db, batch.receipt)
        return results


def _is_a_batch_s(error: Exception) -> bool:
    """Whether a failure is due to what a batch contains, rather than to the database."""
    if isinstance(error, apsw.Error):
        return isinstance(error, apsw.ConstraintError | apsw.MismatchError | apsw.TooBigError)
    return True


def _unwritten(error: Exception) -> LedgerError:
    failure = LedgerError(f"the ledger could not be written, nothing took effect: {error}")
    failure.__cause__ = error
    return failure
