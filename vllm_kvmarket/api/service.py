"""What the routes work with: one market, its keys, and the engine behind this server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer

from vllm_kvmarket.api.auth import Caller, address_of
from vllm_kvmarket.api.bodies import Scope
from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.api.rate_limits import READS, WRITES, Limiter
from vllm_kvmarket.api.sessions import Sessions
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.market.market import Market

if TYPE_CHECKING:
    from vllm_kvmarket.api.publication_queue import Publications

# Where the gate leaves the caller for the market's own routes.
CALLER = "kvmarket.caller"
Messages = Sequence[dict[str, Any]]
Result = TypeVar("Result")


class Frontend(Protocol):
    """The engine as the API server sees it; methods take as long as the text is long."""

    context_tokens: int
    block_tokens: int
    vocabulary_tokens: int
    namespace: bytes

    def document(
        self, text: str | None, messages: Messages | None, as_: Literal["text", "chat"]
    ) -> list[int]:
        """The tokens under which a document is published."""

    def prompt(self, text: str | None, messages: Messages | None) -> list[int]:
        """The tokens of a completion's prompt, or of a chat."""

    async def operate(self, tokens: Sequence[int], wish: dict[str, Any]) -> dict[str, Any]:
        """Run a prompt with a wish of the operator; what the connector answers."""


@dataclass(slots=True)
class Service:
    """One server's market; `frontend` and `publications` are None where there is no engine."""

    market: Market
    keys: Keys
    info: dict[str, Any]
    frontend: Frontend | None = None
    publications: Publications | None = None
    # One text at a time, so that a long one takes no more than a core.
    tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="kvmarket-tokenize")
    )
    reads: Limiter = field(default_factory=lambda: Limiter(READS))
    writes: Limiter = field(default_factory=lambda: Limiter(WRITES))
    sessions: Sessions = field(default_factory=Sessions)

    @property
    def anonymous_may_read(self) -> bool:
        """Whether requests without a key are answered."""
        return self.market.config.anonymous == "allow"

    def count(self, scope: Scope, caller: Caller) -> None:
        """Count a request of the market's own routes. Raises ApiError for one too many."""
        limiter = self.reads if scope["method"] in ("GET", "HEAD") else self.writes
        limiter.count(f"account:{caller.account}" if caller.account else address_of(scope))

    async def tokenize(self, step: Callable[..., Result], *args: Any) -> Result:
        """Run a step of the frontend that tokenises, beside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.tokenizing, step, *args)


def service_of(request: Request) -> Service:
    """The server's market. Raises ApiError on a server without one."""
    service: Service | None = getattr(request.app.state, "kvmarket_service", None)
    if service is None:
        raise ApiError(404, "no_market", "this server was started without --kv-connector kvmarket")
    return service


ServiceOf = Annotated[Service, Depends(service_of)]
_BEARER = HTTPBearer(auto_error=False, description="An API key of the market, `kvm_...`")
_KEY_HEADER = APIKeyHeader(name="x-api-key", auto_error=False, description="The same")


async def caller_of(
    request: Request,
    service: ServiceOf,
    _bearer: Annotated[Any, Depends(_BEARER)],
    _key: Annotated[str | None, Depends(_KEY_HEADER)],
) -> Caller:
    """The caller, whom the gate has checked; counts the request. Raises ApiError."""
    caller = request.scope.get(CALLER)
    if not isinstance(caller, Caller):
        raise ApiError(503, "market_unavailable", "there is no gate in front of this server")
    service.count(request.scope, caller)
    return caller


CallerOf = Annotated[Caller, Depends(caller_of)]
