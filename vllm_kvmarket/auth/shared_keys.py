"""Public keys in the market's database, for machines that share it: who signs, who is trusted.

Each machine keeps its private keys in its home: somebody who takes one machine over, or has a copy
of the database, can sign nothing in the name of the others. What any machine signed is verified on
all, and a revocation holds on all.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vllm_kvmarket.auth.signing_keys import PublicKey
from vllm_kvmarket.core.database import Database, Room, open_database
from vllm_kvmarket.core.errors import UnavailableError

PUBLIC_KEYS = Room(
    "public keys",
    (
        """
CREATE TABLE signing_key (
    kid TEXT PRIMARY KEY,
    jwk TEXT NOT NULL
) STRICT;
CREATE TABLE revoked_key (
    kid TEXT PRIMARY KEY,
    revoked_at_s INTEGER NOT NULL,
    reason TEXT NOT NULL
) STRICT;
CREATE TABLE trusted_key (
    kid TEXT PRIMARY KEY,
    jwk TEXT NOT NULL
) STRICT;
""",
    ),
    UnavailableError,
)


class SharedKeys:
    """See the module. Thread-safe; the database is opened when it is first asked.

    Every method raises UnavailableError while the database is away: nobody then takes a key that
    was revoked for a good one.
    """

    def __init__(self, place: Path | str) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._opened: Database | None = None

    def close(self) -> None:
        """Release the database."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    @property
    def _db(self) -> Database:
        with self._lock:
            if self._opened is None:
                self._opened = open_database(self._place, PUBLIC_KEYS)
            return self._opened

    # Who signs

    def signers(self) -> list[PublicKey]:
        """Every machine's keys, as they were announced."""
        with self._db.snapshot() as db:
            rows = db.execute("SELECT jwk FROM signing_key ORDER BY kid").fetchall()
        return [PublicKey.of_jwk(json.loads(jwk), "a key in the database") for (jwk,) in rows]

    def revoked(self) -> dict[str, int]:
        """When each key was revoked that was, by its kid."""
        with self._db.snapshot() as db:
            return dict(db.execute("SELECT kid, revoked_at_s FROM revoked_key").fetchall())

    def announce(self, keys: Iterable[PublicKey], revoked: Iterable[tuple[str, int]]) -> None:
        """Show a machine's own keys to the others; writes only what they do not know yet."""
        with self._db.snapshot() as db:
            known = dict(db.execute("SELECT kid, jwk FROM signing_key").fetchall())
        gone = self.revoked()
        texts = {key.kid: json.dumps(replace(key, revoked_at_s=0).jwk()) for key in keys}
        news = [each for each in texts.items() if known.get(each[0]) != each[1]]
        ends = [each for each in revoked if each[0] not in gone]
        if not news and not ends:
            return
        with self._db.transaction() as db:
            db.executemany(
                "INSERT INTO signing_key VALUES (?, ?) "
                "ON CONFLICT (kid) DO UPDATE SET jwk = excluded.jwk",
                news,
            )
            for kid, revoked_at_s in ends:
                db.execute(
                    "INSERT INTO revoked_key VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                    (kid, revoked_at_s, "revoked in its home"),
                )

    def revoke(self, kid: str, revoked_at_s: int, reason: str) -> None:
        """Make a key worthless on all machines, for good."""
        with self._db.transaction() as db:
            db.execute(
                "INSERT INTO revoked_key VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (kid, revoked_at_s, reason),
            )

    # Who is trusted

    def trusted(self) -> dict[str, PublicKey]:
        """Every trusted key by its kid."""
        with self._db.snapshot() as db:
            rows = db.execute("SELECT jwk FROM trusted_key ORDER BY kid").fetchall()
        found = (PublicKey.of_jwk(json.loads(jwk), "a key in the database") for (jwk,) in rows)
        return {key.kid: key for key in found}

    def trust(self, key: PublicKey) -> bool:
        """Trust a key from now on; False if it was trusted before."""
        with self._db.transaction() as db:
            if db.execute("SELECT 1 FROM trusted_key WHERE kid = ?", (key.kid,)).fetchall():
                return False
            db.execute("INSERT INTO trusted_key VALUES (?, ?)", (key.kid, json.dumps(key.jwk())))
            return True

    def distrust(self, kid: str) -> bool:
        """Trust a key no more; False if it was not trusted."""
        with self._db.transaction() as db:
            found = db.execute("SELECT 1 FROM trusted_key WHERE kid = ?", (kid,)).fetchall()
            db.execute("DELETE FROM trusted_key WHERE kid = ?", (kid,))
            return bool(found)
