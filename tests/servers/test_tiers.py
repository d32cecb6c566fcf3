"""Disk and object store as one: several machines, damage on either side, a store that dies."""

from __future__ import annotations

import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.machines import Machine, load, objects_of
from tests.support.proxy import Proxy
from tests.support.seaweed import SeaweedFS, free_ports
from tests.support.store_chunks import NAMESPACE, files_in, layout_of, sample
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    LayoutMismatchError,
    StoreError,
)
from vllm_kvmarket.store import DiskStore
from vllm_kvmarket.store.chunk_format import chunk_name
from vllm_kvmarket.store.object_tier import ObjectTier
from vllm_kvmarket.store.tiers import Tiers

# Chunks of several ranges.
LARGE = layout_of(page_bytes=1 << 20, layers=6)


def corrupt_object(store: Tiers, name: str) -> None:
    """Flip a byte in the middle of an object."""
    content = bytearray(objects_of(store).get_bytes(name) or b"")
    content[len(content) // 2] ^= 1
    objects_of(store).put_bytes(name, bytes(content))


def test_without_an_object_store_it_is_the_disk(tmp_path: Path) -> None:
    """Everything works, nothing is fetched, and a chunk is opened as the disk opens it."""
    store = Tiers(DiskStore(tmp_path / "disk"))
    chunk = sample()
    with pytest.raises(ChunkMissingError, match="no such chunk in the store"):
        store.verify(chunk.key)
    assert not store.has(chunk.key) and not store.make_durable(chunk.key)
    with pytest.raises(ChunkMissingError):
        store.open(chunk.key, chunk.layout, NAMESPACE)
    with pytest.raises(ChunkMissingError):
        store.fetch(chunk.key)
    size = chunk.put(store)
    assert chunk.put(store) == 0 and not store.fetch(chunk.key)
    assert store.has(chunk.key) and store.make_durable(chunk.key)
    assert store.shares(chunk.key) == [(0, 1)] and list(store.disk.keys()) == [chunk.key]
    assert store.disk.bytes_used() == store.disk.usage().bytes_used == store.disk.recount() == size
    load(chunk, store)
    store.verify(chunk.key)
    store.disk.path(chunk.key).write_bytes(b"damaged")
    with pytest.raises(ChunkDamagedError):
        store.open(chunk.key, chunk.layout, NAMESPACE)
    assert store.disk.quarantine(chunk.key, 0, 1, "damaged") and len(store.disk.quarantined()) == 1
    chunk.put(store)
    store.disk.delete(chunk.key)
    assert list(store.disk.keys()) == [] and store.disk.sweep_temporary() == 0
    store.close()


@pytest.mark.parametrize("layout", [layout_of(), LARGE, layout_of(rank=1, world_size=2)])
def test_a_second_machine_reads_what_the_first_wrote(machine: Machine, layout: object) -> None:
    """It is fetched once, verified, and from then on read from the disk."""
    first, second = machine(), machine()
    chunk = sample(layout)
    share = (chunk.layout.rank, chunk.layout.world_size)
    assert chunk.put(first) > 0 and chunk.put(first) == 0
    assert list(second.disk.keys()) == [] and second.has(chunk.key, *share)
    assert second.shares(chunk.key) == [share]
    load(chunk, second)
    assert list(second.disk.keys()) == [chunk.key]
    objects_of(second).delete(chunk_name(chunk.key, *share))
    load(chunk, second)
    with second.open_share(chunk.key, *share, NAMESPACE) as opened:
        assert opened.header.layout == chunk.layout
        np.testing.assert_array_equal(opened.layer(1), chunk.pages[1].reshape(-1))
        page = chunk.room(1, 2)[0]
        opened.copy_pages(0, 1, 2, [page])
        np.testing.assert_array_equal(page, chunk.pages[0][1:2])


def test_what_is_nowhere_is_missing(machine: Machine) -> None:
    """It is a miss, of whatever way one asks."""
    store, chunk = machine(), sample()
    for ask in (
        lambda: store.open(chunk.key, chunk.layout, NAMESPACE),
        lambda: store.open_share(chunk.key, 0, 1),
        lambda: store.fetch(chunk.key),
    ):
        with pytest.raises(ChunkMissingError, match="neither on the disk nor in the object store"):
            ask()
    assert not store.has(chunk.key) and not store.make_durable(chunk.key)
    assert store.shares(chunk.key) == [] and files_in(store.disk) in ([], [".usage"])


def test_another_layout_is_fetched_and_a_mismatch(machine: Machine) -> None:
    """A chunk that the bucket has in another layout can be opened for conversion."""
    first, second = machine(), machine()
    chunk = sample()
    chunk.put(first)
    with pytest.raises(LayoutMismatchError):
        second.open(chunk.key, layout_of(tag="102/test-tokens"), NAMESPACE)
    with second.open_share(chunk.key, 0, 1, NAMESPACE) as opened:
        opened.verify()


def damaged_somewhere(file: Path, how: str) -> None:
    """Damage a file on the disk."""
    content = bytearray(file.read_bytes())
    if how == "directory":
        file.unlink()
        file.mkdir()
        return
    if how == "header":
        content[40] ^= 1
    elif how == "payload":
        content[-1] ^= 1
    elif how == "short":
        del content[-100:]
    else:
        content.clear()
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["header", "payload", "short", "empty", "directory"])
def test_damage_on_the_disk_is_mended_unseen(machine: Machine, how: str) -> None:
    """The load gets the right bytes; the damaged file is set aside, a whole one takes its place."""
    store, chunk = machine(), sample()
    chunk.put(store)
    damaged_somewhere(store.disk.path(chunk.key), how)
    load(chunk, store)
    assert len(store.disk.quarantined()) == 1
    store.disk.verify(chunk.key)
    damaged_somewhere(store.disk.path(chunk.key), how)
    store.verify(chunk.key)
    assert not store.disk.has(chunk.key), "the next load fetches it again"
    load(chunk, store)


def test_a_damaged_object_is_told_and_replaced(machine: Machine) -> None:
    """No machine takes it, and none moves it: the next that publishes the chunk repairs it, also
    from its disk.
    """
    first, second = machine(), machine()
    chunk = sample()
    chunk.put(first)
    name = chunk_name(chunk.key)
    corrupt_object(first, name)
    with pytest.raises(ChunkDamagedError):
        load(chunk, second)
    assert list(second.disk.keys()) == [] and list(objects_of(second).names()) == [name]
    for store in (first, second):
        with pytest.raises(ChunkDamagedError, match=r"publish .* again to repair it \(s3://"):
            store.verify(chunk.key)
    load(chunk, first)
    assert first.disk.has(chunk.key), "its own copy is whole"
    assert chunk.put(first) > 0
    load(chunk, second)
    first.verify(chunk.key)
    assert chunk.put(first) == 0 and second.make_durable(chunk.key)


def test_a_damaged_object_is_not_promised_to_others(machine: Machine) -> None:
    """Who finds it stored already uploads its own copy, or says that it has none."""
    first, second = machine(), machine()
    chunk = sample()
    chunk.put(first)
    corrupt_object(first, chunk_name(chunk.key))
    with pytest.raises(ChunkDamagedError):
        second.make_durable(chunk.key)
    assert first.make_durable(chunk.key)
    load(chunk, second)


def test_a_reader_with_bad_memory_takes_nothing_from_others(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it cannot read it reports; the object stays, and others read it."""
    first, bad, third = machine(), machine(), machine()
    chunk = sample()
    chunk.put(first)
    objects = objects_of(bad)
    download = objects.download

    def flip_a_bit(name: str, descriptor: int, size: int, **more: object) -> None:
        download(name, descriptor, size, **more)
        last = os.pread(descriptor, 1, size - 1)
        os.pwrite(descriptor, bytes([last[0] ^ 1]), size - 1)

    monkeypatch.setattr(objects, "download", flip_a_bit)
    for _ in range(2):
        with pytest.raises(ChunkDamagedError):
            load(chunk, bad)
    load(chunk, third)
    third.verify(chunk.key)


def test_a_missing_ranks_share_is_found(machine: Machine) -> None:
    """Every rank's is expected; what is left of another number of ranks does not count."""
    store = machine()
    ranks = [sample(layout_of(rank=rank, world_size=2)) for rank in range(2)]
    for chunk in ranks:
        chunk.put(store)
    store.verify(ranks[0].key)
    name = chunk_name(ranks[0].key, 1, 2)
    objects_of(store).delete(name)
    with pytest.raises(ChunkMissingError, match=name[3:]):
        store.verify(ranks[0].key)
    sample().put(store)
    store.verify(ranks[0].key)


def test_damage_on_both_sides_is_told(machine: Machine) -> None:
    """The load fails, its memory is zeroed, and the next publication repairs both."""
    store, chunk = machine(), sample()
    chunk.put(store)
    corrupt_object(store, chunk_name(chunk.key))
    damaged_somewhere(store.disk.path(chunk.key), "payload")
    room = chunk.room(0, chunk.page_count)
    with (
        pytest.raises(ChunkDamagedError),
        store.open(chunk.key, chunk.layout, NAMESPACE) as opened,
    ):
        opened.copy_all_pages(0, chunk.page_count, [[layer] for layer in room])
    assert not any(layer.any() for layer in room)
    assert not store.disk.has(chunk.key)
    assert chunk.put(store) > 0
    load(chunk, store)


def test_threads_that_want_one_chunk_download_it_once(machine: Machine) -> None:
    """One fetches, the others wait for it; all get the bytes."""
    chunk = sample(LARGE)
    chunk.put(machine())
    store = machine()
    objects = objects_of(store)
    downloads = []
    download = objects.download

    def counted(*args: object, **facts: object) -> None:
        downloads.append(args)
        time.sleep(0.1)
        download(*args, **facts)

    objects.download = counted  # type: ignore[method-assign]
    failures: list[Exception] = []

    def work() -> None:
        try:
            load(chunk, store)
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(downloads) == 1


def test_the_disk_is_a_bounded_cache(machine: Machine) -> None:
    """More chunks than fit are stored and loaded; the quota holds all the while."""
    size = sample(LARGE).put(machine())
    quota_bytes = 2 * size + size // 2
    store = machine(quota_bytes=quota_bytes)
    chunks = [sample(LARGE, seed=seed) for seed in range(1, 5)]
    for chunk in chunks:
        chunk.put(store)
        assert store.disk.usage().bytes_used <= quota_bytes
    for chunk in random.Random(5).choices(chunks, k=8):
        load(chunk, store)
        assert store.disk.usage().bytes_used <= quota_bytes
    assert len(list(store.disk.keys())) == 2


def test_put_says_when_the_object_store_does_not_have_it(
    machine: Machine, seaweed: SeaweedFS, own_proxy: Proxy
) -> None:
    """The chunk stays on the disk, and the next put uploads it from there."""
    store, chunk = machine(seaweed.options(own_proxy.port), timeout_s=3), sample()
    own_proxy.is_down = True
    with pytest.raises(StoreError, match="did not answer"):
        chunk.put(store)
    assert store.disk.has(chunk.key)
    own_proxy.is_down = False
    objects_of(store)._calls._breaker._until_s = 0.0  # the pause is over
    assert chunk.put(store) > 0
    load(chunk, machine())


@pytest.fixture
def own_proxy(seaweed: SeaweedFS, proxied: Callable[[SeaweedFS], Proxy]) -> Proxy:
    """A proxy before the shared server."""
    return proxied(seaweed)


def test_a_dead_store_costs_a_deadline_and_leaves_nothing(machine: Machine) -> None:
    """A load of what is not on the disk fails in time; what is there loads as ever."""
    options = {"endpoint": f"http://127.0.0.1:{free_ports(1)[0]}", "allow_http": "true"}
    options |= {"access_key_id": "key", "secret_access_key": "secret"}
    store = machine(options, timeout_s=1)
    chunk, other = sample(), sample(seed=1)
    started_s = time.monotonic()
    with pytest.raises(StoreError, match="did not answer"):
        chunk.put(store)
    load(chunk, store)
    for _ in range(5):
        with pytest.raises(StoreError, match="not asked again"):
            load(other, store)
    with pytest.raises(StoreError):
        store.has(other.key)
    assert store.disk.has(chunk.key) and store.shares(chunk.key) == [(0, 1)]
    # The upload has a little longer.
    assert time.monotonic() - started_s < 4
    assert store.disk.usage().drafts == 0


def test_a_store_that_is_killed_during_a_load(
    own_seaweed: SeaweedFS,
    proxied: Callable[[SeaweedFS], Proxy],
    connect: Callable[..., ObjectTier],
    tmp_path: Path,
) -> None:
    """The load fails within its deadline, leaves no draft, and works when the server is back."""
    chunk = sample(LARGE)
    chunk.put(Tiers(DiskStore(tmp_path / "first"), connect("s3://bucket", own_seaweed.options())))
    proxy = proxied(own_seaweed)
    proxy.block_s = 0.05
    objects = connect("s3://bucket", own_seaweed.options(proxy.port), timeout_s=2)
    store = Tiers(DiskStore(tmp_path / "second", is_cache=True), objects)

    def strike() -> None:
        proxy.forwarded.wait(10)
        own_seaweed.kill()

    striker = threading.Thread(target=strike)
    striker.start()
    started_s = time.monotonic()
    with pytest.raises(StoreError, match="did not answer"):
        load(chunk, store)
    assert time.monotonic() - started_s < 2 * objects.timeout_s
    striker.join()
    usage = store.disk.usage()
    assert (usage.drafts, usage.chunk_files, usage.bytes_used) == (0, 0, 0)
    own_seaweed.start()
    later = Tiers(store.disk, connect("s3://bucket", own_seaweed.options(), timeout_s=30))
    load(chunk, later)


def test_a_slow_network_slows_a_load_only(
    machine: Machine, seaweed: SeaweedFS, own_proxy: Proxy
) -> None:
    """With latency before every answer a load is right; with more than its deadline, a miss."""
    chunk = sample(LARGE)
    chunk.put(machine())
    own_proxy.latency_s = 0.2
    load(chunk, machine(seaweed.options(own_proxy.port)))
    own_proxy.latency_s = 5
    store = machine(seaweed.options(own_proxy.port), timeout_s=1)
    with pytest.raises(StoreError, match="did not answer within"):
        load(chunk, store)


def test_what_is_promised_is_in_the_bucket(machine: Machine) -> None:
    """Uploaded where it is on the disk alone, and otherwise left as it is."""
    first, second = machine(), machine()
    chunk = sample()
    name = chunk_name(chunk.key)
    chunk.put(first.disk)
    assert objects_of(first).head(name) is None
    assert first.make_durable(chunk.key)
    written = objects_of(first).facts(name)
    assert written is not None and second.make_durable(chunk.key)
    assert objects_of(first).facts(name) == written and list(second.disk.keys()) == []
    assert chunk.put(first) == 0


@pytest.mark.parametrize("how", ["put", "make_durable"])
def test_an_old_copy_does_not_replace_a_newer_object(machine: Machine, how: str) -> None:
    """Who publishes again takes the object over, also where it has loaded the chunk."""
    first, second = machine(), machine()
    old = sample()
    new = dataclasses.replace(old, pages=sample(seed=1).pages)
    old.put(first)
    load(old, second)
    first.disk.delete(old.key)
    objects_of(first).delete(chunk_name(old.key))
    new.put(first)
    newer = first.describe(old.key)
    assert newer is not None and second.describe(old.key) != newer
    if how == "put":
        old.put(second)
    else:
        assert second.make_durable(old.key)
    assert second.describe(old.key) == newer
    load(new, machine())


def test_what_is_received_is_uploaded(machine: Machine) -> None:
    """An imported chunk is in the bucket when the import is done; a bad one is nowhere."""
    source, store, other = machine(), machine(), machine()
    chunk = sample()
    chunk.put(source.disk)
    content = source.disk.path(chunk.key).read_bytes()
    with store.receive(chunk.key, 0, 1, len(content)) as descriptor:
        os.pwrite(descriptor, content, 0)
    load(chunk, other)
    bad = sample(seed=1)
    with (
        pytest.raises(ChunkDamagedError),
        store.receive(bad.key, 0, 1, len(content)) as descriptor,
    ):
        os.pwrite(descriptor, content, 0)
    assert not store.has(bad.key)


def test_deleting_here_deletes_nothing_for_others(machine: Machine) -> None:
    """A machine's garbage collection clears its disk, and leaves the bucket to all."""
    first, second = machine(), machine()
    chunk = sample()
    chunk.put(first)
    first.disk.delete(chunk.key)
    assert list(first.disk.keys()) == []
    load(chunk, second)
    load(chunk, first)


def test_an_old_copy_is_fetched_again(machine: Machine) -> None:
    """A chunk that was repaired with other bytes reaches the disks that have the old ones."""
    first, second = machine(), machine()
    old = sample()
    new = dataclasses.replace(old, pages=sample(seed=1).pages)
    key, layout = old.key, old.layout
    old.put(first)
    load(old, second)
    first.disk.delete(key)
    new.put(first)
    share = first.describe(key)
    assert share is not None and share.size_bytes == objects_of(first).head(chunk_name(key))
    known = b"another1" + share.fingerprint
    load(old, second)
    with pytest.raises(ChunkMissingError):
        second.local().open(key, layout, NAMESPACE, known)
    for store in (second, second.local()):
        with store.open(key, layout, NAMESPACE, known) as opened:
            room = new.room(0, new.page_count)
            opened.copy_all_pages(0, new.page_count, [[layer] for layer in room])
            new.assert_holds(room, 0, new.page_count)
        with store.open_share(key, 0, 1, known=known) as opened:
            opened.verify()
    load(new, second)


def test_what_was_just_fetched_is_not_old(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A catalogue that knows less than the bucket costs one download for each chunk."""
    store, chunk = machine(), sample()
    chunk.put(store)
    objects, names = objects_of(store), []
    download = objects.download

    def counted(name: str, *args: object, **options: object) -> None:
        names.append(name)
        download(name, *args, **options)

    monkeypatch.setattr(objects, "download", counted)
    for _ in range(3):
        store.open(chunk.key, chunk.layout, NAMESPACE, b"unknown1").close()
        store.local().open(chunk.key, chunk.layout, NAMESPACE, b"unknown1").close()
    assert names == [chunk_name(chunk.key)]
    store.open(chunk.key, chunk.layout, NAMESPACE, b"unknown2").close()
    assert len(names) == 2


def test_a_disk_alone_has_no_old_copies(tmp_path: Path) -> None:
    """There is nowhere to fetch another from: what is stored is loaded."""
    store, chunk = Tiers(DiskStore(tmp_path)), sample()
    chunk.put(store)
    store.open(chunk.key, chunk.layout, NAMESPACE, b"unknown1").close()
    assert store.local() is store and store.describe(bytes(32)) is None


def test_layouts_that_nobody_converts_do_not_meet_in_the_bucket(machine: Machine) -> None:
    """Each engine finds the object that it can read, whoever published last."""
    tags = ("012/test-tokens", "012/cuda-ONE", "012/cuda-OTHER")
    first, second = machine(), machine()
    chunks = [
        dataclasses.replace(sample(layout_of(tag=tag)), pages=sample(seed=seed).pages)
        for seed, tag in enumerate(tags)
    ]
    for chunk in chunks:
        chunk.put(first)
    for chunk in chunks:
        load(chunk, second)
    key = chunks[0].key
    assert second.files(key) == objects_of(second).files(key) and len(second.files(key)) == 3
    second.verify(key)
    name = chunk_name(key, *second.files(key)[1])
    corrupt_object(first, name)
    with pytest.raises(ChunkDamagedError):
        second.verify(key)
