"""What each route of vLLM's API server is to the gate.

The gate asks the application's own router which route a request goes to, so that no spelling of a
path leads around it; and what changes something is closed unless it is listed here.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, MutableMapping
from typing import Any

# Also what answers a path that is written a little differently: a redirect, or 405.
READING = frozenset({"GET", "HEAD", "OPTIONS"})
# They check keys themselves.
OURS = ("/v1/kvmarket", "/kvmarket")


class Kind(enum.Enum):
    """How a route is treated."""

    COMPLETIONS = "completions"
    CHAT = "chat"
    RESPONSES = "responses"
    MESSAGES = "messages"
    TOKENS = "tokens"
    INVOCATIONS = "invocations"
    # Generates, but takes no parameters of a connector: everything is computed, under a salt.
    SALTED = "salted"
    # Generates nothing; costs the server some work.
    WORK = "work"
    OPEN = "open"
    OURS = "ours"
    ADMIN = "admin"

    @property
    def generates(self) -> bool:
        """Whether the route makes a model compute."""
        return self in _GENERATES


_GENERATES = frozenset(
    {
        Kind.COMPLETIONS,
        Kind.CHAT,
        Kind.RESPONSES,
        Kind.MESSAGES,
        Kind.TOKENS,
        Kind.INVOCATIONS,
        Kind.SALTED,
    }
)

# By path and method, as vLLM 0.32 registers them. A route that is not here is Kind.ADMIN unless it
# only reads; tests/engine/test_gate_routes.py fails until it is.
ROUTES: dict[tuple[str, str], Kind] = {
    ("/v1/completions", "POST"): Kind.COMPLETIONS,
    ("/v1/chat/completions", "POST"): Kind.CHAT,
    ("/v1/chat/completions/batch", "POST"): Kind.SALTED,
    ("/v1/responses", "POST"): Kind.RESPONSES,
    ("/v1/messages", "POST"): Kind.MESSAGES,
    ("/inference/v1/generate", "POST"): Kind.TOKENS,
    ("/invocations", "POST"): Kind.INVOCATIONS,
    ("/v1/systemone", "POST"): Kind.SALTED,
    ("/generative_scoring", "POST"): Kind.SALTED,
    # A stored response is whoever's knows its id: nobody's but the operator's.
    ("/v1/responses/{response_id}", "GET"): Kind.ADMIN,
    ("/v1/responses/{response_id}/cancel", "POST"): Kind.ADMIN,
    ("/inference/v1/abort_requests", "POST"): Kind.ADMIN,
    ("/scale_elastic_ep", "POST"): Kind.ADMIN,
    ("/is_scaling_elastic_ep", "POST"): Kind.ADMIN,
    ("/v1/messages/count_tokens", "POST"): Kind.WORK,
    ("/tokenize", "POST"): Kind.WORK,
    ("/detokenize", "POST"): Kind.WORK,
    ("/v1/chat/completions/render", "POST"): Kind.WORK,
    ("/v1/messages/render", "POST"): Kind.WORK,
    ("/v1/completions/render", "POST"): Kind.WORK,
    ("/v1/responses/render", "POST"): Kind.WORK,
    ("/v1/chat/completions/derender", "POST"): Kind.WORK,
    ("/v1/completions/derender", "POST"): Kind.WORK,
    ("/openapi.json", "GET"): Kind.OPEN,
    ("/docs", "GET"): Kind.OPEN,
    ("/docs/oauth2-redirect", "GET"): Kind.OPEN,
    ("/redoc", "GET"): Kind.OPEN,
    ("/load", "GET"): Kind.OPEN,
    ("/version", "GET"): Kind.OPEN,
    ("/kv_event_sources", "GET"): Kind.OPEN,
    ("/health", "GET"): Kind.OPEN,
    ("/metrics", "GET"): Kind.OPEN,
    ("/ping", "GET"): Kind.OPEN,
    ("/ping", "POST"): Kind.OPEN,
    ("/v1/models", "GET"): Kind.OPEN,
}


def kind_of(routes: Iterable[Any], scope: MutableMapping[str, Any]) -> Kind:
    """How to treat a request, by the first of `routes` that takes it whole, as the router picks it.

    One that no route takes is OPEN: the router refuses it.
    """
    for route in routes:
        match, _ = route.matches(scope)
        if match.name == "FULL":
            path = getattr(route, "path", "")
            return listed(path, scope.get("method", ""))
    return Kind.OPEN


def listed(path: str, method: str) -> Kind:
    """How a route is treated; one that is not known and does more than read is for admins.

    A websocket has no method, and none is known.
    """
    if any(path == ours or path.startswith(f"{ours}/") for ours in OURS):
        return Kind.OURS
    known = ROUTES.get((path, "GET" if method == "HEAD" else method))
    if known is not None:
        return known
    return Kind.OPEN if method in READING else Kind.ADMIN
