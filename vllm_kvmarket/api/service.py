"""What the routes work with: one market, its keys, and the engine behind this server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import APIKeyHeader, HTTPBearer

from vllm_kvmarket.api.errors import ApiError
from vllm_kvmarket.api.limits import READS, WRITES, Limiter
from vllm_kvmarket.api.observations import Observations
from vllm_kvmarket.api.publishing import Publications
from vllm_kvmarket.api.sessions import Sessions
from vllm_kvmarket.auth.api_keys import PREFIX, Keys, Principal, Scope
from vllm_kvmarket.market.market import Market

ADMIN: Scope = "admin"
PUBLISHER: Scope = "publisher"


class Tokens(Protocol):
    """The engine's own road from text to tokens; methods take as long as the text is."""

    context_tokens: int
    block_tokens: int
    vocabulary_tokens: int
    namespace: bytes

    def document(
        self,
        text: str | None,
        messages: Sequence[dict[str, Any]] | None,
        as_: Literal["text", "chat"],
    ) -> list[int]:
        """The tokens under which a document is published."""

    def prompt(self, text: str | None, messages: Sequence[dict[str, Any]] | None) -> list[int]:
        """The tokens of a completion's prompt, or of a chat."""


@dataclass(slots=True)
class Service:
    """One server's market; `tokens` and `publications` are None where there is no engine."""

    market: Market
    keys: Keys
    info: dict[str, Any]
    tokens: Tokens | None = None
    publications: Publications | None = None
    # Runs a step that tokenises, one at a time and beside the event loop.
    render: Callable[..., Awaitable[Any]] = run_in_threadpool
    reads: Limiter = field(default_factory=lambda: Limiter(READS))
    writes: Limiter = field(default_factory=lambda: Limiter(WRITES))
    sessions: Sessions = field(default_factory=Sessions)
    observations: Observations = field(default_factory=Observations)


def service_of(request: Request) -> Service:
    """The server's market. Raises ApiError on a server without one."""
    service: Service | None = getattr(request.app.state, "kvmarket_service", None)
    if service is None:
        raise ApiError(404, "no_market", "this server was started without --kv-connector kvmarket")
    return service


ServiceOf = Annotated[Service, Depends(service_of)]
_BEARER = HTTPBearer(auto_error=False, description="An API key of the market, `kvm_...`")
_KEY_HEADER = APIKeyHeader(name="x-api-key", auto_error=False, description="The same")


class Caller:
    """Who asks: a principal, or nobody in particular."""

    def __init__(self, principal: Principal | None, anonymous_may_read: bool) -> None:
        self.principal = principal
        self._anonymous_may_read = anonymous_may_read

    @property
    def account(self) -> str | None:
        """The caller's account."""
        return None if self.principal is None else self.principal.account

    @property
    def scopes(self) -> list[Scope]:
        """What the caller's key may do."""
        return [] if self.principal is None else sorted(self.principal.scopes)

    @property
    def is_admin(self) -> bool:
        """Whether the caller may do everything."""
        return self.has(ADMIN)

    def has(self, *scopes: Scope) -> bool:
        """Whether the caller's key has one of these scopes."""
        return self.principal is not None and not set(scopes).isdisjoint(self.principal.scopes)

    def owns(self, account: str) -> bool:
        """Whether an account's affairs are the caller's."""
        return self.is_admin or account == self.account

    def need(self, *scopes: Scope) -> str:
        """Refuse whoever has none of these scopes; the caller's account. Raises ApiError."""
        account = self.need_key()
        if not self.is_admin and not self.has(*scopes):
            raise ApiError(
                403,
                "scope_missing",
                f"this key may not do that; it needs the scope {' or '.join(scopes)}",
            )
        return account

    def need_key(self) -> str:
        """Refuse whoever has no key; the caller's account. Raises ApiError."""
        if self.account is None:
            raise ApiError(
                401,
                "missing_api_key",
                "this needs an API key; send it as `Authorization: Bearer kvm_...`",
                headers={"www-authenticate": "Bearer"},
            )
        return self.account

    def need_reader(self) -> None:
        """Refuse anonymous callers where the configuration does. Raises ApiError."""
        if not self._anonymous_may_read:
            self.need_key()


async def caller_of(
    request: Request,
    service: ServiceOf,
    _bearer: Annotated[Any, Depends(_BEARER)],
    _key: Annotated[str | None, Depends(_KEY_HEADER)],
) -> Caller:
    """Check the key and the rate. A wrong key is refused on public routes too."""
    given = request.headers.getlist("authorization") + request.headers.getlist("x-api-key")
    # Beside ours there may be one that vLLM's --api-key asks for.
    secrets = {secret for value in given if (secret := _secret(value)).startswith(PREFIX)}
    if len(secrets) > 1:
        raise ApiError(400, "several_api_keys", "the request names several API keys; send one")
    principal = None
    for secret in secrets:
        principal = await run_in_threadpool(service.keys.check, secret)
        if principal is None:
            raise ApiError(
                401,
                "invalid_api_key",
                "this API key is unknown or was revoked",
                headers={"www-authenticate": "Bearer"},
            )
    caller = Caller(principal, service.market.config.anonymous == "allow")
    address = request.client.host if request.client else ""
    limiter = service.reads if request.method in ("GET", "HEAD") else service.writes
    wait_s = limiter.wait_s(f"account:{caller.account}" if caller.account else address)
    if wait_s:
        raise ApiError(
            429,
            "rate_limit_exceeded",
            f"too many requests; come again in {wait_s} s",
            headers={"retry-after": str(wait_s)},
        )
    return caller


def _secret(value: str) -> str:
    scheme, _, rest = value.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else value.strip()


CallerOf = Annotated[Caller, Depends(caller_of)]
