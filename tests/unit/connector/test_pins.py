"""Pinned blocks in vLLM's own block pool: the last to be given away, and in nobody's way."""

from __future__ import annotations

import pytest
from vllm.v1.core.block_pool import BlockPool

from tests.support.scheduler_half import BLOCK_TOKENS, request_of
from vllm_kvmarket.connector.pins import PinnedBlocks

BLOCKS = 101  # vLLM keeps one for itself
LONGEST = 10 * BLOCK_TOKENS


@pytest.fixture
def pool():
    return BlockPool(BLOCKS, enable_caching=True, hash_block_size=BLOCK_TOKENS)


@pytest.fixture
def pins(pool):
    made = PinnedBlocks(0.5, LONGEST, BLOCK_TOKENS)
    made.bind(pool)
    return made


def cached(pool, seed, count):
    """A request's whole blocks, cached and free again; their ids."""
    ids = taken(pool, seed, count)
    pool.free_blocks([pool.blocks[block] for block in reversed(ids)])
    return ids


def taken(pool, seed, count):
    """The same, still in use."""
    request = request_of([seed] * count * BLOCK_TOKENS, {})
    blocks = pool.get_new_blocks(count)
    pool.cache_full_blocks(request, blocks, 0, count, BLOCK_TOKENS, 0)
    return [block.block_id for block in blocks]


def is_found(pool, ids, known):
    return [pool.blocks[block].block_hash for block in ids] == known


def hashes(pool, ids):
    return [pool.blocks[block].block_hash for block in ids]


@pytest.mark.parametrize("size", [1, 3, 10])
def test_other_requests_push_everything_out_but_what_is_pinned(pool, pins, size):
    """However many come, of any size up to the longest."""
    pinned, other = cached(pool, 1, 30), cached(pool, 2, 30)
    known, lost = hashes(pool, pinned), hashes(pool, other)
    assert pins.pin("kvd_1", 30 * BLOCK_TOKENS + 7, [*pinned, 99]) == ""
    for number in range(400 // size):
        cached(pool, 1000 + number, size)
        pins.taken(size)
    assert is_found(pool, pinned, known)
    assert not is_found(pool, other, lost)
    assert pool.get_num_free_blocks() == BLOCKS - 1, "a pin holds nothing"


def test_without_a_pin_they_are_pushed_out(pool, pins):
    """Or the test above would show nothing."""
    pinned = cached(pool, 1, 30)
    known = hashes(pool, pinned)
    pins.pin("kvd_1", 30 * BLOCK_TOKENS, pinned)
    pins.unpin("kvd_1")
    for number in range(40):
        cached(pool, 1000 + number, 10)
        pins.taken(10)
    assert not is_found(pool, pinned, known)


def test_where_nothing_else_is_left_pinned_blocks_are_given_away(pool, pins):
    """No request waits for them. The document's end goes first, and it is pinned no more."""
    pinned = cached(pool, 1, 30)
    known = hashes(pool, pinned)
    pins.pin("kvd_1", 30 * BLOCK_TOKENS, pinned)
    for number in range(8):
        taken(pool, 1000 + number, 10)
        pins.taken(10)
    assert hashes(pool, pinned)[:20] == known[:20]
    assert hashes(pool, pinned)[20:] != known[20:]
    assert pins.block_count == 30
    pins.forget_lost()
    assert pins.block_count == 0


def test_emptying_the_cache_works_and_ends_pins(pool, pins):
    """As sleeping and taking new weights do."""
    pinned = cached(pool, 1, 5)
    pins.pin("kvd_1", 5 * BLOCK_TOKENS, pinned)
    assert pool.reset_prefix_cache()
    again = cached(pool, 2, 5)
    assert pins.pin("kvd_2", 5 * BLOCK_TOKENS, again) == ""
    assert pins.block_count == 5, "the first is forgotten"


def test_blocks_that_two_documents_share_are_pinned_once(pool, pins):
    """And until both are unpinned."""
    ids = cached(pool, 1, 20)
    assert pins.pin("kvd_short", 10 * BLOCK_TOKENS, ids) == ""
    assert pins.pin("kvd_long", 20 * BLOCK_TOKENS, ids) == ""
    assert pins.block_count == 20
    pins.unpin("kvd_long")
    assert pins.block_count == 10
    pins.unpin_unless(lambda _: False)
    assert pins.block_count == 0


def test_pins_stay_within_their_budget(pool, pins):
    """Half of the cache; and what vLLM does not cache cannot be pinned."""
    assert pins.budget == 50
    assert pins.pin("kvd_1", 30 * BLOCK_TOKENS, cached(pool, 1, 30)) == ""
    assert "unpin another" in pins.pin("kvd_2", 30 * BLOCK_TOKENS, cached(pool, 2, 30))
    blocks = pool.get_new_blocks(2)
    assert "preload" in pins.pin("kvd_3", 256, [block.block_id for block in blocks])
    off = PinnedBlocks(0.5, LONGEST, BLOCK_TOKENS)
    assert off.budget == 0
    off.bind(BlockPool(9, enable_caching=False, hash_block_size=BLOCK_TOKENS))
    assert "prefix caching is off" in off.pin("kvd_1", 256, [1, 2])
