"""The engine's KV cache groups: which of a document's pages a request needs in each.

Layers of one group share a block table. vLLM makes one group for a plain model. For others it makes
several, whose layers lie in the same memory: a block belongs to one group at a time.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_kvmarket.connector.messages import GroupPages
from vllm_kvmarket.core.errors import ConfigError

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

LATENT = (
    "this model keeps a compressed KV cache (multi-head latent attention, as DeepSeek does), which "
    "is reused only with vLLM's own prefix caching, and on a CPU with AMX; turn it on, or start "
    "it without kvmarket"
)
# Recurrent layers, by vLLM's names, of which all that a request goes on from lies in one block: its
# first one. Whether a model's reuse is exact with it, the self-test says.
STATES = frozenset({"MAMBA2", "GDN_ATTN", "SHORT_CONV"})
UNTRIED_STATE = "kvmarket was not tried with this model's recurrent state"
AWAY = "start it without kvmarket"
NOT_CAUSAL = (
    "this model's layers look at tokens that come later, so that vLLM turns prefix caching off and "
    "kvmarket must not reuse its KV cache either; start it without kvmarket"
)


class GroupKind(enum.Enum):
    """What a token's computation reads of the tokens before it."""

    FULL = "full"  # all of them
    WINDOW = "window"  # the last `reach` - 1
    LOCAL = "local"  # those since the last multiple of `reach`
    STATE = "state"  # none of them: a state that the last one has left


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """One group: `page_bytes` is a block of all its layers on one rank.

    `states` are the parts of each layer's recurrent state; see store.chunk_format.LayerLayout.
    """

    kind: GroupKind
    block_tokens: int
    layers: tuple[str, ...]
    page_bytes: int
    reach: int = 0
    states: tuple[str, ...] = ()
    # Whether each tensor-parallel rank has the same pages.
    is_replicated: bool = False

    def first_token(self, computed: int) -> int:
        """The first token that is still read when so many tokens have been computed.

        Of a recurrent state, the one that has left it.
        """
        if self.kind is GroupKind.STATE:
            return computed - 1
        if self.kind is GroupKind.WINDOW:
            return max(0, computed - self.reach + 1)
        return computed // self.reach * self.reach if self.kind is GroupKind.LOCAL else 0

    def pages(self, blocks: Sequence[int], start: int, stop: int, origin: int) -> GroupPages:
        """The pages of tokens start .. stop - 1, counted from the page of token `origin`.

        `blocks` are a request's blocks of this group, `origin` is a multiple of its block.
        """
        if start >= stop:
            return GroupPages()
        if self.kind is GroupKind.STATE:
            return GroupPages(0, (blocks[(stop - 1) // self.block_tokens],))
        first, last = start // self.block_tokens, -(-stop // self.block_tokens)
        return GroupPages(first - origin // self.block_tokens, tuple(blocks[first:last]))


def is_plain(groups: Sequence[CacheGroup]) -> bool:
    """Whether the model has one group, and keeps all of its tokens."""
    return len(groups) == 1 and groups[0].kind is GroupKind.FULL


def replicas(groups: Sequence[CacheGroup], tensor_parallel_size: int) -> int:
    """How many neighbouring ranks have the same pages, of which one is stored for all of them."""
    return tensor_parallel_size if all(group.is_replicated for group in groups) else 1


def grain_of(groups: Sequence[CacheGroup], device: str) -> int:
    """A reuse must end with a multiple of so many tokens, to compute what vLLM's own hit computes.

    The CPU's kernel for latent attention adds a cached prefix up tile by tile, and rounds after
    each. vLLM's hits end with a block.
    """
    is_latent = device == "cpu" and any(group.is_replicated for group in groups)
    return groups[0].block_tokens if is_latent else 1


def groups_of(kv_cache_config: KVCacheConfig, chunk_tokens: int) -> tuple[CacheGroup, ...]:
    """The engine's groups. Raises ConfigError for one that kvmarket cannot reuse exactly."""
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        if not group.enable_kv_transfer or group.host_resident or group.is_eagle_group:
            raise ConfigError(
                "this engine keeps a KV cache group for speculative decoding or in host memory, "
                "with which kvmarket was not tried; start it without kvmarket"
            )
        specs = layer_specs(group.kv_cache_spec)
        kinds = {_kind_of(spec) for spec in specs}
        if len(kinds) != 1:
            raise ConfigError(
                "this model's layers share a KV cache group and do not read the same tokens, "
                "which kvmarket does not support; start it without kvmarket"
            )
        kind, reach = kinds.pop()
        block_tokens = int(group.kv_cache_spec.block_size)
        if kind is not GroupKind.STATE and chunk_tokens % block_tokens:
            raise ConfigError(_other_blocks(kv_cache_config, chunk_tokens, block_tokens))
        names = tuple(group.layer_names)
        page_bytes = sum(_content_bytes(spec) for spec in specs)
        if len(specs) == 1:
            page_bytes *= len(names)
        states = tuple(_state_of(spec) for spec in specs if isinstance(spec, MambaSpec))
        if len(states) == 1:
            states *= len(names)
        is_latent = all(isinstance(spec, MLAAttentionSpec) for spec in specs)
        groups.append(CacheGroup(kind, block_tokens, names, page_bytes, reach, states, is_latent))
    if len({group.block_tokens for group in groups if group.kind is not GroupKind.STATE}) > 1:
        raise ConfigError(
            "this model's attention layers have blocks of different sizes, which kvmarket does not "
            "support; start it without kvmarket"
        )
    return tuple(groups)


def _other_blocks(config: KVCacheConfig, chunk_tokens: int, block_tokens: int) -> str:
    """What to do where a chunk is not made of whole blocks."""
    problem = f"chunk_tokens {chunk_tokens} is no multiple of the block size {block_tokens}; "
    if not config.has_mamba_layers:
        return f"{problem}set --block-size to a divisor of {chunk_tokens}"
    # vLLM makes blocks so long that a recurrent state fits into one, whatever is asked for.
    size = max(chunk_tokens, 1 << (block_tokens - 1).bit_length())
    return (
        f"{problem}vLLM needs blocks of that length for this model's recurrent state: start it "
        f"with --block-size {size}, on a market with chunk_tokens {size}"
    )


def _content_bytes(spec: KVCacheSpec) -> int:
    """The bytes of one layer's block; vLLM pads a state to the length of attention's blocks."""
    return spec.state_content_size_bytes if isinstance(spec, MambaSpec) else spec.page_size_bytes


def layer_specs(spec: KVCacheSpec) -> list[KVCacheSpec]:
    """The specifications of a group's layers; one where all are equal."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return list(spec.kv_cache_specs.values())
    return [spec]


def _state_of(spec: MambaSpec) -> str:
    """For example `mamba2:7x96=bfloat16,8x32x16=float32`."""
    parts = (
        f"{'x'.join(map(str, shape))}={str(dtype).removeprefix('torch.')}"
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    )
    return f"{spec.mamba_type.name.lower()}:{','.join(parts)}"


def _kind_of(spec: KVCacheSpec) -> tuple[GroupKind, int]:
    # Exact types: vLLM derives others from them, which were not tried.
    if type(spec) is FullAttentionSpec:
        if spec.non_causal:
            raise ConfigError(NOT_CAUSAL)
        return GroupKind.FULL, 0
    if type(spec) is MLAAttentionSpec and spec.tokens_per_state == 1 and not spec.model_version:
        return GroupKind.FULL, 0
    if type(spec) is SlidingWindowSpec and not spec.extra_retained_tokens:
        return GroupKind.WINDOW, spec.sliding_window
    if type(spec) is ChunkedLocalAttentionSpec:
        return GroupKind.LOCAL, spec.attention_chunk_size
    if isinstance(spec, MambaSpec):
        if type(spec) is not MambaSpec or spec.mamba_type.name not in STATES:
            raise ConfigError(f"{UNTRIED_STATE} ({spec.mamba_type.name}), {AWAY}")
        if spec.mamba_cache_mode != "none" or spec.num_speculative_blocks:
            raise ConfigError(f"{UNTRIED_STATE} (in blocks, or for drafts), {AWAY}")
        return GroupKind.STATE, 0
    raise ConfigError(
        f"kvmarket was not tried with a KV cache of {type(spec).__name__}; "
        "start this model without kvmarket"
    )
