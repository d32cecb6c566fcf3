"""Calls to an object store, with deadlines, retries and clear errors.

obstore's calls are awaited on an event loop in their own thread. There they can be cancelled; a
thread that is blocked in a call could not be stopped.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
import obstore.exceptions
import obstore.store

from vllm_kvmarket.core.errors import ConfigError, StoreError

T = TypeVar("T")
# Options of obstore's HTTP client; all others are options of one kind of store.
_CLIENT_OPTIONS = frozenset({
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "default_content_type",
    "http1_only",
    "http2_keep_alive_interval",
    "http2_keep_alive_timeout",
    "http2_keep_alive_while_idle",
    "http2_only",
    "pool_idle_timeout",
    "pool_max_idle_per_host",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "randomize_addresses",
    "read_timeout",
    "root_certificate",
    "timeout",
    "user_agent",
})  # fmt: skip
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0
_ONE_ATTEMPT = 1 / 3  # of the deadline: then a hanging request is tried once more
_FIRST_BACKOFF_S = 0.05
_LONGEST_BACKOFF_S = 1.0
_LOOP_GRACE_S = 1.0
_STATUS = re.compile(r"status code: (\d{3})")
_MAY_PASS = frozenset({408, 425, 429})
_FORBIDDEN = frozenset({401, 403})
_QUERY = re.compile(r"\?\S+")
_MAX_REASON = 200

# obstore's threads do not exist in a fork of the process that started them.
_first_user: int | None = None


def connect(url: str, options: Mapping[str, str], timeout_s: float) -> Any:
    """Make obstore's store for a URL; nothing is sent. Raises ConfigError."""
    client = {key: value for key, value in options.items() if key in _CLIENT_OPTIONS}
    config = {key: value for key, value in options.items() if key not in _CLIENT_OPTIONS}
    scheme = urlsplit(url).scheme
    try:
        if scheme in ("file", "memory"):
            if options:
                raise ValueError(f"{scheme}:// takes no options")
            if scheme == "memory":
                return obstore.store.MemoryStore()
            folder = local_root(url)
            if folder is None or not folder.is_absolute():
                raise ValueError("file:// takes a folder's whole path")
            return obstore.store.LocalStore(folder, mkdir=True)
        patience = {"timeout": f"{timeout_s * 10:.0f}s", "connect_timeout": f"{timeout_s:.3f}s"}
        # We count and space the attempts ourselves.
        once = {"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)}
        # Its types differ for each kind of store, and only the URL says which one this is.
        from_url: Any = obstore.store.from_url
        return from_url(
            url,
            config=config or None,
            client_options={**patience, **client},
            retry_config=once,
        )
    except obstore.exceptions.UnknownConfigurationKeyError as error:
        raise ConfigError(
            f"object_store_options: {_reason(error)} See obstore's documentation for its options"
        ) from None
    except (obstore.exceptions.BaseError, ValueError, OSError) as error:
        raise ConfigError(
            f"object_store_url: {url} with these options cannot be used ({_reason(error)}); "
            "expected for example s3://bucket/prefix, gs://, az:// or file:///folder"
        ) from None


def local_root(url: str) -> Path | None:
    """The folder of a file:// URL; None for others."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


class Breaker:
    """A circuit breaker: a dead store costs one deadline, not one for each chunk; thread-safe.

    After a call without an answer, no call is made for a while. Then one is made as a probe; when
    it gets no answer either, the next pause is twice as long.
    """

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._until_s = 0.0
        self._probing = False
        self._lock = threading.Lock()

    def enter(self) -> float:
        """Ask to make a call; returns the seconds to wait first, 0 when it may be made.

        After 0 the caller must call `answered` or `failed`.
        """
        with self._lock:
            if self._pause_s == 0.0:
                return 0.0
            left = self._until_s - time.monotonic()
            if left > 0:
                return left
            if self._probing:
                return self._pause_s
            self._probing = True
            return 0.0

    def answered(self) -> None:
        """The store answered a call, perhaps with a refusal."""
        with self._lock:
            self._pause_s = 0.0
            self._probing = False

    def failed(self) -> None:
        """The store did not answer a call."""
        with self._lock:
            now_s = time.monotonic()
            # Calls that run together fail together; they make one pause.
            if self._probing or now_s >= self._until_s:
                doubled = min(2 * self._pause_s, LONGEST_PAUSE_S)
                self._pause_s = max(FIRST_PAUSE_S, doubled)
                self._until_s = now_s + self._pause_s
            self._probing = False


class Calls:
    """Runs calls of one object store; thread-safe. At most `at_once` requests run at a time."""

    def __init__(self, url: str, *, timeout_s: float, at_once: int) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._at_once = asyncio.Semaphore(at_once)
        self._breaker = Breaker()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Callable[[], Any] | None = None
        self._closed = False
        self._trouble = ""

    def close(self) -> None:
        """Cancel running calls. May be called twice."""
        with self._lock:
            self._closed = True
            stop, self._stop, self._loop = self._stop, None, None
        if stop is not None:
            stop()

    def run(
        self,
        call: Callable[[], Coroutine[Any, Any, T]],
        what: str,
        *,
        until_s: float | None = None,
        timeout_s: float | None = None,
    ) -> T:
        """Await a call, at most `timeout_s`, and not after `until_s` (time.monotonic()).

        Raises FileNotFoundError when the object is not there; StoreError when the store refuses or
        does not answer; and what else the call raises.
        """
        limit_s = timeout_s or self._timeout_s
        if until_s is not None:
            limit_s = min(limit_s, until_s - time.monotonic())
        loop = self._running_loop()
        put_off_s = self._breaker.enter()
        if put_off_s > 0:
            raise StoreError(
                f"{what}: object store {self._url} did not answer, and is not asked again for "
                f"{put_off_s:.1f} s{self._trouble}; see that it runs"
            )
        has_answered = True
        future = asyncio.run_coroutine_threadsafe(_bounded(call, limit_s), loop)
        try:
            return future.result(max(0.0, limit_s) + _LOOP_GRACE_S)
        except concurrent.futures.CancelledError:
            raise StoreError(f"{what}: the store was closed meanwhile; open it again") from None
        except TimeoutError:
            has_answered = False
            future.cancel()
            how = f"within {max(0.0, limit_s):.1f} s{self._trouble}"
            raise self._unanswered(what, how) from None
        except obstore.exceptions.AlreadyExistsError:
            raise
        except obstore.exceptions.BaseError as error:
            has_answered = not _may_pass(error)
            if has_answered:
                raise self._refused(what, error) from None
            raise self._unanswered(what, f"({_reason(error)})") from None
        finally:
            if has_answered:
                self._breaker.answered()
            else:
                self._breaker.failed()

    async def attempt(self, call: Callable[[], Awaitable[T]], timeout_s: float | None = None) -> T:
        """Repeat a request until the store answers; for calls of `run` that may be repeated.

        A first one that hangs is cancelled after a third of `timeout_s`.
        """
        limit_s: float | None = (timeout_s or self._timeout_s) * _ONE_ATTEMPT
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                async with self._at_once, asyncio.timeout(limit_s):
                    answer = await call()
            except TimeoutError:
                self._trouble = " (a request hung)"
                limit_s = None
            except obstore.exceptions.GenericError as error:
                if not _may_pass(error):
                    raise
                self._trouble = f" ({_reason(error)})"
            else:
                self._trouble = ""
                return answer
            # Requests that failed together must not all come back together.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        global _first_user  # noqa: PLW0603  # obstore's runtime belongs to the process too
        if _first_user is None:
            _first_user = os.getpid()
        if _first_user != os.getpid():
            raise StoreError(
                f"object store {self._url}: the process was forked after it was first used; "
                "set VLLM_WORKER_MULTIPROC_METHOD=spawn"
            )
        with self._lock:
            if self._closed:
                raise StoreError(f"object store {self._url}: the store is closed; open it again")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(
                    target=self._loop.run_forever, name="kvmarket-objects", daemon=True
                )
                thread.start()
                # Runs also when nobody closes it, and before the interpreter ends.
                self._stop = weakref.finalize(self, _stop_loop, self._loop, thread, os.getpid())
            return self._loop

    def _unanswered(self, what: str, how: str) -> StoreError:
        return StoreError(
            f"{what}: object store {self._url} did not answer {how}; "
            "see that it runs and is near enough"
        )

    def _refused(self, what: str, error: Exception) -> StoreError:
        status = _status(error)
        if status in _FORBIDDEN or isinstance(
            error,
            obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError,
        ):
            advice = "check the credentials in its options or in the environment"
        elif status == 404:
            advice = "make the bucket, or check the URL"
        else:
            advice = "check its URL and options"
        return StoreError(f"{what}: object store {self._url} refused ({_reason(error)}); {advice}")


async def _bounded(call: Callable[[], Coroutine[Any, Any, T]], limit_s: float) -> T:
    try:
        async with asyncio.timeout(max(0.0, limit_s)):
            return await call()
    except BaseExceptionGroup as group:
        # One of several requests failed, and the others were cancelled.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, owner: int) -> None:
    if os.getpid() != owner:
        # A fork shares the loop's sockets with its parent, which still needs them.
        return

    def stop() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        # Tasks see the cancellation first.
        loop.call_soon(loop.call_soon, loop.stop)

    loop.call_soon_threadsafe(stop)
    thread.join(_LOOP_GRACE_S)
    if not thread.is_alive():
        loop.close()


def _status(error: Exception) -> int | None:
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    is_generic = isinstance(error, obstore.exceptions.GenericError)
    if not is_generic or str(error).startswith(("Generic LocalFileSystem", "Generic InMemory")):
        return False
    status = _status(error)
    return status is None or status >= 500 or status in _MAY_PASS


def _reason(error: Exception) -> str:
    """The message of obstore as one line, without an XML document and without a signed query."""
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    text = _QUERY.sub("", text.partition("\n")[0].partition(": <?xml")[0]).strip()
    said = text.rpartition(" - ")[2][:_MAX_REASON].rstrip(": ")
    return f"{code[1]}: {said}" if code else said
