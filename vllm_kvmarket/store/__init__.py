"""Published KV in its tiers: a stored chunk is bit-exact, or an error."""

from vllm_kvmarket.store.chunk_format import ChunkHeader, ChunkLayout, LayerLayout
from vllm_kvmarket.store.chunk_reader import StoredChunk, aligned_empty, open_chunk
from vllm_kvmarket.store.disk import CHUNKS_FOLDER, DiskStore
from vllm_kvmarket.store.object_tier import ObjectTier
from vllm_kvmarket.store.tiers import Tiers

__all__ = [
    "CHUNKS_FOLDER",
    "ChunkHeader",
    "ChunkLayout",
    "DiskStore",
    "LayerLayout",
    "ObjectTier",
    "StoredChunk",
    "Tiers",
    "aligned_empty",
    "open_chunk",
]
