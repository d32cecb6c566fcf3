"""API keys: the account that an HTTP request acts for, and the limits of the key.

A key is 256 random bits, shown once; the market's database stores its digest only. Nobody can guess
256 random bits, so a plain digest is as safe as a slow one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from blake3 import blake3

from vllm_kvmarket.auth.operator_tokens import ACCOUNT_PATTERN
from vllm_kvmarket.core.database import Bindings, Connection, Room, open_database
from vllm_kvmarket.core.errors import ConfigError, NotFoundError, UnavailableError

Scope = Literal["admin", "publisher", "buyer", "read-only"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "kvm_"
# The ledger's own accounts; `world` may go below zero, so that a key for it would be free money.
RESERVED_ACCOUNTS = frozenset({"world", "provider", "suspense"})
# Every process sees a revocation within a second.
REFRESH_S = 0.5
# The times of last use are written by a thread, this often.
WRITE_USES_S = 30.0
# A purchase waits for its budget no longer than this for other writers of the database.
WRITE_PATIENCE_MS = 1_000
DAY_S = 86_400
# Longer than a retry finds its purchase in the ledger.
KEEP_PURCHASES_S = 2 * DAY_S

_ACCOUNT = re.compile(ACCOUNT_PATTERN)
_SECRET = re.compile(r"kvm_[A-Za-z0-9_-]{43}")
_CONTEXT = b"kvmarket api key 1\0"

_SCHEMA = """
CREATE TABLE api_key (
    key_id TEXT PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
    account TEXT NOT NULL,
    scopes TEXT NOT NULL,
    label TEXT NOT NULL,
    limits TEXT NOT NULL,
    created_at_s REAL NOT NULL,
    revoked_at_s REAL,
    changed INTEGER NOT NULL  -- the revision of this row's last change
) STRICT;
CREATE INDEX api_key_account ON api_key (account);
CREATE INDEX api_key_changed ON api_key (changed);
CREATE TABLE api_key_revision (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    revision INTEGER NOT NULL
) STRICT;
INSERT INTO api_key_revision VALUES (1, 0);
CREATE TABLE api_key_use (
    key_id TEXT PRIMARY KEY REFERENCES api_key,
    last_used_at_s REAL NOT NULL DEFAULT 0,
    day INTEGER NOT NULL DEFAULT 0,  -- since 1970, in UTC
    spent_of_day_nano INTEGER NOT NULL DEFAULT 0,
    spent_nano INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
"""
# The purchases that a client may repeat, with the attempts under way; see also api_servers.
_SHARED = """
CREATE TABLE api_key_purchase (
    key_id TEXT NOT NULL REFERENCES api_key,
    purchase TEXT NOT NULL,
    begun_at_s REAL NOT NULL,
    counted_nano INTEGER NOT NULL,
    charged_nano INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    PRIMARY KEY (key_id, purchase)
) STRICT, WITHOUT ROWID;
CREATE INDEX api_key_purchase_begun ON api_key_purchase (begun_at_s);
CREATE TABLE api_server (
    name TEXT PRIMARY KEY,
    seen_at_s REAL NOT NULL
) STRICT, WITHOUT ROWID;
"""
# Sessions of the pages that people have ended before they were over.
_ENDED_SESSIONS = """
CREATE TABLE ended_session (
    id TEXT PRIMARY KEY,
    ended_at_s REAL NOT NULL
) STRICT, WITHOUT ROWID;
"""
_COLUMNS = (
    "api_key.key_id, account, scopes, label, limits, created_at_s, revoked_at_s, "
    "last_used_at_s, day, spent_of_day_nano, spent_nano"
)
_TABLES = "api_key LEFT JOIN api_key_use USING (key_id)"

Nano = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class KeysUnavailableError(UnavailableError):
    """The table of keys cannot be read: nobody can be let in."""


KEYS = Room(
    "keys",
    (_SCHEMA, _SHARED, _ENDED_SESSIONS),
    KeysUnavailableError,
    patience_ms=WRITE_PATIENCE_MS,
)


class KeyLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a key may not exceed. None means no limit.

    No request of the key buys from a listing dearer than `max_cache_read_nano_per_mtok`. Those of a
    key that `consents` buy reuse without asking for it; without that cap, up to the provider's own
    tariff. `networks` are the address ranges that the key may be used from (none: everywhere).
    """

    expires_at_s: float | None = None
    day_budget_nano: Nano | None = None
    total_budget_nano: Nano | None = None
    consents: bool = True
    max_cache_read_nano_per_mtok: Nano | None = None
    networks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for network in self.networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigError(f"no address range: {error}; give one like 10.0.0.0/8") from None

    @property
    def has_budget(self) -> bool:
        """Whether the key's purchases are counted."""
        return self.day_budget_nano is not None or self.total_budget_nano is not None


NO_LIMITS = KeyLimits()
_NO_LIMITS_ENCODED = msgspec.json.encode(NO_LIMITS).decode()


@dataclass(frozen=True, slots=True)
class Principal:
    """The sender of a request: the owner of a key."""

    account: str
    scopes: frozenset[Scope]
    key_id: str
    limits: KeyLimits = NO_LIMITS

    def is_good(self, now_s: float, address: str) -> bool:
        """Whether the key may be used now and from this network address ("": not known)."""
        limits = self.limits
        if limits.expires_at_s is not None and now_s >= limits.expires_at_s:
            return False
        return not limits.networks or _is_within(address, limits.networks)


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """The facts of a key, without its secret; `revoked_at_s` is None for a key in force."""

    key_id: str
    account: str
    scopes: tuple[Scope, ...]
    label: str
    limits: KeyLimits
    created_at_s: float
    revoked_at_s: float | None
    last_used_at_s: float | None
    spent_today_nano: int
    spent_nano: int


class Keys:
    """The keys of one market; thread-safe, several processes may use one database.

    Every method raises KeysUnavailableError when the database cannot be used, `check` too when its
    copy of the keys is older than REFRESH_S: a key may have been revoked meanwhile. Readers never
    wait for a writer: they have their own connection, and `check` is a look-up in memory.
    """

    def __init__(
        self,
        place: Path | str,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._reading = threading.Lock()
        self._known: dict[bytes, Principal] = {}
        self._by_id: dict[str, bytes] = {}
        self._revision = -1
        self._fresh_until_s = float("-inf")
        self._used_at_s: dict[str, float] = {}
        self._closing = threading.Event()
        self._use_writer: threading.Thread | None = None
        self._db = open_database(place, KEYS)
        with self._reading:
            self._refresh()

    def close(self) -> None:
        """Write the times of last use, and release the database."""
        self._closing.set()
        if self._use_writer is not None:
            self._use_writer.join()
        with self._reading:
            self._db.close()

    def create(
        self,
        account: str,
        scopes: Iterable[str] = ("buyer",),
        label: str = "",
        limits: KeyLimits = NO_LIMITS,
    ) -> tuple[str, str]:
        """Make a key for `account`, which may be created later; mutates the database.

        Returns the secret, which can never be read again, and the key's id. Raises ConfigError for
        a wrong or reserved account, and for an unknown scope.
        """
        wanted = sorted(set(scopes))
        if not _ACCOUNT.fullmatch(account):
            raise ConfigError(
                f"{account!r} is no account: use 1 to 128 letters, digits and . _ : @ -"
            )
        if account in RESERVED_ACCOUNTS:
            raise ConfigError(
                f"{account!r} is an account of the market itself; make a key for another account "
                "(an admin's key needs no account with money)"
            )
        unknown = [scope for scope in wanted if scope not in SCOPES]
        if unknown or not wanted:
            raise ConfigError(f"unknown scopes {unknown}; give one or more of {', '.join(SCOPES)}")
        secret = PREFIX + secrets.token_urlsafe(32)
        key_id = f"key_{secrets.token_hex(8)}"
        encoded = msgspec.json.encode(limits).decode()
        self._change(
            "INSERT INTO api_key SELECT ?, ?, ?, ?, ?, ?, ?, NULL, revision FROM api_key_revision",
            (
                key_id,
                _digest(secret),
                account,
                " ".join(wanted),
                label,
                encoded,
                self._wall_clock(),
            ),
        )
        return secret, key_id

    def revoke(self, key_id: str) -> None:
        """End a key, for good; mutates the database. A second time changes nothing.

        Raises NotFoundError for an unknown one.
        """
        if not self.listed(key_id=key_id):
            raise NotFoundError(f"there is no key {key_id}")
        self._change(
            "UPDATE api_key SET revoked_at_s = ?, changed = (SELECT revision FROM api_key_revision)"
            " WHERE key_id = ? AND revoked_at_s IS NULL",
            (self._wall_clock(), key_id),
        )

    def listed(self, account: str | None = None, key_id: str | None = None) -> list[KeyInfo]:
        """Return keys, newest first, revoked ones too: all, an account's, or the one of an id."""
        with self._reading:
            rows = self._read(
                f"SELECT {_COLUMNS} FROM {_TABLES} "  # noqa: S608  # constants
                "WHERE (:account IS NULL OR account = :account) "
                "AND (:key_id IS NULL OR api_key.key_id = :key_id) "
                "ORDER BY created_at_s DESC, changed DESC",
                {"account": account, "key_id": key_id},
            )
        return [self._info(row) for row in rows]

    def check(self, secret: str, address: str = "") -> Principal | None:
        """The owner of a secret; takes microseconds.

        None for no key, an unknown, revoked or expired one, and for one that may not be used from
        `address`.
        """
        if not _SECRET.fullmatch(secret):
            return None
        digest = _digest(secret)
        # A key that another process has just made is known at once.
        self._look_again(is_missing=digest not in self._known)
        return self._good(self._known.get(digest), address)

    def principal(self, key_id: str, address: str = "") -> Principal | None:
        """The owner of a key that was checked before, by its id; None as for `check`."""
        self._look_again(is_missing=key_id not in self._by_id)
        digest = self._by_id.get(key_id)
        return self._good(self._known.get(digest) if digest else None, address)

    def end_session(self, session_id: str, at_s: float, forgotten_before_s: float) -> None:
        """Note on every server that a session has ended, and forget old ones. Mutates."""
        with self._db.transaction() as db:
            db.execute("DELETE FROM ended_session WHERE ended_at_s < ?", (forgotten_before_s,))
            db.execute(
                "INSERT INTO ended_session VALUES (?, ?) ON CONFLICT DO NOTHING", (session_id, at_s)
            )

    def has_ended(self, session_id: str) -> bool:
        """Whether a session was ended, on whichever server."""
        with self._reading:
            return bool(self._read("SELECT 1 FROM ended_session WHERE id = ?", (session_id,)))

    def spend(self, key_id: str, amount_nano: int, purchase: str | None = None) -> bool:
        """Count a purchase if the key's budgets have room for it; whether they do. Mutates.

        If so, `answered` follows. Retries of a named purchase are counted once together.
        """
        # Not `principal`: the request's address has been checked, and is not known here.
        self._look_again(is_missing=key_id not in self._by_id)
        found = self._known.get(self._by_id.get(key_id, b""))
        if found is None:
            return False
        limits = found.limits
        with self._db.transaction() as db:
            counted_nano, charged_nano, attempts = _attempts(db, key_id, purchase)
            more_nano = max(0, amount_nano - counted_nano)
            asked: dict[str, int | str | None] = {
                "key_id": key_id,
                "day": int(self._wall_clock() // DAY_S),
                "amount": more_nano,
                "of_day": limits.day_budget_nano,
                "in_all": limits.total_budget_nano,
            }
            db.execute(
                "INSERT INTO api_key_use (key_id) VALUES (:key_id) ON CONFLICT DO NOTHING", asked
            )
            db.execute(
                "UPDATE api_key_use SET day = :day, spent_of_day_nano = 0 WHERE key_id = :key_id "
                "AND day < :day",
                asked,
            )
            spent = db.execute(
                "UPDATE api_key_use SET spent_of_day_nano = spent_of_day_nano + :amount, "
                "spent_nano = spent_nano + :amount WHERE key_id = :key_id "
                "AND (:of_day IS NULL OR spent_of_day_nano <= :of_day - :amount) "
                "AND (:in_all IS NULL OR spent_nano <= :in_all - :amount) RETURNING 1",
                asked,
            )
            has_room = bool(spent.fetchall())
            if has_room and purchase is not None:
                counted = (counted_nano + more_nano, charged_nano, attempts + 1)
                self._note_attempts(db, key_id, purchase, counted)
            return has_room

    def budget_left_nano(self, key_id: str, purchase: str | None = None) -> int | None:
        """The most that a key may still spend today, with what is counted for a named purchase;
        None without a budget.
        """
        (found,) = self.listed(key_id=key_id)
        budgets = (
            (found.limits.day_budget_nano, found.spent_today_nano),
            (found.limits.total_budget_nano, found.spent_nano),
        )
        with self._reading, self._db.reading() as db:
            counted_nano, _, _ = _attempts(db, key_id, purchase)
        left = [most - spent + counted_nano for most, spent in budgets if most is not None]
        return min(left, default=None)

    def answered(
        self, key_id: str, spent_nano: int, charged_nano: int | None, purchase: str | None = None
    ) -> None:
        """Give back what was spent and not charged; nothing where that is not known (None).

        Mutates. Of a named purchase, only when no attempt of it is under way.
        """
        if purchase is None and charged_nano is None:
            return
        with self._db.transaction() as db:
            left_nano = 0 if charged_nano is None else spent_nano - charged_nano
            if purchase is not None:
                counted_nano, before_nano, attempts = _attempts(db, key_id, purchase)
                charged_nano = counted_nano if charged_nano is None else charged_nano + before_nano
                charged_nano = min(counted_nano, charged_nano)
                left_nano = 0 if attempts > 1 else counted_nano - charged_nano
                counted = (counted_nano - left_nano, charged_nano, attempts - 1)
                self._note_attempts(db, key_id, purchase, counted)
            db.execute(
                "UPDATE api_key_use SET spent_nano = CASE WHEN spent_nano > :amount "
                "THEN spent_nano - :amount ELSE 0 END, "
                "spent_of_day_nano = CASE WHEN day <> :day THEN spent_of_day_nano "
                "WHEN spent_of_day_nano > :amount THEN spent_of_day_nano - :amount ELSE 0 END "
                "WHERE key_id = :key_id",
                {
                    "key_id": key_id,
                    "amount": max(0, left_nano),
                    "day": int(self._wall_clock() // DAY_S),
                },
            )

    def _note_attempts(
        self, db: Connection, key_id: str, purchase: str, counted: tuple[int, int, int]
    ) -> None:
        now_s = self._wall_clock()
        db.execute("DELETE FROM api_key_purchase WHERE begun_at_s < ?", (now_s - KEEP_PURCHASES_S,))
        db.execute(
            "INSERT INTO api_key_purchase VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (key_id, purchase) DO UPDATE SET counted_nano = excluded.counted_nano, "
            "charged_nano = excluded.charged_nano, attempts = excluded.attempts",
            (key_id, purchase, now_s, *counted),
        )

    def write_uses(self) -> None:
        """Write the times of last use that are not written yet. Mutates the database."""
        used, self._used_at_s = self._used_at_s, {}
        if used:
            with self._db.transaction() as db:
                db.executemany(
                    "INSERT INTO api_key_use (key_id, last_used_at_s) VALUES (?, ?) "
                    "ON CONFLICT (key_id) DO UPDATE SET last_used_at_s = excluded.last_used_at_s "
                    "WHERE api_key_use.last_used_at_s < excluded.last_used_at_s",
                    used.items(),
                )

    def _good(self, principal: Principal | None, address: str) -> Principal | None:
        now_s = self._wall_clock()
        if principal is None or not principal.is_good(now_s, address):
            return None
        self._used_at_s[principal.key_id] = now_s
        if self._use_writer is None:
            self._start_use_writer()
        return principal

    def _start_use_writer(self) -> None:
        with self._reading:
            if self._use_writer is None and not self._closing.is_set():
                self._use_writer = threading.Thread(
                    target=self._write_uses_often, name="kvmarket-key-uses", daemon=True
                )
                self._use_writer.start()

    def _write_uses_often(self) -> None:
        while True:
            is_last = self._closing.wait(WRITE_USES_S)
            # A time of last use is a help for people; the next one is written with the next use.
            with contextlib.suppress(KeysUnavailableError):
                self.write_uses()
            if is_last:
                return

    def _look_again(self, *, is_missing: bool) -> None:
        if is_missing or self._clock() >= self._fresh_until_s:
            with self._reading:
                self._refresh()

    def _refresh(self) -> None:
        """Read the rows that changed since the last time; only the first time reads them all."""
        now_s = self._clock()
        ((revision,),) = self._read("SELECT revision FROM api_key_revision", ())
        if revision != self._revision:
            # Where the table is an older one, from a backup, everything is read anew.
            if revision < self._revision:
                self._known, self._by_id, self._revision = {}, {}, -1
            # A change between the two queries is read now and once more the next time.
            rows = self._read(
                "SELECT digest, account, scopes, key_id, limits, revoked_at_s FROM api_key "
                "WHERE changed >= ?",
                (self._revision,),
            )
            for digest, account, scopes, key_id, limits, revoked_at_s in rows:
                if revoked_at_s is not None:
                    self._known.pop(digest, None)
                    self._by_id.pop(key_id, None)
                    continue
                self._known[digest] = Principal(
                    account, frozenset(_scopes(scopes)), key_id, _limits(limits)
                )
                self._by_id[key_id] = digest
            self._revision = revision
        self._fresh_until_s = now_s + REFRESH_S

    def _info(self, row: tuple[Any, ...]) -> KeyInfo:
        key_id, account, scopes, label, limits, created, revoked, used, day, of_day, spent = row
        return KeyInfo(
            key_id,
            account,
            _scopes(scopes),
            label,
            _limits(limits),
            created,
            revoked,
            last_used_at_s=used or None,
            spent_today_nano=of_day if day == int(self._wall_clock() // DAY_S) else 0,
            spent_nano=spent or 0,
        )

    def _read(self, statement: str, values: Bindings) -> list[tuple[Any, ...]]:
        with self._db.reading() as db:
            return db.execute(statement, values).fetchall()

    def _change(self, statement: str, values: Bindings) -> None:
        with self._db.transaction() as db:
            db.execute("UPDATE api_key_revision SET revision = revision + 1")
            db.execute(statement, values)
        self._fresh_until_s = float("-inf")


def _attempts(db: Connection, key_id: str, purchase: str | None) -> tuple[int, int, int]:
    """What is counted for a purchase, what of that was charged, and its attempts under way."""
    rows: list[tuple[int, int, int]] = db.execute(
        "SELECT counted_nano, charged_nano, attempts FROM api_key_purchase "
        "WHERE key_id = ? AND purchase = ?",
        (key_id, purchase),
    ).fetchall()
    return rows[0] if rows else (0, 0, 0)


def _digest(secret: str) -> bytes:
    return blake3(_CONTEXT + secret.encode()).digest()


def _scopes(text: str) -> tuple[Scope, ...]:
    return tuple(scope for scope in SCOPES if scope in text.split(" "))


def _limits(encoded: str) -> KeyLimits:
    # Most keys have none, and 100,000 keys are read when a server starts.
    if encoded == _NO_LIMITS_ENCODED:
        return NO_LIMITS
    return msgspec.json.decode(encoded, type=KeyLimits)


def _is_within(address: str, networks: tuple[str, ...]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    return any(parsed in ipaddress.ip_network(network) for network in networks)
