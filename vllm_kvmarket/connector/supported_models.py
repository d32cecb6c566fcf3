"""Which models kvmarket may serve: only those whose reuse was shown to give the same tokens.

A model that is refused here ends the start in one line. The first check runs before an engine
starts, on what vLLM's configuration says; the second runs in the engine, on its KV cache's layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_kvmarket.core.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

RECURRENT = (
    "this model has layers with a recurrent state (Mamba and others), which kvmarket cannot store "
    "yet; start it without kvmarket"
)
ONLY_WINDOWS = (
    "this model attends through sliding windows only, and kvmarket cannot reuse a part of a "
    "document there yet; start it with --disable-sliding-window (the context is then as long as "
    "the window) or without kvmarket"
)
LATENT = (
    "this model keeps a compressed KV cache (multi-head latent attention, as DeepSeek does), with "
    "which kvmarket gave wrong tokens on a CPU and was not tried elsewhere; start it without "
    "kvmarket"
)
CACHING_TURNED_OFF = (
    "vLLM turns prefix caching off for this model on this machine, so kvmarket must not reuse its "
    "KV cache either; start it without kvmarket"
)


def check_model(vllm_config: VllmConfig, *, caching_refused: bool) -> None:
    """Raise ConfigError for a model that would not give the same tokens, before an engine starts.

    `caching_refused`: the operator asked for no prefix caching, so that it is off for that reason.
    """
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    if model.is_hybrid or model.is_attention_free or model.has_inner_state:
        raise ConfigError(RECURRENT)
    # vLLM gives the whole cache a window only where every layer has it.
    if cache.sliding_window is not None:
        raise ConfigError(ONLY_WINDOWS)
    if model.use_mla:
        raise ConfigError(LATENT)
    if not cache.enable_prefix_caching and not caching_refused:
        raise ConfigError(CACHING_TURNED_OFF)


def check_layers(kv_cache_config: KVCacheConfig) -> None:
    """Raise ConfigError for KV cache layers whose reuse was not shown to be exact.

    For engines whose configuration did not pass `check_model`, and for what only layers know.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(
            f"this model keeps {len(groups)} kinds of KV cache (recurrent or cross-attention "
            "layers); kvmarket supports models with one"
        )
    for spec in _layer_specs(groups[0].kv_cache_spec):
        if not isinstance(spec, FullAttentionSpec):
            raise ConfigError(
                f"this model's KV cache is a {type(spec).__name__}, and kvmarket supports full "
                "attention; a model with sliding windows only starts with --disable-sliding-window"
            )
        if isinstance(spec, MLAAttentionSpec):
            raise ConfigError(LATENT)
        # The exact type: vLLM derives others from it, which were not tried.
        if type(spec) is not FullAttentionSpec:
            raise ConfigError(
                f"kvmarket was not tried with a KV cache of {type(spec).__name__}; "
                "start this model without kvmarket"
            )
        if spec.non_causal:
            raise ConfigError(CACHING_TURNED_OFF)


def _layer_specs(spec: KVCacheSpec) -> list[KVCacheSpec]:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return list(spec.kv_cache_specs.values())
    return [spec]
