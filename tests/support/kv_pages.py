"""Pages that compress as those of a model do: numbers of one scale a channel, few exponents."""

from __future__ import annotations

import numpy as np

from tests.support.store_chunks import NAMESPACE, Sample, layout_of
from vllm_kvmarket.core.model_identity import pack_tokens

NUMBERS = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e5m2": 1}  # bytes each


def kv_bytes(dtype: str, count: int, seed: int = 0, channels: int = 64) -> np.ndarray:
    """`count` numbers as uint8, with one scale for each of so many channels."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.standard_normal(channels))
    numbers = rng.standard_normal(count) * np.resize(scales, count)
    if dtype == "float16":
        return numbers.astype(np.float16).view(np.uint8)
    if dtype == "float8_e5m2":
        return (numbers.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
    singles = numbers.astype(np.float32)
    if dtype == "float32":
        return singles.view(np.uint8)
    return (singles.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def kv_sample(
    dtype: str = "bfloat16", pages: int = 2, page_bytes: int = 2048, layers: int = 3, seed: int = 0
) -> Sample:
    """Make a chunk of full pages of 4 tokens that every codec makes smaller."""
    count = pages * page_bytes // NUMBERS[dtype]
    return Sample(
        layout=layout_of(page_bytes, layers, dtype=dtype),
        tokens=pack_tokens(range(seed, seed + 4 * pages)),
        pages=tuple(
            kv_bytes(dtype, count, seed + layer).reshape(pages, page_bytes)
            for layer in range(layers)
        ),
        namespace=NAMESPACE,
    )
