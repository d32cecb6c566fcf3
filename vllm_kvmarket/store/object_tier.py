"""The object tier: chunk files in a bucket, through obstore.

Every call has one deadline over all its attempts. A call without an answer raises StoreError and
opens a circuit breaker: for a few seconds every further call fails at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import obstore
import obstore.exceptions

from vllm_kvmarket.core.durable_files import sync_path
from vllm_kvmarket.core.errors import StoreError
from vllm_kvmarket.store.chunk_format import Share, chunk_name, share_of
from vllm_kvmarket.store.object_client import Calls, connect, local_root

# Bytes of one request of a download: so many that a round trip does not count.
PART_BYTES = 4 << 20
# A larger upload is cut into parts, which the bucket joins.
_SINGLE_PUT_BYTES = 32 << 20
# An upload may take longer on a slow line: no request waits for it.
_SLOWEST_UPLOAD_BYTES_PER_S = 1 << 20
# For listings and the like: a writer to the bucket must not fill our memory.
MAX_DOCUMENT_BYTES = 64 << 20
_LISTED_AT_ONCE = 1000
# Objects that can be deleted before the deadline of one call.
_DELETED_IN_TIME = 100


class ObjectReplacedError(StoreError):
    """The object was replaced while it was read; read it again."""


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """An object's name, bytes and version.

    `version` is the ETag: equal for equal content, and as a rule different for other content; None
    when the bucket has none.
    """

    name: str
    size: int
    version: str | None


class ObjectTier:
    """Objects below one URL; thread-safe. The first call connects, not the constructor.

    `threads`: the most requests at once. Every method raises StoreError when the store refuses or
    does not answer. Methods with `until_s`, a value of time.monotonic(), end by then; the others
    within `timeout_s`; an upload may take a second more for each MiB.

    After it was used, a fork of the process must not use it.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, str] | None = None,
        *,
        timeout_s: float = 10.0,
        threads: int = 4,
    ) -> None:
        """`options` are obstore's. Raises ConfigError for a wrong URL or option."""
        self.url = url
        self.timeout_s = timeout_s
        self._threads = threads
        self._store = connect(url, options or {}, timeout_s)
        self._root = local_root(url)
        self._calls = Calls(url, timeout_s=timeout_s, at_once=threads)

    def close(self) -> None:
        """Cancel running calls; their callers get a StoreError. May be called twice."""
        self._calls.close()

    # Chunks

    def upload(self, name: str, path: Path) -> int:
        """Store a file durably under `name`, and replace what was there; returns its bytes.

        Raises FileNotFoundError when there is no such file.
        """
        content = path.read_bytes()
        self.put_bytes(name, content)
        return len(content)

    def download(
        self,
        name: str,
        descriptor: int,
        size: int,
        *,
        version: str | None = None,
        until_s: float | None = None,
    ) -> None:
        """Write an object of `size` bytes to a file, from its start, several ranges at once.

        Only the size is verified. With `version`, an object that was replaced raises
        ObjectReplacedError. After an error the file's content is undefined.
        """
        ranges = [
            (start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)
        ] or [(0, 0)]

        async def fetch_all() -> None:
            # A duplicate: late data must not go to the file that the caller opens next under the
            # same number.
            own = os.dup(descriptor)
            try:
                async with asyncio.TaskGroup() as tasks:
                    for start, stop in ranges:
                        tasks.create_task(self._fetch(name, own, start, stop, size, version))
            finally:
                os.close(own)

        try:
            self._calls.run(fetch_all, name, until_s=until_s)
        except FileNotFoundError:
            raise ObjectReplacedError(f"{name}: deleted while it was read; try again") from None

    async def _fetch(  # noqa: PLR0917  # ruff counts the instance
        self, name: str, descriptor: int, start: int, stop: int, size: int, version: str | None
    ) -> None:
        options: dict[str, Any] = {} if version is None else {"if_match": version}
        if stop > start:
            options["range"] = (start, stop)

        async def get() -> Any:
            answer = await obstore.get_async(self._store, name, options=cast("Any", options))
            if answer.meta["size"] != size:
                return None
            return await answer.bytes_async()

        try:
            content = await self._calls.attempt(get)
        except obstore.exceptions.PreconditionError:
            content = None
        if content is None or len(content) != stop - start:
            raise ObjectReplacedError(f"{name}: replaced while it was read; try again")
        view = memoryview(content)
        while view.nbytes:
            done = os.pwrite(descriptor, view, start)
            view, start = view[done:], start + done

    def facts(self, name: str, *, until_s: float | None = None) -> ObjectFacts | None:
        """An object's facts; None when there is no object."""
        try:
            found = self._run(lambda: obstore.head_async(self._store, name), name, until_s=until_s)
        except FileNotFoundError:
            return None
        return _facts(found)

    def head(self, name: str) -> int | None:
        """An object's size in bytes; None when there is none."""
        facts = self.facts(name)
        return None if facts is None else facts.size

    def files(self, key: bytes) -> list[Share]:
        """What each object of a chunk is, in order."""
        folder, _, name = chunk_name(key).partition("/")
        stem = name[: 2 * len(key)]
        found = []
        # Names of shares follow the stem. A folder is not listed in order.
        for facts in self.entries(folder, after=f"{folder}/{stem}"):
            if stem in facts.name:
                found.append(share_of(facts.name.rpartition("/")[2]))
            elif self._root is None:
                break
        return sorted(share for share in found if share is not None)

    # Anything

    def get_bytes(self, name: str) -> bytes | None:
        """A small document; None when there is none."""

        async def get() -> bytes | None:
            answer = await obstore.get_async(self._store, name)
            if answer.meta["size"] > MAX_DOCUMENT_BYTES:
                return None
            return bytes(await answer.bytes_async())

        try:
            content: bytes | None = self._run(get, name)
        except FileNotFoundError:
            return None
        if content is None:
            raise StoreError(
                f"{name}: more than {MAX_DOCUMENT_BYTES} bytes, too many for a document; "
                "delete the object"
            )
        return content

    def delete(self, *names: str) -> None:
        """Remove objects, if they are there."""

        async def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                await self._calls.attempt(lambda: obstore.delete_async(self._store, name))

        async def remove_all() -> None:
            async with asyncio.TaskGroup() as tasks:
                for name in names:
                    tasks.create_task(remove(name))

        if names:
            patience_s = self.timeout_s * (1 + len(names) // _DELETED_IN_TIME)
            self._calls.run(remove_all, names[0], timeout_s=patience_s)

    def names(self, prefix: str = "") -> Iterator[str]:
        """Names of all objects below a folder, "" for all; in no order."""
        return (facts.name for facts in self.entries(prefix))

    def entries(self, prefix: str = "", *, after: str | None = None) -> Iterator[ObjectFacts]:
        """The facts of all objects below a folder; with `after`, only of names after it.

        Each thousand of them has its own deadline.
        """

        async def begin() -> tuple[Any, Any]:
            stream = obstore.list(
                self._store, prefix or None, offset=after, chunk_size=_LISTED_AT_ONCE
            )
            batches = aiter(stream)
            return batches, await anext(batches, None)

        batches, batch = self._run(begin, prefix or "/")
        while batch is not None:
            yield from (_facts(found) for found in batch)
            # Cannot be repeated: it may continue where it failed, or after that.
            batch = self._calls.run(lambda: anext(batches, None), prefix or "/")

    def put_new(self, name: str, content: bytes) -> None:
        """Store bytes durably unless something is there already.

        Not every store can tell: then of two writers of one moment the later one replaces.
        """
        if self.facts(name) is not None:
            return
        put = lambda: obstore.put_async(self._store, name, content, mode="create")  # noqa: E731
        try:
            # Not repeated: the second attempt would find what the first has stored.
            self._calls.run(put, name)
        except obstore.exceptions.AlreadyExistsError:
            return
        except StoreError:
            # Some stores do not know conditional requests.
            if self.facts(name) is not None:
                return
            self.put_bytes(name, content)
        if self._root is not None:
            _sync_to_disk(self._root, self._root / name)

    def put_bytes(self, name: str, content: bytes) -> None:
        """Store bytes durably, and replace what was there."""
        put = lambda: obstore.put_async(  # noqa: E731
            self._store,
            name,
            content,
            use_multipart=len(content) > _SINGLE_PUT_BYTES,
            chunk_size=_SINGLE_PUT_BYTES // 2,
            max_concurrency=self._threads,
        )
        patience_s = self.timeout_s + len(content) / _SLOWEST_UPLOAD_BYTES_PER_S
        try:
            self._run(put, name, timeout_s=patience_s)
        except FileNotFoundError as error:
            raise StoreError(
                f"{name}: cannot be stored in {self.url}, which is not there; make the bucket"
            ) from error
        if self._root is not None:
            _sync_to_disk(self._root, self._root / name)

    def _run(
        self,
        call: Callable[[], Awaitable[Any]],
        what: str,
        *,
        until_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        return self._calls.run(
            lambda: self._calls.attempt(call, timeout_s),
            what,
            until_s=until_s,
            timeout_s=timeout_s,
        )


def _facts(found: Any) -> ObjectFacts:
    return ObjectFacts(found["path"], found["size"], found["e_tag"])


def _sync_to_disk(root: Path, file: Path) -> None:
    """Make a file below a folder durable, as obstore does not. Raises StoreError."""
    try:
        for path in itertools.takewhile(lambda path: path != root.parent, (file, *file.parents)):
            sync_path(path)
    except OSError as error:
        raise StoreError(f"{file}: cannot be made durable ({error.strerror})") from error
