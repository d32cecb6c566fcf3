"""Which market an object store belongs to, so that a wrong setting cannot lose its chunks.

A market writes an id of its own into its object store. A market that was given another market's
store, another bucket or prefix, or a bucket while its chunks are on the disk alone, is refused
before it does anything. Several machines use one store as one market, by one `database_url`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import msgspec

from vllm_kvmarket.catalogue import Catalogue
from vllm_kvmarket.catalogue.listing import NEEDED, ON_OFFER
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    ConfigError,
    LayoutMismatchError,
    StoreError,
)
from vllm_kvmarket.store.object_tier import ObjectTier
from vllm_kvmarket.store.tiers import Tiers

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_kvmarket.market.market import Market

FORMAT = 1
# The object that says whose store it is.
MARKER = "store.json"


class Marker(msgspec.Struct, frozen=True):
    """The content of the object that says whose store it is."""

    format: int
    store_id: Annotated[str, msgspec.Meta(min_length=32, max_length=32)]


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
        self._record = catalogue.store_record

    def check_configuration(self) -> None:
        """Refuse a store that is not this market's, when a market opens.

        The object store is asked only when the record does not decide, and need not answer then:
        `confirm` asks again. Raises ConfigError, and StoreError when a store with a new URL does
        not answer.
        """
        recorded, objects = self._record.read(), self._store.objects
        if objects is None:
            if recorded is not None:
                raise ConfigError(
                    f"this market's chunks are in {recorded}: set object_store_url to it"
                )
            return
        if recorded is None:
            if self._has_chunks():
                raise ConfigError(
                    "object_store_url is set, but this market's chunks are on its disk alone: run "
                    "`kvmarket store upload` with this configuration first"
                )
            # A store that does not answer now is claimed before the first document is stored.
            with contextlib.suppress(StoreError):
                self.confirm()
            return
        if recorded != objects.url:
            found = read_marker(objects)
            if found is None or found.store_id != self._record.market_id():
                raise ConfigError(
                    f"object_store_url is {objects.url}, but this market's chunks are in "
                    f"{recorded}: set it to that, or copy everything with {MARKER} to the new "
                    "place first"
                )
            self._record.write(objects.url)
        self._record.url = objects.url

    def confirm(self) -> None:
        """Make sure that the object store is there and is this market's; before what relies on it.

        A store that no market uses yet becomes this one's. Raises StoreError, ConfigError.
        """
        objects = self._store.objects
        if objects is None:
            return
        is_new = self._record.read() is None
        claim(objects, self._record.market_id(), may_be_empty=is_new)
        if is_new or self._record.url is None:
            self._record.write(objects.url)

    def _has_chunks(self) -> bool:
        if next(self._store.disk.keys(), None) is not None:
            return True
        # Also when the folder is empty: it may not be mounted.
        return any(each.state in NEEDED for each in self._catalogue.listings())


def read_marker(objects: ObjectTier) -> Marker | None:
    """Read which market's store this is; None when it is nobody's. Raises StoreError."""
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


def claim(objects: ObjectTier, market_id: str, *, may_be_empty: bool) -> None:
    """See that a store is this market's; one that is nobody's becomes it if it `may_be_empty`.

    Raises StoreError, and ConfigError for another market's store.
    """
    found = read_marker(objects)
    if found is None and may_be_empty:
        objects.put_new(MARKER, msgspec.json.encode(Marker(FORMAT, market_id)))
        # Another market may have been faster.
        found = read_marker(objects)
    if found is None:
        raise StoreError(
            f"{objects.url} is empty: its {MARKER} is gone, and nothing was changed; restore the "
            "bucket, or set the right URL"
        )
    if found.store_id != market_id:
        raise ConfigError(
            f"{objects.url} is another market's, and nothing was changed: use a prefix of your "
            "own, or that market's database_url"
        )


def upload(
    market: Market, objects: ObjectTier, on_progress: Callable[[int, int], object] | None = None
) -> UploadReport:
    """Copy all chunks of a market without an object store into one, and record that.

    What is there already is not sent again, so a run that was interrupted is continued. From the
    record on, the disk is a cache of the object store. Raises StoreError, ConfigError, and
    CatalogueRefusedError while an engine publishes; nothing is recorded then.
    """
    record = market.catalogue.store_record
    if (recorded := record.read()) is not None:
        raise ConfigError(f"this market's chunks are in {recorded} already")
    claim(objects, record.market_id(), may_be_empty=True)
    mover = _Mover(market, objects, on_progress)
    while True:
        market.catalogue.fail_abandoned()
        mover.move()
        if record.write(objects.url, uploaded=mover.done):
            break
    return UploadReport(
        url=objects.url,
        uploaded=mover.uploaded,
        uploaded_bytes=mover.uploaded_bytes,
        present=mover.present,
        damaged=sorted(key.hex() for key in mover.damaged),
    )


class _Mover:
    """Uploads the chunks that documents need, one by one."""

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
        needed = {key for each in on_offer for key in each.chunk_keys}
        total = len(needed | self.done)
        for key in sorted(needed - self.done):
            self._move_chunk(key)
            self.done.add(key)
            if self._on_progress is not None:
                self._on_progress(len(self.done), total)

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
