"""Clients that buy: completions and chats, whole and streamed, many of which leave on the way."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from benchmarks.soak_parts.documents import Document, Library, random_text, random_tokens
from benchmarks.soak_parts.plan import CONTEXT, MODEL_NAME, Asked, Story
from benchmarks.soak_parts.server import Soaked

# Longer than any pause, queue and answer together; what takes longer hangs.
ANSWERS_WITHIN_S = 180.0
REFUSALS = {402: "refused: 402", 404: "refused: 404"}
ACCOUNTS = ("alice", "alice", "bob", "bob", "carol", "dave", None)


class Client:
    """One client; asks one thing after another until it is stopped."""

    def __init__(
        self, server: Soaked, library: Library, story: Story, http: httpx.AsyncClient, name: str
    ) -> None:
        self._server = server
        self._library = library
        self._story = story
        self._http = http
        self._name = name
        self._rng = random.Random(f"{name} {server.plan.seed}")
        self._count = 0
        self._shapes: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "whole": (20, self._whole),
            "stream": (16, self._stream),
            "long stream": (10, self._long_stream),
            "stream left": (12, self._stream_left),
            "whole left": (8, self._whole_left),
            "several choices": (6, self._several_choices),
            "by id": (8, self._by_id),
            "required": (6, self._required),
            "bounded price": (6, self._bounded_price),
            "never": (5, self._never),
            "nothing matches": (6, self._nothing_matches),
            "sent twice": (5, self._sent_twice),
            "chat": (10, self._chat),
        }

    async def run(self, stopping: asyncio.Event) -> None:
        """Ask until `stopping`."""
        names = list(self._shapes)
        weights = [weight for weight, _ in self._shapes.values()]
        while not stopping.is_set():
            (shape,) = self._rng.choices(names, weights)
            await self._shapes[shape][1]()
            self._story.counts[f"asked: {shape}"] += 1

    # Shapes

    async def _whole(self) -> None:
        await self._send(self._new("whole"))

    async def _stream(self) -> None:
        await self._send(self._new("stream", streamed=True))

    async def _long_stream(self) -> None:
        # What grows is what vLLM preempts.
        longest = self._rng.randrange(150, 450)
        await self._send(self._new("long stream", streamed=True, max_tokens=longest))

    async def _stream_left(self) -> None:
        asked = self._new("stream left", streamed=True, max_tokens=self._rng.randrange(100, 300))
        await self._send(asked, leave_after_events=self._rng.choice((0, 1, 1, 2, 5, 20)))

    async def _whole_left(self) -> None:
        asked = self._new("whole left", max_tokens=self._rng.randrange(60, 300))
        await self._send(asked, leave_after_s=self._rng.uniform(0.0, 2.0))

    async def _several_choices(self) -> None:
        asked = self._new("several choices", greedy=False)
        await self._send(asked, n=self._rng.choice((2, 3)))

    async def _by_id(self) -> None:
        document = self._document()
        if not document.id:
            await self._whole()
            return
        question = random_tokens(self._rng, self._rng.randrange(3, 40))
        asked = self._new("by id", document=document, prompt=[*document.tokens, *question])
        if asked.account is None:
            asked.account = "alice"
        # A buyer by id does not learn the document's tokens.
        seen = {"return_token_ids": False, "return_tokens_as_token_ids": True, "logprobs": 1}
        await self._send(asked, prompt=question, kvmarket={"document": document.id}, **seen)

    async def _required(self) -> None:
        asked = self._new("required", reuse="require")
        asked.account = asked.account or "bob"
        await self._send(asked)

    async def _bounded_price(self) -> None:
        asked = self._new("bounded price")
        # From a fiftieth of what reuse costs by the tariff up to twice that.
        asked.max_price_nano = int(len(asked.prompt) * 500 * self._rng.uniform(0.02, 2))
        await self._send(asked)

    async def _never(self) -> None:
        await self._send(self._new("never", reuse="never"))

    async def _nothing_matches(self) -> None:
        prompt = random_tokens(self._rng, self._rng.randrange(20, 700))
        await self._send(self._new("nothing matches", prompt=prompt))

    async def _sent_twice(self) -> None:
        asked = self._new("sent twice", max_tokens=8)
        again = Asked(
            asked.id, "sent twice", asked.account, asked.route, asked.prompt, asked.max_tokens
        )
        await self._send(asked)
        await self._send(again)

    async def _chat(self) -> None:
        texts = [each for each in self._library.documents if each.text]
        texts = [each for each in texts if each.id in self._story.on_offer] or texts
        text = self._rng.choice(texts).text if texts else random_text(self._rng, 100)
        question = random_text(self._rng, self._rng.randrange(3, 12))
        asked = self._new("chat", prompt=[], streamed=self._rng.random() < 0.5)
        asked.route = "chat/completions"
        await self._send(asked, messages=[{"role": "user", "content": f"{text}\n\n{question}"}])

    def _document(self) -> Document:
        """Mostly one that is on offer."""
        while True:
            offered = self._rng.random() < 0.85
            document = self._library.pick(self._rng, self._story.on_offer if offered else None)
            if document.tokens:
                return document

    def _new(
        self,
        shape: str,
        *,
        document: Document | None = None,
        prompt: list[int] | None = None,
        max_tokens: int | None = None,
        **more: Any,
    ) -> Asked:
        """A completion of a document, or of its beginning, and a question."""
        self._count += 1
        rng = self._rng
        if prompt is None:
            tokens = (document or self._document()).tokens
            end = (
                len(tokens) if rng.random() < 0.8 else rng.randrange(len(tokens) // 2, len(tokens))
            )
            prompt = [*tokens[:end], *random_tokens(rng, rng.randrange(1, 60))]
        return Asked(
            id=f"{self._name}-{self._count}",
            shape=shape,
            account=rng.choice(ACCOUNTS),
            route="completions",
            prompt=prompt,
            max_tokens=min(max_tokens or rng.randrange(4, 40), CONTEXT - len(prompt) - 1),
            **more,
        )

    # HTTP

    async def _send(
        self,
        asked: Asked,
        *,
        leave_after_events: int | None = None,
        leave_after_s: float | None = None,
        **body: Any,
    ) -> None:
        """Send a request and note what came of it; never raises for what a server can answer."""
        self._story.asked.append(asked)
        headers = {"x-request-id": asked.id}
        if asked.shape == "sent twice":  # a retry, which is the same purchase
            headers["idempotency-key"] = asked.id
        if asked.account is not None:
            headers["authorization"] = f"Bearer {self._server.keys[asked.account]}"
        url = f"{self._server.base}/v1/{asked.route}"
        sent = {**_body(asked), **body}
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                if asked.streamed:
                    await self._read_stream(asked, url, headers, sent, leave_after_events)
                elif leave_after_s is not None:
                    await self._leave(asked, url, headers, sent, leave_after_s)
                else:
                    response = await self._http.post(url, json=sent, headers=headers)
                    _take(asked, response.status_code, response.content)
        except TimeoutError:
            asked.outcome, asked.error = "broken", f"no whole answer in {ANSWERS_WITHIN_S:.0f} s"
        except (httpx.HTTPError, ValueError, KeyError) as error:
            asked.outcome, asked.error = "broken", repr(error)
        if asked.outcome == "broken":
            self._story.fail(f"request {asked.id} ({asked.shape}): {asked.error}")
        refused = asked.outcome == "refused"
        self._story.counts[f"refused: {asked.status}" if refused else asked.outcome] += 1

    async def _leave(
        self, asked: Asked, url: str, headers: dict[str, str], body: Any, after_s: float
    ) -> None:
        """Wait a while for a whole answer, then close the connection."""
        sending = asyncio.create_task(self._http.post(url, json=body, headers=headers))
        done, _ = await asyncio.wait([sending], timeout=after_s)
        if done:
            response = sending.result()
            _take(asked, response.status_code, response.content)
            return
        sending.cancel()
        await asyncio.wait([sending])
        asked.outcome = "left"

    async def _read_stream(
        self, asked: Asked, url: str, headers: dict[str, str], body: Any, events: int | None
    ) -> None:
        async with self._http.stream("POST", url, json=body, headers=headers) as response:
            if response.status_code != 200:
                _take(asked, response.status_code, await response.aread())
                return
            asked.status, seen, ended = 200, 0, False
            if events == 0:
                asked.outcome = "left"
                return
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                ended = _take_event(asked, line.removeprefix("data:").strip()) or ended
                seen += 1
                if events is not None and seen >= events and not ended:
                    asked.outcome = "left"
                    return
        if not ended:
            raise ValueError("the stream ended before its last event")
        asked.outcome = "answered"


def _body(asked: Asked) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "max_tokens": asked.max_tokens,
        "temperature": 0 if asked.greedy else 1,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if asked.route == "completions":
        body["prompt"] = asked.prompt
    if asked.streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    # Also where it is the default: a key alone buys up to the tariff's price only.
    wish: dict[str, Any] = {"reuse": asked.reuse}
    if asked.max_price_nano is not None:
        wish["max_price_nano"] = asked.max_price_nano
    return body | {"kvmarket": wish}


def _take(asked: Asked, status: int, content: bytes) -> None:
    """Note an answer that came whole; mutates. Raises ValueError for one that should not be."""
    asked.status = status
    if status in REFUSALS:
        asked.outcome = "refused"
        return
    if status != 200:
        raise ValueError(f"HTTP {status}: {content[:300]!r}")
    answer = json.loads(content)
    asked.outcome = "answered"
    asked.tokens = _tokens_of(answer["choices"][0])
    asked.sold = (answer.get("kv_transfer_params") or {}).get("kvmarket") or {}
    _take_usage(asked, answer["usage"])
    _take_prompt(asked, answer)


def _tokens_of(choice: dict[str, Any]) -> list[int]:
    if choice.get("token_ids") is not None:
        return list(choice["token_ids"])
    return [int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"]]


def _take_event(asked: Asked, data: str) -> bool:
    """Note one event of a stream; whether it was the generation's last. Mutates."""
    if data == "[DONE]":
        return True
    event = json.loads(data)
    if event.get("type") == "kvmarket":
        asked.receipts = event["receipts"]
        return False
    if "error" in event:
        raise ValueError(f"an error in the stream: {event['error']}")
    if event.get("usage"):
        _take_usage(asked, event["usage"])
    for choice in event["choices"]:
        asked.tokens += choice.get("token_ids") or []
    _take_prompt(asked, event)
    return False


def _take_usage(asked: Asked, usage: dict[str, Any]) -> None:
    asked.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _take_prompt(asked: Asked, answer: dict[str, Any]) -> None:
    """A chat's prompt is known to the server's template only; a completion's is compared."""
    found = answer.get("prompt_token_ids")
    for choice in answer["choices"]:
        found = found or choice.get("prompt_token_ids")
    if not found:
        return
    if not asked.prompt:
        asked.prompt = list(found)
    elif asked.prompt != list(found):
        raise ValueError("the prompt that was answered is not the one that was sent")
