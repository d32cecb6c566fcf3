"""Section 3: what lossless codecs make of real KV, by type of number, and how fast, on one core.

The KV is the model's own, of a licence text, computed in float32 and rounded to the other types, in
the pages of the CPU backend. Layers are encoded one by one. What comes back is compared bit by bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from benchmarks.paper_sections.tables import table
from benchmarks.store import real_kv
from vllm_kvmarket.store import aligned_empty
from vllm_kvmarket.store import codec as codecs

TOKENS, QUICK_TOKENS = 2048, 256
REPEATS = 3
# How many bits of a number are sign, exponent, and the two parts that its mantissa is counted in.
FIELDS = {"float32": (1, 8, 7, 16), "bfloat16": (1, 8, 7, 0), "float16": (1, 5, 10, 0)}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# zstd's highest levels take minutes; a sixth of the layers tells their ratio.
SLOW, SLOW_STEP = "zstd-19", 6
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Codec:
    """A lossless codec of one layer's pages, uint8 (blocks, page_bytes)."""

    name: str
    encode: Callable[[Bytes], Any]  # to bytes, or uint8 (bytes,)
    decode: Callable[[Bytes, Bytes], object]  # uint8 (bytes,) into memory of the layer's shape


def shuffle(layer: Bytes, item_bytes: int) -> Bytes:
    """All first bytes of the numbers, then all second ones, and so on; uint8 (bytes,)."""
    return np.ascontiguousarray(layer.reshape(-1, item_bytes).T).reshape(-1)


def unshuffle(mixed: Bytes, place: Bytes, item_bytes: int) -> None:
    """Undo `shuffle` into `place`."""
    place.reshape(-1, item_bytes)[:] = mixed.reshape(item_bytes, -1).T


def _plain(name: str, compress: Any, decompress: Any) -> Codec:
    def decode(stored: Any, place: Bytes) -> None:
        place.reshape(-1)[:] = np.frombuffer(decompress(stored), np.uint8)

    return Codec(name, lambda layer: compress(layer.reshape(-1)), decode)


def _shuffled(name: str, compress: Any, decompress: Any, item_bytes: int) -> Codec:
    return Codec(
        f"byte shuffle, {name}",
        lambda layer: compress(shuffle(layer, item_bytes)),
        lambda stored, place: unshuffle(
            np.frombuffer(decompress(stored), np.uint8), place, item_bytes
        ),
    )


def _ours(dtype: str, page_bytes: int) -> Codec:
    name = codecs.CODEC_EXPONENT
    return Codec(
        name,
        lambda layer: codecs.encode(name, dtype, [layer], page_bytes=page_bytes),
        lambda stored, place: codecs.decode_into(
            name, dtype, stored, [place], page_bytes=page_bytes
        ),
    )


def codecs_for(dtype: str, page_bytes: int) -> list[Codec]:
    """All codecs of this machine, simplest first; lz4 where its package is installed."""
    item_bytes = ITEM_BYTES[dtype]
    decompress = zstandard.ZstdDecompressor().decompress
    zstd = {n: zstandard.ZstdCompressor(level=n).compress for n in (1, 3, 19)}
    found = [_plain("copy (no codec)", np.copy, lambda stored: stored)]
    try:
        import lz4.frame
    except ModuleNotFoundError:
        lz = None
    else:
        lz = lz4.frame
        found.append(_plain("lz4", lz.compress, lz.decompress))
    found += [_plain(f"zstd-{level}", zstd[level], decompress) for level in zstd]
    if lz is not None:
        found.append(_shuffled("lz4", lz.compress, lz.decompress, item_bytes))
    found.append(_shuffled("zstd-1", zstd[1], decompress, item_bytes))
    return [*found, _ours(dtype, page_bytes)]


def measure(codec: Codec, layers: Sequence[Bytes], repeats: int) -> dict[str, Any]:
    """Ratio, and speeds in decoded bytes a second. Raises RuntimeError when a bit has changed."""
    stored = []
    for layer in layers:
        encoded = np.frombuffer(codec.encode(layer), np.uint8)
        stored.append(aligned_empty(len(encoded)))
        stored[-1][:] = encoded
    place = aligned_empty(layers[0].nbytes).reshape(layers[0].shape)
    for layer, each in zip(layers, stored, strict=True):
        place.fill(0)
        codec.decode(each, place)
        if not np.array_equal(place, layer):
            raise RuntimeError(f"{codec.name} did not give back what it was given")
    total = sum(layer.nbytes for layer in layers)

    def decode() -> None:
        for each in stored:
            codec.decode(each, place)

    def encode() -> None:
        for layer in layers:
            codec.encode(layer)

    return {
        "codec": codec.name,
        "ratio": total / sum(each.nbytes for each in stored),
        "encode_bytes_per_s": total / _seconds(encode, repeats),
        "decode_bytes_per_s": total / _seconds(decode, repeats),
        "measured_bytes": total,
    }


def _seconds(work: Callable[[], None], repeats: int) -> float:
    """The median of this thread's CPU seconds."""
    taken = []
    for _ in range(repeats):
        started = time.thread_time()
        work()
        taken.append(time.thread_time() - started)
    return max(statistics.median(taken), 1e-9)


def entropy_bits(values: np.ndarray[Any, Any]) -> float:
    """Shannon entropy of small integers, in bits, each counted by itself."""
    counts = np.bincount(values.reshape(-1))
    shares = counts[counts > 0] / values.size
    return float(-(shares * np.log2(shares)).sum())


def field_entropies(layers: Sequence[Bytes], dtype: str) -> dict[str, float]:
    """Bits of information in sign, exponent and mantissa of a number, averaged over the layers."""
    sums = {"sign": 0.0, "exponent": 0.0, "mantissa": 0.0}
    for layer in layers:
        words = layer.reshape(-1).view("<u4" if dtype == "float32" else "<u2").astype(np.int64)
        shift = 8 * ITEM_BYTES[dtype]
        parts = []
        for bits in FIELDS[dtype]:
            shift -= bits
            parts.append(entropy_bits((words >> shift) & ((1 << bits) - 1)) if bits else 0.0)
        for name, bits in zip(sums, (parts[0], parts[1], parts[2] + parts[3]), strict=True):
            sums[name] += bits / len(layers)
    return sums


def run(model: str, quick: bool) -> dict[str, Any]:
    """Run the section; a result for JSON."""
    tokens, kv = real_kv(Path(model), QUICK_TOKENS if quick else TOKENS)
    kv["float16"] = [
        pages.view(np.float32).astype(np.float16).view(np.uint8) for pages in kv["float32"]
    ]
    rows, sizes, entropies = [], {}, {}
    for dtype, layers in kv.items():
        sizes[dtype] = sum(layer.nbytes for layer in layers) / len(tokens)
        bits = field_entropies(layers, dtype)
        entropies[dtype] = {**bits, "ratio": 8 * ITEM_BYTES[dtype] / sum(bits.values())}
        for codec in codecs_for(dtype, layers[0].shape[1]):
            is_slow = codec.name == SLOW
            sample = layers[::SLOW_STEP] if is_slow else layers
            found = measure(codec, sample, 1 if quick or is_slow else REPEATS)
            rows.append({"dtype": dtype, "layers": len(sample), **found})
    return {
        "tokens": len(tokens),
        "layers": len(kv["float32"]),
        "bytes_per_token": sizes,
        "field_entropies": entropies,
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    """A row a codec, and where the information lies."""
    print(f"KV of {result['tokens']:,} tokens, {result['layers']} layers; one core, CPU time\n")
    table(
        ("codec", "dtype", "kB a token", "ratio", "encode\nGB/s", "decode\nGB/s", "layers"),
        [
            (
                row["codec"],
                row["dtype"],
                f"{result['bytes_per_token'][row['dtype']] / row['ratio'] / 1e3:.1f}",
                f"{row['ratio']:.3f}",
                f"{row['encode_bytes_per_s'] / 1e9:.2f}",
                f"{row['decode_bytes_per_s'] / 1e9:.2f}",
                str(row["layers"]),
            )
            for row in result["rows"]
        ],
    )
    print("\nBits of information in a number, each counted by itself:")
    table(
        ("dtype", "sign", "exponent", "mantissa", "bits stored", "ratio of such\na coder"),
        [
            (
                dtype,
                f"{bits['sign']:.2f}",
                f"{bits['exponent']:.2f}",
                f"{bits['mantissa']:.2f}",
                str(8 * ITEM_BYTES[dtype]),
                f"{bits['ratio']:.3f}",
            )
            for dtype, bits in result["field_entropies"].items()
        ],
    )
