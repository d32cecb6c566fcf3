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

RECURRENT = (
    "this model has layers with a recurrent state (Mamba and others), which kvmarket cannot store "
    "yet; start it without kvmarket"
)
LATENT = (
    "this model keeps a compressed KV cache (multi-head latent attention, as DeepSeek does), with "
    "which kvmarket gave wrong tokens on a CPU and was not tried elsewhere; start it without "
    "kvmarket"
)
NOT_CAUSAL = (
    "this model's layers look at tokens that come later, so that vLLM turns prefix caching off and "
    "kvmarket must not reuse its KV cache either; start it without kvmarket"
)


class GroupKind(enum.Enum):
    """What a token's computation reads of the tokens before it."""

    FULL = "full"  # all of them
    WINDOW = "window"  # the last `reach` - 1
    LOCAL = "local"  # those since the last multiple of `reach`


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """One group: `page_bytes` is a block of all its layers on one rank."""

    kind: GroupKind
    block_tokens: int
    layers: tuple[str, ...]
    page_bytes: int
    reach: int = 0

    def first_token(self, computed: int) -> int:
        """The first token that is still read when so many tokens have been computed."""
        if self.kind is GroupKind.WINDOW:
            return max(0, computed - self.reach + 1)
        return computed // self.reach * self.reach if self.kind is GroupKind.LOCAL else 0

    def pages(self, blocks: Sequence[int], start: int, stop: int, origin: int) -> GroupPages:
        """The pages of tokens start .. stop - 1, counted from the page of token `origin`.

        `blocks` are a request's blocks of this group, `origin` is a multiple of its block.
        """
        if start >= stop:
            return GroupPages()
        first, last = start // self.block_tokens, -(-stop // self.block_tokens)
        return GroupPages(first - origin // self.block_tokens, tuple(blocks[first:last]))


def is_plain(groups: Sequence[CacheGroup]) -> bool:
    """Whether the model has one group, and keeps all of its tokens."""
    return len(groups) == 1 and groups[0].kind is GroupKind.FULL


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
        if chunk_tokens % block_tokens:
            raise ConfigError(
                f"chunk_tokens {chunk_tokens} is no multiple of the block size {block_tokens}; "
                f"set --block-size to a divisor of {chunk_tokens}"
            )
        names = tuple(group.layer_names)
        page_bytes = sum(spec.page_size_bytes for spec in specs)
        if len(specs) == 1:
            page_bytes *= len(names)
        groups.append(CacheGroup(kind, block_tokens, names, page_bytes, reach))
    if len({group.block_tokens for group in groups}) > 1:
        raise ConfigError(
            "this model's attention layers have blocks of different sizes, which kvmarket does not "
            "support; start it without kvmarket"
        )
    return tuple(groups)


def layer_specs(spec: KVCacheSpec) -> list[KVCacheSpec]:
    """The specifications of a group's layers; one where all are equal."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return list(spec.kv_cache_specs.values())
    return [spec]


def _kind_of(spec: KVCacheSpec) -> tuple[GroupKind, int]:
    # Exact types: vLLM derives others from them, which were not tried.
    if type(spec) is FullAttentionSpec:
        if spec.non_causal:
            raise ConfigError(NOT_CAUSAL)
        return GroupKind.FULL, 0
    if type(spec) is SlidingWindowSpec and not spec.extra_retained_tokens:
        return GroupKind.WINDOW, spec.sliding_window
    if type(spec) is ChunkedLocalAttentionSpec:
        return GroupKind.LOCAL, spec.attention_chunk_size
    if isinstance(spec, MLAAttentionSpec):
        raise ConfigError(LATENT)
    if isinstance(spec, MambaSpec):
        raise ConfigError(RECURRENT)
    raise ConfigError(
        f"kvmarket was not tried with a KV cache of {type(spec).__name__}; "
        "start this model without kvmarket"
    )
