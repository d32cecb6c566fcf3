"""Documents published with one block size or one rank, reused with others, to the token."""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import SimpleNamespace

import msgspec
import pytest
import torch

from tests.support.engines import NANO, running, words
from vllm_kvmarket import Market
from vllm_kvmarket.connector.paged_cache import (
    UNPROVEN_LATENT,
    latent_packing,
    layout_tag,
    proven_packing,
)
from vllm_kvmarket.market.timed_requests import ask, empty_prefix_cache
from vllm_kvmarket.store.packings import read_tag

QUESTION = words(496, 10)
# Ends 60 tokens into its last chunk: in the middle of a block of any size.
LENGTH = 572
LARGE, SMALL, RANKS = words(301, LENGTH), words(302, LENGTH), words(303, LENGTH)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def market(home):
    with Market.open(home) as opened:
        opened.create_account("alice")
        opened.deposit("alice", 1000 * NANO, "d")
        yield opened


@pytest.fixture(scope="module")
def large(tiny, market):
    """LARGE, published in blocks of 128 by one rank."""
    with running(tiny(1), market, block_size=128) as llm:
        return market.publish(llm, token_ids=LARGE, title="large")


@pytest.fixture(scope="module")
def small(tiny, market, large):
    """SMALL, published in blocks of 32, the smallest that vLLM takes; reuses LARGE as well."""
    with running(tiny(1), market, block_size=32) as llm:
        assert_reused(llm, market, LARGE)
        return market.publish(llm, token_ids=SMALL, title="small")


@pytest.fixture(scope="module")
def two_ranks(tiny, market, small):
    """RANKS, published by two ranks; the same engine reuses LARGE and SMALL."""
    with two_rank_engine(tiny(1), market) as llm:
        assert_reused(llm, market, LARGE)
        assert_reused(llm, market, SMALL)
        return market.publish(llm, token_ids=RANKS, title="ranks")


@contextmanager
def two_rank_engine(model, market):
    """An engine of two ranks on a core each."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks need two cores")
    with running(model, market, tensor_parallel_size=2) as llm:
        yield llm


def assert_reused(llm, market, document):
    """All of the document is loaded, and the answer is that of full prefill by this engine."""
    full = ask(llm, document + QUESTION, rest_s=0)
    assert full.market["declined"]
    empty_prefix_cache(llm)
    reuse = ask(llm, document + QUESTION, market.params("alice"), rest_s=0)
    assert reuse.market["loaded_tokens"] == reuse.market["reused_tokens"] == len(document)
    assert reuse.market["computed_tokens"] == len(QUESTION)
    assert reuse.token_ids == full.token_ids
    assert len(full.token_ids) == 24
    # A part of the document, which ends inside a chunk and inside a block.
    part = document[:391] + QUESTION
    full = ask(llm, part, rest_s=0)
    empty_prefix_cache(llm)
    reuse = ask(llm, part, market.params("alice"), rest_s=0)
    assert reuse.market["loaded_tokens"] == 391
    assert reuse.token_ids == full.token_ids
    empty_prefix_cache(llm)


@pytest.mark.parametrize("block", [64])
@pytest.mark.long
def test_chunks_of_larger_and_of_smaller_blocks_are_reused(tiny, market, small, block):
    """Published in blocks of 128 and of 32, reused in blocks between them; 256 by hand."""
    with running(tiny(1), market, block_size=block) as llm:
        assert_reused(llm, market, LARGE)
        assert_reused(llm, market, SMALL)


@pytest.mark.long
def test_chunks_of_two_ranks_are_reused_by_one(tiny, market, two_ranks):
    """Two ranks have reused what one published (in `two_ranks`); now the other way round."""
    key = two_ranks.chunk_keys[0]
    assert market.store.shares(key) == [(0, 2), (1, 2)]
    with running(tiny(1), market, block_size=64) as llm:
        assert_reused(llm, market, RANKS)


@pytest.mark.long
def test_what_is_usable_converted_is_not_stored_again(tiny, market, two_ranks, large):
    """Publishing LARGE again where it has other ranks' and other blocks' chunks writes nothing."""
    for key in large.chunk_keys:
        assert market.store.shares(key) == [(0, 1)]
    with running(tiny(1), market, block_size=128) as llm:
        assert_reused(llm, market, SMALL)
        assert_reused(llm, market, RANKS)
        market.delist(two_ranks.document_id)
        listing = market.publish(llm, token_ids=RANKS, title="ranks")
        assert_reused(llm, market, RANKS)
    assert listing.state == "live"
    assert market.store.shares(two_ranks.chunk_keys[0]) == [(0, 2), (1, 2)]


@pytest.mark.long
def test_a_layout_that_cannot_be_converted_is_a_miss_with_its_reason(
    tiny, market, small, two_ranks, capfd
):
    """Stored by kernels that nobody here knows: recomputed, not charged, and not called damage."""
    for key in small.chunk_keys:
        with market.store.open_share(key, 0, 1) as share:
            header = share.header
            layers = [[share.layer(index)] for index in range(len(header.layout.layers))]
        market.store.disk.delete(key)
        market.store.put(
            key=key,
            parent=header.parent,
            namespace=header.namespace,
            tokens=header.tokens,
            layout=msgspec.structs.replace(header.layout, tag="012/cpu-rvv-unproven"),
            layers=layers,
        )
    with running(tiny(1), market, block_size=64) as llm:
        full = ask(llm, SMALL + QUESTION, rest_s=0)
        empty_prefix_cache(llm)
        answer = ask(llm, SMALL + QUESTION, market.params("alice"), rest_s=0)
    assert answer.token_ids == full.token_ids
    assert answer.market["reused_tokens"] == answer.market["charge_nano"] == 0
    assert market.catalogue.get(small.document_id).state == "live"
    output = capfd.readouterr()
    assert "012/cpu-rvv-unproven, is not one that kvmarket can convert" in output.out + output.err


# What PagedCache says of a cache, without an engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("isa", ["vec", "vec16"])
def test_a_packing_is_believed_when_the_kernel_has_filled_a_page(isa, tokens, dtype):
    """vLLM's own kernels write keys by columns and values by rows."""
    assert proven_packing(isa, (3, tokens, 2 * 64), dtype) == "vec"


def test_a_kernel_that_is_not_there_or_not_known_proves_nothing(caplog):
    """An unknown instruction set, a quantized cache, a latent without heads."""
    assert proven_packing("none", (3, 32, 128), torch.float32) == "none-unproven"
    assert proven_packing("vec", (3, 32, 128), torch.uint8) == "vec-unproven"
    assert proven_packing("vec", (32, 128), torch.float32) == "vec-unproven"
    assert read_tag("012/cpu-vec-unproven") is None


@pytest.mark.parametrize("tokens", [32, 128])
def test_latents_lie_token_by_token_where_the_kernel_writes_them_so(tokens):
    """vLLM's kernel with AMX; it takes no other numbers than bfloat16 and float16."""
    assert latent_packing((1, tokens, 576), torch.bfloat16) == "tokens"
    assert latent_packing((1, tokens, 576), torch.float32) == UNPROVEN_LATENT
    assert read_tag(f"012/cpu-{UNPROVEN_LATENT}") is None


class Backend:
    @staticmethod
    def get_name():
        return "FLASH_ATTN"


def config_of(*, heads=4, ranks=1, stages=1, cache_dtype="auto", backend=Backend):
    """The few facts of a VllmConfig that decide a tag."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            world_size=ranks * stages,
            tensor_parallel_size=ranks,
            pipeline_parallel_size=stages,
        ),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        compilation_config=SimpleNamespace(
            static_forward_context={"layer": SimpleNamespace(attn_backend=backend)}
        ),
    )


def device_cache(heads, order="HND"):
    """A layer's cache of blocks of 16 tokens on no device at all: only its strides are read."""
    if order == "HND":
        return {"layer": torch.empty((8, heads, 16, 128), device="meta")}
    return {"layer": torch.empty((8, 16, heads, 128), device="meta").transpose(1, 2)}


class Other(Backend):
    @staticmethod
    def get_name():
        return "ROCM_ATTN"


TAGS = [
    (config_of(), device_cache(4), "012/meta-tokens"),
    (config_of(), device_cache(4, "NHD"), "102/meta-tokens"),
    (config_of(ranks=2), device_cache(2), "012/meta-tokens"),
    (config_of(ranks=8), device_cache(1), "012/meta-tokens/x2"),
    (config_of(ranks=2), device_cache(4), "012/meta-tokens/heads-vary"),
    (config_of(stages=2), device_cache(4), "012/meta-tokens/stages-2"),
    (config_of(cache_dtype="nvfp4"), device_cache(4), "012/meta-FLASH_ATTN"),
    (config_of(backend=Other), device_cache(4), "012/meta-ROCM_ATTN"),
    (config_of(backend=None), device_cache(4), "012/meta-unknown"),
]


@pytest.mark.parametrize(("config", "cache", "tag"), TAGS, ids=[row[2] for row in TAGS])
def test_a_device_tag_names_the_order_only_where_it_is_known(config, cache, tag):
    """GPU backends that keep K beside V per token; no GPU has run this."""
    found = layout_tag(config, cache, 16)
    assert found == tag
    assert (read_tag(found) is not None) == (found.partition("/x")[0].endswith("-tokens"))
