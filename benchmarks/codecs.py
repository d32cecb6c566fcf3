"""The codecs, measured on a stored document: ratio and speed on one core, and which pays where.

python -m benchmarks.codecs DOCUMENT_ID [--home FOLDER] [--threads N] [--sample BYTES] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kvmarket.core import config
from vllm_kvmarket.core.errors import StoreError
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.store import aligned_empty
from vllm_kvmarket.store import codec as codecs

SAMPLE_BYTES = 64_000_000
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of one stored chunk, decoded: uint8 (pages * page_bytes,)."""

    dtype: str
    page_bytes: int
    pages: codecs.Bytes


@dataclass(frozen=True, slots=True)
class Speeds:
    """One codec measured on one core; speeds are in decoded bytes a second."""

    codec: str
    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float

    def effective_bytes_per_s(self, source_bytes_per_s: float, threads: int) -> float:
        """The rate of pages from a source while `threads` read and decode at once."""
        return min(self.ratio * source_bytes_per_s, threads * self.decode_bytes_per_s)


def measure(layers: list[Layer], codec: str) -> Speeds:
    """Encode and decode a sample, on one core. Raises StoreError when a bit has changed."""
    # Aligned to cache lines and decoded into one buffer, as when read from a file.
    stored = [aligned_empty(len(each)) for each in _encode(layers, codec)]
    for memory, each in zip(stored, _encode(layers, codec), strict=True):
        memory[:] = each
    buffer = aligned_empty(max(layer.pages.nbytes for layer in layers))

    def decode(check: bool = False) -> None:
        for layer, memory in zip(layers, stored, strict=True):
            place = buffer[: layer.pages.nbytes]
            codecs.decode_into(codec, layer.dtype, memory, [place], page_bytes=layer.page_bytes)
            if check and not np.array_equal(place, layer.pages):
                raise StoreError(f"codec {codec} is not exact here; check this machine's memory")

    decode(check=True)
    total = sum(layer.pages.nbytes for layer in layers)
    return Speeds(
        codec,
        ratio=total / sum(len(memory) for memory in stored),
        encode_bytes_per_s=total / _median_s(lambda: _encode(layers, codec)),
        decode_bytes_per_s=total / _median_s(decode),
    )


def _encode(layers: list[Layer], codec: str) -> list[codecs.Bytes]:
    return [
        codecs.encode(codec, layer.dtype, [layer.pages], page_bytes=layer.page_bytes)
        for layer in layers
    ]


def _median_s(work: Callable[[], object]) -> float:
    """Median CPU time of this thread, so that a running engine does not count."""
    seconds = []
    for _ in range(REPEATS):
        started = time.thread_time()
        work()
        seconds.append(time.thread_time() - started)
    return max(statistics.median(seconds), 1e-9)


def winners(measured: list[Speeds], threads: int) -> list[tuple[float, float, str]]:
    """Ranges of a source's speed, in bytes a second, each with the codec that loads fastest there.

    The ranges go from 0 to infinity; of two equal codecs the one that comes first in `measured`
    wins.
    """
    # Each rate is a straight line that bends once; the fastest changes only where two lines cross.
    ceilings = [threads * each.decode_bytes_per_s for each in measured]
    crossings = {ceiling / each.ratio for ceiling in ceilings for each in measured}
    edges = [0.0, *sorted(crossings), math.inf]
    ranges: list[tuple[float, float, str]] = []
    for start, stop in pairwise(edges):
        middle = (start + stop) / 2 if math.isfinite(stop) else 2 * start + 1
        rates = [each.effective_bytes_per_s(middle, threads) for each in measured]
        best = measured[rates.index(max(rates))]
        if ranges and ranges[-1][2] == best.codec:
            ranges[-1] = (ranges[-1][0], stop, best.codec)
        else:
            ranges.append((start, stop, best.codec))
    return ranges


def _sample(market: Market, document_id: str, limit: int) -> tuple[list[Layer], int]:
    """Decoded layers of a document's chunks, up to `limit` bytes; and the document's tokens."""
    listing = market.catalogue.get(document_id)
    layers: list[Layer] = []
    total = 0
    for layer in _layers(market, listing.chunk_keys):
        total += layer.pages.nbytes
        if layers and total > limit:
            break
        layers.append(layer)
    if not layers:
        raise StoreError(f"{document_id}: none of its chunks is stored; publish it again")
    return layers, listing.token_count


def _layers(market: Market, keys: tuple[bytes, ...]) -> Iterator[Layer]:
    for key in keys:
        for share in market.store.files(key):
            with market.store.open_share(key, *share[:2], layout=share.layout) as chunk:
                layout = chunk.header.layout
                for index, described in enumerate(layout.layers):
                    # A chunk inside a document has no recurrent state.
                    if (pages := chunk.layer(index)).nbytes:
                        yield Layer(layout.dtype, described.page_bytes, pages)


def report_on(market: Market, document_id: str, threads: int, sample: int) -> dict[str, Any]:
    """Measure every codec on a document. Raises KVMarketError."""
    layers, tokens = _sample(market, document_id, sample)
    measured = [measure(layers, codec) for codec in codecs.CODECS]
    return {
        "document_id": document_id,
        "tokens": tokens,
        "dtype": layers[0].dtype,
        "sampled_bytes": sum(layer.pages.nbytes for layer in layers),
        "threads": threads,
        "codecs": [
            {
                "codec": each.codec,
                "ratio": round(each.ratio, 4),
                # Raw pages are written without a copy.
                "encode_bytes_per_s": (
                    None if each.codec == codecs.CODEC_RAW else round(each.encode_bytes_per_s)
                ),
                "decode_bytes_per_s": round(each.decode_bytes_per_s),
            }
            for each in measured
        ],
        "winners": [
            {
                "from_bytes_per_s": round(start),
                "to_bytes_per_s": round(stop) if math.isfinite(stop) else None,
                "codec": codec,
            }
            for start, stop, codec in winners(measured, threads)
        ],
    }


def _show(report: dict[str, Any]) -> None:
    print(
        f"{report['document_id']}: {report['tokens']:,} tokens of {report['dtype']}, "
        f"{report['sampled_bytes'] / 1e6:.1f} MB measured on one core\n"
        f"{'codec':<16}{'ratio':>8}{'encode GB/s':>14}{'decode GB/s':>14}"
    )
    for each in report["codecs"]:
        encoded = (each["encode_bytes_per_s"] or 0) / 1e9
        print(
            f"{each['codec']:<16}{each['ratio']:>8.3f}{encoded:>14.2f}"
            f"{each['decode_bytes_per_s'] / 1e9:>14.2f}"
        )
    for each in report["winners"]:
        last = each["to_bytes_per_s"]
        until = "and more" if last is None else f"up to {last / 1e9:.2f} GB/s"
        print(
            f"{each['codec']} loads fastest from a source of "
            f"{each['from_bytes_per_s'] / 1e9:.2f} GB/s {until}, with {report['threads']} threads"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("document_id")
    parser.add_argument("--home", type=Path, help="folder of the market")
    parser.add_argument("--threads", type=int, help="that load at once (default: io_threads)")
    parser.add_argument("--sample", type=int, default=SAMPLE_BYTES, help="most bytes to measure")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    settings = config.load(None)
    with Market.open(args.home or Path(settings.home).expanduser(), settings) as market:
        threads = args.threads or settings.io_threads
        report = report_on(market, args.document_id, threads, args.sample)
    print(json.dumps(report, indent=2)) if args.json else _show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
