"""The ledger in the market's SQLite file: a writing connection, and a reading one a thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import apsw

from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.errors import LedgerUnavailableError
from vllm_kvmarket.ledger import tables
from vllm_kvmarket.ledger.group_commit import malformed, unavailable
from vllm_kvmarket.ledger.model import Account, Result, Transfer
from vllm_kvmarket.ledger.receipts import Receipt
from vllm_kvmarket.ledger.storage import Batch, Everything, apply_group, wanted
from vllm_kvmarket.ledger.working_set import Found, GroupBooks, Memory, Wanted

WRITER_CACHE_KIB = 65_536  # a group touches pages all over the indexes of random ids
CHECKPOINT_PAGES = 4000  # a page that many groups change is copied to the file once


class SqliteStorage:
    """See storage.Storage. Several processes may share the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        # A thread that ends takes its connection with it; close() takes those of the others.
        self._connections: weakref.WeakSet[apsw.Connection] = weakref.WeakSet()
        self._connections_lock = threading.Lock()
        self._memory = Memory()
        self._data_version: object = None
        with self._reported():
            self._writing = sqlite.connect(path)
            self._writing.pragma("cache_size", -WRITER_CACHE_KIB)
            self._writing.pragma("wal_autocheckpoint", CHECKPOINT_PAGES)
            sqlite.migrate(self._writing, tables.ROOM, tables.MIGRATIONS)

    def close(self) -> None:
        """See Storage."""
        self._writing.close()
        with self._connections_lock:
            for connection in self._connections:
                connection.close()

    def write(self, group: Sequence[Batch]) -> list[list[Result]]:
        """See Storage."""
        try:
            return self._write(self._writing, group)
        except (apsw.ConstraintError, apsw.MismatchError, apsw.TooBigError) as error:
            raise malformed(error) from error
        except apsw.Error as error:
            raise unavailable(error) from error
        except Exception as error:
            # No error of the database, so one of the rules with what a caller built by hand.
            raise malformed(error) from error

    def _write(self, db: apsw.Connection, group: Sequence[Batch]) -> list[list[Result]]:
        looked_for = wanted(group)
        # Takes the write lock first: what is looked up stands until the commit, in every process.
        db.execute("BEGIN IMMEDIATE")
        try:
            books = GroupBooks(self._find(db, looked_for))
            answers, receipts = apply_group(books, group)
            tables.keep(db, books, receipts)
            db.execute("COMMIT")
            self._memory.learn(books)
        except BaseException:
            if db.in_transaction:  # SQLite may have rolled back already, as on a full disk
                db.execute("ROLLBACK")
            self._memory.forget()
            raise
        return answers

    def _find(self, db: apsw.Connection, looked_for: Wanted) -> Found:
        """Look up what a group names, under the write lock."""
        # The version changes when another connection commits, of this process or of another.
        version = db.pragma("data_version")
        if version != self._data_version:
            self._data_version = version
            self._memory.forget()
        known, left = self._memory.divide(looked_for)
        found = tables.find(db, left)
        return Found(
            known.accounts + found.accounts,
            known.transfers + found.transfers,
            known.dues | found.dues,
            found.resolutions,
        )

    def open_account(self, account: Account) -> None:
        """See Storage."""
        with self._reading() as db:
            db.execute(
                "INSERT INTO account (id, kind, may_go_negative, currency) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO NOTHING",
                (account.id, account.kind, int(account.may_go_negative), account.currency),
            )

    def account(self, account_id: str) -> Account | None:
        """See Storage."""
        with self._reading() as db:
            return next(iter(tables.read_accounts(db, [account_id])), None)

    def accounts(self) -> list[Account]:
        """See Storage."""
        with self._reading() as db:
            return tables.read_accounts(db)

    def transfer(self, transfer_id: str) -> Transfer | None:
        """See Storage."""
        with self._reading() as db:
            return next(iter(tables.read_some(db, [transfer_id])), None)

    def transfers(self, account: str | None, limit: int | None) -> list[Transfer]:
        """See Storage."""
        with self._reading() as db:
            return tables.read_transfers(db, account, limit)

    def transfers_after(self, sequence: int, limit: int) -> list[Transfer]:
        """See Storage."""
        with self._reading() as db:
            return tables.read_after(db, sequence, limit)

    def sequence_of(self, transfer_id: str) -> int | None:
        """See Storage."""
        with self._reading() as db:
            query = "SELECT sequence FROM transfer WHERE id = ?"
            row = db.execute(query, (transfer_id,)).fetchone()
            return row[0] if row else None

    def receipts(self, where: Mapping[str, str], limit: int | None) -> list[Receipt]:
        """See Storage."""
        with self._reading() as db:
            return tables.read_receipts(db, where, limit)

    def due_at_s(self, pending_id: str) -> float | None:
        """See Storage."""
        with self._reading() as db:
            return tables.read_dues(db, [pending_id]).get(pending_id)

    def overdue(self, now_s: float, limit: int) -> list[str]:
        """See Storage."""
        with self._reading() as db:
            return tables.overdue_holds(db, now_s, limit)

    def everything(self) -> Everything:
        """See Storage."""
        with self._reading() as db:
            db.execute("BEGIN")  # a read transaction: all of it of the same moment
            try:
                return Everything(
                    tables.read_accounts(db),
                    tables.read_transfers(db)[::-1],
                    tables.read_receipts(db, {})[::-1],
                    tables.read_dues(db),
                )
            finally:
                db.execute("ROLLBACK")

    @contextmanager
    def _reading(self) -> Iterator[apsw.Connection]:
        """This thread's connection, for reading and for opening accounts."""
        with self._reported():
            connection: apsw.Connection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = sqlite.connect(self._path)
                with self._connections_lock:
                    self._connections.add(connection)
            yield connection

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn the database's errors into ours."""
        try:
            yield
        except apsw.Error as error:
            raise LedgerUnavailableError(
                f"the market's database {self._path} cannot be used ({error}); see `kvmarket env`"
            ) from error
