"""Copies to and from an accelerator: its operations are faked, and end as late as they may."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections import deque

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.cpu import host_register

from tests.support.paged import (
    CHUNK_TOKENS,
    PLENTY,
    Bench,
    assert_loaded,
    blocks_of,
    content,
    fill,
    into,
    paged_cache,
    same,
    stored,
    until,
)
from vllm_kvmarket.connector import chunk_io, device_copies
from vllm_kvmarket.connector.device_copies import DeviceCopies, Place, pieces, pinned_empty
from vllm_kvmarket.store import chunk_reader


class LazyCopies:
    """Copies are made when somebody waits for them, in their order, as a slow device may."""

    made: list[LazyCopies]

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.queue: deque[tuple[list[int], list[int], list[int]]] = deque()
        self.calls = 0
        self.allocated: list[int] = []
        LazyCopies.made.append(self)

    def pinned(self, size):
        self.allocated.append(size)
        return np.full(size, 0xEE, np.uint8)

    def copy(self, sources, targets, sizes):
        assert len(sources) == len(targets) == len(sizes) > 0
        self.calls += 1
        self.queue.append((sources, targets, sizes))
        return _End(self, self.calls)

    def run(self, until_call):
        while self.queue and self.calls - len(self.queue) < until_call:
            for source, target, size in zip(*self.queue.popleft(), strict=True):
                ctypes.memmove(target, source, size)


class _End:
    def __init__(self, copies, call):
        self._copies, self._call = copies, call

    def synchronize(self):
        self._copies.run(self._call)


@pytest.fixture(autouse=True)
def lazy(monkeypatch):
    LazyCopies.made = []
    monkeypatch.setattr(chunk_io, "Operations", LazyCopies)
    return LazyCopies.made


def on_a_device(**shape):
    """A paged cache whose pages the host cannot write to."""
    cache = paged_cache(**shape)
    cache._host = None
    return cache


@pytest.fixture
def device(tmp_path, monkeypatch):
    """Transfers on a device's cache; the tests' own look at its pages goes by the host."""
    real = chunk_io.PagedCache.host_pages

    def host_pages(cache, layer, blocks):
        rows = cache.rows[layer].numpy()
        return [rows[block] for block in blocks]

    monkeypatch.setattr(chunk_io.PagedCache, "host_pages", host_pages)
    # Each layer is a piece of its own.
    monkeypatch.setattr(device_copies, "PIECE_BYTES", 1)
    monkeypatch.setattr(chunk_io, "pieces", lambda sizes: pieces(sizes, 1))
    with Bench(tmp_path, on_a_device(), host_bytes=PLENTY) as bench:
        yield bench
    monkeypatch.setattr(chunk_io.PagedCache, "host_pages", real)


def test_runs_of_blocks_are_copied_in_one_call():
    """Neighbouring blocks are one copy, where nothing lies between pages."""
    rows = [torch.zeros((10, 8), dtype=torch.uint8) for _ in range(2)]
    operations = LazyCopies(torch.device("cpu"))
    copies = DeviceCopies(rows, operations)
    memory = copies.buffer(40)
    memory[:] = np.arange(40)
    copies.upload([Place(0, (4, 5, 9), memory[:24]), Place(1, (7, 2), memory[24:])])
    assert operations.calls == 1
    assert [size for _, _, sizes in operations.queue for size in sizes] == [16, 8, 8, 8]
    assert not rows[0].any(), "the caller does not wait"
    copies.finish()
    assert rows[0][4:6].flatten().tolist() == list(range(16))
    assert rows[0][9].tolist() == list(range(16, 24))
    assert rows[1][7].tolist() == list(range(24, 32))
    assert rows[1][2].tolist() == list(range(32, 40))


def test_pages_with_gaps_between_them_are_copied_one_by_one():
    """A stride longer than a page: what lies between pages is somebody else's."""
    whole = torch.full((6, 12), 7, dtype=torch.uint8)
    copies = DeviceCopies([whole[:, :8]], LazyCopies(torch.device("cpu")))
    memory = copies.buffer(16)
    memory[:] = np.arange(16)
    copies.upload([Place(0, (2, 3), memory)])
    copies.finish()
    assert whole[2].tolist() == [*range(8), 7, 7, 7, 7]
    assert whole[3].tolist() == [*range(8, 16), 7, 7, 7, 7]
    assert [page.tolist() for page in copies.download([(0, (3, 2))])] == [
        [*range(8, 16), *range(8)]
    ]


def test_a_buffer_is_used_again_only_when_its_copies_have_left_it():
    """Two buffers: the third use waits for the first's copies, and for no later ones."""
    rows = torch.zeros((4, 8), dtype=torch.uint8)
    operations = LazyCopies(torch.device("cpu"))
    copies = DeviceCopies([rows], operations)
    for block in range(3):
        memory = copies.buffer(8)
        memory[:] = block + 1
        copies.upload([Place(0, (block,), memory)])
    assert rows[:, 0].tolist() == [1, 0, 0, 0]
    copies.finish()
    assert rows[:, 0].tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("tokens", [CHUNK_TOKENS, 37])
def test_what_a_device_stored_is_loaded_bit_for_bit(device, tokens):
    """By way of two buffers, one call a piece; later straight from host memory, in one call."""
    chunk = stored(device, tokens=tokens)
    expected = content(device.cache, blocks_of(chunk), tokens)
    for _ in range(2):
        load = into(chunk, 20)
        assert device.load(load).failures == {}
        assert same(content(device.cache, blocks_of(load), tokens), expected)
    until(lambda: device.host.has(chunk.key))
    before = sum(each.calls for each in LazyCopies.made)
    allocated = sum(len(each.allocated) for each in LazyCopies.made)
    load = into(chunk, 30)
    assert device.load(load).failures == {}
    assert same(content(device.cache, blocks_of(load), tokens), expected)
    assert device.count("chunks_loaded/host") == 1
    assert sum(each.calls for each in LazyCopies.made) == before + 1
    assert sum(len(each.allocated) for each in LazyCopies.made) == allocated


def test_no_copy_is_left_when_a_load_fails(device):
    """The last layer is damaged; the first ones are on their way into blocks of others."""
    chunk = stored(device)
    path = device.store.disk.path(chunk.key)
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    load = into(chunk, 20)
    assert device.load(load).reasons == {"damaged": 1}
    assert [len(each.queue) for each in LazyCopies.made] == [0] * len(LazyCopies.made)
    fill(device.cache, blocks_of(load), seed=5)
    before = content(device.cache, blocks_of(load), CHUNK_TOKENS)
    for each in LazyCopies.made:
        each.run(each.calls)
    assert same(content(device.cache, blocks_of(load), CHUNK_TOKENS), before)


def test_copies_end_before_a_disk_is_waited_for(device, monkeypatch):
    """While it stalls the load may be given up, and nothing may be on its way then."""
    chunk = stored(device)
    read = chunk_reader.os.preadv
    under_way = []

    def slow(descriptor, buffers, offset, flags=0):
        if flags:
            raise BlockingIOError(11, "would wait")
        under_way.append(sum(len(each.queue) for each in LazyCopies.made))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(chunk_reader.os, "preadv", slow)
    load = into(chunk, 20)
    assert device.load(load).failures == {}
    assert_loaded(device, chunk, load)
    assert len(under_way) > 3
    assert not any(under_way)


@pytest.mark.parametrize(
    ("sizes", "cut"),
    [([], []), ([9], [1]), ([2, 2, 2], [2, 1]), ([9, 1, 1, 9], [1, 2, 1]), ([4, 4], [1, 1])],
)
def test_pieces_are_small_and_hold_everything(sizes, cut):
    """In their order; what is larger than a piece is one by itself."""
    made = list(pieces(sizes, 4))
    assert [len(piece) for piece in made] == cut
    assert [index for piece in made for index in piece] == list(range(len(sizes)))


@pytest.mark.parametrize("registers", [True, False])
def test_pinned_memory_is_released_when_its_last_view_goes(monkeypatch, registers):
    """Pages of its own, registered once; where that fails it is ordinary memory."""
    calls = []
    monkeypatch.setattr(
        host_register, "host_register", lambda at, size: calls.append(("+", at, size)) or registers
    )
    monkeypatch.setattr(host_register, "host_unregister", lambda at: calls.append(("-", at)))
    memory = pinned_empty(10_000)
    at = memory.ctypes.data
    assert (at % mmap.PAGESIZE, memory.nbytes, memory.flags.writeable) == (0, 10_000, True)
    view = memory[100:200]
    del memory
    gc.collect()
    assert calls == [("+", at, 10_000)]
    view[:] = 1
    del view
    gc.collect()
    assert calls[1:] == ([("-", at)] if registers else [])
