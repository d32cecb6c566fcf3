"""Clients that publish: new documents, evicted and damaged ones again, new prices, withdrawals."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx

from benchmarks.soak_parts.documents import Document, Library
from benchmarks.soak_parts.plan import NANO, Story
from benchmarks.soak_parts.server import Soaked

DEAREST_NANO_PER_MTOK = 5 * NANO  # the input price: dearer is refused
ROUTE = "/v1/kvmarket/documents"


class Publisher:
    """One publisher's client; publishes, reprices and withdraws its documents."""

    def __init__(
        self, server: Soaked, library: Library, story: Story, http: httpx.AsyncClient, account: str
    ) -> None:
        self._server = server
        self._library = library
        self._story = story
        self._http = http
        self._account = account
        self._rng = random.Random(f"{account} {server.plan.seed}")

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping`, a step every second or two."""
        while not stopping.is_set():
            did = self._rng.random()
            if did < 0.55:
                await self._publish(self._absent())
            elif did < 0.62:
                await self._publish(self._library.replace_one())
            elif did < 0.70:
                await self._publish(self._library.pick(self._rng))
            elif did < 0.85:
                await self._reprice()
            elif did < 0.90:
                await self._withdraw()
            elif did < 0.95:
                await self._look()
            else:
                await self._repair()
            await asyncio.sleep(self._rng.uniform(0.5, 3.0))

    async def publish_all(self, documents: list[Document]) -> None:
        """Publish some before the soak begins."""
        for document in documents:
            await self._publish(document)

    async def _publish(self, document: Document) -> None:
        price = self._rng.choice((None, self._rng.randrange(NANO // 10, DEAREST_NANO_PER_MTOK)))
        body: dict[str, Any] = {"title": document.title, "cache_read_nano_per_mtok": price}
        body["royalty_ppm"] = self._rng.choice((None, self._rng.randrange(500_000)))
        if document.text:
            body |= {"text": document.text, "as": "chat"}
        else:
            body["token_ids"] = document.tokens
        answer = await self._call("POST", ROUTE, {k: v for k, v in body.items() if v is not None})
        if answer is None:
            return
        document.id = answer["id"]
        document.publisher = answer["publisher"]
        self._note_price(answer)
        if answer["state"] == "publishing":
            self._story.accepted[document.id] += 1
            self._story.counts["published: accepted"] += 1

    async def _reprice(self) -> None:
        document = self._mine()
        if document is None:
            return
        price = self._rng.choice((None, self._rng.randrange(NANO // 10, DEAREST_NANO_PER_MTOK)))
        # It holds from before the answer is here.
        tariff_nano = NANO // 2
        prices = self._story.prices.setdefault(document.id, set())
        prices.add(tariff_nano if price is None else price)
        body = {"cache_read_nano_per_mtok": price}
        if await self._call("PATCH", f"{ROUTE}/{document.id}", body) is not None:
            self._story.counts["repriced"] += 1

    async def _withdraw(self) -> None:
        document = self._mine()
        if document is None:
            return
        if await self._call("DELETE", f"{ROUTE}/{document.id}") is not None:
            self._story.counts["withdrawn"] += 1

    async def _look(self) -> None:
        await self._call("GET", f"{ROUTE}?limit=50&sort=reuse")
        document = self._mine()
        if document is not None and document.tokens:
            await self._call("POST", "/v1/kvmarket/quotes", {"token_ids": document.tokens})

    async def _repair(self) -> None:
        """Publish again what is known to be damaged."""
        answer = await self._call("GET", f"{ROUTE}?limit=100&state=damaged")
        damaged = {each["id"] for each in (answer or {}).get("data", [])}
        for document in self._library.documents:
            if document.id in damaged and document.publisher == self._account:
                await self._publish(document)

    def _absent(self) -> Document:
        """One that is not on offer: new, evicted, withdrawn or damaged."""
        offered = self._story.on_offer
        absent = [each for each in self._library.documents if each.id not in offered]
        return self._rng.choice(absent or self._library.documents)

    def _mine(self) -> Document | None:
        mine = [each for each in self._library.documents if each.publisher == self._account]
        return self._rng.choice(mine) if mine else None

    def _note_price(self, answer: dict[str, Any]) -> None:
        prices = self._story.prices.setdefault(answer["id"], set())
        prices.add(answer["prices"]["cache_read_nano_per_mtok"])

    async def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any] | None:
        """An answer, or None where the market has a reason to say no."""
        headers = {"authorization": f"Bearer {self._server.keys[self._account]}"}
        try:
            response = await self._http.request(
                method, f"{self._server.base}{path}", json=body, headers=headers, timeout=120
            )
        except httpx.HTTPError as error:
            self._story.fail(f"{method} {path}: {error!r}")
            return None
        said = response.json().get("error") if response.status_code < 500 else None
        if response.status_code >= 400 and (said is None or response.status_code == 401):
            self._story.fail(f"{method} {path}: HTTP {response.status_code} {response.text[:300]}")
            return None
        if said is not None:
            # Withdrawn, evicted or somebody else's meanwhile; or too many requests.
            self._story.counts[f"market said no: {said['code']}"] += 1
            return None
        return dict(response.json())
