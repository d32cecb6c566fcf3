"""Moving chunks between the tiers and the paged cache, in threads.

A request's loads are tasks of one chunk each; a request is done when all of its chunks are. Saves
and audits go chunk by chunk, and queue again after each, so that loads need not wait for a whole
document. Saves, and what may have to wait for the object store, have threads of their own. A load
that waits longer than the deadline, for the object store or for a disk that has stalled, ends
without what has not come. Hot chunks are brought into host memory by
a thread that gives way to all others. An error ends its chunk only, and is reported, never raised
into the engine.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm_kvmarket.connector.chunk_io import Chunks, NotOnThisMachineError, compare
from vllm_kvmarket.connector.copy_threads import begin_thread
from vllm_kvmarket.connector.messages import (
    AuditReport,
    ChunkAudit,
    ChunkLoad,
    ChunkPrefetch,
    ChunkSave,
    FailureReason,
    LoadPlan,
    LoadReport,
    PageCopy,
    SavePlan,
    SaveReport,
    WorkerReport,
)
from vllm_kvmarket.connector.metrics import MarketStats, Tally
from vllm_kvmarket.connector.paged_cache import PagedCache
from vllm_kvmarket.connector.step_copies import StepCopies
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    KVMarketError,
    LayoutMismatchError,
    StoreError,
    StoreFullError,
)
from vllm_kvmarket.store.chunk_reader import TooLateError, guarded
from vllm_kvmarket.store.host_memory import HostTier
from vllm_kvmarket.store.tiers import Tiers

# A longer queue would be useless: the requests are scheduled before their chunks' turn.
MAX_QUEUED_CHUNKS = 512
# A step waits so long for a load that was in memory a moment ago.
STEP_LOAD_S = 0.25
LOOK_AGAIN_S = 0.005
# Of the processors' time, when others want all of it: the kernel gives the least that it can.
_LEAST_PRIORITY = 19


@dataclass(slots=True, eq=False)
class _Load:
    plan: LoadPlan
    started_s: float
    left: list[_ChunkTask] = field(default_factory=list)
    report: LoadReport = field(default_factory=LoadReport)
    bad_blocks: set[int] = field(default_factory=set)


class _ChunkTask:
    """One chunk to load, and whether its blocks may be written to; a Guard of the reader's.

    A chunk that waits, for a thread, a disk or an object store, may be given up. Then its blocks
    belong to someone else. One whose blocks are being written to may not.
    """

    def __init__(self, transfers: Transfers, load: _Load, chunk: ChunkLoad) -> None:
        self._transfers = transfers
        self.load = load
        self.chunk = chunk
        self.ended = False
        self.writes = False
        self.afar = False  # it is being fetched from the object store
        # Since when a thread of its own waits for the disk; None: it is queued.
        self.waits_since_s: float | None = None
        self._wrote = False

    def claim(self) -> None:
        """Begin to write to the blocks. Raises TooLateError."""
        with self._transfers.changed:
            if self.ended:
                raise TooLateError(self.chunk.key.hex())
            self.writes = True

    def __enter__(self) -> None:
        with self._transfers.changed:
            self._wrote, self.writes = self.writes, False
            self.waits_since_s = time.monotonic()

    def __exit__(self, *error: object) -> None:
        with self._transfers.changed:
            self.waits_since_s = time.monotonic()
            if not self.afar:
                self._transfers.moved_s = self.waits_since_s
            if self._wrote and self.ended:
                raise TooLateError(self.chunk.key.hex())
            self.writes = self._wrote


@dataclass(slots=True, eq=False)
class _Save:
    plan: SavePlan
    left: deque[ChunkSave]
    report: SaveReport = field(default_factory=SaveReport)


@dataclass(slots=True, eq=False)
class _Audit:
    plan: SavePlan
    left: deque[ChunkSave]
    report: AuditReport = field(default_factory=AuditReport)


@dataclass(slots=True)
class Finished:
    """The transfers that ended since the last call, by request."""

    received: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)
    # What could not be loaded: blocks of a plain model, else whole requests.
    bad_blocks: set[int] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    report: WorkerReport = field(default_factory=WorkerReport)


class Prefetcher:
    """A short queue of chunks to read ahead, first come first served; thread-safe.

    `read(namespace, key)` does the work and raises nothing. With `gives_way` the threads run
    when the processors have nothing else to do.
    """

    def __init__(
        self,
        read: Callable[[bytes, bytes], None],
        threads: int,
        *,
        cores: frozenset[int] = frozenset(),
        gives_way: bool = False,
    ) -> None:
        self._read = read
        self._cores = cores
        self._gives_way = gives_way
        self._changed = threading.Condition()
        self._queue: OrderedDict[bytes, bytes] = OrderedDict()  # key -> namespace
        self._loads = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"kvmarket-prefetch-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, namespace: bytes, keys: Iterable[bytes]) -> int:
        """Queue chunks; returns how many did not fit. What is queued already stays in place."""
        dropped = 0
        with self._changed:
            for key in keys:
                if key in self._queue:
                    continue
                if len(self._queue) >= MAX_QUEUED_CHUNKS:
                    dropped += 1
                    continue
                self._queue[key] = namespace
            self._changed.notify_all()
        return dropped

    def load_began(self, keys: Iterable[bytes]) -> None:
        """A load is under way: begin nothing until it has ended, and leave its chunks to it.

        Each call is paired with one of `load_ended`.
        """
        with self._changed:
            self._loads += 1
            for key in keys:
                self._queue.pop(key, None)

    def load_ended(self) -> None:
        """A load that `load_began` announced has ended."""
        with self._changed:
            self._loads -= 1
            if self._loads == 0 and self._queue:
                self._changed.notify_all()

    def close(self) -> None:
        """Forget what is queued, finish what is being read, end the threads."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        begin_thread(self._cores)
        if self._gives_way:
            # A thread's own priority, on Linux. Without it the thread competes with the others.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._queue and not self._loads))
                if self._closed:
                    return
                key, namespace = self._queue.popitem(last=False)
            self._read(namespace, key)


class Transfers:
    """Owns the threads and what is under way; thread-safe.

    `timeout_s`: a load ends without what it has waited for so long, of the object store or of a
    disk that has stalled. `cores`: those that the threads may use, where they should not just
    inherit the caller's.
    """

    def __init__(
        self,
        store: Tiers,
        cache: PagedCache,
        threads: int,
        *,
        host: HostTier | None = None,
        timeout_s: float = 10.0,
        cores: frozenset[int] = frozenset(),
    ) -> None:
        self._cache = cache
        self._host = host or HostTier(0)
        self._timeout_s = timeout_s
        self._tally = Tally()
        self._chunks = Chunks(store, cache, self._host, self._tally)
        # Threads of a pool start when they are needed.
        begin = partial(begin_thread, cores)
        self._pool = ThreadPoolExecutor(threads, "kvmarket-load", begin)
        self._remote = ThreadPoolExecutor(threads, "kvmarket-fetch", begin)
        self._saving = ThreadPoolExecutor(threads, "kvmarket-save", begin)
        self._copies = StepCopies(self._chunks, self._saving.submit)
        self._prefetcher = Prefetcher(
            self._read_ahead, threads if self._chunks.has_object_tier else 1, cores=cores
        )
        # It hears of no loads, and does not wait for their end: it gives way to them.
        self._hot_chunks = Prefetcher(self._keep_hot, 1, cores=cores, gives_way=True)
        self.changed = threading.Condition()
        self._under_way = 0
        self._loads: list[_Load] = []
        # Of the threads that read this machine's disk: how many do, and when one last went on.
        self._reading = 0
        self.moved_s = 0.0
        self._look_at_s = 0.0
        self._finished = Finished()

    def load(self, plan: LoadPlan) -> None:
        """Start to load; the plan's request turns up in `take` when it has ended."""
        load = _Load(plan, started_s=time.monotonic())
        load.left = [_ChunkTask(self, load, chunk) for chunk in plan.chunks]
        tasks = list(load.left)
        with self.changed:
            self._under_way += 1
            self._loads.append(load)
            if not self._reading:
                self.moved_s = load.started_s
        self._prefetcher.load_began([chunk.key for chunk in plan.chunks])
        for task in tasks:
            self._pool.submit(self._run_load, task)

    def wait_for_step_loads(self) -> None:
        """Wait until the loads of this step's own requests have ended, or could not in time.

        They do not turn up in `take`, but for their report.
        """
        with self.changed:
            if self.changed.wait_for(lambda: not self._of_this_step(), STEP_LOAD_S):
                return
            # What is being written to its blocks may not be given up, unless it waits for a disk.
            while loads := self._of_this_step():
                for task in [task for load in loads for task in load.left if not task.writes]:
                    failure = f"it was in memory no more, and did not come within {STEP_LOAD_S:g} s"
                    self._end_chunk(task, "", StoreError(failure))
                self.changed.wait(LOOK_AGAIN_S)

    def _of_this_step(self) -> list[_Load]:
        return [load for load in self._loads if load.plan.in_step]

    def save(self, plan: SavePlan) -> None:
        """Start to store; the plan's request turns up in `take` when it has ended."""
        self._under_way += 1
        self._saving.submit(self._run_save, _Save(plan, deque(plan.chunks)))

    def audit(self, plan: SavePlan) -> None:
        """Start to compare; the plan's request turns up in `take` when it has ended."""
        self._under_way += 1
        self._saving.submit(self._run_audit, _Audit(plan, deque(plan.chunks)))

    def copy(self, wanted: PageCopy) -> None:
        """Copy pages of a running request; on the model's thread, when its step has ended."""
        self._copies.take(wanted)

    def forget(self, request_id: str) -> None:
        """Drop the copies of a request that ended without a plan."""
        self._copies.forget(request_id)

    def prefetch(self, prefetch: ChunkPrefetch) -> None:
        """Read ahead when there is nothing else to do; the result is only counted."""
        for key, known in zip(prefetch.keys, prefetch.known, strict=False):
            self._chunks.learn(key, known)
        dropped = self._prefetcher.add(prefetch.namespace, prefetch.keys)
        if dropped:
            self._tally.count("prefetches", "dropped", dropped)

    def take(self, wait_s: float = 0.0) -> Finished:
        """The transfers that ended since the last call; waits at most `wait_s` for one to end."""
        with self.changed:
            if wait_s and self._under_way:
                self.changed.wait_for(
                    lambda: bool(self._finished.received or self._finished.sent), wait_s
                )
            if self._loads and (now := time.monotonic()) >= self._look_at_s:
                self._look_at_s = now + self._timeout_s / 20
                self._give_up(now - self._timeout_s)
            finished, self._finished = self._finished, Finished()
            self._under_way -= len(finished.received) + len(finished.sent)
            return finished

    def take_stats(self) -> MarketStats | None:
        """The counts since the last call; None when there are none."""
        stats = self._tally.take()
        if stats is not None:
            stats.stands_at("host_cache_bytes", self._host.usage().bytes_used)
        return stats

    def close(self) -> None:
        """Finish what is under way, but for what waits for the object store; end the threads."""
        self._prefetcher.close()
        # Loads move from one pool to the other: in this order none finds its pool closed.
        self._pool.shutdown(wait=True)
        self._hot_chunks.close()
        with self.changed:
            self._give_up(math.inf)
        self._remote.shutdown(wait=True)
        self._saving.shutdown(wait=True)

    # Loading

    def _run_load(self, task: _ChunkTask) -> None:
        with self.changed:
            if task.ended:
                return
            task.waits_since_s = self.moved_s = time.monotonic()
            self._reading += 1
        failure: Exception | None = None
        tier = ""
        try:
            tier = self._load_chunk(task, fetch=False)
        except Exception as error:  # noqa: BLE001  # the engine must go on, and recompute
            failure = error
        with self.changed:
            self._reading -= 1
            self.moved_s = time.monotonic()
            if not isinstance(failure, NotOnThisMachineError):
                self._end_chunk(task, tier, failure)
                return
            task.writes, task.afar = False, True
        self._remote.submit(self._run_fetch, task)

    def _run_fetch(self, task: _ChunkTask) -> None:
        failure: Exception | None = None
        tier = ""
        try:
            if not task.ended:
                tier = self._load_chunk(task, fetch=True)
        except Exception as error:  # noqa: BLE001  # the engine must go on, and recompute
            failure = error
        with self.changed:
            self._end_chunk(task, tier, failure)

    def _load_chunk(self, task: _ChunkTask, *, fetch: bool) -> str:
        started_s = time.monotonic()
        namespace = task.load.plan.namespace
        with guarded(task):
            tier, is_hot = self._chunks.load(namespace, task.chunk, fetch=fetch, claim=task.claim)
        self._tally.count("chunk_load_seconds", tier, time.monotonic() - started_s)
        if is_hot:
            self._hot_chunks.add(namespace, [task.chunk.key])
        return tier

    def _keep_hot(self, namespace: bytes, key: bytes) -> None:
        try:
            self._chunks.keep(namespace, key)
        except Exception:  # noqa: BLE001  # the next load meets the same error, and reports it
            self._tally.count("prefetches", "failed")

    def _give_up(self, before_s: float) -> None:
        """End loads that have waited since before then; the lock is held.

        For the object store a load waits from its beginning. A disk has stalled when one read, or
        all threads, have not gone on for so long; loads behind others in the queue just wait.
        """
        for load in list(self._loads):
            waiting = [task for task in load.left if not task.writes]
            near = [task for task in waiting if not task.afar]
            late = [task for task in waiting if task.afar and load.started_s < before_s]
            stalled = any(
                (self.moved_s if task.waits_since_s is None else task.waits_since_s) < before_s
                for task in near
            )
            for task in late + (near if stalled else []):
                where = "object store" if task.afar else "disk"
                failure = StoreError(
                    f"the {where} did not deliver it within {self._timeout_s:g} s; "
                    "it was computed instead"
                )
                self._end_chunk(task, "", failure)

    def _end_chunk(self, task: _ChunkTask, tier: str, failure: Exception | None) -> None:
        """Note how one chunk's load went, once; the lock is held."""
        if task.ended:
            return
        task.ended = True
        load, chunk, report = task.load, task.chunk, task.load.report
        load.left.remove(task)
        if failure is None:
            size = self._chunks.loaded_bytes(chunk)
            report.loaded_bytes += size
            self._tally.count("chunks_loaded", tier)
            self._tally.count("loaded_bytes", tier, size)
        else:
            reason = _reason(failure)
            report.failures[chunk.key] = _describe(failure)
            report.reasons[reason] = report.reasons.get(reason, 0) + 1
            if reason in {"damaged", "missing"}:
                report.damaged.add(chunk.key)
            if self._cache.is_plain:
                load.bad_blocks.update(chunk.groups[0].block_ids)
            self._tally.count("load_failures", reason)
        if not load.left:
            self._loads.remove(load)
            report.seconds = time.monotonic() - load.started_s
            self._tally.took("load_seconds", report.seconds)
            self._finished.bad_blocks |= load.bad_blocks
            if load.plan.in_step:
                self._under_way -= 1
                self._tally.count("step_loads")
            else:
                self._finished.received.add(load.plan.request_id)
            if report.failures and not self._cache.is_plain:
                self._finished.failed.add(load.plan.request_id)
            self._finished.report.loads[load.plan.request_id] = report
            self._prefetcher.load_ended()
            self.changed.notify_all()

    def _read_ahead(self, namespace: bytes, key: bytes) -> None:
        try:
            result = self._chunks.read_ahead(namespace, key)
        except Exception:  # noqa: BLE001  # the load that follows meets the same error, and reports it
            result = "failed"
        self._tally.count("prefetches", result)

    # Saving and comparing

    def _queue_again(self, run: Callable[[Any], None], work: Any) -> bool:
        """Let others have a turn before the next chunk; False when the threads are to end."""
        try:
            self._saving.submit(run, work)
        except RuntimeError:
            return False
        return True

    def _run_save(self, save: _Save) -> None:
        # In the document's order, one after another: what is there after a crash is a prefix.
        report = save.report
        while save.left and not report.failure:
            started_s = time.perf_counter()
            chunk = save.left.popleft()
            try:
                stored = self._save_chunk(save.plan, chunk)
            except Exception as error:  # noqa: BLE001  # the engine must go on
                report.failure = _describe(error)
                report.is_full = isinstance(error, StoreFullError)
                self._tally.count("save_failures", "full" if report.is_full else "io")
            else:
                report.stored_bytes += stored
                report.shares += self._chunks.described(chunk.key)
                if stored:
                    self._tally.count("chunks_saved")
                    self._tally.count("saved_bytes", amount=stored)
                    seconds = time.perf_counter() - started_s
                    self._tally.count("chunk_save_seconds", amount=seconds)
                if save.left and self._queue_again(self._run_save, save):
                    return
        self._copies.forget(save.plan.request_id)
        with self.changed:
            self._finished.sent.add(save.plan.request_id)
            self._finished.report.saves[save.plan.request_id] = report
            self.changed.notify_all()

    def _save_chunk(self, plan: SavePlan, chunk: ChunkSave) -> int:
        if self._cache.is_plain:
            return self._chunks.save(plan.namespace, chunk)
        stored = self._copies.outcome(plan.request_id, chunk.key)
        if isinstance(stored, int):
            return stored
        self._chunks.keep_stored(plan.namespace, chunk.key)
        return 0

    def _run_audit(self, audit: _Audit) -> None:
        while audit.left:
            chunk = audit.left.popleft()
            result = self._audit_chunk(audit.plan, chunk)
            audit.report.chunks[chunk.key] = result
            self._tally.count("chunks_audited", result.result)
            if audit.left and self._queue_again(self._run_audit, audit):
                return
        self._copies.forget(audit.plan.request_id)
        with self.changed:
            self._finished.sent.add(audit.plan.request_id)
            self._finished.report.audits[audit.plan.request_id] = audit.report
            self.changed.notify_all()

    def _audit_chunk(self, plan: SavePlan, chunk: ChunkSave) -> ChunkAudit:
        try:
            if not self._cache.is_plain:
                found = self._copies.outcome(plan.request_id, chunk.key)
                assert isinstance(found, ChunkAudit), "an audit computes the chunk"
                return found
            stored = self._chunks.stored(plan.namespace, chunk.key)
            computed = self._chunks.computed(chunk)
            return compare(self._cache.layout, chunk.token_count, computed, stored)
        except Exception as error:  # noqa: BLE001  # the engine must go on
            return ChunkAudit("unread", detail=_describe(error))


def _reason(error: Exception) -> FailureReason:
    if isinstance(error, ChunkDamagedError):
        return "damaged"
    if isinstance(error, ChunkMissingError):
        return "missing"
    return "layout" if isinstance(error, LayoutMismatchError) else "io"


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, KVMarketError) else f"{type(error).__name__}: {error}"
