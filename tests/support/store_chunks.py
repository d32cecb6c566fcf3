"""Chunks for the store's tests: small layouts, random pages, and every way to load them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from vllm_kvmarket.core.errors import ChunkDamagedError
from vllm_kvmarket.core.model_identity import ROOT, chunk_key, pack_tokens
from vllm_kvmarket.store import ChunkLayout, DiskStore, LayerLayout, open_chunk
from vllm_kvmarket.store.chunk_format import prepare
from vllm_kvmarket.store.quota import RECORD_NAME

NAMESPACE = bytes(range(32))
OTHER_NAMESPACE = bytes(32)
# Layers that end inside a block of 4,096 are padded; others lie one after another.
PADDED = 100
DENSE = 2048


def replace_pages(path: Path, key: bytes, layers: Sequence[Sequence[np.ndarray]]) -> None:
    """Put a file with other pages, which verifies, in a stored chunk's place."""
    with open_chunk(path, key) as chunk:
        header = chunk.header
    prepared = prepare(
        key=key,
        parent=header.parent,
        namespace=header.namespace,
        tokens=header.tokens,
        layout=header.layout,
        layers=layers,
    )
    draft = path.with_suffix(".draft")
    with draft.open("wb", buffering=0) as file:
        prepared.write(file.fileno())
    draft.replace(path)


def falsify(disk: DiskStore, key: bytes) -> None:
    """Put a file with other pages, which verifies, in place of a chunk of an engine of one rank."""
    with open_chunk(disk.path(key), key) as chunk:
        layers = [[chunk.layer(index) ^ 1] for index in range(len(chunk.header.layout.layers))]
    replace_pages(disk.path(key), key, layers)


def layout_of(page_bytes: int = PADDED, layers: int = 3, **facts: object) -> ChunkLayout:
    """Make a layout of blocks of 4 tokens with equal layers, which others could convert."""
    block_tokens = facts.setdefault("block_tokens", 4)
    shape = (1, block_tokens, page_bytes // block_tokens)
    described = tuple(
        LayerLayout(name=f"layer.{index}", page_shape=shape, page_bytes=page_bytes)
        for index in range(layers)
    )
    return ChunkLayout(**{"tag": "012/test-tokens", "dtype": "uint8", "layers": described, **facts})


@dataclasses.dataclass(frozen=True)
class Sample:
    """One chunk as a caller has it; `pages[layer]` is uint8 (pages, page_bytes)."""

    layout: ChunkLayout
    tokens: bytes
    pages: tuple[np.ndarray, ...]
    namespace: bytes = NAMESPACE
    parent: bytes = ROOT

    @property
    def key(self) -> bytes:
        """The chunk's key."""
        return chunk_key(self.namespace, self.parent, self.tokens)

    @property
    def page_count(self) -> int:
        """Pages a layer."""
        return len(self.pages[0])

    def put(self, store: DiskStore) -> int:
        """Store it, a buffer a page."""
        return store.put(
            key=self.key,
            parent=self.parent,
            namespace=self.namespace,
            tokens=self.tokens,
            layout=self.layout,
            layers=[list(layer) for layer in self.pages],
        )

    def load(self, store: DiskStore) -> None:
        """Load it whole and in part; whatever comes back is asserted to be what was stored."""
        with store.open(self.key, self.layout, self.namespace) as chunk:
            whole = self.room(0, self.page_count)
            chunk.copy_all_pages(0, self.page_count, [[layer] for layer in whole])
            self.assert_holds(whole, 0, self.page_count)
            first = self.room(0, 1)
            chunk.copy_all_pages(0, 1, [[layer] for layer in first])
            self.assert_holds(first, 0, 1)

    def room(self, first_page: int, last_page: int) -> list[np.ndarray]:
        """Memory for some pages of every layer, filled with a value that must not stay."""
        return [np.full_like(layer[first_page:last_page], 0xAA) for layer in self.pages]

    def assert_holds(self, room: list[np.ndarray], first_page: int, last_page: int) -> None:
        """Check that memory holds these pages."""
        for got, stored in zip(room, self.pages, strict=True):
            np.testing.assert_array_equal(got, stored[first_page:last_page])


def sample(
    layout: ChunkLayout | None = None, token_count: int = 7, seed: int = 0, **facts: object
) -> Sample:
    """Make a chunk from a seed: by default of 7 tokens in two pages, the last partly filled."""
    layout = layout or layout_of()
    rng = np.random.default_rng(seed)
    tokens = random.Random(seed).choices(range(50_000), k=token_count)
    pages = layout.page_count(token_count)
    return Sample(
        layout=layout,
        tokens=pack_tokens(tokens),
        pages=tuple(
            rng.integers(0, 256, (pages, layer.page_bytes), dtype=np.uint8)
            for layer in layout.layers
        ),
        **facts,
    )


def files_in(store: DiskStore) -> list[str]:
    """Every file in the store, temporary ones included, without its count of bytes."""
    files = (file for file in store.root.rglob("*") if not file.is_dir())
    return sorted(file.name for file in files if file.name != RECORD_NAME)


def stored(store: DiskStore, page_bytes: int = PADDED, **facts: object) -> tuple[Sample, Path]:
    """Store a sample; also says where."""
    chunk = sample(layout_of(page_bytes), **facts)
    chunk.put(store)
    return chunk, store.path(chunk.key)


def assert_damaged(store: DiskStore, chunk: Sample) -> None:
    """Neither a load nor a check takes the chunk for whole, and the next put repairs it."""
    with pytest.raises(ChunkDamagedError):
        chunk.load(store)
    with pytest.raises(ChunkDamagedError):
        store.verify(chunk.key)
    assert chunk.put(store) > 0
    chunk.load(store)
    store.verify(chunk.key)
