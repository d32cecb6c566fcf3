"""Which object store a market's chunks are in, so that a wrong setting cannot lose them.

The first market that uses an object store writes an id and the chunk size into it; every market
records the id in its own database. A market that was given another bucket, another prefix, another
chunk size, or a bucket while its chunks are on the disk alone, is refused before it does anything.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING, Annotated

import msgspec

from vllm_kvmarket.catalogue import Catalogue
from vllm_kvmarket.catalogue.listing import NEEDED, ON_OFFER
from vllm_kvmarket.catalogue.store_record import RecordedStore
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    ConfigError,
    LayoutMismatchError,
    NotFoundError,
    StoreError,
)
from vllm_kvmarket.market import shared_bucket
from vllm_kvmarket.store import bucket_listings
from vllm_kvmarket.store.bucket_listings import MARKER
from vllm_kvmarket.store.object_tier import ObjectTier
from vllm_kvmarket.store.tiers import Tiers

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_kvmarket.market.market import Market

FORMAT = 1


class Marker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of the object that names a store."""

    format: int
    store_id: Annotated[str, msgspec.Meta(min_length=32, max_length=32)]
    chunk_tokens: int


class UploadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `upload` did, in files of chunks; `damaged` are keys of chunks that were not uploaded.

    Documents with a damaged chunk are not on offer until they are published again.
    """

    url: str
    uploaded: int
    uploaded_bytes: int
    present: int
    damaged: list[str]


class BucketIdentity:
    """Compares what is configured, what is recorded, and what is written in the object store."""

    def __init__(self, store: Tiers, catalogue: Catalogue) -> None:
        self._store = store
        self._catalogue = catalogue
        self._is_confirmed = False

    def check_configuration(self) -> None:
        """Refuse a store that is not this market's, when a market opens.

        The object store is asked only when the record does not decide, and need not answer then:
        `confirm` asks again. Raises ConfigError, and StoreError when a store with a new URL does
        not answer.
        """
        record, url = self._catalogue.store_record.read(), self._url
        if record.url is None and url is not None and self._has_chunks():
            raise ConfigError(
                "object_store_url is set, but this market's chunks are on its disk alone: run "
                "`kvmarket store upload` with this configuration first"
            )
        if record.url is not None and url is None:
            raise ConfigError(
                f"this market's chunks are in {record.url}: set object_store_url to it"
            )
        if record.url is not None and record.url != url:
            self._move(record)
        self._catalogue.store_record.store_id = record.store_id
        if record.store_id is None:
            # A store that does not answer now is claimed before the first document is stored.
            with contextlib.suppress(StoreError):
                self.confirm()

    def _move(self, record: RecordedStore) -> None:
        """Accept another URL of the same store, or of its copy. Raises ConfigError."""
        assert self._store.objects is not None
        found = read_marker(self._store.objects)
        if found is None or found.store_id != record.store_id:
            raise ConfigError(
                f"object_store_url is {self._url}, but this market's chunks are in {record.url}: "
                f"set it to that, or copy everything with {MARKER} to the new place first"
            )
        self._catalogue.store_record.write(RecordedStore(self._url, record.store_id))

    def confirm(self) -> None:
        """Make sure that the object store is there and is this market's; before what relies on it.

        A store that no market uses yet becomes this one's. Raises StoreError, ConfigError.
        """
        if self._store.objects is None:
            return
        self._is_confirmed = False
        record = self._catalogue.store_record.read()
        if record.store_id is None:
            marker = claim(self._store.objects, self._catalogue.chunk_tokens)
            self._catalogue.store_record.write(RecordedStore(self._url, marker.store_id))
        else:
            found = read_marker(self._store.objects)
            if found is None or found.store_id != record.store_id:
                raise StoreError(
                    f"{self._url} is empty or another market's: its {MARKER} is not the one that "
                    "this market knows, and nothing was changed; restore the bucket, or set the "
                    "right URL"
                )
            self._catalogue.store_record.store_id = record.store_id
        self._is_confirmed = True

    def confirm_once(self) -> None:
        """Confirm the object store unless the last time was in this process, and a success.

        For what writes into the store: another bucket may be behind the URL that is recorded.
        """
        if not self._is_confirmed:
            self.confirm()

    @property
    def _url(self) -> str | None:
        return self._store.objects.url if self._store.objects is not None else None

    def _has_chunks(self) -> bool:
        if next(self._store.disk.keys(), None) is not None:
            return True
        # Also when the folder is empty: it may not be mounted.
        return any(each.state in NEEDED for each in self._catalogue.listings())


def read_marker(objects: ObjectTier) -> Marker | None:
    """Read which store this is; None when no market uses it. Raises StoreError."""
    content = objects.get_bytes(MARKER)
    if content is None:
        return None
    try:
        marker = msgspec.json.decode(content, type=Marker)
    except msgspec.DecodeError as error:
        raise StoreError(f"{objects.url}: {MARKER} cannot be read ({error})") from None
    if marker.format != FORMAT:
        raise StoreError(f"{objects.url} was made by a newer kvmarket; install that version")
    return marker


def claim(objects: ObjectTier, chunk_tokens: int) -> Marker:
    """Read which store this is, and give it an id if it has none.

    Raises StoreError, and ConfigError for a store with another chunk size.
    """
    marker = read_marker(objects)
    if marker is None:
        fresh = Marker(FORMAT, uuid.uuid4().hex, chunk_tokens)
        objects.put_new(MARKER, msgspec.json.encode(fresh))
        # Another market may have been faster.
        marker = read_marker(objects)
        if marker is None:
            raise StoreError(f"{objects.url}: {MARKER} was stored and is not there; try again")
    if marker.chunk_tokens != chunk_tokens:
        raise ConfigError(
            f"chunk_tokens is {chunk_tokens}, but the chunks in {objects.url} have "
            f"{marker.chunk_tokens} tokens: set it to {marker.chunk_tokens} in a new home, or use "
            "another bucket or prefix"
        )
    return marker


def upload(
    market: Market, objects: ObjectTier, on_progress: Callable[[int, int], object] | None = None
) -> UploadReport:
    """Copy all chunks of a market without an object store into one, and record that.

    What is there already is not sent again, so a run that was interrupted is continued. From the
    record on, the disk is a cache of the object store. Raises StoreError, ConfigError, and
    CatalogueRefusedError while an engine publishes; nothing is recorded then.
    """
    record = market.catalogue.store_record.read()
    if record.url is not None:
        raise ConfigError(f"this market's chunks are in {record.url} already")
    marker = claim(objects, market.config.chunk_tokens)
    mover = _Mover(market, objects, on_progress)
    while True:
        market.catalogue.fail_abandoned()
        mover.move()
        if market.catalogue.store_record.write(
            RecordedStore(objects.url, marker.store_id), uploaded=mover.done
        ):
            break
    mover.withdraw()
    return UploadReport(
        url=objects.url,
        uploaded=mover.uploaded,
        uploaded_bytes=mover.uploaded_bytes,
        present=mover.present,
        damaged=sorted(key.hex() for key in mover.damaged),
    )


class _Mover:
    """Uploads documents one by one: the chunks, then the entry that protects them."""

    def __init__(
        self,
        market: Market,
        objects: ObjectTier,
        on_progress: Callable[[int, int], object] | None,
    ) -> None:
        self._market = market
        self._objects = objects
        self._both = Tiers(market.store.disk, objects)
        self._on_progress = on_progress
        self.done: set[bytes] = set()
        self.damaged: set[bytes] = set()
        self.uploaded = self.uploaded_bytes = self.present = 0

    def move(self) -> None:
        """Upload what documents need and is not done yet."""
        on_offer = [each for each in self._market.catalogue.listings() if each.state in ON_OFFER]
        total = len({key for each in on_offer for key in each.chunk_keys} | self.done)
        for listing in on_offer:
            for key in listing.chunk_keys:
                if key not in self.done:
                    self._move_chunk(key)
                    self.done.add(key)
                    if self._on_progress is not None:
                        self._on_progress(len(self.done), total)
            if listing.state == "live" and self.damaged.isdisjoint(listing.chunk_keys):
                shared_bucket.put_entry(self._objects, self._market.catalogue, listing.document_id)

    def _move_chunk(self, key: bytes) -> None:
        unusable = (ChunkDamagedError, ChunkMissingError, LayoutMismatchError)
        try:
            self._market.store.disk.verify(key)
        except unusable:
            # An older kvmarket used an object store without recording it; its disk was a cache.
            try:
                self._both.verify(key)
            except unusable as error:
                self._market.catalogue.report_damage(key, str(error))
                self.damaged.add(key)
            else:
                self.present += len(self._objects.files(key))
            return
        for share in self._market.store.disk.files(key):
            sent = self._both.upload(key, *share)
            self.uploaded += sent > 0
            self.present += not sent
            self.uploaded_bytes += sent
        # The object is what counts, should it differ from the file that was here.
        stored = [self._both.describe(key, *share) for share in self._both.disk.files(key)]
        self._market.catalogue.shares.note([share for share in stored if share is not None])

    def withdraw(self) -> None:
        """Withdraw entries of documents that left the market while others were uploaded."""
        for document_id in bucket_listings.listed_documents(self._objects):
            with contextlib.suppress(NotFoundError):
                listing = self._market.catalogue.get(document_id)
                if listing.state not in NEEDED:
                    shared_bucket.remove_entry(self._objects, listing)
