"""Copies between host memory and an accelerator's pages, by vLLM's own operations.

Not run on an accelerator in this project's tests: fakes of the operations check which bytes go
where, in which order, and that no memory is used again before a copy has left it.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from vllm_kvmarket.connector.paged_cache import Bytes, runs
from vllm_kvmarket.store.chunk_reader import Guard

# Bytes of one buffer of a thread: while one is copied to the device, the other is read into.
PIECE_BYTES = 4 * 1024 * 1024


class Place(NamedTuple):
    """Pages of one layer: in these blocks, and one after another in this memory."""

    layer: int
    blocks: tuple[int, ...]
    memory: Bytes


class Copied(Protocol):
    """Some copies' end."""

    def synchronize(self) -> None:
        """Wait for it."""


class Operations:
    """An accelerator's copies for one thread, on a stream of its own, in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device=device)
        # As vLLM's operation wants addresses and sizes.
        self._dtype = torch.uint64 if device.type == "xpu" else torch.int64

    def pinned(self, size: int) -> Bytes:
        """Memory that the device copies from by itself, uint8 (size,). Raises MemoryError."""
        return pinned_empty(size)

    def copy(self, sources: list[int], targets: list[int], sizes: list[int]) -> Copied:
        """Start copies between addresses, all in one call; returns their end."""
        from vllm import _custom_ops as ops

        with self._stream:
            ops.swap_blocks_batch(
                torch.tensor(sources, dtype=self._dtype),
                torch.tensor(targets, dtype=self._dtype),
                torch.tensor(sizes, dtype=self._dtype),
            )
            event = torch.Event(device=self._device)
            event.record(self._stream)
        copied: Copied = event
        return copied


def pinned_empty(size: int) -> Bytes:
    """Uninitialised memory on pages of its own that a device may copy from, uint8 (size,).

    Where vLLM cannot register it, copies are slower. torch's own pinned memory would be rounded up
    to a power of two. Raises MemoryError.
    """
    from vllm.v1.kv_offload.cpu.host_register import host_register, host_unregister

    try:
        pages = mmap.mmap(-1, size)
    except OSError as error:
        raise MemoryError(str(error)) from error
    memory: Bytes = np.frombuffer(pages, dtype=np.uint8)
    address = memory.ctypes.data
    if host_register(address, size):
        # Views keep `memory` alive, and `memory` its pages.
        weakref.finalize(memory, host_unregister, address)
    return memory


@dataclass(slots=True)
class _Buffer:
    memory: Bytes = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    copied: Copied | None = None


class DeviceCopies:
    """One thread's buffers and copies. `rows`: for each layer uint8 (blocks, page_bytes)."""

    def __init__(self, rows: Sequence[torch.Tensor], operations: Operations) -> None:
        self._rows = rows
        self._operations = operations
        self._buffers = (_Buffer(), _Buffer())
        self._turn = 0
        self._last: Copied | None = None

    def buffer(self, size: int) -> Bytes:
        """The other one of two pinned buffers, when its last copies have left it: uint8 (size,)."""
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        if buffer.copied is not None:
            buffer.copied.synchronize()
            buffer.copied = None
        if buffer.memory.nbytes < size:
            buffer.memory = self._operations.pinned(max(size, PIECE_BYTES))
        return buffer.memory[:size]

    def upload(self, places: Iterable[Place]) -> None:
        """Start to copy memory into blocks; `finish` waits, and the memory must stay until then.

        Memory from `buffer` need not: its next use waits.
        """
        device, host, sizes = self._addresses(places)
        self._last = self._buffers[self._turn].copied = self._operations.copy(host, device, sizes)

    def download(self, wanted: Sequence[tuple[int, tuple[int, ...]]]) -> list[Bytes]:
        """Copy blocks into pinned memory: for each (layer, blocks) its pages, one after another.

        Valid until this thread's next copy.
        """
        sizes = [len(blocks) * self._rows[layer].shape[1] for layer, blocks in wanted]
        memory, start = self.buffer(sum(sizes)), 0
        places = []
        for (layer, blocks), size in zip(wanted, sizes, strict=True):
            places.append(Place(layer, blocks, memory[start : start + size]))
            start += size
        device, host, lengths = self._addresses(places)
        self._operations.copy(device, host, lengths).synchronize()
        return [place.memory for place in places]

    def finish(self) -> None:
        """Wait until every copy so far has ended."""
        if self._last is not None:
            self._last.synchronize()
            self._last = None

    def _addresses(self, places: Iterable[Place]) -> tuple[list[int], list[int], list[int]]:
        """On the device, on the host, and bytes, of each run of neighbouring blocks."""
        device: list[int] = []
        host: list[int] = []
        sizes: list[int] = []
        for layer, blocks, memory in places:
            rows = self._rows[layer]
            page, stride, first = rows.shape[1], rows.stride(0), rows.data_ptr()
            dense = stride == page
            at = memory.ctypes.data
            for start, end in runs(blocks) if dense else [(each, each + 1) for each in blocks]:
                size = (end - start) * page
                device.append(first + start * stride)
                host.append(at)
                sizes.append(size)
                at += size
        return device, host, sizes


class AfterCopies(AbstractContextManager[None]):
    """A Guard that lets copies end before the destination may be taken away."""

    def __init__(self, copies: DeviceCopies, guard: Guard) -> None:
        self._copies = copies
        self._guard = guard

    def __enter__(self) -> None:
        self._copies.finish()
        self._guard.__enter__()

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(None, None, None)


@contextmanager
def copies_ended(copies: DeviceCopies) -> Iterator[None]:
    """Leave no copy under way behind, also after an error: the blocks are given back then."""
    try:
        yield
    finally:
        copies.finish()


def pieces(sizes: Sequence[int], most: int = PIECE_BYTES) -> Iterator[range]:
    """Neighbouring indexes whose sizes add up to at most `most`, or one index that is larger."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > most:
            yield range(start, index)
            start, total = index, 0
        total += size
    if sizes:
        yield range(start, len(sizes))
