"""Which models kvmarket may serve: only those whose reuse was shown to give the same tokens.

A model that is refused here ends the start in one line, before an engine starts, by what vLLM's
configuration says. `cache_groups.groups_of` checks again in the engine, by its KV cache's layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvmarket.connector.cache_groups import LATENT, RECURRENT
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
    if model.is_hybrid or model.is_attention_free or model.has_inner_state:
        raise ConfigError(RECURRENT)
    if model.use_mla:
        raise ConfigError(LATENT)
    if not cache.enable_prefix_caching and not caching_refused:
        raise ConfigError(CACHING_TURNED_OFF)
