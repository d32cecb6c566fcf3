"""Listings in a shared object store: what one home publishes, the others sell too.

Each home keeps its own catalogue and ledger; the bucket holds the chunks and, for each document on
offer, one entry with its listing and tokens. Anyone who can write to the bucket is trusted as an
operator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING, Annotated

import msgspec

from vllm_kvmarket.catalogue import Catalogue, Listing
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
from vllm_kvmarket.ledger import Ledger
from vllm_kvmarket.market.publishers import ensure_account
from vllm_kvmarket.store import ObjectTier, Tiers, bucket_listings

if TYPE_CHECKING:
    from vllm_kvmarket.market.bucket_identity import BucketIdentity

FORMAT = 1

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


def offer(store: Tiers, catalogue: Catalogue, document_id: str, stored_bytes: int = 0) -> None:
    """Tell the other homes of a document whose chunks are durable; nothing without an object store.

    Raises StoreError, NotFoundError.
    """
    if store.objects is None:
        return
    listing = catalogue.get(document_id)
    entry = Entry(
        format=FORMAT,
        document_id=document_id,
        namespace=listing.namespace,
        tokens=pack_tokens(catalogue.tokens_of(document_id)),
        terms=listing.terms,
        created_at_s=listing.created_at_s,
        stored_bytes=max(stored_bytes, listing.stored_bytes),
        shares=tuple(catalogue.shares.of(listing.chunk_keys)),
    )
    bucket_listings.publish_listing(store.objects, msgspec.msgpack.encode(entry), document_id)


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


def withdraw(store: Tiers, document_id: str) -> None:
    """Tell the other homes no more of a document. Raises StoreError."""
    if store.objects is not None:
        bucket_listings.withdraw_listing(store.objects, document_id)


class Directory:
    """Keeps a home's catalogue in step with the bucket's entries; used by one thread."""

    def __init__(
        self, store: Tiers, catalogue: Catalogue, ledger: Ledger, identity: BucketIdentity
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._ledger = ledger
        self._identity = identity
        # The entries that were looked at, by version.
        self._seen: dict[str, str | None] = {}

    def sync(self) -> int:
        """Put on offer here what other homes published, note what they stored anew, delist what
        they withdrew; how many were new.

        An entry that cannot be read is skipped with a warning. Raises StoreError when the object
        store does not answer.
        """
        if self._store.objects is None:
            return 0
        self._identity.confirm()
        there = bucket_listings.listed_versions(self._store.objects)
        gone = sorted(self._seen.keys() - there)
        if left_out := bucket_listings.still_listed(self._store.objects, gone):
            raise StoreError(
                f"the bucket's list left out {len(left_out)} entries that are there, so it may "
                "be wrong; nothing is delisted"
            )
        again: set[str] = set()
        adopted = 0
        for document_id in sorted(name for name, _ in there.items() - self._seen.items()):
            try:
                if document_id in self._seen:
                    self._learn(document_id)
                else:
                    adopted += self._adopt(document_id)
            except UnavailableError as error:
                logger.warning("kvmarket: the bucket's entry %s waits: %s", document_id, error)
                again.add(document_id)
            except KVMarketError as error:
                logger.warning("kvmarket: the bucket's entry %s: %s", document_id, error)
        for document_id in gone:
            with contextlib.suppress(NotFoundError):
                self._catalogue.delist(document_id)
        self._seen = {name: version for name, version in there.items() if name not in again}
        return adopted

    def _learn(self, document_id: str) -> None:
        """Note what is stored now of a document that was published again."""
        assert self._store.objects is not None
        if (entry := read_entry(self._store.objects, document_id)) is not None:
            self._note(entry, chunks_of(entry, self._catalogue.chunk_tokens))

    def _note(self, entry: Entry, document: DocumentChunks) -> None:
        own = set(document.keys)
        self._catalogue.shares.note([share for share in entry.shares if share.key in own])

    def _adopt(self, document_id: str) -> bool:
        with contextlib.suppress(NotFoundError):
            if self._catalogue.get(document_id).state != "failed":
                return False
        assert self._store.objects is not None
        entry = read_entry(self._store.objects, document_id)
        if entry is None:
            return False
        document = chunks_of(entry, self._catalogue.chunk_tokens)
        ensure_account(self._ledger, entry.terms.publisher)
        listing = Listing.of(document, entry.terms, created_at_s=entry.created_at_s)
        listing = dataclasses.replace(listing, stored_bytes=entry.stored_bytes)
        self._note(entry, document)
        return self._catalogue.adopt(listing, document).state == "live"
