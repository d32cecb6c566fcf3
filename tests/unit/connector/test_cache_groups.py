"""Which groups of KV cache layers are taken, and which pages of each a reuse reads."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum as StateTypes
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_kvmarket import ConfigError
from vllm_kvmarket.connector.cache_groups import (
    CacheGroup,
    GroupKind,
    groups_of,
    is_plain,
    replicas,
)
from vllm_kvmarket.connector.messages import GroupPages
from vllm_kvmarket.connector.supported_models import check_groups

SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
LATENT = {**SHAPE, "num_kv_heads": 1}
PAGE = 2 * 2 * 16 * 32 * 4
FULL = FullAttentionSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=64)
STATE = MambaSpec(400, shapes=((2, 3), (4,)), dtypes=(torch.bfloat16, torch.float32))
LOCAL = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=128)


def cache_of(*specs):
    groups = [KVCacheGroupSpec([f"a{i}", f"b{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize(
    ("specs", "complaint"),
    [
        ([MLAAttentionSpec(**LATENT, tokens_per_state=4)], "MLAAttentionSpec"),
        ([MLAAttentionSpec(**LATENT, model_version="deepseek_v4")], "MLAAttentionSpec"),
        ([FullAttentionSpec(**SHAPE, non_causal=True)], "turns prefix caching off"),
        ([FULL, SlidingWindowSpec(**SHAPE, sliding_window=64, extra_retained_tokens=3)], "Sliding"),
        ([SinkFullAttentionSpec(**SHAPE, sink_len=4)], "SinkFullAttentionSpec"),
        ([FULL, dataclasses.replace(STATE, num_speculative_blocks=2)], "recurrent state"),
        ([FULL, dataclasses.replace(STATE, mamba_cache_mode="align")], "recurrent state"),
        ([FULL, dataclasses.replace(STATE, mamba_type=StateTypes.MAMBA1)], "MAMBA1"),
        ([FULL, dataclasses.replace(STATE, mamba_type=StateTypes.LINEAR)], "LINEAR"),
        ([FullAttentionSpec(**{**SHAPE, "block_size": 96})], "--block-size"),
        ([FullAttentionSpec(**{**SHAPE, "block_size": 32}), WINDOW], "blocks of different sizes"),
    ],
)
def test_layers_that_were_not_shown_to_be_exact_are_refused(specs, complaint):
    """In one line that says which kind of layer it is."""
    with pytest.raises(ConfigError, match=complaint) as refusal:
        groups_of(cache_of(*specs), 256)
    assert "\n" not in str(refusal.value)


def test_groups_of_a_draft_model_and_in_host_memory_are_refused():
    """Neither was tried."""
    for fact in ({"is_eagle_group": True}, {"host_resident": True}, {"enable_kv_transfer": False}):
        config = cache_of(FULL)
        config.kv_cache_groups.append(KVCacheGroupSpec(["draft"], FULL, **fact))
        with pytest.raises(ConfigError, match="speculative decoding or in host memory"):
            groups_of(config, 256)


@pytest.mark.parametrize("spec", [FULL, FullAttentionSpec(**SHAPE, sliding_window=64)])
def test_full_attention_is_plain(spec):
    """Also with a window where vLLM keeps every block, as with its hybrid manager off."""
    groups = groups_of(cache_of(spec), 256)
    assert groups == (CacheGroup(GroupKind.FULL, 16, ("a0", "b0"), 2 * PAGE),)
    assert is_plain(groups)


def test_latent_attention_is_plain_and_each_rank_has_all_of_it():
    """Of DeepSeek-V2 and V3, and with an indexer's layers beside, of V3.2."""
    latent = MLAAttentionSpec(**LATENT)
    indexer = MLAAttentionSpec(**{**LATENT, "head_size": 132, "dtype": torch.uint8})
    both = UniformTypeKVCacheSpecs(16, {"a0": latent, "b0": indexer})
    for spec, page in ((latent, 2 * 16 * 32 * 4), (both, 16 * 32 * 4 + 16 * 132)):
        groups = groups_of(cache_of(spec), 256)
        assert groups == (CacheGroup(GroupKind.FULL, 16, ("a0", "b0"), page, is_replicated=True),)
        assert (is_plain(groups), replicas(groups, 8)) == (True, 8)
    assert replicas(groups_of(cache_of(FULL, latent), 256), 8) == 1


def test_windows_and_local_attention_are_groups_of_their_own():
    """With how far a token looks back."""
    groups = groups_of(cache_of(FULL, WINDOW, LOCAL), 256)
    assert [(group.kind, group.reach) for group in groups] == [
        (GroupKind.FULL, 0),
        (GroupKind.WINDOW, 64),
        (GroupKind.LOCAL, 128),
    ]
    assert not is_plain(groups)
    assert not is_plain(groups_of(cache_of(WINDOW), 256))


@settings(deadline=None)  # the first example imports
@given(st.sampled_from([FULL, WINDOW, LOCAL, STATE]), st.integers(1, 900))
def test_a_reuse_reads_exactly_the_blocks_that_vllm_keeps(spec, computed):
    """vLLM's own managers say how many tokens in front are read no more."""
    from vllm.v1.core.single_type_kv_cache_manager import (
        ChunkedLocalAttentionManager,
        FullAttentionManager,
        MambaManager,
        SlidingWindowManager,
    )

    managers = {
        FullAttentionSpec: FullAttentionManager,
        SlidingWindowSpec: SlidingWindowManager,
        ChunkedLocalAttentionSpec: ChunkedLocalAttentionManager,
        MambaSpec: MambaManager,
    }
    manager = object.__new__(managers[type(spec)])
    for name in ("sliding_window", "extra_retained_tokens", "attention_chunk_size"):
        setattr(manager, name, getattr(spec, name, None))
    (group,) = groups_of(cache_of(spec), 256)
    assert group.first_token(computed) == manager.get_num_skipped_tokens(computed)


def test_pages_are_counted_from_the_chunk_and_blocks_from_the_request():
    """Tokens 300 .. 600 of a request lie in blocks 18 .. 37; chunk 1 begins with block 16."""
    group = CacheGroup(GroupKind.FULL, 16, ("a",), PAGE)
    pages = group.pages(range(100, 200), 300, 512, 256)
    assert (pages.first_page, pages.last_page) == (2, 16)
    assert pages.block_ids == tuple(range(118, 132))
    assert group.pages(range(100, 200), 512, 512, 256).block_ids == ()


def test_a_hybrids_blocks_are_as_long_as_its_state_and_the_refusal_says_what_to_set():
    """VLLM does not make them shorter: the chunks of the market must be longer."""
    long = FullAttentionSpec(**{**SHAPE, "block_size": 1152})
    with pytest.raises(ConfigError, match="--block-size 2048, on a market with chunk_tokens 2048"):
        groups_of(cache_of(long, STATE), 256)
    blocks = FullAttentionSpec(**{**SHAPE, "block_size": 2048})
    assert [group.block_tokens for group in groups_of(cache_of(blocks, STATE), 2048)] == [2048, 400]


def test_of_a_recurrent_state_the_block_of_the_last_token_is_read():
    """Whatever its blocks' size, which no chunk need be a multiple of."""
    (group,) = groups_of(cache_of(STATE), 256)
    assert (group.kind, group.block_tokens) == (GroupKind.STATE, 400)
    assert group.states == ("mamba2:2x3=bfloat16,4=float32",) * 2
    for kind in (StateTypes.GDN_ATTN, StateTypes.SHORT_CONV):
        spec = dataclasses.replace(STATE, mamba_type=kind)
        (other,) = groups_of(cache_of(spec), 256)
        name = f"{kind.name.lower()}:2x3=bfloat16,4=float32"
        assert other == dataclasses.replace(group, states=(name, name))
    assert group.pages([7, 8, 9], 800, 801, 768) == GroupPages(0, (9,))
    assert group.pages([7, 8, 9], 799, 800, 768) == GroupPages(0, (8,))
    assert group.pages([7, 8, 9], 800, 800, 768) == GroupPages()


@pytest.mark.parametrize("spec", [FULL, STATE])
def test_a_state_that_the_namespace_does_not_tell_of_is_refused(spec):
    """And the reverse: where a match may end would be wrong."""
    groups = groups_of(cache_of(spec), 256)
    model = SimpleNamespace(is_hybrid=False, is_attention_free=False, has_inner_state=spec is STATE)
    check_groups(SimpleNamespace(model_config=model), groups)
    model.has_inner_state = not model.has_inner_state
    with pytest.raises(ConfigError, match="recurrent layers"):
        check_groups(SimpleNamespace(model_config=model), groups)
