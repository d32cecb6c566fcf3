"""How the gate treats each route of vLLM's API server.

The application's own router decides which route a request belongs to, so no spelling of a path
leads around the gate. A route that is not listed here is for admins only, whatever its method.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, MutableMapping
from typing import Any


class Kind(enum.Enum):
    """How a route is treated."""

    COMPLETIONS = "completions"
    CHAT = "chat"
    RESPONSES = "responses"
    MESSAGES = "messages"
    TOKENS = "tokens"
    INVOCATIONS = "invocations"
    # Generates, but takes no parameters for a connector: computed in full, under a salt.
    SALTED = "salted"
    # Does not generate, but costs the server some work.
    WORK = "work"
    OPEN = "open"
    # Open, but amounts of money are for admins.
    METRICS = "metrics"
    OURS = "ours"
    PAGES = "pages"
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

# Their routes say themselves which scope they need.
OURS = {"/v1/kvmarket": Kind.OURS, "/kvmarket": Kind.PAGES}
# By path and method, as vLLM 0.32 registers them; tests/engine/test_gate_routes.py finds new ones.
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
    # Anyone who knows a stored response's id could read it, so only the operator may.
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
    # It names the hosts of the engines.
    ("/kv_event_sources", "GET"): Kind.ADMIN,
    ("/health", "GET"): Kind.OPEN,
    ("/metrics", "GET"): Kind.METRICS,
    ("/ping", "GET"): Kind.OPEN,
    ("/ping", "POST"): Kind.OPEN,
    ("/v1/models", "GET"): Kind.OPEN,
}


def kind_of(routes: Iterable[Any], scope: MutableMapping[str, Any]) -> Kind:
    """How to treat a request: by the first of `routes` that matches it, as the router picks it.

    OPEN if none matches: the router refuses such a request.
    """
    for route in routes:
        match, _ = route.matches(scope)
        if match.name == "FULL":
            path = getattr(route, "path", "")
            return listed(path, scope.get("method", ""))
    return Kind.OPEN


def listed(path: str, method: str) -> Kind:
    """How a route is treated. An unknown one, and every websocket, is for admins."""
    for prefix, kind in OURS.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return kind
    return ROUTES.get((path, "GET" if method == "HEAD" else method), Kind.ADMIN)
