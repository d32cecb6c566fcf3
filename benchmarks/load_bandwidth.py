"""How fast stored chunks come into memory, verified, beside memcpy in the same run.

    python -m benchmarks.load_bandwidth --home MARKET [--json]

Loads every chunk of the market's longest document, from the page cache, into preallocated memory
laid out like a paged cache, with two threads, as the connector does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import memcpy_bytes_per_s
from vllm_kvmarket import Market
from vllm_kvmarket.store import ChunkHeader
from vllm_kvmarket.store.chunk_reader import aligned_empty, open_chunk

THREADS = 2
REPEATS = 7


def measure(market: Market) -> dict[str, Any]:
    """Bytes a second, the median of several rounds; the first one, in a new process, by itself."""
    listing = max(market.catalogue.listings(state="live"), key=lambda each: each.token_count)
    headers: list[ChunkHeader] = []
    for key in listing.chunk_keys:
        with open_chunk(market.store.disk.path(key), key) as chunk:
            headers.append(chunk.header)
    layout = headers[0].layout
    pages = sum(header.page_count for header in headers)
    # On a cache line, as torch allocates: the kernel copies far slower into numpy's own.
    cache = [aligned_empty(pages * layer.page_bytes) for layer in layout.layers]
    for memory in cache:
        memory.fill(0)
    firsts = np.cumsum([0, *(header.page_count for header in headers)])

    def load(index: int) -> None:
        header = headers[index]
        first, last = int(firsts[index]), int(firsts[index + 1])
        with market.store.open(header.key, layout, header.namespace) as chunk:
            chunk.copy_all_pages(
                0,
                header.page_count,
                [
                    [memory[first * layer.page_bytes : last * layer.page_bytes]]
                    for memory, layer in zip(cache, layout.layers, strict=True)
                ],
            )

    # Of the pages, whatever a codec made of them.
    total = pages * sum(layer.page_bytes for layer in layout.layers)
    seconds = []
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            list(pool.map(load, range(len(headers))))
            seconds.append(time.perf_counter() - started)
    memcpy = memcpy_bytes_per_s(THREADS)
    speed = total / statistics.median(seconds[1:])
    return {
        "tokens": listing.token_count,
        "bytes": total,
        "bytes_per_s": speed,
        "first_bytes_per_s": total / seconds[0],
        "memcpy_bytes_per_s": memcpy,
        "of_memcpy": speed / memcpy,
    }


def main() -> None:
    """Measure, and print a line or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with Market.open(args.home) as market:
        result = measure(market)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{result['bytes'] / 1e6:.0f} MB: {result['bytes_per_s'] / 1e9:.1f} GB/s, "
        f"{result['of_memcpy']:.0%} of memcpy"
    )


if __name__ == "__main__":
    main()
