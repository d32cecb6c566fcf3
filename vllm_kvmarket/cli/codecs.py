"""`codecs`: what each codec makes of a stored document, and when it pays."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli.command import Command, count, open_market
from vllm_kvmarket.cli.output import clean, emit, size, table
from vllm_kvmarket.core.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from vllm_kvmarket.market.market import Market
    from vllm_kvmarket.store.codec import Bytes

SAMPLE_BYTES = 64_000_000
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of one stored chunk, decoded: uint8 (pages * page_bytes,)."""

    dtype: str
    page_bytes: int
    pages: Bytes


@dataclass(frozen=True, slots=True)
class Speeds:
    """What one core made of a sample with one codec; speeds are in decoded bytes a second."""

    codec: str
    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float

    def effective_bytes_per_s(self, source_bytes_per_s: float, threads: int) -> float:
        """How fast pages come from a source while `threads` read and decode at once."""
        return min(self.ratio * source_bytes_per_s, threads * self.decode_bytes_per_s)


def measure(layers: list[Layer], codec: str) -> Speeds:
    """Encode and decode a sample, on one core. Raises StoreError when a bit has changed."""
    import numpy as np

    from vllm_kvmarket.store import aligned_empty
    from vllm_kvmarket.store import codec as codecs

    # On cache lines and one place for all, as it is read from a file.
    stored = [aligned_empty(len(each)) for each in _encode(layers, codec)]
    for memory, each in zip(stored, _encode(layers, codec), strict=True):
        memory[:] = each
    room = aligned_empty(max(layer.pages.nbytes for layer in layers))

    def decode(check: bool = False) -> None:
        for layer, memory in zip(layers, stored, strict=True):
            place = room[: layer.pages.nbytes]
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


def _encode(layers: list[Layer], codec: str) -> list[Bytes]:
    from vllm_kvmarket.store import codec as codecs

    return [
        codecs.encode(codec, layer.dtype, [layer.pages], page_bytes=layer.page_bytes)
        for layer in layers
    ]


def _median_s(work: Callable[[], object]) -> float:
    """Seconds of this thread on a core: an engine beside it must not count."""
    seconds = []
    for _ in range(REPEATS):
        started = time.thread_time()
        work()
        seconds.append(time.thread_time() - started)
    return max(statistics.median(seconds), 1e-9)


def winners(measured: list[Speeds], threads: int) -> list[tuple[float, float, str]]:
    """From which to which speed of a source, bytes a second, each codec loads fastest.

    Ranges follow one another from 0 to infinity; where two are equal, the simpler one, which comes
    first in `measured`, wins.
    """
    # Rates are straight lines that bend once: who leads can only change where two of them cross.
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
        for rank, world_size in market.store.shares(key):
            with market.store.open_share(key, rank, world_size) as chunk:
                layout = chunk.header.layout
                for index, described in enumerate(layout.layers):
                    yield Layer(layout.dtype, described.page_bytes, chunk.layer(index))


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--measure", metavar="ID", required=True, help="a document, kvd_...")
    parser.add_argument(
        "--threads", type=count, help="that load at once (default: the configuration's io_threads)"
    )
    parser.add_argument(
        "--sample", type=count, default=SAMPLE_BYTES, help="bytes of KV at most (default: 64M)"
    )


def _run(args: argparse.Namespace) -> int:
    from vllm_kvmarket.store.codec import CODEC_RAW, CODECS

    with open_market(args) as market:
        threads = args.threads or market.config.io_threads
        layers, tokens = _sample(market, args.measure, args.sample)
    measured = [measure(layers, codec) for codec in CODECS]
    document = {
        "document_id": args.measure,
        "tokens": tokens,
        "dtype": layers[0].dtype,
        "sampled_bytes": sum(layer.pages.nbytes for layer in layers),
        "threads": threads,
        "codecs": [
            {
                "codec": each.codec,
                "ratio": round(each.ratio, 4),
                # Raw bytes are written from where they lie.
                "encode_bytes_per_s": (
                    None if each.codec == CODEC_RAW else round(each.encode_bytes_per_s)
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
    emit(args, document, lambda where: _show(where, document))
    return 0


def _show(where: Console, document: dict[str, Any]) -> None:
    where.print(
        clean(
            f"{document['document_id']}: {document['tokens']:,} tokens of {document['dtype']}, "
            f"{size(document['sampled_bytes'])} measured on one core"
        )
    )
    table(
        where,
        ["codec", ">ratio", ">encode", ">decode"],
        [
            (
                each["codec"],
                f"{each['ratio']:.3f}",
                f"{size(each['encode_bytes_per_s'])}/s" if each["encode_bytes_per_s"] else "-",
                f"{size(each['decode_bytes_per_s'])}/s",
            )
            for each in document["codecs"]
        ],
    )
    for each in document["winners"]:
        last = each["to_bytes_per_s"]
        until = f"up to {size(last)}/s" if last is not None else "and more"
        where.print(
            f"{each['codec']} loads fastest from a source of {size(each['from_bytes_per_s'])}/s "
            f"{until}, with {document['threads']} threads"
        )


COMMANDS = (Command("codecs", "what each codec makes of a stored document", _run, _configure),)
