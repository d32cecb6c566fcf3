"""Published KV on disk: a stored chunk is bit-exact, or an error."""

from vllm_kvmarket.store.disk import CHUNKS_FOLDER, DiskStore
from vllm_kvmarket.store.layout import ChunkHeader, ChunkLayout, LayerLayout
from vllm_kvmarket.store.reader import StoredChunk, aligned_empty, open_chunk

__all__ = [
    "CHUNKS_FOLDER",
    "ChunkHeader",
    "ChunkLayout",
    "DiskStore",
    "LayerLayout",
    "StoredChunk",
    "aligned_empty",
    "open_chunk",
]
