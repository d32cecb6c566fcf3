"""The tokens of single chunks: a match needs those of the chunk where it ends."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from vllm_kvmarket.catalogue import queries
from vllm_kvmarket.catalogue.connections import Connections
from vllm_kvmarket.catalogue.first_offers import TokensOf
from vllm_kvmarket.catalogue.listing import Match
from vllm_kvmarket.core.database import Connection
from vllm_kvmarket.core.errors import CatalogueError

THREADS = 2
# Chunks whose tokens are kept, those that were asked for last: a kilobyte each.
_KEPT = 4_000


class ChunkTokens:
    """Chunks' tokens for one process; thread-safe."""

    def __init__(self, db: Connections) -> None:
        self._db = db
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        # It starts a thread when there is something to do.
        self._pool = ThreadPoolExecutor(THREADS, "kvmarket-match")

    def close(self) -> None:
        """Finish what is being read, drop what is not, end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def at_hand(self, key: bytes) -> bytes | None:
        """Tokens that cost microseconds: from memory, or from a database on this machine.

        None where they would have to be waited for, or cannot be read.
        """
        tokens = self._remembered(key)
        if tokens is None and self._db.is_near:
            try:
                tokens = self.read(key)
            except CatalogueError:
                return None
        return tokens

    def read(self, key: bytes) -> bytes | None:
        """Tokens from wherever they are. Raises CatalogueError when they cannot be read."""
        tokens = self._remembered(key)
        if tokens is None:
            tokens = self._db.tokens_of(key)
            self._remember(key, tokens)
        return tokens

    def reader(self, db: Connection) -> TokensOf:
        """Tokens as one moment of the database has them."""

        def read(key: bytes) -> bytes | None:
            tokens = self._remembered(key)
            if tokens is None:
                tokens = queries.tokens_of(db, key)
                self._remember(key, tokens)
            return tokens

        return read

    def later(self, match: Callable[[], Match | None]) -> Future[Match | None]:
        """Match by a thread that may wait for the database."""
        return self._pool.submit(match)

    def _remembered(self, key: bytes) -> bytes | None:
        with self._lock:
            tokens = self._kept.get(key)
            if tokens is not None:
                self._kept.move_to_end(key)
            return tokens

    def _remember(self, key: bytes, tokens: bytes | None) -> None:
        if tokens is not None:
            with self._lock:
                self._kept[key] = tokens
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
