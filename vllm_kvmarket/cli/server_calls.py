"""Calls of a running server's routes, for commands that need its engine."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

from vllm_kvmarket.core.errors import ConfigError, RefusedError, UnavailableError

KEY_VARIABLE = "KVMARKET_API_KEY"
# An engine with much to do is slow to answer.
TIMEOUT_S = 600.0


def post(server: str, path: str) -> dict[str, Any]:
    """Send a POST request without a body; the answer.

    The key comes from the environment: other users of a machine can read a command's arguments.
    Raises ConfigError, RefusedError, and UnavailableError.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise ConfigError(
            f"{KEY_VARIABLE} is not set; it must hold an admin's key of {server} "
            "(`kvmarket key create`)"
        )
    if not server.startswith(("http://", "https://")):
        raise ConfigError(f"{server!r} is no address of a server, such as http://127.0.0.1:8000")
    request = urllib.request.Request(  # noqa: S310  # the scheme was checked
        server.rstrip("/") + path, method="POST", headers={"authorization": f"Bearer {key}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise RefusedError(f"{server} answered {error.code}: {_message(error)}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise UnavailableError(f"{server} cannot be reached: {error}; is it running?") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError):
        return str(error.reason)
