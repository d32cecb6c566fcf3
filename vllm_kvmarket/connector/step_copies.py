"""Copies of pages whose blocks vLLM may free before their request ends.

A sliding window's blocks are freed while the rest of a long document is computed, and a preempted
request loses all of its blocks. So the pages of a document that is published or audited are copied
after each step of it. A chunk whose pages are complete is stored, or compared, in the background.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from vllm_kvmarket.connector.chunk_io import Chunks, compare
from vllm_kvmarket.connector.messages import ChunkAudit, PageCopy
from vllm_kvmarket.core.errors import StoreError
from vllm_kvmarket.store.codec import Bytes

# Copies that wait to be stored. Where there would be more, a step waits so long for the store, and
# then the publication fails: a slow store must neither fill the memory nor stop the model.
MOST_BYTES = 256 * 1024 * 1024
PATIENCE_S = 0.05
TOO_SLOW = "the store is slower than the model; publish the document again"

Outcome = int | ChunkAudit


@dataclass(slots=True, eq=False)
class _Copy:
    """One chunk's pages, of `tokens` tokens so far."""

    layers: list[Bytes]
    tokens: int = 0
    outcome: Future[Outcome] = field(default_factory=Future)


class StepCopies:
    """Every request's copies on one rank; `take` is called on the model's thread only."""

    def __init__(self, chunks: Chunks, submit: Callable[[Callable[[], None]], object]) -> None:
        self._chunks = chunks
        self._submit = submit
        self._changed = threading.Condition()
        self._copies: dict[str, dict[bytes, _Copy]] = {}
        # Requests of which something was not taken, and nothing more is.
        self._given_up: set[str] = set()
        self._waiting_bytes = 0

    def take(self, wanted: PageCopy) -> None:
        """Copy the pages that a step has filled; waits at most PATIENCE_S for the store."""
        if wanted.request_id in self._given_up:
            return
        copies = self._copies.setdefault(wanted.request_id, {})
        chunk = wanted.chunk
        copy = copies.get(chunk.key)
        if copy is None:
            copy = copies[chunk.key] = _Copy(self._chunks.memory(chunk))
        if not copy.layers or copy.outcome.done():
            return  # computed again, after a preemption
        if wanted.first_token > copy.tokens:
            copy.outcome.set_exception(
                StoreError(
                    f"{chunk.key.hex()}: its first tokens were not computed by this request; "
                    "publish the document again"
                )
            )
            return
        self._chunks.copy_out(chunk, copy.layers)
        copy.tokens = wanted.last_token
        if copy.tokens < chunk.token_count:
            return
        size = sum(layer.nbytes for layer in copy.layers)
        with self._changed:
            has_room = self._changed.wait_for(
                lambda: self._waiting_bytes == 0 or self._waiting_bytes + size <= MOST_BYTES,
                PATIENCE_S,
            )
            if not has_room:
                self._given_up.add(wanted.request_id)
                copies.clear()
                return
            self._waiting_bytes += size
        layers, copy.layers = copy.layers, []
        self._submit(lambda: self._work(wanted, copy.outcome, layers, size))

    def _work(
        self, wanted: PageCopy, outcome: Future[Outcome], layers: list[Bytes], size: int
    ) -> None:
        try:
            pages = [[layer] for layer in layers]
            if wanted.compares:
                stored = self._chunks.stored(wanted.namespace, wanted.chunk.key)
                tokens = wanted.chunk.token_count
                outcome.set_result(compare(self._chunks.layout, tokens, pages, stored))
            else:
                outcome.set_result(self._chunks.save(wanted.namespace, wanted.chunk, pages))
        except Exception as error:  # noqa: BLE001  # the engine must go on
            outcome.set_exception(error)
        finally:
            with self._changed:
                self._waiting_bytes -= size
                self._changed.notify_all()

    def outcome(self, request_id: str, key: bytes) -> Outcome | None:
        """What came of a chunk, None when the request did not compute it; waits for the store.

        Raises what storing or reading it raised, and StoreError where the store was too slow.
        """
        if request_id in self._given_up:
            raise StoreError(f"{key.hex()}: {TOO_SLOW}")
        copy = self._copies.get(request_id, {}).get(key)
        if copy is None:
            return None
        if copy.layers and not copy.outcome.done():
            raise StoreError(f"{key.hex()}: was not computed to its end")
        return copy.outcome.result()

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a request; what is being stored is stored."""
        self._copies.pop(request_id, None)
        self._given_up.discard(request_id)
