"""A chunk that can be had again when its file turns out to be damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from vllm_kvmarket.core.errors import ChunkDamagedError
from vllm_kvmarket.store.chunk_format import Bytes
from vllm_kvmarket.store.chunk_reader import StoredChunk
from vllm_kvmarket.store.layout import ChunkHeader

T = TypeVar("T")


class MirroredChunk:
    """An open chunk whose file is a copy of an object; it is used like a StoredChunk.

    When the file turns out to be damaged, it is quarantined, fetched again, and read again.
    """

    def __init__(
        self, chunk: StoredChunk, replace: Callable[[ChunkDamagedError], StoredChunk]
    ) -> None:
        self._chunk = chunk
        self._replace = replace

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def header(self) -> ChunkHeader:
        """What the chunk says of itself."""
        return self._chunk.header

    def close(self) -> None:
        """Give the file back; may be called twice."""
        self._chunk.close()

    def layer(self, index: int) -> Bytes:
        """See StoredChunk.layer; also raises what fetching raises."""
        return self._read(lambda chunk: chunk.layer(index))

    def copy_pages(
        self, index: int, first_page: int, last_page: int, destination: Sequence[Bytes]
    ) -> None:
        """See StoredChunk.copy_pages; also raises what fetching raises."""
        self._read(lambda chunk: chunk.copy_pages(index, first_page, last_page, destination))

    def copy_all_pages(
        self, first_page: int, last_page: int, destinations: Sequence[Sequence[Bytes]]
    ) -> None:
        """See StoredChunk.copy_all_pages; also raises what fetching raises."""
        self._read(lambda chunk: chunk.copy_all_pages(first_page, last_page, destinations))

    def verify(self) -> None:
        """Check every byte. Raises ChunkDamagedError when the object is damaged too."""
        self._read(StoredChunk.verify)

    def _read(self, read: Callable[[StoredChunk], T]) -> T:
        try:
            return read(self._chunk)
        except ChunkDamagedError as error:
            self._chunk.close()
            self._chunk = self._replace(error)
        return read(self._chunk)
