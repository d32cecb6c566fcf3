"""API keys: which account an HTTP request speaks for, and what it may do.

A key is 256 random bits, shown once; the market's database keeps its digest only. There is nothing
to guess in it, so that a plain digest is as safe as a slow one.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import apsw
from blake3 import blake3

from vllm_kvmarket.auth.operator_tokens import ACCOUNT_PATTERN
from vllm_kvmarket.core import sqlite
from vllm_kvmarket.core.errors import ConfigError, NotFoundError, UnavailableError

Scope = Literal["admin", "publisher", "buyer", "read-only"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "kvm_"
ROOM = "keys"
# Revocations are seen within a second by every process.
REFRESH_S = 0.5

_ACCOUNT = re.compile(ACCOUNT_PATTERN)
_SECRET = re.compile(r"kvm_[A-Za-z0-9_-]{43}")
_CONTEXT = b"kvmarket api key 1\0"

MIGRATIONS = (
    """
    CREATE TABLE api_key (
        key_id TEXT PRIMARY KEY,
        digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
        account TEXT NOT NULL,
        scopes TEXT NOT NULL,
        label TEXT NOT NULL,
        created_at_s REAL NOT NULL,
        revoked_at_s REAL
    ) STRICT;
    CREATE INDEX api_key_account ON api_key (account);
    CREATE TABLE api_key_revision (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        revision INTEGER NOT NULL
    ) STRICT;
    INSERT INTO api_key_revision VALUES (1, 0);
    """,
)
_COLUMNS = "key_id, account, scopes, label, created_at_s, revoked_at_s"


class KeysUnavailableError(UnavailableError):
    """The table of keys cannot be read: nobody can be let in."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sent a request."""

    account: str
    scopes: frozenset[Scope]
    key_id: str

    def may(self, scope: Scope) -> bool:
        """Say whether the key allows what needs `scope`; an admin's allows everything, and every
        key allows reading.
        """
        return scope in self.scopes or "admin" in self.scopes or scope == "read-only"


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What is known of a key; its secret is not. `revoked_at_s` is None for a key that is good."""

    key_id: str
    account: str
    scopes: tuple[Scope, ...]
    label: str
    created_at_s: float
    revoked_at_s: float | None


class Keys:
    """The keys of one market; thread-safe, several processes may use one database.

    Every method raises KeysUnavailableError when the database cannot be used: `check` too, once
    what it remembers is older than REFRESH_S, since a key may have been revoked meanwhile.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[bytes, Principal] = {}
        self._revision = -1
        self._fresh_until_s = float("-inf")
        self._path = path
        try:
            self._db = sqlite.connect(path)
            sqlite.migrate(self._db, ROOM, MIGRATIONS)
        except apsw.Error as error:
            raise self._unavailable(error) from error

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the keys in the market's database (`market.home / DATABASE_FILE`)."""
        return cls(path)

    def close(self) -> None:
        """Release the database."""
        with self._lock:
            self._db.close()

    def create(
        self, account: str, scopes: Iterable[str] = ("buyer",), label: str = ""
    ) -> tuple[str, str]:
        """Make a key for `account`, which need not exist yet; mutates the database.

        Returns the secret, which can never be read again, and the key's id. Raises ConfigError for
        an account or a scope that cannot be.
        """
        wanted = sorted(set(scopes))
        if not _ACCOUNT.fullmatch(account):
            raise ConfigError(
                f"{account!r} is no account: use 1 to 128 letters, digits and . _ : @ -"
            )
        unknown = [scope for scope in wanted if scope not in SCOPES]
        if unknown or not wanted:
            raise ConfigError(f"unknown scopes {unknown}; give one or more of {', '.join(SCOPES)}")
        secret = PREFIX + secrets.token_urlsafe(32)
        key_id = f"key_{secrets.token_hex(8)}"
        self._change(
            "INSERT INTO api_key VALUES (?, ?, ?, ?, ?, ?, NULL)",
            (key_id, _digest(secret), account, " ".join(wanted), label, time.time()),
        )
        return secret, key_id

    def revoke(self, key_id: str) -> None:
        """End a key, for good; mutates the database. A second time changes nothing.

        Raises NotFoundError for an unknown one.
        """
        if not self.listed(key_id=key_id):
            raise NotFoundError(f"there is no key {key_id}")
        self._change(
            "UPDATE api_key SET revoked_at_s = ? WHERE key_id = ? AND revoked_at_s IS NULL",
            (time.time(), key_id),
        )

    def listed(self, account: str | None = None, key_id: str | None = None) -> list[KeyInfo]:
        """Return keys, newest first, revoked ones too: all, an account's, or the one of an id."""
        with self._lock:
            rows = self._read(
                f"SELECT {_COLUMNS} FROM api_key "  # noqa: S608  # a constant
                "WHERE (?1 IS NULL OR account = ?1) AND (?2 IS NULL OR key_id = ?2) "
                "ORDER BY created_at_s DESC, rowid DESC",
                (account, key_id),
            )
        return [KeyInfo(row[0], row[1], _scopes(row[2]), *row[3:]) for row in rows]

    def check(self, header: str) -> Principal | None:
        """Who a secret, or an Authorization header with it ("Bearer kvm_..."), belongs to.

        None for what is no key, an unknown or a revoked one. Takes microseconds.
        """
        secret = secret_in(header)
        if secret is None:
            return None
        digest = _digest(secret)
        with self._lock:
            if self._clock() >= self._fresh_until_s or digest not in self._known:
                # One made just now by another process is known at once.
                self._refresh()
            return self._known.get(digest)

    def _refresh(self) -> None:
        now_s = self._clock()
        ((revision,),) = self._read("SELECT revision FROM api_key_revision", ())
        if revision != self._revision:
            # Should a change come in between, the revision is too old, and all is read again.
            rows = self._read(
                "SELECT digest, account, scopes, key_id FROM api_key WHERE revoked_at_s IS NULL", ()
            )
            self._known = {
                row[0]: Principal(row[1], frozenset(_scopes(row[2])), row[3]) for row in rows
            }
            self._revision = revision
        self._fresh_until_s = now_s + REFRESH_S

    def _read(self, sql: str, values: tuple[object, ...]) -> list[tuple]:  # type: ignore[type-arg]
        try:
            return self._db.execute(sql, values).fetchall()
        except apsw.Error as error:
            raise self._unavailable(error) from error

    def _change(self, sql: str, values: tuple[object, ...]) -> None:
        with self._lock:
            try:
                with self._db:
                    self._db.execute(sql, values)
                    self._db.execute("UPDATE api_key_revision SET revision = revision + 1")
            except apsw.Error as error:
                raise self._unavailable(error) from error
            self._fresh_until_s = float("-inf")

    def _unavailable(self, error: Exception) -> KeysUnavailableError:
        return KeysUnavailableError(
            f"the keys in {self._path} cannot be used ({error}); see `kvmarket env`"
        )


def secret_in(header: str) -> str | None:
    """The secret in an Authorization header, or alone; None where there is no key of ours."""
    scheme, _, rest = header.strip().partition(" ")
    secret = rest.strip() if scheme.lower() == "bearer" and rest else header.strip()
    return secret if _SECRET.fullmatch(secret) else None


def _digest(secret: str) -> bytes:
    return blake3(_CONTEXT + secret.encode()).digest()


def _scopes(text: str) -> tuple[Scope, ...]:
    return tuple(scope for scope in SCOPES if scope in text.split(" "))
