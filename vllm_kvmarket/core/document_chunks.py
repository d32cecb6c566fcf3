"""A document cut into chunks: hashed once, then used by connector, catalogue and bundles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import msgspec

from vllm_kvmarket.core import model_identity
from vllm_kvmarket.core.model_identity import (
    CHUNK_TOKENS,
    ROOT,
    TOKEN_BYTES,
    pack_tokens,
)


class DocumentChunks(msgspec.Struct, frozen=True):
    """The key and the packed tokens of each chunk, in order; only the last one may be shorter."""

    namespace: bytes
    keys: tuple[bytes, ...]
    tokens: tuple[bytes, ...]
    token_count: int

    @classmethod
    def of(
        cls, namespace: bytes, token_ids: Sequence[int], chunk_tokens: int = CHUNK_TOKENS
    ) -> Self:
        """Cut and hash a document. Raises ValueError for what is no token id."""
        packed = pack_tokens(token_ids)
        width = chunk_tokens * TOKEN_BYTES
        tokens = tuple(packed[start : start + width] for start in range(0, len(packed), width))
        keys = model_identity.keys_of(namespace, tokens)
        return cls(namespace, tuple(keys), tokens, len(token_ids))

    @property
    def document_id(self) -> str:
        """The document's id. An empty document has none: IndexError."""
        return model_identity.document_id(self.keys[-1])

    @property
    def parents(self) -> tuple[bytes, ...]:
        """The key of the chunk before each, ROOT before the first."""
        return (ROOT, *self.keys[:-1])
