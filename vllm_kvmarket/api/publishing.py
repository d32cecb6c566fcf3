"""Publishing over HTTP: a queue in front of the server's own engine, one document at a time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.auth.operator_tokens import OPERATOR
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.errors import KVMarketError
from vllm_kvmarket.core.model_identity import chunk_keys, document_id
from vllm_kvmarket.market.market import Market

MOST_WAITING = 64
# What the engine says it begins with the document's listing; from then on that is the engine's.
LOST = "the engine could not publish it; see the server's log, then publish it again"
CLOSED = "the server was stopped; publish it again"

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What publishing needs of an engine."""

    async def operate(self, tokens: Sequence[int], wish: dict[str, Any]) -> dict[str, Any]:
        """Run a prompt with a wish of the operator; what the market's half of it answered."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A document that somebody wants on offer."""

    tokens: list[int]
    title: str
    publisher: str
    rendered_as: Literal["text", "chat"]
    cache_read_nano_per_mtok: int | None = None
    royalty_ppm: int | None = None
    ttl_s: float | None = None


class Publications:
    """What this server publishes. Used by one event loop; the catalogue says how it went.

    A document is `publishing` in the catalogue from the moment it is accepted, held there by this
    process: when it dies, what it had not published fails, and every process sees that.
    """

    def __init__(self, market: Market, engine: Engine, namespace: bytes) -> None:
        self._market = market
        self._engine = engine
        self._namespace = namespace
        self._waiting: dict[str, tuple[Wish, float | None]] = {}
        self._beginning: dict[str, asyncio.Task[Listing]] = {}
        self._running: str | None = None
        self._worker: asyncio.Task[None] | None = None

    def id_of(self, tokens: Sequence[int]) -> str:
        """The id under which these tokens are published here; hashes them all."""
        keys = chunk_keys(self._namespace, tokens, self._market.config.chunk_tokens)
        return document_id(keys[-1])

    async def add(self, name: str, wish: Wish) -> Listing:
        """Accept a document, whose id is `name`; its listing as it stands. Raises ApiError when too
        many are waiting, CatalogueError.

        One that is live, or being published already, comes back as it is.
        """
        if name in self._waiting or name == self._running:
            return await asyncio.to_thread(self._market.catalogue.get, name)
        beginning = self._beginning.get(name)
        if beginning is None:
            if len(self._waiting) + len(self._beginning) >= MOST_WAITING:
                raise ApiError(
                    503,
                    "too_many_publishing",
                    f"{MOST_WAITING} documents are waiting to be published; come again later",
                    headers={"retry-after": "30"},
                )
            beginning = asyncio.create_task(self._begin(name, wish))
            self._beginning[name] = beginning
            beginning.add_done_callback(lambda _: self._beginning.pop(name, None))
        # A client that leaves now does not take the document back.
        return await asyncio.shield(beginning)

    async def _begin(self, name: str, wish: Wish) -> Listing:
        """Note in the catalogue that a document is being published, and stand in line."""
        now_s = time.time()
        expires_at_s = None if wish.ttl_s is None else now_s + wish.ttl_s
        listing = Listing(
            document_id=name,
            namespace=self._namespace,
            title=wish.title,
            publisher=wish.publisher,
            token_count=len(wish.tokens),
            rendered_as=wish.rendered_as,
            cache_read_nano_per_mtok=wish.cache_read_nano_per_mtok,
            royalty_ppm=wish.royalty_ppm,
            created_at_s=now_s,
            expires_at_s=expires_at_s,
            paid_for=self._market.config.tariff.write_nano(len(wish.tokens)) > 0,
        )
        begun = await asyncio.wrap_future(self._market.begin_listing(listing, wish.tokens))
        if begun.state == "publishing":
            self._waiting[name] = wish, expires_at_s
            if self._worker is None or self._worker.done():
                self._worker = asyncio.create_task(self._work(), name="kvmarket-publishing")
        return begun

    async def close(self) -> None:
        """Give up what is waiting or under way; the catalogue says so."""
        await asyncio.gather(*self._beginning.values(), return_exceptions=True)
        left = [*self._waiting, *([self._running] if self._running else [])]
        self._waiting.clear()
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        for name in left:
            await self._fail(name, CLOSED)

    async def _work(self) -> None:
        while self._waiting:
            name = next(iter(self._waiting))
            (wish, expires_at_s), self._running = self._waiting.pop(name), name
            try:
                # While it runs, the engine holds the listing too; then it holds it alone.
                await self._fail(name, await self._publish(name, wish, expires_at_s))
            finally:
                self._running = None

    async def _publish(self, name: str, wish: Wish, expires_at_s: float | None) -> str:
        """Have the engine publish one document; why it could not, as far as is known here."""
        try:
            listing = await asyncio.to_thread(self._market.catalogue.get, name)
            if listing.state != "publishing":
                return ""  # delisted meanwhile
            answer = await self._engine.operate(
                wish.tokens,
                {
                    "publish": {
                        "title": wish.title,
                        "publisher": wish.publisher,
                        "rendered_as": wish.rendered_as,
                        "cache_read_nano_per_mtok": wish.cache_read_nano_per_mtok,
                        "royalty_ppm": wish.royalty_ppm,
                        "expires_at_s": expires_at_s,
                    },
                    "token": self._market.credentials.token(OPERATOR),
                },
            )
        except Exception as error:  # noqa: BLE001  # whatever an engine raises, the next document is not its business
            logger.error("kvmarket: %s could not be published: %r", name, error)
            return LOST
        if answer.get("declined"):
            return str(answer["declined"])
        if answer.get("document_id") != name:
            logger.error("kvmarket: published %s as %s", name, answer.get("document_id"))
        return LOST

    async def _fail(self, name: str, reason: str) -> None:
        """Hold a listing no more: it fails unless it is live, or the engine goes on storing it."""
        try:
            await asyncio.to_thread(self._market.catalogue.fail, name, reason)
        except KVMarketError as error:
            logger.error("kvmarket: the catalogue could not be written: %s", error)
