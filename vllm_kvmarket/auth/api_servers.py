"""How many API server processes share a market: each grants its part of every rate limit."""

from __future__ import annotations

import contextlib
import secrets
import threading
from pathlib import Path

from vllm_kvmarket.auth.api_keys import KEYS, KeysUnavailableError
from vllm_kvmarket.core.database import open_database

SEEN_EVERY_S = 5.0
# By the database's clock.
GONE_AFTER_S = 20.0


class ApiServers:
    """The API server processes of one database; this one is among them until it is closed.

    `count` is what was last known: while the database is away it stays. Raises
    KeysUnavailableError if the database cannot be used at the start.
    """

    def __init__(self, place: Path | str) -> None:
        self._name = secrets.token_hex(8)
        self._db = open_database(place, KEYS)
        self._closing = threading.Event()
        self.count = 1
        self.look()
        self._watcher = threading.Thread(target=self._watch, name="kvmarket-servers", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Leave, so that the others grant more at once; releases the database."""
        self._closing.set()
        self._watcher.join()
        with contextlib.suppress(KeysUnavailableError), self._db.transaction() as db:
            db.execute("DELETE FROM api_server WHERE name = ?", (self._name,))
        self._db.close()

    def look(self) -> None:
        """Say that this process lives, forget those that died, and count the rest. Mutates."""
        with self._db.transaction() as db:
            db.execute("DELETE FROM api_server WHERE seen_at_s < unixepoch() - ?", (GONE_AFTER_S,))
            db.execute(
                "INSERT INTO api_server VALUES (?, unixepoch()) "
                "ON CONFLICT (name) DO UPDATE SET seen_at_s = excluded.seen_at_s",
                (self._name,),
            )
            ((self.count,),) = db.execute("SELECT count(*) FROM api_server").fetchall()

    def _watch(self) -> None:
        while not self._closing.wait(SEEN_EVERY_S):
            with contextlib.suppress(KeysUnavailableError):
                self.look()
