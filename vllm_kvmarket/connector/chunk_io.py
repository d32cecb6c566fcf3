"""Copies one chunk at a time between the tiers and the paged cache, and compares chunks.

Loads go host memory -> disk -> object store; a chunk in another layout, or cut up for other ranks,
is converted. What was loaded twice, or was read ahead, stays in host memory.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_kvmarket.connector.device_copies import (
    AfterCopies,
    DeviceCopies,
    Operations,
    Place,
    copies_ended,
    pieces,
)
from vllm_kvmarket.connector.messages import ChunkAudit, ChunkLoad, ChunkSave
from vllm_kvmarket.connector.metrics import Tally
from vllm_kvmarket.connector.paged_cache import Bytes, PagedCache
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    LayoutMismatchError,
    StoreError,
)
from vllm_kvmarket.core.model_identity import has_state
from vllm_kvmarket.core.stored_share import StoredShare
from vllm_kvmarket.store import aligned_empty, conversion
from vllm_kvmarket.store.chunk_format import ChunkLayout, raw_sizes, state_parts
from vllm_kvmarket.store.chunk_reader import current_guard, guarded
from vllm_kvmarket.store.conversion import as_floats, canonical
from vllm_kvmarket.store.host_memory import Filling, HostTier, layers_of
from vllm_kvmarket.store.packings import clear_slots, own_share
from vllm_kvmarket.store.tiers import OpenChunk, Tiers

# The largest difference that is still close, as a share of the layer's largest computed value:
# other kernels, or a prompt cut into other pieces, change less than this by rounding.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}

# Chunks whose fingerprints are remembered: more than fit into host memory.
MOST_KNOWN = 100_000
HOST, DISK, OBJECTS = "host", "disk", "objects"  # the tiers, as metrics name them
# No read from a disk takes longer: the thread that reads the chunk is stuck.
_OTHERS_READ_S = 30.0


class NotOnThisMachineError(StoreError):
    """Only the object store may have it: load it in a thread that may wait for that."""


class Loaded(NamedTuple):
    """From which tier a chunk came, and whether it is wanted in host memory."""

    tier: str
    is_hot: bool = False


class _Straight:
    """A stored chunk in this engine's own layout, `page_count` pages a layer."""

    is_converted = False

    def __init__(self, stored: OpenChunk, known: bytes) -> None:
        self.stored = stored
        self.known = known
        self.page_count = stored.header.page_count
        self.has_state = stored.header.has_state

    def copy(self, first: int, last: int, destinations: Sequence[Sequence[Bytes]]) -> None:
        """Verified pages first .. last - 1 of every layer; see StoredChunk.copy_all_pages."""
        self.stored.copy_all_pages(first, last, destinations)


class _Converted:
    """A stored chunk in another layout or in other ranks' shares, `page_count` pages as of here."""

    is_converted = True
    has_state = False

    def __init__(  # ruff counts the instance
        self, store: Tiers, cache: PagedCache, namespace: bytes, key: bytes, known: bytes
    ) -> None:
        self._store, self._cache, self._namespace, self._key = store, cache, namespace, key
        self.known = known
        # What has to be fetched is fetched by this: `copy` does not wait for an object store.
        tokens = conversion.token_count(store, key, cache.layout, namespace, known)
        self.page_count = cache.layout.page_count(tokens)

    def copy(self, first: int, last: int, destinations: Sequence[Sequence[Bytes]]) -> None:
        """Verified, converted pages first .. last - 1 of every layer; see copy_converted."""
        conversion.copy_converted(
            self._store,
            self._key,
            self._cache.layout,
            self._namespace,
            first,
            last,
            destinations,
            known=self.known,
        )


class Chunks:
    """One rank's chunks; thread-safe. Callers own the blocks that they name."""

    def __init__(self, store: Tiers, cache: PagedCache, host: HostTier, tally: Tally) -> None:
        self._store = store
        # The same without the object store, for threads that must not wait for it.
        self._local = store.local()
        self._cache = cache
        # A buffer of the host tier has all pages of each layer.
        self._host = HostTier(0) if cache.layout.has_states else host
        self._tally = tally
        self._layers = range(cache.layer_count)
        self._page_bytes = sum(layer.page_bytes for layer in cache.layout.layers)
        self._devices = threading.local()
        # The fingerprints that the catalogue knows of chunks that were loaded last.
        self._known: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def has_object_tier(self) -> bool:
        """Whether there is an object store behind the disk."""
        return self._store.objects is not None

    def learn(self, key: bytes, known: bytes) -> None:
        """Note which stored shares of a chunk the catalogue knows; forget pages of older ones."""
        with self._lock:
            before = self._known.get(key)
            if before == known or (before and not known):
                return
            self._known[key] = known
            old = self._known.popitem(last=False)[0] if len(self._known) > MOST_KNOWN else None
        for stale in (key if before is not None else None, old):
            if stale is not None:
                self._host.drop(stale)

    # Loading

    def load(
        self, namespace: bytes, chunk: ChunkLoad, *, fetch: bool, claim: Callable[[], None]
    ) -> Loaded:
        """Bring a chunk's pages into the paged cache.

        `fetch`: ask the object store too, which may take its whole deadline. Without, what is not
        whole on this machine raises NotOnThisMachineError where there is an object store. `claim`
        is called before the paged cache is written to; what it raises ends the load, blocks
        untouched.

        Raises StoreErrors; the blocks then hold zeros or what they held, never an unverified byte.
        A damaged file has been quarantined.
        """
        self.learn(chunk.key, chunk.known)
        waits = fetch or not self.has_object_tier
        held = self._host.pin(chunk.key, _OTHERS_READ_S if waits else 0.0)
        if held is not None:
            with held as buffer:
                claim()
                self._fill(buffer, chunk)
            return Loaded(HOST)
        if not waits and self._host.has(chunk.key):
            raise NotOnThisMachineError(f"{chunk.key.hex()}: is being fetched; wait for it")
        store = self._store if fetch else self._local
        try:
            with self._source(store, namespace, chunk.key) as source:
                is_hot = self._host.is_hot(chunk.key)
                if is_hot and source.is_converted:
                    # To convert it once more would take longer than to copy it.
                    self._load_and_keep(source, chunk, claim)
                    is_hot = False
                else:
                    claim()
                    self._copy_in_place(source, chunk)
        except (ChunkDamagedError, ChunkMissingError) as error:
            if isinstance(error, ChunkDamagedError):
                self._quarantine(chunk.key, error)
            if waits:
                raise
            raise NotOnThisMachineError(f"{chunk.key.hex()}: fetch it from afar") from error
        return Loaded(OBJECTS if fetch and self.has_object_tier else DISK, is_hot)

    def _load_and_keep(
        self, source: _Straight | _Converted, chunk: ChunkLoad, claim: Callable[[], None]
    ) -> None:
        """Load a chunk by way of host memory, where it stays if it fits."""
        filling = self._host.begin(chunk.key)
        if filling is not None:
            with filling:
                buffer = self._bring(chunk.key, source, filling)
                if buffer is not None:
                    claim()
                    self._fill(buffer, chunk)
                    return
        claim()
        self._copy_in_place(source, chunk)

    def keep(self, namespace: bytes, key: bytes) -> None:
        """Bring a hot chunk of this machine into host memory, if it fits, with low priority.

        Not in the load that found it hot, since a request waits for that: memory that was never
        used is filled at 0.8 GB/s, other memory at 16 (AMD EPYC, a virtual machine).

        Raises StoreErrors; a damaged file has been quarantined.
        """
        filling = self._host.begin(key, idly=True)
        if filling is None:
            return
        try:
            with filling, self._source(self._local, namespace, key) as source:
                self._bring(key, source, filling)
        except ChunkDamagedError as error:
            self._quarantine(key, error)
            raise

    @contextlib.contextmanager
    def _source(
        self, store: Tiers, namespace: bytes, key: bytes
    ) -> Iterator[_Straight | _Converted]:
        """Open a chunk in any layout, and fetch it where the store has an object tier."""
        known = self._known.get(key, b"")
        try:
            stored = store.open(key, self._cache.layout, namespace, known)
        except (LayoutMismatchError, ChunkMissingError):
            if not store.shares(key) and not store.files(key):
                raise
            source = _Converted(store, self._cache, namespace, key, known)
            self._tally.count("chunks_converted")
            yield source
            return
        with stored:
            yield _Straight(stored, known)

    def _read(self, source: _Straight | _Converted, buffer: Bytes) -> None:
        """Read a whole chunk into host memory."""
        layers = layers_of(buffer, self.layout, source.page_count, source.has_state)
        if isinstance(source, _Converted) or not self.layout.has_states:
            source.copy(0, source.page_count, [[layer] for layer in layers])
            return
        counts = source.stored.header.page_counts
        for index, (layer, count) in enumerate(zip(layers, counts, strict=True)):
            if count:
                source.stored.copy_pages(index, 0, count, [layer])

    def _bring(self, key: bytes, source: _Straight | _Converted, filling: Filling) -> Bytes | None:
        """Read a whole chunk into the host tier, where it stays; None: it does not fit."""
        buffer = filling.memory(source.page_count * self._page_bytes)
        if buffer is not None:
            self._read(source, buffer)
            filling.commit()
            if self._known.get(key, b"") != source.known:
                # The catalogue has learnt of a newer one meanwhile.
                self._host.drop(key)
        return buffer

    def _copy_in_place(self, source: _Straight | _Converted, chunk: ChunkLoad) -> None:
        """Read pages from a file into the paged cache, without host memory where that can be."""
        spans = {(pages.first_page, pages.last_page) for pages in chunk.groups}
        if self._cache.on_host and len(spans) == 1 and not self.layout.has_states:
            ((first, last),) = spans
            places = [self._cache.host_pages(*place) for place in self._wanted(chunk)]
            source.copy(first, last, places)
            return
        if isinstance(source, _Converted):
            buffer = aligned_empty(source.page_count * self._page_bytes)
            self._read(source, buffer)
            self._fill(buffer, chunk)
            return
        if not self._cache.on_host:
            self._upload(source, chunk)
            return
        for layer, blocks in self._wanted(chunk):
            pages = chunk.groups[self._cache.group_of[layer]]
            place = self._cache.host_pages(layer, blocks)
            source.stored.copy_pages(layer, pages.first_page, pages.last_page, place)

    def _upload(self, source: _Straight, chunk: ChunkLoad) -> None:
        """Read pages piece by piece into pinned memory, while the piece before goes up."""
        copies, wanted = self._device_copies(), self._wanted(chunk)
        layers = self._cache.layout.layers
        sizes = [len(blocks) * layers[layer].page_bytes for layer, blocks in wanted]
        guard = current_guard()
        with guarded(AfterCopies(copies, guard) if guard else None), copies_ended(copies):
            for piece in pieces(sizes):
                memory = copies.buffer(sum(sizes[index] for index in piece))
                places, start = [], 0
                for index in piece:
                    (layer, blocks), stop = wanted[index], start + sizes[index]
                    place = Place(layer, blocks, memory[start:stop])
                    pages = chunk.groups[self._cache.group_of[layer]]
                    source.stored.copy_pages(
                        layer, pages.first_page, pages.last_page, [place.memory]
                    )
                    places.append(place)
                    start = stop
                copies.upload(places)

    def _wanted(self, chunk: ChunkLoad | ChunkSave) -> list[tuple[int, tuple[int, ...]]]:
        """The layers of which a chunk has pages to copy, each with the blocks of these pages."""
        groups = self._cache.group_of
        wanted = [(layer, chunk.groups[groups[layer]].block_ids) for layer in self._layers]
        return [(layer, blocks) for layer, blocks in wanted if blocks]

    def loaded_bytes(self, chunk: ChunkLoad) -> int:
        """The bytes of a chunk's pages that are wanted."""
        layers = self._cache.layout.layers
        wanted = self._wanted(chunk)
        return sum(len(blocks) * layers[layer].page_bytes for layer, blocks in wanted)

    def _fill(self, buffer: Bytes, chunk: ChunkLoad) -> None:
        """Copy pages of a whole chunk in host memory into the paged cache."""
        layout = self._cache.layout
        layers = layers_of(buffer, layout, buffer.nbytes // self._page_bytes)
        places = []
        for layer, blocks in self._wanted(chunk):
            page_bytes = layout.layers[layer].page_bytes
            first = chunk.groups[self._cache.group_of[layer]].first_page
            pages = layers[layer][first * page_bytes :][: len(blocks) * page_bytes]
            places.append(Place(layer, blocks, pages))
        if not self._cache.on_host:
            copies = self._device_copies()
            with copies_ended(copies):
                copies.upload(places)
            return
        for layer, blocks, pages in places:
            start = 0
            for run in self._cache.host_pages(layer, blocks):
                np.copyto(run, pages[start : start + run.nbytes])
                start += run.nbytes

    def _device_copies(self) -> DeviceCopies:
        copies: DeviceCopies | None = getattr(self._devices, "copies", None)
        if copies is None:
            operations = Operations(self._cache.device)
            copies = self._devices.copies = DeviceCopies(self._cache.rows, operations)
        return copies

    def _quarantine(self, key: bytes, error: ChunkDamagedError) -> None:
        """Set aside whichever of a chunk's files on this machine are damaged; forget its pages."""
        self._host.drop(key)
        for share in {own_share(self._cache.layout), *self._local.disk.files(key)}:
            if self._local.quarantine(key, *share[:2], str(error), share.layout):
                self._tally.count("chunks_quarantined")

    # Reading ahead

    def read_ahead(self, namespace: bytes, key: bytes) -> str:
        """Bring a chunk into host memory, or without that from the object store onto the disk.

        Returns the result: `done`, `present` or `no_room`. Raises StoreErrors; a damaged file has
        been quarantined.
        """
        try:
            if self._host.is_on:
                filling = self._host.begin(key, prefetched=True)
                if filling is None:
                    return "present"
                with filling, self._source(self._store, namespace, key) as source:
                    return "no_room" if self._bring(key, source, filling) is None else "done"
            own = own_share(self._cache.layout)
            if not self.has_object_tier or self._store.disk.has(key, *own):
                return "present"
            with self._source(self._store, namespace, key):
                return "done"
        except ChunkDamagedError as error:
            self._quarantine(key, error)
            raise

    # Saving and comparing

    def save(
        self, namespace: bytes, chunk: ChunkSave, layers: Sequence[Sequence[Bytes]] | None = None
    ) -> int:
        """Store a chunk durably; how many bytes, 0 when what is stored already can be used.

        `layers` are its pages, where they lie in the paged cache no more. Slots behind its last
        token are stored as zeros, whatever they hold. Raises StoreErrors.
        """
        if not self._cache.is_stored_here:
            return 0
        if not chunk.is_new and self._is_stored_otherwise(namespace, chunk.key):
            return 0
        pages = self.computed(chunk) if layers is None else layers
        return self._store.put(
            key=chunk.key,
            parent=chunk.parent,
            namespace=namespace,
            tokens=chunk.tokens,
            layout=self._cache.layout,
            layers=without_tail(self._cache.layout, chunk.token_count, pages),
        )

    def keep_stored(self, namespace: bytes, key: bytes) -> None:
        """Make sure that a chunk which was loaded is in the store for good. Raises StoreErrors."""
        if self._cache.is_stored_here and not (
            self._is_stored_otherwise(namespace, key)
            or self._store.make_durable(key, *own_share(self._cache.layout))
        ):
            raise ChunkMissingError(f"{key.hex()}: left the store; publish the document again")

    def described(self, key: bytes) -> list[StoredShare]:
        """What the catalogue records of this rank's share of a chunk that was just saved."""
        if not self._cache.is_stored_here:
            return []
        share = self._store.describe(key, *own_share(self._cache.layout))
        return [share] if share is not None else []

    def _is_stored_otherwise(self, namespace: bytes, key: bytes) -> bool:
        """Whether it is there, whole, for good, in a layout that can be converted into this one.

        False also in this engine's own layout, and when it is not known: `put` decides then.
        """
        layout = self._cache.layout
        try:
            with self._store.open(key, layout, namespace):
                return False
        except (LayoutMismatchError, ChunkMissingError):
            pass
        except StoreError:
            return False
        try:
            return (
                bool(shares := self._store.shares(key))
                and conversion.is_usable(self._store, key, layout, namespace)
                and all(self._store.make_durable(key, *share) for share in shares)
            )
        except StoreError:
            return False

    def computed(self, chunk: ChunkSave) -> list[list[Bytes]]:
        """A chunk's pages as they lie in the paged cache: for each layer, runs of pages."""
        if self._cache.on_host:
            return [self._cache.host_pages(*place) for place in self._wanted(chunk)]
        return [[pages] for pages in self._device_copies().download(self._wanted(chunk))]

    @property
    def layout(self) -> ChunkLayout:
        """The layout of this engine's pages."""
        return self._cache.layout

    def memory(self, chunk: ChunkSave) -> list[Bytes]:
        """Memory for a chunk's pages, for each layer uint8 (bytes,); not initialised."""
        counts = self.layout.page_counts(chunk.token_count, has_state(chunk.key))
        pairs = zip(counts, self.layout.layers, strict=True)
        return [aligned_empty(count * layer.page_bytes) for count, layer in pairs]

    def copy_out(self, chunk: ChunkSave, layers: Sequence[Bytes]) -> None:
        """Copy the pages that `chunk.groups` names into the memory of a whole chunk."""
        for (layer, _), runs in zip(self._wanted(chunk), self.computed(chunk), strict=True):
            page_bytes = self.layout.layers[layer].page_bytes
            start = chunk.groups[self._cache.group_of[layer]].first_page * page_bytes
            for run in runs:
                np.copyto(layers[layer][start : start + run.nbytes], run)
                start += run.nbytes

    def stored(self, namespace: bytes, key: bytes) -> list[Bytes]:
        """A chunk's pages as they are stored, verified: for each layer, uint8 (bytes,).

        Raises StoreErrors; a damaged file has been quarantined.
        """
        try:
            with self._source(self._store, namespace, key) as source:
                sizes = raw_sizes(self.layout, source.page_count, source.has_state)
                buffer = aligned_empty(sum(sizes))
                self._read(source, buffer)
                return layers_of(buffer, self.layout, source.page_count, source.has_state)
        except ChunkDamagedError as error:
            self._quarantine(key, error)
            raise


def without_tail(
    layout: ChunkLayout, token_count: int, layers: Sequence[Sequence[Bytes]]
) -> Sequence[Sequence[Bytes]]:
    """A chunk's pages, with zeros in the slots behind its last token.

    Whatever is there belongs to somebody else. In a packing that is not known it stays.
    """
    filled = token_count % layout.block_tokens
    if not filled:
        return layers
    cleared = []
    for index, runs in enumerate(layers):
        if layout.layers[index].state:
            cleared.append(list(runs))
            continue
        page_bytes = layout.layers[index].page_bytes
        *before, end = runs
        last = end[-page_bytes:].copy()
        clear_slots(layout, index, last, filled)
        rest = [end[:-page_bytes]] if end.nbytes > page_bytes else []
        cleared.append([*before, *rest, last])
    return cleared


def compare(
    layout: ChunkLayout,
    token_count: int,
    computed: Sequence[Sequence[Bytes]],
    stored: Sequence[Bytes],
) -> ChunkAudit:
    """Compare one chunk's pages, given for each layer: computed ones in runs, stored ones in one.

    Only the slots of its `token_count` tokens count: what lies behind them in the last page is
    not a part of it. Bit for bit first; differing pages are compared as numbers. In a layout that
    kvmarket cannot take apart, and in a dtype without a tolerance, only equal pages are `exact`, a
    last page that is partly filled is left out, and what differs is `different`.
    """
    worst, where, is_close = 0.0, "", True
    for index, (ours, theirs) in enumerate(zip(computed, stored, strict=True)):
        pages = ours[0] if len(ours) == 1 else np.concatenate(ours)
        if pages.nbytes != theirs.nbytes:
            return ChunkAudit("unread", detail=f"{theirs.nbytes} bytes instead of {pages.nbytes}")
        if np.array_equal(pages, theirs):
            continue
        difference, allowed = _difference(layout, index, token_count, pages, theirs)
        if difference > worst:
            name = layout.layers[index].name
            worst, where = difference, f"{name} differs by {difference:.3g} (allowed {allowed:.3g})"
        is_close = is_close and difference <= allowed
    if not where:
        return ChunkAudit("exact")
    return ChunkAudit("close" if is_close else "different", worst, where)


def _difference(
    layout: ChunkLayout, index: int, token_count: int, ours: Bytes, theirs: Bytes
) -> tuple[float, float]:
    """The largest absolute difference between two layers' tokens, and the largest that is close.

    Infinite where it is not a number, or is not known.
    """
    if layout.layers[index].state:
        return _state_difference(layout.layers[index].state, ours, theirs)
    try:
        computed = canonical(layout, index, ours)[:token_count]
        stored = canonical(layout, index, theirs)[:token_count]
        if np.array_equal(computed, stored):
            return 0.0, 0.0
        numbers = as_floats(computed, layout.dtype).astype(np.float64)
        difference = np.abs(numbers - as_floats(stored, layout.dtype))
    except LayoutMismatchError:
        whole = token_count // layout.block_tokens * layout.layers[index].page_bytes
        same = np.array_equal(ours[:whole], theirs[:whole])
        return (0.0 if same else np.inf), 0.0
    return _bounded(difference, numbers, layout.dtype)


def _state_difference(state: str, ours: Bytes, theirs: Bytes) -> tuple[float, float]:
    """As `_difference`, for a state: of the part that differs most from what is close."""
    found, start = (-np.inf, 0.0), 0
    for shape, dtype in state_parts(state):
        words = np.dtype(np.uint16 if dtype in {"bfloat16", "float16"} else np.uint32)
        stop = start + math.prod(shape) * words.itemsize
        computed, stored = (each[start:stop].view(words) for each in (ours, theirs))
        start = stop
        if not np.array_equal(computed, stored):
            try:
                numbers = as_floats(computed, dtype).astype(np.float64)
                difference = np.abs(numbers - as_floats(stored, dtype))
            except LayoutMismatchError:
                return np.inf, 0.0
            found = max(found, _bounded(difference, numbers, dtype), key=_excess)
    return found


def _excess(found: tuple[float, float]) -> float:
    return found[0] - found[1]


def _bounded(
    difference: npt.NDArray[np.float64], numbers: npt.NDArray[np.float64], dtype: str
) -> tuple[float, float]:
    largest = float(difference.max())
    allowed = TOLERANCES[dtype] * float(np.abs(numbers).max())
    if not np.isfinite(largest) or not np.isfinite(allowed):
        return np.inf, 0.0
    return largest, allowed
