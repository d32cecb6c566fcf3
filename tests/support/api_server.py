"""The market's routes on a real market, with a stand-in for the engine."""

from __future__ import annotations

import hashlib
import time
from contextlib import contextmanager
from types import SimpleNamespace

import msgspec
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_kvmarket import Market
from vllm_kvmarket.api.gate import Gate
from vllm_kvmarket.api.pages import build_pages
from vllm_kvmarket.api.server import build_router, close_with_server, open_service
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.config import load
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import NotPublishableError
from vllm_kvmarket.core.listing_terms import ListingTerms

NANO = 1_000_000_000
CONTEXT = 4096
BLOCK = 16


class WordEngine:
    """A word is a token. Publishes as the connector does, on its own market object, without KV."""

    def __init__(self, home):
        self.context_tokens = CONTEXT
        self.block_tokens = BLOCK
        self.vocabulary_tokens = 1 << 31
        self.namespace = hashlib.sha256(b"words").digest()
        self.declines = ""
        self.is_exact = True
        self.dies = False
        self.wishes = []
        self._market = Market.open(home)

    def document(self, text, messages, as_):
        if not (text or messages):
            raise NotPublishableError("the document is empty; there is nothing to publish")
        return self.prompt(text, messages)

    def prompt(self, text, messages):
        words = (
            text or "".join(f"<{each['role']}> {each['content']}" for each in messages)
        ).split()
        return [int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) >> 1 for word in words]

    async def reuses(self):
        return self.is_exact

    async def operate(self, tokens, wish):
        self.wishes.append(wish)
        if self.dies:
            raise RuntimeError("the engine is dead")
        if self.declines:
            return {"declined": self.declines}
        if wish.get("preload"):
            return {"reused_tokens": len(tokens) - 1, "loaded_tokens": len(tokens) - 1}
        document = DocumentChunks.of(self.namespace, tokens, self._market.config.chunk_tokens)
        terms = msgspec.convert(wish["publish"]["terms"], ListingTerms)
        listing = Listing.of(document, terms, created_at_s=time.time())
        self._market.begin_listing(listing, document).result()
        self._market.commit_listing(listing.document_id, 1000, document.keys)
        return {"document_id": listing.document_id}

    def close(self):
        self._market.close()


@contextmanager
def running(home, *, engine=True, **settings):
    """A client of an app that serves the market in `home`; keys of admin, pat, bea and eve."""
    config = load({"home": str(home), "refresh_interval_s": 0.02, **settings})
    front = WordEngine(home) if engine else None
    service = open_service(config, front, "words")
    app = FastAPI()
    app.include_router(build_router())
    app.include_router(build_pages())
    app.add_middleware(Gate)
    close_with_server(app)
    app.state.kvmarket_service = service
    market = service.market
    keys = {"admin": service.keys.create("boss", ["admin"])[0]}
    for name, scopes in (("pat", "publisher"), ("bea", "buyer"), ("eve", "publisher")):
        market.create_account(name, scopes)
        keys[name] = service.keys.create(name, [scopes])[0]
    with TestClient(app) as client:
        try:
            yield SimpleNamespace(
                client=client, service=service, market=market, engine=front, keys=keys, app=app
            )
        finally:
            if front is not None:
                front.close()


def as_(server, name):
    """Headers of somebody's key."""
    return {"authorization": f"Bearer {server.keys[name]}"}


def text_of(words, name="w"):
    """A document of so many words."""
    return " ".join(f"{name}{number}" for number in range(words))


def publish(server, who="pat", **wish):
    """Publish, and wait until it is live or failed; the document."""
    posted = server.client.post("/v1/kvmarket/documents", json=wish, headers=as_(server, who))
    assert posted.status_code in (200, 202), posted.text
    return settled(server, posted.json()["id"], who)


def settled(server, name, who="pat"):
    """A document, when it is published or failed."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        got = server.client.get(f"/v1/kvmarket/documents/{name}", headers=as_(server, who))
        if got.json()["state"] != "publishing":
            break
        time.sleep(0.01)
    return got.json()
