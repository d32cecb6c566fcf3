"""Which models kvmarket may serve: only those whose reuse was shown to give the same tokens.

A model that is refused here ends the start in one line, before an engine starts, by what vLLM's
configuration says. `cache_groups.groups_of` checks again in the engine, by its KV cache's layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_kvmarket.connector.cache_groups import LATENT, CacheGroup, GroupKind
from vllm_kvmarket.core.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONTEXT_PARALLEL = (
    "context parallelism spreads a block's tokens over ranks, which kvmarket cannot store; leave "
    "--decode-context-parallel-size and --prefill-context-parallel-size at 1"
)
ONE_ROLE = 'kvmarket publishes and reuses in every engine: give kv_role "kv_both"'
CACHING_TURNED_OFF = (
    "vLLM turns prefix caching off for this model on this machine, so kvmarket must not reuse its "
    "KV cache either; start it without kvmarket"
)
ROTATED_WRONGLY = (
    "vLLM's operation rotary_embedding on a CPU leaves most keys of latent attention unrotated: "
    "which ones depends on how many tokens are computed at once, so that no KV cache of them can "
    'be reused; turn it off (-cc.custom_ops+=-rotary_embedding, or compilation_config={"custom_ops"'
    ': ["-rotary_embedding"]}), which also gives the right tokens'
)
# With these vLLM rotates a latent's keys by other code.
SCALED_ROTATIONS = frozenset({"yarn", "deepseek_yarn", "deepseek_llama_scaling"})
STATES_IN_BLOCKS = (
    "with prefix caching vLLM keeps this model's recurrent state at the ends of blocks, where "
    "kvmarket was not tried; start it with --no-enable-prefix-caching"
)
STATES_INEXACT = (
    "this engine keeps a recurrent state that is late or randomly rounded (replayssm, recoverssm, "
    "stochastic rounding), which kvmarket cannot reuse exactly; turn that off"
)


def check_model(vllm_config: VllmConfig, *, caching_refused: bool) -> None:
    """Raise ConfigError for a model that would not give the same tokens, before an engine starts.

    `caching_refused`: the operator asked for no prefix caching, so that it is off for that reason.
    """
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ConfigError(CONTEXT_PARALLEL)
    if transfer is not None and transfer.kv_role != "kv_both":
        raise ConfigError(f"{ONE_ROLE}, not {transfer.kv_role!r}")
    if model.use_mla:
        _check_latent(vllm_config)
    if has_states(vllm_config):
        _check_states(vllm_config)
    # vLLM calls its own caching of models without attention experimental, and leaves it off.
    if not (cache.enable_prefix_caching or caching_refused or model.is_attention_free):
        raise ConfigError(CACHING_TURNED_OFF)


def has_states(vllm_config: VllmConfig) -> bool:
    """Whether the model has recurrent layers, of which vLLM keeps a state."""
    model = vllm_config.model_config
    return bool(model.is_hybrid or model.is_attention_free or model.has_inner_state)


def check_groups(vllm_config: VllmConfig, groups: Sequence[CacheGroup]) -> None:
    """Raise ConfigError where the namespace would not say that there are states, or the reverse."""
    if any(group.kind is GroupKind.STATE for group in groups) != has_states(vllm_config):
        raise ConfigError(
            "vLLM's configuration and its KV cache disagree about whether this model has recurrent "
            "layers; start it without kvmarket"
        )


def _check_latent(vllm_config: VllmConfig) -> None:
    on_cpu = vllm_config.device_config.device_type == "cpu"
    # Beside recurrent layers (Kimi Linear) it is off because kvmarket asks for that. A CPU without
    # AMX cannot go on from a cached prefix.
    is_off = not vllm_config.cache_config.enable_prefix_caching
    if is_off and (on_cpu or not has_states(vllm_config)):
        raise ConfigError(LATENT)
    rotation = getattr(vllm_config.model_config.hf_text_config, "rope_parameters", None) or {}
    is_scaled = rotation.get("rope_type") in SCALED_ROTATIONS
    if (
        on_cpu
        and not is_scaled
        and vllm_config.compilation_config.is_custom_op_enabled("rotary_embedding")
    ):
        raise ConfigError(ROTATED_WRONGLY)


def _check_states(vllm_config: VllmConfig) -> None:
    cache = vllm_config.cache_config
    if cache.enable_prefix_caching or cache.mamba_cache_mode != "none":
        raise ConfigError(STATES_IN_BLOCKS)
    rounds_randomly = vllm_config.mamba_config.enable_stochastic_rounding
    if cache.use_replayssm or cache.use_kda_recoverssm or rounds_randomly:
        raise ConfigError(STATES_INEXACT)
