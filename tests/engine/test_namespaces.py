"""Random configurations of tiny models: equal namespaces, equal KV, and other KV, other namespaces.

The KV is what a real engine computes and stores for one document.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.support.engines import running, words
from vllm_kvmarket import Market
from vllm_kvmarket.store import open_chunk
from vllm_kvmarket.store.conversion import as_floats, canonical

pytestmark = pytest.mark.long

DOCUMENT = words(44, 300)
# What decides KV, and what does not: one value of each is drawn for every engine.
DECIDING: dict[str, list[Any]] = {
    "model": [1, 2],
    "rms_norm_eps": [1e-6, 1e-3],
    "rope_theta": [1e4, 5e5],
}
OTHERS: dict[str, list[Any]] = {
    "block_size": [32, 64, 128],
    "max_num_batched_tokens": [128, 1024],
    "max_model_len": [512, 2048],
    "max_num_seqs": [1, 8],
    "enable_prefix_caching": [True, False],
}
# Sums in another order.
CLOSE = 1e-3


def kv_of(tiny, home, chosen):
    """The namespace under which an engine publishes the document, and the KV that it computed."""
    options = {name: chosen[name] for name in OTHERS}
    overrides = {
        "rms_norm_eps": chosen["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": chosen["rope_theta"]},
    }
    with (
        Market.open(home) as market,
        running(tiny(chosen["model"]), market, **options, hf_overrides=overrides) as llm,
    ):
        listing = market.publish(llm, token_ids=DOCUMENT)
        kv = []
        for key in listing.chunk_keys:
            with open_chunk(market.store.disk.path(key), key) as chunk:
                kv.append(np.concatenate([floats(chunk, n) for n in range(layers(chunk))], axis=1))
    return listing.namespace, np.concatenate(kv)[: len(DOCUMENT)]


def layers(chunk):
    return len(chunk.header.layout.layers)


def floats(chunk, index):
    """One layer's KV as (tokens, numbers)."""
    layout = chunk.header.layout
    count = -(-chunk.header.token_count // layout.block_tokens)
    pages = np.empty((count, layout.layers[index].page_bytes), np.uint8)
    chunk.copy_pages(index, 0, count, list(pages))
    elements = as_floats(canonical(layout, index, pages), layout.dtype)
    return elements.reshape(elements.shape[0], -1)


def test_namespaces_are_equal_where_kv_is(tiny, tmp_path):
    """Nine engines: of eight possible kinds of KV at least one is there twice."""
    chooser = random.Random(2026)
    drawn = [
        {name: chooser.choice(values) for name, values in (DECIDING | OTHERS).items()}
        for _ in range(9)
    ]
    found = [kv_of(tiny, tmp_path / str(n), chosen) for n, chosen in enumerate(drawn)]
    seen = set()
    for first in range(len(found)):
        for second in range(first):
            apart = float(np.abs(found[first][1] - found[second][1]).max())
            is_same = found[first][0] == found[second][0]
            assert is_same == (apart < CLOSE), (drawn[first], drawn[second], apart)
            seen.add(is_same)
    assert seen == {True, False}
