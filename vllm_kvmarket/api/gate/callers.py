"""Who sent a request: whose key it carries, or whose signed parameters."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from vllm_kvmarket.api.gate.bodies import Scope, header_values
from vllm_kvmarket.api.gate.refusals import BEARER, Refusal, bad, no_key
from vllm_kvmarket.auth.api_keys import PREFIX, Principal
from vllm_kvmarket.auth.api_keys import Scope as KeyScope
from vllm_kvmarket.auth.operator_tokens import Credentials, account_subject
from vllm_kvmarket.connector import request_params
from vllm_kvmarket.connector.request_params import Reason, RequestParams

CONNECTOR = "kvmarket"
WITHOUT_KEY = "this server answers with a key only: Authorization: Bearer kvm_..."


@dataclass(frozen=True, slots=True)
class Caller:
    """An account that buys, the operator at work, or, with neither, nobody in particular.

    `operation` is what the connector is told of the operator's work, with its token.
    """

    account: str | None = None
    operation: dict[str, Any] | None = None

    @property
    def is_anonymous(self) -> bool:
        """Whether nobody is known to have sent this."""
        return self.account is None and self.operation is None

    def salt(self, credentials: Credentials) -> str:
        """What keeps a caller's unpublished prefixes from all others; it cannot be guessed."""
        if self.is_anonymous:
            # Two callers without a key may be two people.
            return secrets.token_hex(32)
        subject = "operator" if self.account is None else f"account:{self.account}"
        return credentials.token(f"salt:{subject}")

    def connector_params(
        self,
        credentials: Credentials,
        *,
        reuse: bool,
        declined: Reason | None = None,
        max_price_nano: int | None = None,
    ) -> dict[str, Any] | None:
        """What the connector is told, None for nothing: then everything is computed.

        `declined` says why there is no reuse where the sender does not want it.
        """
        if self.operation is not None:
            return {CONNECTOR: self.operation}
        if declined is not None:
            return {CONNECTOR: {"declined": declined}}
        if self.account is None or not reuse:
            return None
        token = credentials.token(account_subject(self.account))
        told: dict[str, Any] = {"account": self.account, "token": token}
        if max_price_nano is not None:
            told["max_price_nano"] = max_price_nano
        return {CONNECTOR: told}


def principal_of(keys: Any, scope: Scope) -> Principal | None:
    """Whose key a request carries, None for none of ours. Raises Refusal: a key that is not good
    does not make its sender nobody.
    """
    given = header_values(scope, "authorization") + header_values(scope, "x-api-key")
    # Beside ours there may be one that vLLM's --api-key asks for.
    ours = {value for each in given if (value := _bare(each)).startswith(PREFIX)}
    if not ours:
        return None
    if len(ours) > 1:
        raise bad("the request names several API keys; send one", code="several_api_keys")
    principal: Principal | None = keys.check(ours.pop())
    if principal is None:
        raise Refusal(
            401,
            "invalid_api_key",
            "this API key is unknown or was revoked",
            headers=dict(BEARER),
        )
    return principal


def need(principal: Principal | None, scope: KeyScope) -> None:
    """Raises Refusal unless a key allows what needs `scope`."""
    if principal is None:
        raise no_key(f"this needs an API key with the scope {scope}")
    if not principal.may(scope):
        raise Refusal(403, "scope_missing", f"this key may not do that; it needs the scope {scope}")


def caller_of(
    principal: Principal | None, credentials: Credentials, body: dict[str, Any]
) -> Caller:
    """Who sent a body: a key's account, or whoever the home's secret signed parameters for.

    Parameters that are not signed are not heard, and none are beside a key.
    """
    if principal is not None:
        return Caller(account=principal.account)
    given = body.get("kv_transfer_params")
    raw = given.get(CONNECTOR) if isinstance(given, dict) else None
    if not isinstance(raw, dict) or not raw.get("token"):
        return Caller()
    wish = request_params.read({CONNECTOR: raw}, credentials, trusted=False)
    if not isinstance(wish, RequestParams):
        return Caller()
    if wish.publish is not None or wish.preload or wish.audit is not None:
        return Caller(operation=raw)
    return Caller(account=wish.account)


def _bare(value: str) -> str:
    scheme, _, rest = value.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else value.strip()
