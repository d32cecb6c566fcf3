"""A paged cache in plain memory and the transfers on it, for tests that need no engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_kvmarket.connector.cache_groups import CacheGroup, GroupKind
from vllm_kvmarket.connector.messages import (
    AuditReport,
    ChunkLoad,
    ChunkSave,
    GroupPages,
    LoadPlan,
    LoadReport,
    SavePlan,
    SaveReport,
)
from vllm_kvmarket.connector.paged_cache import PagedCache
from vllm_kvmarket.connector.transfers import Transfers
from vllm_kvmarket.core.model_identity import ROOT, chunk_key, pack_tokens
from vllm_kvmarket.store import DiskStore
from vllm_kvmarket.store.conversion import canonical
from vllm_kvmarket.store.host_memory import HostTier
from vllm_kvmarket.store.object_tier import ObjectTier
from vllm_kvmarket.store.tiers import Tiers

NAMESPACE = bytes(range(32))
HEADS, HEAD_DIM = 2, 32
CHUNK_TOKENS = 64
PLENTY = 1 << 24  # bytes of host memory
DEADLINE_S = 60.0


def one_group(layers: Sequence[str], block_tokens: int = 16) -> CacheGroup:
    """The only group of a plain model."""
    return CacheGroup(GroupKind.FULL, block_tokens, tuple(layers), 1 << 16)


def blocks_of(chunk: ChunkLoad | ChunkSave) -> tuple[int, ...]:
    """The blocks of a chunk of a plain model."""
    (pages,) = chunk.groups
    return pages.block_ids


def paged_cache(
    block_tokens: int = 16, blocks: int = 64, layers: int = 3, dtype: torch.dtype = torch.float32
) -> PagedCache:
    """A CPU's paged cache of small layers, every block of it zeros."""
    shape = (blocks, HEADS, block_tokens, 2 * HEAD_DIM)
    tensors = {f"layer.{n}": torch.zeros(shape, dtype=dtype) for n in range(layers)}
    group = one_group(list(tensors), block_tokens)
    return PagedCache(config_of(dtype), tensors, [group], blocks)


def latent_cache(rank: int, ranks: int) -> PagedCache:
    """Of a model with latent attention, which each rank has whole."""
    tensors = {f"layer.{n}": torch.zeros((64, 16, 2 * HEAD_DIM)) for n in range(3)}
    group = replace(one_group(list(tensors)), is_replicated=True)
    return PagedCache(config_of(rank=rank, ranks=ranks), tensors, [group], 64)


def config_of(dtype: torch.dtype = torch.float32, rank: int = 0, ranks: int = 1) -> Any:
    """What PagedCache reads of vLLM's configuration."""
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype, get_head_size=lambda: HEAD_DIM),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(
            rank=rank, world_size=ranks, tensor_parallel_size=ranks, pipeline_parallel_size=1
        ),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


def fill(cache: PagedCache, blocks: Sequence[int], seed: int) -> None:
    """Put random numbers into blocks."""
    rng = np.random.default_rng(seed)
    for rows in cache.rows:
        for block in blocks:
            page = rows.numpy()[block]
            dtype = np.float32 if cache.layout.dtype == "float32" else np.uint16
            page.view(dtype)[:] = rng.normal(size=page.nbytes // 4) if dtype is np.float32 else 1


def content(cache: PagedCache, blocks: Sequence[int], tokens: int) -> list[np.ndarray]:
    """The content of so many tokens in blocks, for each layer [token, head, content], as bits."""
    return [
        canonical(cache.layout, layer, np.concatenate(cache.host_pages(layer, blocks)))[:tokens]
        for layer in range(cache.layer_count)
    ]


def same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    """Whether two contents are equal, bit for bit."""
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def chunk_save(seed: int, tokens: int, blocks: Sequence[int], parent: bytes = ROOT) -> ChunkSave:
    """A chunk of `tokens` tokens that no other seed has."""
    packed = pack_tokens([seed * 10_000 + n for n in range(tokens)])
    pages = (GroupPages(0, tuple(blocks)),)
    return ChunkSave(chunk_key(NAMESPACE, parent, packed), parent, packed, pages)


class Bench:
    """Transfers over a disk, with or without an object store, and requests on them by number."""

    def __init__(
        self,
        root: Path,
        cache: PagedCache | None = None,
        *,
        objects: ObjectTier | None = None,
        host_bytes: int = 0,
        threads: int = 2,
        timeout_s: float = 10.0,
        namespace: bytes = NAMESPACE,
        **disk: Any,
    ) -> None:
        self.cache = cache or paged_cache()
        self.store = Tiers(DiskStore(root, is_cache=objects is not None, **disk), objects)
        self.host = HostTier(host_bytes)
        self.transfers = Transfers(
            self.store, self.cache, threads, host=self.host, timeout_s=timeout_s
        )
        self.namespace = namespace
        self.bad_blocks: set[int] = set()
        self.reports: dict[str, Any] = {}
        self._requests = 0
        self._counts: dict[str, int] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.transfers.close()
        self.store.close()

    def _id(self) -> str:
        self._requests += 1
        return f"request-{self._requests}"

    def _wait(self, request: str) -> Any:
        until = time.monotonic() + DEADLINE_S
        while request not in self.reports:
            assert time.monotonic() < until, "the transfer did not end"
            self.poll()
        return self.reports.pop(request)

    def poll(self) -> None:
        """One step of an engine."""
        finished = self.transfers.take(0.01)
        report = finished.report
        self.bad_blocks |= finished.bad_blocks
        self.reports |= report.loads | report.saves | report.audits
        assert finished.received == set(report.loads)
        assert finished.sent == set(report.saves) | set(report.audits)

    def save(self, *chunks: ChunkSave) -> SaveReport:
        """Store chunks, and wait."""
        request = self._id()
        self.transfers.save(SavePlan(request, self.namespace, chunks))
        report: SaveReport = self._wait(request)
        return report

    def start_load(self, *chunks: ChunkLoad) -> str:
        """Start to load chunks; the request's id for `end_load`."""
        request = self._id()
        self.transfers.load(LoadPlan(request, self.namespace, chunks))
        return request

    def end_load(self, request: str) -> LoadReport:
        """Wait for a load."""
        report: LoadReport = self._wait(request)
        return report

    def load(self, *chunks: ChunkLoad) -> LoadReport:
        """Load chunks, and wait."""
        return self.end_load(self.start_load(*chunks))

    def audit(self, *chunks: ChunkSave) -> AuditReport:
        """Compare chunks, and wait."""
        request = self._id()
        self.transfers.audit(SavePlan(request, self.namespace, chunks))
        report: AuditReport = self._wait(request)
        return report

    def count(self, name: str) -> int:
        """How often something was counted so far."""
        stats = self.transfers.take_stats()
        if stats is not None:
            for key, amount in stats.data["counts"].items():
                self._counts[key] = self._counts.get(key, 0) + amount
        return self._counts.get(name, 0)

    def wait_for_count(self, name: str, at_least: int = 1) -> None:
        """Wait until something was counted so often."""
        until = time.monotonic() + DEADLINE_S
        while self.count(name) < at_least:
            assert time.monotonic() < until, f"{name} was not counted"
            time.sleep(0.005)


def stored(
    bench: Bench, seed: int = 1, tokens: int = CHUNK_TOKENS, first_block: int = 0
) -> ChunkSave:
    """A chunk that is stored from blocks of random numbers."""
    pages = bench.cache.layout.page_count(tokens)
    chunk = chunk_save(seed, tokens, range(first_block, first_block + pages))
    fill(bench.cache, blocks_of(chunk), seed)
    assert bench.save(chunk).stored_bytes > 0
    return chunk


def into(chunk: ChunkSave, first_block: int, first_page: int = 0) -> ChunkLoad:
    """Load a chunk into other blocks, in another order."""
    blocks = range(first_block, first_block + len(blocks_of(chunk)) - first_page)
    return ChunkLoad(chunk.key, (GroupPages(first_page, tuple(reversed(blocks))),))


def assert_loaded(bench: Bench, chunk: ChunkSave, load: ChunkLoad) -> None:
    """Check that a load's blocks hold what the chunk's blocks hold of the chunk's tokens."""
    first = load.groups[0].first_page
    tokens = chunk.token_count - first * bench.cache.layout.block_tokens
    expected = content(bench.cache, blocks_of(chunk)[first:], tokens)
    assert same(content(bench.cache, blocks_of(load), tokens), expected)


class GatedObjects(ObjectTier):
    """An object store in this process's memory whose downloads wait until the gate is opened."""

    def __init__(self, url: str = "memory:///", timeout_s: float = 10.0) -> None:
        super().__init__(url, timeout_s=timeout_s)
        self.gate = threading.Event()
        self.gate.set()
        self.downloads: list[str] = []

    def download(self, name: str, *args: Any, **options: Any) -> None:
        """See ObjectTier.download."""
        self.downloads.append(name)
        self.gate.wait(DEADLINE_S)
        super().download(name, *args, **options)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
