"""Who sends a request: the one place where API keys are found in headers and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from fastapi.concurrency import run_in_threadpool

from vllm_kvmarket.api.bodies import Scope, header_values
from vllm_kvmarket.api.errors import BEARER, ApiError, invalid, missing_key
from vllm_kvmarket.api.rate_limits import WRONG_KEYS, Limiter, Queue, counted_as
from vllm_kvmarket.auth.api_keys import NO_LIMITS, PREFIX, KeyLimits, Keys, Principal
from vllm_kvmarket.auth.api_keys import Scope as KeyScope

ADMIN: KeyScope = "admin"
PUBLISHER: KeyScope = "publisher"
BUYER: KeyScope = "buyer"
MOST_CHECKS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sends a request: the owner of a key, or an anonymous client (no account).

    On the routes of vLLM it may also be the holder of an operator's token: then `operation` is
    what the connector shall do, with that token, or `account` is the one that the token is for.
    """

    account: str | None = None
    scopes: frozenset[KeyScope] = frozenset()
    key_id: str | None = None
    limits: KeyLimits = NO_LIMITS
    operation: dict[str, Any] | None = None
    anonymous_may_read: bool = True

    @classmethod
    def of_key(cls, principal: Principal) -> Self:
        """The owner of a key."""
        return cls(
            account=principal.account,
            scopes=principal.scopes,
            key_id=principal.key_id,
            limits=principal.limits,
        )

    @property
    def is_anonymous(self) -> bool:
        """Whether neither an account nor the operator is known to send this."""
        return self.account is None and self.operation is None

    @property
    def is_admin(self) -> bool:
        """Whether the caller may do everything."""
        return ADMIN in self.scopes

    def may(self, *scopes: KeyScope) -> bool:
        """Whether the caller's key has one of these scopes."""
        return self.is_admin or not self.scopes.isdisjoint(scopes)

    def owns(self, account: str) -> bool:
        """Whether the caller may act for an account."""
        return self.is_admin or account == self.account

    def need(self, *scopes: KeyScope) -> str:
        """The caller's account, if its key has one of these scopes. Raises ApiError."""
        account = self.need_key()
        if not self.may(*scopes):
            raise ApiError(
                403,
                "scope_missing",
                f"this key may not do that; it needs the scope {' or '.join(scopes)}",
            )
        return account

    def need_key(self) -> str:
        """The caller's account. Raises ApiError for an anonymous one."""
        if self.account is None:
            raise missing_key("this needs an API key; send it as `Authorization: Bearer kvm_...`")
        return self.account

    def need_reader(self) -> None:
        """Refuse anonymous callers if the configuration says so. Raises ApiError."""
        if self.is_anonymous and not self.anonymous_may_read:
            raise missing_key("this server answers with a key only: Authorization: Bearer kvm_...")


def key_in(scope: Scope) -> str | None:
    """The API key in a request's headers, None if there is none of ours. Raises ApiError."""
    given = header_values(scope, "authorization") + header_values(scope, "x-api-key")
    # Another key may be there for vLLM's own --api-key.
    ours = {secret for value in given if (secret := _secret(value)).startswith(PREFIX)}
    if len(ours) > 1:
        raise invalid("the request names several API keys; send one", code="several_api_keys")
    return ours.pop() if ours else None


class KeyChecker:
    """Checks API keys, bounded and beside the event loop."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._wrong = Limiter(WRONG_KEYS)
        self._waiting = Queue(MOST_CHECKS, "the check of an API key")

    async def check(self, secret: str, address: str) -> Principal | None:
        """The owner of a key; None for a wrong one, which is counted for its sender's address.

        Raises ApiError after too many wrong ones, and KeysUnavailableError.
        """
        sender = counted_as(address)
        self._wrong.count(sender, take=False)
        with self._waiting.place():
            principal = await run_in_threadpool(self._keys.check, secret, address)
        if principal is None:
            self._wrong.wait_s(sender)
        return principal


def wrong_key() -> ApiError:
    """401: a sender with a wrong key is not anonymous, so public routes refuse it as well."""
    return ApiError(
        401,
        "invalid_api_key",
        "this API key is unknown, revoked, expired, or not for this network address",
        headers=BEARER,
    )


def _secret(value: str) -> str:
    scheme, _, rest = value.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else value.strip()
