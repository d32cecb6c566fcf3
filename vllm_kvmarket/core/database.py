"""The market's database: SQLite in the home, or PostgreSQL for several machines.

The SQL is written once, for SQLite, in words that PostgreSQL has too. What is spelled differently
there is translated in `core/postgres_database.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_kvmarket.core.errors import UnavailableError

Value = None | bool | int | float | str | bytes
Bindings = Sequence[Value] | Mapping[str, Value]


class BusyError(UnavailableError):
    """Another process or thread is writing, and the caller did not want to wait."""


class Rows(Protocol):
    """The rows of one statement."""

    def __iter__(self) -> Iterator[Any]:
        """Yield each row, a tuple."""

    def fetchall(self) -> list[Any]:
        """Return all rows."""


class Connection(Protocol):
    """Runs statements; `?` and `:name` are bound. Transactions belong to who opened it."""

    def execute(self, statement: str, bindings: Bindings = (), /) -> Rows:
        """Run one statement."""

    def executemany(self, statement: str, bindings: Iterable[Bindings], /) -> object:
        """Run one statement for each of many bindings."""


@dataclass(frozen=True, slots=True)
class Room:
    """A room's tables: `migrations[0]` makes those of version `oldest`, each further one leads to
    the next version; they are only ever appended to.

    `sqlite_only` and `postgres_only` are run after the first migration. `unavailable` makes the
    room's error; a transaction waits `patience_ms` for other writers.
    """

    name: str
    migrations: Sequence[str]
    unavailable: Callable[[str], Exception]
    sqlite_only: str = ""
    postgres_only: str = ""
    patience_ms: int = 10_000
    oldest: int = 1


class Database(Protocol):
    """One room's connections; thread-safe. One transaction writes at a time, and readers never wait
    for it.

    Every method raises the room's error when the database cannot be used. `place` says where it is.
    """

    place: str

    def transaction(self, *, wait: bool = True) -> AbstractContextManager[Connection]:
        """Change the database, durably and all or nothing.

        Raises BusyError where someone else is writing and `wait` is false.
        """

    def reading(self) -> AbstractContextManager[Connection]:
        """Read the database statement by statement, each as of its own moment."""

    def snapshot(self) -> AbstractContextManager[Connection]:
        """Read the database as of one moment, whatever others write meanwhile."""

    def close(self) -> None:
        """Release the database, once what is under way is done."""


def open_database(place: Path | str, room: Room) -> Database:
    """Open a file's path or a `postgresql://` URL; makes the room's tables where there are none."""
    if isinstance(place, Path):
        from vllm_kvmarket.core.sqlite import SqliteDatabase

        return SqliteDatabase(place, room)
    from vllm_kvmarket.core.postgres_database import PostgresDatabase

    return PostgresDatabase(place, room)
