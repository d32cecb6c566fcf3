"""The service behind all routes: one market, its keys, and the engine of this server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer

from vllm_kvmarket.api.auth import (
    READS,
    WRITES,
    Caller,
    KeyChecker,
    Limiter,
    Queue,
    counted_as,
    key_in,
    sender_address,
    wrong_key,
)
from vllm_kvmarket.api.bodies import MOST_ITEMS, Scope
from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.api.sessions import Sessions
from vllm_kvmarket.auth.admin_log import AdminLog
from vllm_kvmarket.auth.api_keys import Keys
from vllm_kvmarket.auth.api_servers import ApiServers
from vllm_kvmarket.market.market import Market

if TYPE_CHECKING:
    from vllm_kvmarket.api.publication_queue import Publications

# Requests that the gate prepares at the same time; threads and database serve them in turn.
MOST_PREPARED = 2048
# Texts that wait to be tokenised.
MOST_WAITING = 32
# Where the gate leaves the caller for the market's own routes.
CALLER = "kvmarket.caller"
# By its registered name, or by its class with a module path.
_CONNECTORS = ("kvmarket", "KVMarketConnector")
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

    async def reuses(self) -> bool:
        """Whether the engine reuses now what is published for `namespace`."""

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
    gate_queue: Queue = field(default_factory=lambda: Queue(MOST_PREPARED, "the gate"))
    tokenizing_queue: Queue = field(default_factory=lambda: Queue(MOST_WAITING, "the tokenizer"))
    # None for a server that is alone.
    servers: ApiServers | None = None
    reads: Limiter = field(init=False)
    writes: Limiter = field(init=False)
    admin_log: AdminLog = field(init=False)
    key_checker: KeyChecker = field(init=False)
    sessions: Sessions = field(init=False)

    def __post_init__(self) -> None:
        self.admin_log = AdminLog(self.market.database)
        self.reads = Limiter(READS, server_count=self._server_count)
        self.writes = Limiter(WRITES, server_count=self._server_count)
        self.key_checker = KeyChecker(self.keys, self._server_count)
        self.sessions = Sessions(self.market.credentials, self.keys)

    def _server_count(self) -> int:
        return self.servers.count if self.servers else 1

    @property
    def anonymous_may_read(self) -> bool:
        """Whether requests without a key are answered."""
        return self.market.config.anonymous == "allow"

    @property
    def most_items(self) -> int:
        """How many values a body may have: tokens, mostly."""
        return max(MOST_ITEMS, 2 * self.frontend.context_tokens) if self.frontend else MOST_ITEMS

    def address_of(self, scope: Scope) -> str:
        """The network address of a request's sender."""
        return sender_address(scope, self.market.config.trusted_proxies)

    async def authenticate(self, scope: Scope) -> Caller:
        """Find and check the key of a request. Raises ApiError and KeysUnavailableError."""
        secret = key_in(scope)
        if secret is None:
            return Caller(anonymous_may_read=self.anonymous_may_read)
        principal = await self.key_checker.check(secret, self.address_of(scope))
        if principal is None:
            raise wrong_key()
        return Caller.of_key(principal)

    def count(self, scope: Scope, caller: Caller) -> None:
        """Count a request of the market's own routes. Raises ApiError for one too many."""
        limiter = self.reads if scope["method"] in ("GET", "HEAD") else self.writes
        sender = caller.account and f"account:{caller.account}"
        limiter.count(sender or counted_as(self.address_of(scope)))

    async def tokenize(self, step: Callable[..., Result], *args: Any) -> Result:
        """Run a step of the frontend that tokenises, beside the event loop. Raises ApiError."""
        loop = asyncio.get_running_loop()
        with self.tokenizing_queue.place():
            return await loop.run_in_executor(self.tokenizing, step, *args)

    def record(self, caller: Caller, action: str, details: Mapping[str, Any]) -> None:
        """Write what an administrator is about to change; nothing for another caller. Blocks."""
        if caller.is_admin:
            self.admin_log.record(str(caller.key_id), action, details)


def market_settings(transfer: Any) -> Mapping[str, Any] | None:
    """The market's configuration in an engine's transfer configuration; None without a market.

    It may stand inside a MultiConnector's, or name the connector's class.
    """
    if transfer is None:
        return None
    settings: Mapping[str, Any] = transfer.kv_connector_extra_config or {}
    if transfer.kv_connector in _CONNECTORS:
        return settings
    for each in settings.get("connectors") or ():
        if isinstance(each, Mapping) and each.get("kv_connector") in _CONNECTORS:
            inner: Mapping[str, Any] = each.get("kv_connector_extra_config") or {}
            return inner
    return None


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
    _service: ServiceOf,
    _bearer: Annotated[Any, Depends(_BEARER)],
    _key: Annotated[str | None, Depends(_KEY_HEADER)],
) -> Caller:
    """The caller, whom the gate has checked. Raises ApiError if there is no gate."""
    caller = request.scope.get(CALLER)
    if not isinstance(caller, Caller):
        raise ApiError(503, "market_unavailable", "there is no gate in front of this server")
    return caller


CallerOf = Annotated[Caller, Depends(caller_of)]
