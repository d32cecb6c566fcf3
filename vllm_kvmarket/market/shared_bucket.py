"""Listings in a shared object store: what one home publishes, the others sell too.

Each home keeps its own catalogue and ledger; the bucket holds the chunks and, for each document on
offer, one entry with its listing and tokens. The home that published a document decides on its
terms and its end; the others adopt it. Anyone who can write to the bucket is trusted as an
operator. Homes that share a database (`database_url`) do not need it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Annotated

import msgspec

from vllm_kvmarket.catalogue import Catalogue, Listing
from vllm_kvmarket.catalogue.listing import NEEDED, ON_OFFER
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import (
    CatalogueRefusedError,
    KVMarketError,
    NotFoundError,
    StoreError,
    UnavailableError,
)
from vllm_kvmarket.core.listing_terms import YEAR_9999_S, ListingTerms
from vllm_kvmarket.core.model_identity import KEY_BYTES, pack_tokens, unpack_tokens
from vllm_kvmarket.core.stored_share import StoredShare
from vllm_kvmarket.market.publishers import ensure_account
from vllm_kvmarket.store import ObjectTier, bucket_listings

if TYPE_CHECKING:
    from vllm_kvmarket.market.market import Market

FORMAT = 1
# Why an adopted document is delisted that its home offers no more; it may come back.
WITHDRAWN = "its publisher has withdrawn it"
# How long one round may take: the same thread has other chores.
ROUND_S = 2.0

logger = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A listing as the bucket has it; `tokens` are packed little-endian uint32."""

    format: int
    document_id: str
    namespace: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    tokens: bytes
    terms: ListingTerms
    created_at_s: Annotated[float, msgspec.Meta(ge=0, le=YEAR_9999_S)]
    stored_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    # What is stored of its chunks, so that other homes know an old copy of theirs.
    shares: tuple[StoredShare, ...] = ()


def offer(market: Market, document_id: str, stored_bytes: int = 0) -> None:
    """Tell the other homes of a document whose chunks are durable; nothing without a directory.

    Raises StoreError, NotFoundError, ConfigError.
    """
    if market.store.directory is not None:
        market.identity.confirm_once()
        put_entry(market.store.directory, market.catalogue, document_id, stored_bytes)


def offer_changes(market: Market, document_id: str) -> Listing:
    """Tell the other homes of a document's new terms, if they know it; returns its listing.

    Raises as `offer`.
    """
    listing = market.catalogue.get(document_id)
    if listing.state == "live":
        offer(market, document_id)
    return listing


def put_entry(
    objects: ObjectTier, catalogue: Catalogue, document_id: str, stored_bytes: int = 0
) -> None:
    """Write a document's entry. Of one that another home offers, only what is stored is changed.

    Raises StoreError, NotFoundError.
    """
    listing = catalogue.get(document_id)
    shares = tuple(catalogue.shares.of(listing.chunk_keys))
    if listing.adopted:
        theirs = read_entry(objects, document_id)
        if theirs is None:
            return
        entry = msgspec.structs.replace(theirs, shares=shares)
    else:
        entry = Entry(
            format=FORMAT,
            document_id=document_id,
            namespace=listing.namespace,
            tokens=pack_tokens(catalogue.tokens_of(document_id)),
            terms=listing.terms,
            created_at_s=listing.created_at_s,
            stored_bytes=max(stored_bytes, listing.stored_bytes),
            shares=shares,
        )
    bucket_listings.publish_listing(objects, msgspec.msgpack.encode(entry), document_id)


def read_entry(objects: ObjectTier, document_id: str) -> Entry | None:
    """Read a document's entry; None when there is none.

    Raises CatalogueRefusedError for what is no valid entry of that document, StoreError.
    """
    encoded = bucket_listings.read_listing(objects, document_id)
    return None if encoded is None else decode(encoded, document_id)


def decode(encoded: bytes, document_id: str) -> Entry:
    """Read an entry, which any writer to the bucket may have made. Raises CatalogueRefusedError."""
    try:
        entry = msgspec.msgpack.decode(encoded, type=Entry)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CatalogueRefusedError(f"not an entry ({error})") from None
    if entry.format != FORMAT or entry.document_id != document_id:
        raise CatalogueRefusedError("not an entry of this format and name")
    return entry


def chunks_of(entry: Entry, chunk_tokens: int) -> DocumentChunks:
    """Cut an entry's document into chunks.

    Raises CatalogueRefusedError when its id is not that of its tokens in chunks of this size.
    """
    try:
        tokens = unpack_tokens(entry.tokens)
        document = DocumentChunks.of(entry.namespace, tokens, chunk_tokens)
        is_its_id = document.document_id == entry.document_id
    except (ValueError, IndexError) as error:
        raise CatalogueRefusedError(f"not a document's tokens ({error})") from None
    if not is_its_id:
        raise CatalogueRefusedError(f"not the id of these tokens in chunks of {chunk_tokens}")
    return document


def withdraw(market: Market, document_id: str) -> None:
    """Tell the other homes no more of a document of this one; another home's entry stays.

    Raises StoreError, NotFoundError, ConfigError.
    """
    if market.store.directory is not None:
        market.identity.confirm_once()
        remove_entry(market.store.directory, market.catalogue.get(document_id))


def remove_entry(objects: ObjectTier, listing: Listing) -> None:
    """Remove a listing's entry, unless another home made it. Raises StoreError."""
    if listing.adopted:
        return
    with contextlib.suppress(CatalogueRefusedError):
        entry = read_entry(objects, listing.document_id)
        if entry is None or not is_own(entry, listing):
            return
    bucket_listings.withdraw_listing(objects, listing.document_id)


def is_own(entry: Entry, listing: Listing) -> bool:
    """Whether an entry was made of this listing, and not of another home's of that document."""
    return not listing.adopted and entry.created_at_s == listing.created_at_s


class Directory:
    """Keeps a home's catalogue in step with the bucket's entries; used by one thread."""

    def __init__(self, market: Market) -> None:
        self._market = market
        # The entries that were looked at, by version.
        self._seen: dict[str, str | None] = {}

    def sync(self) -> int:
        """Put on offer here what other homes published, note what they changed, delist what they
        withdrew; how many were new.

        An entry that cannot be read is skipped with a warning. What takes longer than a few seconds
        is left to the next time. Raises StoreError when the object store does not answer.
        """
        objects = self._market.store.directory
        if objects is None:
            return 0
        self._market.identity.confirm()
        there = bucket_listings.listed_versions(objects)
        gone = sorted(self._seen.keys() - there)
        if left_out := bucket_listings.still_listed(objects, gone):
            raise StoreError(
                f"the bucket's list left out {len(left_out)} entries that are there, so it may "
                "be wrong; nothing is delisted"
            )
        adopted = 0
        until_s = time.monotonic() + ROUND_S
        news = sorted(name for name, _ in there.items() - self._seen.items())
        for number, document_id in enumerate(news):
            if number and time.monotonic() >= until_s:
                break
            try:
                adopted += self._follow(objects, document_id)
            except UnavailableError as error:
                logger.warning("kvmarket: the bucket's entry %s waits: %s", document_id, error)
                continue
            except KVMarketError as error:
                logger.warning("kvmarket: the bucket's entry %s: %s", document_id, error)
            self._seen[document_id] = there[document_id]
        for document_id in gone:
            self._leave(document_id)
            del self._seen[document_id]
        return adopted

    def _follow(self, objects: ObjectTier, document_id: str) -> bool:
        """Do what an entry says that is new or was changed; whether its document is new here."""
        entry = read_entry(objects, document_id)
        if entry is None:
            return False
        document = chunks_of(entry, self._market.config.chunk_tokens)
        listing = self._find(document_id)
        if listing is None or _may_return(listing, entry):
            return self._adopt(entry, document)
        if is_own(entry, listing) and listing.state not in NEEDED:
            # It left the market while the bucket was away.
            bucket_listings.withdraw_listing(objects, document_id)
            return False
        self._note(entry, document)
        if listing.adopted and listing.state in NEEDED:
            terms, catalogue = entry.terms, self._market.catalogue
            catalogue.set_price(document_id, terms.cache_read_nano_per_mtok)
            catalogue.set_expiry(document_id, terms.expires_at_s)
        return False

    def _adopt(self, entry: Entry, document: DocumentChunks) -> bool:
        ensure_account(self._market.ledger, entry.terms.publisher)
        listing = Listing.of(document, entry.terms, created_at_s=entry.created_at_s)
        listing = dataclasses.replace(listing, stored_bytes=entry.stored_bytes, adopted=True)
        self._note(entry, document)
        return self._market.catalogue.adopt(listing, document, force=True).state == "live"

    def _note(self, entry: Entry, document: DocumentChunks) -> None:
        own = set(document.keys)
        self._market.catalogue.shares.note([share for share in entry.shares if share.key in own])

    def _leave(self, document_id: str) -> None:
        """An entry is gone: so is a document of another home. One of this home is offered again."""
        listing = self._find(document_id)
        if listing is None or listing.is_over(time.time()):
            return
        if not listing.adopted:
            if listing.state in ON_OFFER:
                offer(self._market, document_id)
        elif listing.state != "delisted":
            # Another engine of this home may have done it.
            with contextlib.suppress(NotFoundError):
                self._market.catalogue.delist(document_id, WITHDRAWN)

    def _find(self, document_id: str) -> Listing | None:
        with contextlib.suppress(NotFoundError):
            return self._market.catalogue.get(document_id)
        return None


def _may_return(listing: Listing, entry: Entry) -> bool:
    """Whether a document that is not on offer here is put on offer when another home offers it.

    Not what was delisted here, and not on terms that are over.
    """
    ends_at_s = entry.terms.expires_at_s
    if is_own(entry, listing) or (ends_at_s is not None and ends_at_s <= time.time()):
        return False
    return listing.state in ("failed", "expired", "evicted") or (
        listing.state == "delisted" and listing.adopted and listing.reason == WITHDRAWN
    )
