"""Operations on an offline engine, a vllm.LLM on a market: publish, preload, pin, audit.

Each is one greedy request of one token, signed for the operator. They are methods of Market.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from vllm_kvmarket.catalogue import Audit, Listing
from vllm_kvmarket.core.errors import (
    AuditFailedError,
    ConfigError,
    NotPublishableError,
    PinError,
    PublishFailedError,
)
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import keeps_states
from vllm_kvmarket.market import document_tokens
from vllm_kvmarket.market.publishers import ensure_account

if TYPE_CHECKING:
    from vllm_kvmarket.market.market import Market

CONNECTOR = "kvmarket"
# Storing 1 GB takes seconds on a slow disk; a listing that takes longer than this is lost.
PUBLISH_TIMEOUT_S = 600.0
PIN_TIMEOUT_S = 10.0
POLL_S = 0.01


def publish(
    market: Market,
    llm: Any,
    text: str | None = None,
    *,
    token_ids: Sequence[int] | None = None,
    title: str = "",
    publisher: str = "publisher",
    cache_read_nano_per_mtok: int | None = None,
    royalty_ppm: int | None = None,
    as_: Literal["text", "chat"] = "text",
    ttl_s: float | None = None,
) -> Listing:
    """Prefill a document once on `llm` (a vllm.LLM on this market) and list it.

    Give `text`, rendered `as_` plain text or as the first chat message, or `token_ids`; it is
    on offer for `ttl_s` seconds, None for good. Returns the live listing, when every chunk is
    durable; a document that is listed already comes back as it is. Raises NotPublishableError
    (nothing was tried) and PublishFailedError (nothing was listed).
    """
    tokens = (
        list(token_ids) if token_ids is not None else document_tokens.render(llm, text or "", as_)
    )
    document_tokens.check_publishable(llm, tokens)
    return _publish(
        market,
        llm,
        tokens,
        ListingTerms(
            title=title,
            publisher=publisher,
            rendered_as=as_,
            cache_read_nano_per_mtok=cache_read_nano_per_mtok,
            royalty_ppm=royalty_ppm,
            expires_at_s=None if ttl_s is None else time.time() + ttl_s,
        ),
    )


def republish(market: Market, llm: Any, document_id: str) -> Listing:
    """Publish a document again on its own terms, from the catalogue's tokens: what is damaged
    or was evicted is computed and stored anew. Raises as `publish` does, and NotFoundError.
    """
    listing = market.catalogue.get(document_id)
    terms = listing.terms
    if listing.is_over(time.time()):
        terms = msgspec.structs.replace(terms, expires_at_s=None)
    tokens = market.catalogue.tokens_of(document_id)
    document_tokens.check_publishable(llm, tokens)
    # Its publisher has paid for storing it, where that has a price.
    return _publish(market, llm, tokens, terms, charge=False)


def _publish(
    market: Market, llm: Any, tokens: list[int], terms: ListingTerms, *, charge: bool = True
) -> Listing:
    ensure_account(market.ledger, terms.publisher)
    wish = {"terms": msgspec.to_builtins(terms), "charge": charge}
    answer = _operate(market, llm, tokens, publish=wish)
    if reason := answer.get("declined"):
        raise NotPublishableError(f"{terms.title or 'the document'}: {reason}")
    return wait_for_listing(market, answer["document_id"], go_on=_goes_on_by(llm))


def wait_for_listing(
    market: Market,
    document_id: str,
    timeout_s: float = PUBLISH_TIMEOUT_S,
    go_on: Callable[[], object] = lambda: None,
) -> Listing:
    """Wait until a document is live. Raises PublishFailedError with the reason when it
    failed. `go_on` is called meanwhile, again and again.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        listing = market.catalogue.get(document_id)
        if listing.state == "live":
            return listing
        if listing.state != "publishing":
            raise PublishFailedError(f"{listing.terms.title or document_id}: {listing.reason}")
        if time.monotonic() > deadline:
            raise PublishFailedError(
                f"{listing.terms.title or document_id}: not listed after {timeout_s:.0f} s; "
                "look at the engine's log, then publish it again"
            )
        go_on()
        time.sleep(POLL_S)


def preload(market: Market, llm: Any, document_id: str) -> int:
    """Bring a document into `llm`'s paged cache before anyone asks; free of charge.

    Returns the tokens that are there now. Raises NotFoundError for an unknown document.
    """
    answer = _operate(market, llm, market.catalogue.tokens_of(document_id), preload=True)
    return int(answer.get("reused_tokens", 0))


def pin(market: Market, llm: Any, document_id: str) -> int:
    """Preload a document and keep it in the paged cache: here until it is unpinned, in other
    engines from its next use there.

    Returns its tokens that are held, in whole blocks. Raises NotFoundError for an unknown
    document, and PinError, with nothing pinned, when it does not fit into the engine's cache.
    """
    market.catalogue.set_pinned(document_id, pinned=True)
    tokens = market.catalogue.tokens_of(document_id)
    deadline = time.monotonic() + PIN_TIMEOUT_S
    while True:
        answer = _operate(market, llm, tokens, preload=True)
        if held := int(answer.get("pinned_tokens", 0)):
            return held
        reason = answer.get("declined") or answer.get("not_pinned")
        # Without a reason the engine has not seen the change yet.
        if reason or time.monotonic() > deadline:
            market.catalogue.set_pinned(document_id, pinned=False)
            raise PinError(
                f"{document_id} is not pinned: {reason or 'it could not be loaded whole'}"
            )
        time.sleep(POLL_S)


def unpin(market: Market, document_id: str) -> None:
    """Let engines drop a document from their caches again. Raises NotFoundError."""
    market.catalogue.set_pinned(document_id, pinned=False)


def audit(
    market: Market, llm: Any, document_id: str, chunks: int = 3, seed: int | None = None
) -> Audit:
    """Compute randomly chosen chunks of a document on `llm` and compare them with what is
    stored; recorded with the listing.

    Raises NotFoundError, and AuditFailedError when no comparison was made.
    """
    listing = market.catalogue.get(document_id)
    count = len(listing.chunk_keys)
    chosen = sorted(random.Random(seed).sample(range(count), min(chunks, count)))  # noqa: S311  # which chunks is no secret
    tokens = market.catalogue.tokens_of(document_id)
    if not keeps_states(listing.namespace):  # else the last chunk is the document's
        tokens = tokens[: (chosen[-1] + 1) * market.config.chunk_tokens]
    before = len(market.catalogue.audits_of(document_id))
    wish = {"document_id": document_id, "chunks": chosen}
    if reason := _operate(market, llm, tokens, audit=wish).get("declined"):
        raise AuditFailedError(f"{document_id} was not audited: {reason}")
    deadline, go_on = time.monotonic() + PUBLISH_TIMEOUT_S, _goes_on_by(llm)
    while len(audits := market.catalogue.audits_of(document_id)) == before:
        if time.monotonic() > deadline:
            raise AuditFailedError(f"{document_id}: no result; look at the engine's log")
        go_on()
        time.sleep(POLL_S)
    return max(audits, key=lambda audit: audit.at_s)


def _goes_on_by(llm: Any) -> Callable[[], object]:
    """What has an engine that runs in this process compute more; another one needs nothing."""
    client = llm.llm_engine.engine_core
    return client.get_output if hasattr(client, "engine_core") else lambda: None


def _operate(market: Market, llm: Any, tokens: list[int], **wish: Any) -> dict[str, Any]:
    sampling = llm.get_default_sampling_params()
    sampling.max_tokens = 1
    sampling.temperature = 0.0
    signed = market.credentials.sign_params(wish)
    sampling.extra_args = {"kv_transfer_params": {CONNECTOR: signed}}
    (output,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    answer = (output.kv_transfer_params or {}).get(CONNECTOR)
    if answer is None:
        raise ConfigError(
            "this engine is not on a market: start it with "
            "kv_transfer_config=market.transfer_config()"
        )
    return dict(answer)
