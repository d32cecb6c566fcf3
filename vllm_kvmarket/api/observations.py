"""What the gate sees of requests: how long they waited for their first token, and how much of their
prompts was reused. In memory, of this process, and bounded: for the provider's page.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

MOST_REQUESTS = 4096
# The usage stands at a body's end; longer ones are not looked through.
TAIL_BYTES = 1 << 16
# What answers say of their prompts, in OpenAI's words, Anthropic's and ours. In generated text the
# quotes have backslashes before them.
_FIGURES = re.compile(
    rb'(?<!\\)"(prompt_tokens|input_tokens|cached_tokens|cache_read_input_tokens'
    rb'|reused_tokens|computed_tokens|tokens_reused|tokens_computed)":\s*(\d{1,12})'
)


@dataclass(frozen=True, slots=True)
class Observation:
    """One request that was answered.

    `first_s` is the time from the gate to the first piece of its answer: of a stream,
    the first token; else the whole answer. Tokens are the prompt's, None where the answer does not
    say; `reused_tokens` were charged for as reused, `cached_tokens` were not computed.
    """

    at_s: float
    first_s: float
    is_stream: bool
    prompt_tokens: int | None
    reused_tokens: int
    cached_tokens: int


class Observations:
    """The newest requests; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: deque[Observation] = deque(maxlen=MOST_REQUESTS)

    def add(self, seen: Observation) -> None:
        """Remember a request; mutates."""
        with self._lock:
            self._newest.append(seen)

    def newest(self) -> list[Observation]:
        """What is remembered, oldest first."""
        with self._lock:
            return list(self._newest)

    def watch(self, send: Send) -> Watcher:
        """An ASGI send that passes everything on as it comes, and remembers what it saw."""
        return Watcher(send, self)


class Watcher:
    """See Observations.watch; whoever made it calls `finish` in the end."""

    def __init__(self, send: Send, observations: Observations) -> None:
        self._send = send
        self._observations = observations
        self._began_s = time.monotonic()
        self._first_s: float | None = None
        self._status = 0
        self._is_stream = False
        self._figures: dict[bytes, int] = {}

    async def __call__(self, message: Message) -> None:
        """ASGI's send."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._is_stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
        body = message.get("body", b"")
        if body and self._first_s is None:
            self._first_s = time.monotonic() - self._began_s
        await self._send(message)
        if body and self._status == 200:
            self._look(body)

    def finish(self) -> None:
        """Remember the request if it was answered, also one whose client left the moment it had its
        answer, as OpenAI's do at a stream's [DONE].
        """
        if self._status == 200 and self._first_s is not None:
            self._observations.add(self._seen(self._first_s))

    def _look(self, body: bytes) -> None:
        tail = body[-TAIL_BYTES:]
        if b"_tokens" in tail or b'"tokens_' in tail:
            self._figures |= {name: int(count) for name, count in _FIGURES.findall(tail)}

    def _seen(self, first_s: float) -> Observation:
        told = self._figures
        # An answer's own object says it one way, a receipt behind a stream the other.
        reused = told.get(b"reused_tokens", told.get(b"tokens_reused", 0))
        computed = told.get(b"computed_tokens", told.get(b"tokens_computed"))
        prompt = told.get(b"prompt_tokens")
        read = told.get(b"cache_read_input_tokens")
        cached = read or told.get(b"cached_tokens", 0)
        if computed is not None:
            prompt = reused + computed
        elif prompt is None and b"input_tokens" in told:
            # Anthropic's leaves out what was read from a cache.
            prompt = told[b"input_tokens"] + (read or 0)
        return Observation(
            at_s=time.time(),
            first_s=first_s,
            is_stream=self._is_stream,
            prompt_tokens=prompt,
            reused_tokens=reused,
            cached_tokens=max(cached, reused),
        )
