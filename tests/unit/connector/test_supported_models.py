"""The second check of the models, on the KV cache's layers, for what the configuration hides."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_kvmarket import ConfigError
from vllm_kvmarket.connector.supported_models import check_layers

SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)


def cache_of(*specs):
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize(
    ("specs", "complaint"),
    [
        ([SlidingWindowSpec(**SHAPE, sliding_window=64)], "SlidingWindowSpec"),
        ([MLAAttentionSpec(**{**SHAPE, "num_kv_heads": 1})], "multi-head latent attention"),
        ([FullAttentionSpec(**SHAPE, non_causal=True)], "turns prefix caching off"),
        ([FULL, FULL], "2 kinds of KV cache"),
    ],
)
def test_layers_that_were_not_shown_to_be_exact_are_refused(specs, complaint):
    """In one line that says which kind of layer it is."""
    with pytest.raises(ConfigError, match=complaint) as refusal:
        check_layers(cache_of(*specs))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("spec", [FULL, FullAttentionSpec(**SHAPE, sliding_window=64)])
def test_full_attention_is_taken(spec):
    """Also with a window where vLLM keeps every block, as in models that mix both."""
    check_layers(cache_of(spec))
