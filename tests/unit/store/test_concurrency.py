"""Several writers, readers and processes at once, and writers that die half-way."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.store_chunks import DENSE, files_in, layout_of, sample
from vllm_kvmarket.core.errors import ChunkMissingError
from vllm_kvmarket.store import DiskStore


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "chunks")


def test_many_threads_write_and_read_one_chunk(store: DiskStore) -> None:
    """While threads store and delete one chunk, readers find it whole or missing, never half."""
    chunk = sample(layout_of(DENSE, layers=8))
    stop = threading.Event()
    loads = []

    def read() -> None:
        while not stop.is_set():
            with contextlib.suppress(ChunkMissingError):
                chunk.load(store)
                loads.append(1)

    def write() -> None:
        for _ in range(40):
            chunk.put(store)
            store.delete(chunk.key)
            chunk.put(store)

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        writers = [pool.submit(write) for _ in range(3)]
        try:
            for writer in writers:
                writer.result()
        finally:
            stop.set()
        for reader in readers:
            reader.result()
    assert loads
    chunk.load(store)
    assert files_in(store) == [store.path(chunk.key).name]


WRITER = """
import sys
from pathlib import Path
from tests.support.store_chunks import sample
from vllm_kvmarket.store import DiskStore
store = DiskStore(Path(sys.argv[1]))
for seed in range(20):
    sample(seed=seed).put(store)
    sample(seed=seed).load(store)
"""


def test_several_processes_store_the_same_chunks(store: DiskStore) -> None:
    """Processes that publish the same document at once end with one whole file a chunk."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(store.root)], env=environment)
        for _ in range(3)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    names = {store.path(sample(seed=seed).key).name for seed in range(20)}
    assert set(files_in(store)) == names
    for seed in range(20):
        sample(seed=seed).load(store)


# Folders may be synced; the draft's own sync kills.
KILLED = """
import os
def kill(descriptor):
    if ".draft-" in os.readlink(f"/proc/self/fd/{descriptor}"):
        os.kill(os.getpid(), 9)
os.fsync = kill
"""


def test_a_writer_that_was_killed_leaves_a_draft_only(store: DiskStore) -> None:
    """kill -9 before the rename leaves no chunk, but a temporary file that the sweep removes."""
    chunk = sample()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writer = subprocess.run(
        [sys.executable, "-c", KILLED + WRITER, str(store.root)], env=environment, check=False
    )
    assert writer.returncode == -9
    assert [name.startswith(".draft-") for name in files_in(store)] == [True]
    assert list(store.keys()) == []
    assert store.bytes_used() == 0
    assert not store.has(chunk.key)
    assert store.sweep_temporary() == 1
    assert files_in(store) == []
    chunk.put(store)
    chunk.load(store)
