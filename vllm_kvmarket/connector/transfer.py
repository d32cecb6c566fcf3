"""Moving chunks between the store and the paged cache, in a pool of threads.

Loads and saves of one request are tasks of one chunk each; a request is done when all of its tasks
are. An error ends its chunk only, and is reported, never raised into the engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from vllm_kvmarket.connector.layouts import Bytes, DeviceStaging, PagedCache
from vllm_kvmarket.connector.messages import (
    ChunkLoad,
    ChunkSave,
    LoadPlan,
    LoadReport,
    SavePlan,
    SaveReport,
    WorkerReport,
)
from vllm_kvmarket.errors import ChunkDamagedError, ChunkMissingError, KVMarketError
from vllm_kvmarket.store import DiskStore


@dataclass(slots=True)
class _Load:
    plan: LoadPlan
    left: int
    started_s: float
    report: LoadReport = field(default_factory=LoadReport)
    bad_blocks: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Finished:
    """What ended since it was last taken: request ids, blocks that hold nothing usable, reports."""

    received: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)
    bad_blocks: set[int] = field(default_factory=set)
    report: WorkerReport = field(default_factory=WorkerReport)


class Transfers:
    """Owns the threads, their staging buffers, and what is under way; thread-safe."""

    def __init__(self, store: DiskStore, cache: PagedCache, threads: int) -> None:
        self._store = store
        self._cache = cache
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvmarket-io")
        self._layers = range(cache.layer_count)
        self._local = threading.local()
        self._changed = threading.Condition()
        self._under_way = 0
        self._finished = Finished()

    def load(self, plan: LoadPlan) -> None:
        """Start to load; the plan's request turns up in `take` when it has ended."""
        load = _Load(plan, left=len(plan.chunks), started_s=time.perf_counter())
        self._under_way += 1
        for chunk in plan.chunks:
            self._pool.submit(self._run_load, load, chunk)

    def save(self, plan: SavePlan) -> None:
        """Start to store; the plan's request turns up in `take` when it has ended."""
        self._under_way += 1
        self._pool.submit(self._run_save, plan)

    def take(self, wait_s: float = 0.0) -> Finished:
        """What ended since the last call; waits for something to end, at most `wait_s`."""
        with self._changed:
            if wait_s and self._under_way:
                self._changed.wait_for(
                    lambda: bool(self._finished.received or self._finished.sent), wait_s
                )
            finished, self._finished = self._finished, Finished()
            self._under_way -= len(finished.received) + len(finished.sent)
            return finished

    def close(self) -> None:
        """Finish what is under way, end the threads."""
        self._pool.shutdown(wait=True)

    def _staging(self) -> DeviceStaging:
        staging: DeviceStaging | None = getattr(self._local, "staging", None)
        if staging is None:
            staging = self._local.staging = DeviceStaging(self._cache)
        return staging

    # Loading

    def _run_load(self, load: _Load, chunk: ChunkLoad) -> None:
        failure = _failure(lambda: self._load_chunk(load.plan.namespace, chunk))
        with self._changed:
            load.left -= 1
            if failure is not None:
                load.report.failures[chunk.key] = _describe(failure)
                if isinstance(failure, ChunkDamagedError | ChunkMissingError):
                    load.report.damaged.add(chunk.key)
                load.bad_blocks.update(chunk.block_ids)
            else:
                load.report.loaded_bytes += len(chunk.block_ids) * sum(
                    layer.page_bytes for layer in self._cache.layout.layers
                )
            if load.left == 0:
                load.report.seconds = time.perf_counter() - load.started_s
                self._finished.received.add(load.plan.request_id)
                self._finished.bad_blocks |= load.bad_blocks
                self._finished.report.loads[load.plan.request_id] = load.report
                self._changed.notify_all()

    def _load_chunk(self, namespace: bytes, chunk: ChunkLoad) -> None:
        first, last = chunk.first_page, chunk.first_page + len(chunk.block_ids)
        with self._store.open(chunk.key, self._cache.layout, namespace) as stored:
            if self._cache.on_host:
                pages = [self._cache.host_pages(layer, chunk.block_ids) for layer in self._layers]
                stored.copy_all_pages(first, last, pages)
                return
            staging = self._staging()
            for layer in self._layers:
                stored.copy_pages(layer, first, last, [staging.buffer(layer, last - first)])
                staging.upload(layer, chunk.block_ids)
            staging.finish()

    # Saving

    def _run_save(self, plan: SavePlan) -> None:
        report = SaveReport()
        # In the document's order, one after another: what is there after a crash is a prefix.
        for chunk in plan.chunks:
            failure = _failure(partial(self._save_chunk, plan.namespace, chunk, report))
            if failure is not None:
                report.failure = _describe(failure)
                break
        with self._changed:
            self._finished.sent.add(plan.request_id)
            self._finished.report.saves[plan.request_id] = report
            self._changed.notify_all()

    def _save_chunk(self, namespace: bytes, chunk: ChunkSave, report: SaveReport) -> None:
        layers: list[list[Bytes]]
        if self._cache.on_host:
            layers = [self._cache.host_pages(layer, chunk.block_ids) for layer in self._layers]
        else:
            staging = self._staging()
            layers = [[staging.download(layer, chunk.block_ids)] for layer in self._layers]
        report.stored_bytes += self._store.put(
            key=chunk.key,
            parent=chunk.parent,
            namespace=namespace,
            tokens=chunk.tokens,
            layout=self._cache.layout,
            layers=layers,
        )


def _failure(work: Callable[[], None]) -> Exception | None:
    """Run `work`; what it raised, or None."""
    try:
        work()
    except Exception as error:  # noqa: BLE001  # the engine must go on, and recompute
        return error
    return None


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, KVMarketError) else f"{type(error).__name__}: {error}"
