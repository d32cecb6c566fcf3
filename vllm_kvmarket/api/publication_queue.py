"""Publishing over HTTP: a queue in front of the server's engine, one document at a time."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence

import msgspec

from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.api.service import Frontend
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import KVMarketError
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.market.market import Market

MOST_WAITING = 64
# The reason on a listing that fails; the engine reports its own reason where it has one.
LOST = "the engine could not publish it; see the server's log, then publish it again"
CLOSED = "the server was stopped; publish it again"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Publication:
    """A document to publish."""

    tokens: list[int]
    document: DocumentChunks
    terms: ListingTerms


class Publications:
    """The documents that this server is to publish. For one event loop.

    The catalogue has the result. A document is `publishing` there from the moment it is accepted.
    If this process dies, the catalogue of every process shows that its documents failed.
    """

    def __init__(self, market: Market, frontend: Frontend) -> None:
        self._market = market
        self._frontend = frontend
        self._namespace = frontend.namespace
        self._waiting: dict[str, Publication] = {}
        self._beginning: dict[str, tuple[Publication, asyncio.Task[Listing]]] = {}
        self._running: str | None = None
        self._worker: asyncio.Task[None] | None = None

    def chunks_of(self, tokens: Sequence[int]) -> DocumentChunks:
        """The chunks under which these tokens are published here; hashes them all."""
        return DocumentChunks.of(self._namespace, tokens, self._market.config.chunk_tokens)

    async def add(self, publication: Publication) -> Listing:
        """Accept a document; its listing, which may be live already.

        Raises ApiError when too many are waiting, and CatalogueError.
        """
        name = publication.document.document_id
        if name in self._waiting or name == self._running:
            return await asyncio.to_thread(self._market.catalogue.get, name)
        _, beginning = self._beginning.get(name, (None, None))
        if beginning is None:
            if len(self._waiting) + len(self._beginning) >= MOST_WAITING:
                raise ApiError(
                    503,
                    "too_many_publishing",
                    f"{MOST_WAITING} documents are waiting to be published; come again later",
                    headers={"retry-after": "30"},
                )
            self._check_publisher(publication.terms.publisher)
            beginning = asyncio.create_task(self._begin(name, publication))
            self._beginning[name] = publication, beginning
            beginning.add_done_callback(lambda _: self._beginning.pop(name, None))
        # The document stays accepted if its client leaves now.
        return await asyncio.shield(beginning)

    def _check_publisher(self, publisher: str) -> None:
        """Raise ApiError for a publisher that would fill the queue, which all share."""
        most = self._market.config.publisher_max_queued
        queued = [*self._waiting.values(), *(each for each, _ in self._beginning.values())]
        if sum(each.terms.publisher == publisher for each in queued) >= most:
            raise ApiError(
                429,
                "too_many_queued",
                f"{publisher} has {most} documents waiting to be published; come again later",
                headers={"retry-after": "30"},
            )

    async def _begin(self, name: str, publication: Publication) -> Listing:
        """Write the listing into the catalogue, and put the document into the queue."""
        listing = Listing.of(
            publication.document,
            publication.terms,
            created_at_s=time.time(),
            paid_for=self._market.config.tariff.write_nano(len(publication.tokens)) > 0,
        )
        begun = await asyncio.wrap_future(self._market.begin_listing(listing, publication.document))
        if begun.state == "publishing":
            self._waiting[name] = publication
            if self._worker is None or self._worker.done():
                self._worker = asyncio.create_task(self._work(), name="kvmarket-publishing")
        return begun

    async def close(self) -> None:
        """Give up all documents that are not published yet; the catalogue says so."""
        await asyncio.gather(
            *(task for _, task in self._beginning.values()), return_exceptions=True
        )
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
            publication, self._running = self._waiting.pop(name), name
            try:
                # The engine has a lock on the listing as well, and keeps it while it stores chunks.
                await self._fail(name, await self._publish(name, publication))
            finally:
                self._running = None

    async def _publish(self, name: str, publication: Publication) -> str:
        """Let the engine publish one document; the reason for a failure, as far as it is known."""
        try:
            listing = await asyncio.to_thread(self._market.catalogue.get, name)
            if listing.state != "publishing":
                return ""  # withdrawn meanwhile
            params = {"publish": {"terms": msgspec.to_builtins(publication.terms)}}
            answer = await self._frontend.operate(
                publication.tokens, self._market.credentials.sign_params(params)
            )
        except Exception as error:  # noqa: BLE001  # the next document must not suffer
            logger.error("kvmarket: %s could not be published: %r", name, error)
            return LOST
        if answer.get("declined"):
            return str(answer["declined"])
        if answer.get("document_id") != name:
            logger.error("kvmarket: published %s as %s", name, answer.get("document_id"))
        return LOST

    async def _fail(self, name: str, reason: str) -> None:
        """End a publication: the listing fails unless it is live or the engine still stores it."""
        try:
            await asyncio.to_thread(self._market.catalogue.fail, name, reason)
        except KVMarketError as error:
            logger.error("kvmarket: the catalogue could not be written: %s", error)
