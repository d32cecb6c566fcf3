"""Block hashes of published tokens: one copy in vLLM's paged cache for all readers.

vLLM finds a block of its cache by a hash over all tokens up to the block's end, and an account's
salt in the first block makes every hash of a request the account's own. Where a request reuses
published tokens, its whole blocks of them are hashed without that salt, under a secret of the
market and the namespace. The first block behind them has the salt, and so all that follows is as
private as in any other request.

Only a request that reuses published tokens has such hashes, and only as far as it reuses them. So
nobody else finds these blocks, and a document that is being published is found by nobody before it
is on offer.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    hash_block_tokens,
)

from vllm_kvmarket.auth.operator_tokens import Credentials

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

# Chunks whose hashes are remembered: 16 hashes of 100 bytes each, where a block has 16 tokens.
MOST_CHUNKS = 1 << 14
_TAG = "kvmarket"

HashFunction = Callable[[Any], bytes]


class SharedHashes:
    """Gives requests hashes that others share; called on the scheduler's thread only."""

    def __init__(self, algorithm: str, chunk_tokens: int, credentials: Credentials) -> None:
        self._hash = get_hash_fn_by_name(algorithm)
        self._chunk_tokens = chunk_tokens
        self._credentials = credentials
        self._secrets: dict[bytes, str] = {}
        # Part of each secret; changes when blocks that were hashed before must not be found.
        self._epoch = ""
        self._pool: BlockPool | None = None
        # Tokens a hash; 0 while vLLM caches nothing.
        self._size = 0
        self._known: OrderedDict[bytes, tuple[BlockHash, ...]] = OrderedDict()

    def bind(self, pool: BlockPool) -> None:
        """Take the engine's block pool, which knows how much one hash covers."""
        self._pool = pool
        self._size = pool.hash_block_size if pool.enable_caching else 0

    def share(
        self, request: Request, namespace: bytes, keys: Sequence[bytes], token_count: int
    ) -> None:
        """Hash the whole blocks among a request's first `token_count` tokens as everybody does.

        `keys` are those of the chunks that contain these tokens. Mutates the request, before vLLM
        looks for it in its cache.
        """
        private = request._block_hasher  # vLLM has no other way to hash anew
        if private is None or not self._size or token_count < self._size:
            return
        shared = self._hashes(request, namespace, keys, token_count // self._size)
        before, request.block_hashes = request.block_hashes, []
        request._block_hasher = _Hasher(self._hash, self._size, shared, private, before)
        request.update_block_hashes()

    def unshare(self, request: Request) -> None:
        """Give a request that owns no blocks its own hashes back; mutates the request."""
        hasher = request._block_hasher
        if isinstance(hasher, _Hasher):
            request._block_hasher = hasher.private
            request.block_hashes = hasher.before
            request.update_block_hashes()

    def forget(self) -> None:
        """Have no request find a block that was hashed by the others before. Mutates."""
        self._epoch = secrets.token_hex(8)
        self._secrets.clear()
        self._known.clear()

    def isolate(self, request: Request) -> None:
        """Give a request hashes that no other will have; mutates the request."""
        if self._size:
            request.cache_salt = secrets.token_hex(16)
            request.block_hashes = []
            request.update_block_hashes()

    def forget_behind(self, request: Request, token_count: int, but: Collection[int] = ()) -> bool:
        """Let nobody find what the cache has of a request's shared blocks behind so many tokens,
        or not before its own blocks, which are `but`; whether there was anything. Mutates the cache
        of a model with one group.
        """
        pool, any_found = self._pool, False
        for each in self.of(request)[self.count(token_count) :]:
            assert pool is not None
            while (found := pool.get_cached_block(each, [0])) and found[0].block_id not in but:
                pool.evict_blocks({found[0].block_id})
                any_found = True
        return any_found

    def of(self, request: Request) -> Sequence[BlockHash]:
        """The hashes at the beginning of a request that it shares with others."""
        hasher = request._block_hasher
        return hasher.shared if isinstance(hasher, _Hasher) else ()

    def count(self, token_count: int) -> int:
        """How many hashes the whole blocks among so many tokens have."""
        return token_count // self._size if self._size else 0

    def _hashes(
        self, request: Request, namespace: bytes, keys: Sequence[bytes], count: int
    ) -> list[BlockHash]:
        """The first `count` hashes. A chunk's key stands for all tokens up to its end, and so for
        its hashes.
        """
        per_chunk = self._chunk_tokens // self._size
        found: list[BlockHash] = []
        for key in keys:
            wanted = min(per_chunk, count - len(found))
            known = self._known.get(key)
            if known is None or wanted < per_chunk:
                known = self._hash_chunk(request, namespace, found, wanted)
            if wanted == per_chunk:
                self._known[key] = known
                self._known.move_to_end(key)
            found += known
        while len(self._known) > MOST_CHUNKS:
            self._known.popitem(last=False)
        return found

    def _hash_chunk(
        self, request: Request, namespace: bytes, before: list[BlockHash], count: int
    ) -> tuple[BlockHash, ...]:
        """The `count` hashes behind those `before`."""
        if namespace not in self._secrets:
            self._secrets[namespace] = self._credentials.sign(
                "blocks", namespace.hex() + self._epoch
            )
        made: list[BlockHash] = []
        parent = before[-1] if before else None
        for index in range(len(before), len(before) + count):
            tokens = request.all_token_ids[index * self._size : (index + 1) * self._size]
            extra = None if parent else ((_TAG, self._secrets[namespace]),)
            parent = hash_block_tokens(self._hash, parent, tokens, extra)
            made.append(parent)
        return tuple(made)


@dataclass(frozen=True, slots=True)
class _Hasher:
    """Takes the place of vLLM's hasher of one request. `private` is that hasher, and `before` are
    the hashes that it made.
    """

    function: HashFunction
    size: int
    shared: list[BlockHash]
    private: Callable[[Request], list[BlockHash]]
    before: list[BlockHash]

    def __call__(self, request: Request) -> list[BlockHash]:
        """The hashes of the request's whole blocks that have none yet."""
        done = request.block_hashes
        made = self.shared[len(done) :]
        first = len(self.shared)
        index = len(done) + len(made)
        while (end := (index + 1) * self.size) <= request.num_tokens:
            start = index * self.size
            extra, _ = generate_block_hash_extra_keys(request, start, end, 0)
            if index == first and request.cache_salt:
                extra = (*(extra or ()), ("cache_salt", request.cache_salt))
            parent = made[-1] if made else done[-1]
            tokens = request.all_token_ids[start:end]
            made.append(hash_block_tokens(self.function, parent, tokens, extra))
            index += 1
        return made
