"""Tokens under the market's secret: only a process that can read it can make them.

The secret is never used itself. Each purpose has a key derived from it, so that a token for one
purpose is worthless for every other. The token of a request is bound to all its parameters and
lasts a minute: in a log it is worthless too.

An operator can rotate the secret while processes run. They see the new one within a second; tokens
under the old one are good for a minute more.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
from blake3 import blake3

from vllm_kvmarket.core.durable_files import make_private, write_durably
from vllm_kvmarket.core.errors import ConfigError, UnavailableError

SECRET_FILE = "operator.key"  # noqa: S105  # its name, not the secret
SECRET_BYTES = 32
# An account's whole name.
ACCOUNT_PATTERN = r"[A-Za-z0-9._:@-]{1,128}"
REQUEST_LIFETIME_S = 60.0
GRACE_S = 60.0
# How long a process may go on with the secret that it has read.
REFRESH_S = 0.5
# The clocks of two machines that share a home may differ by this.
CLOCK_SKEW_S = 5.0

Purpose = Literal["request", "salt", "blocks", "session", "form"]


class _Secrets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's content, as JSON: the secret, and the one before the last rotation."""

    secret: str
    previous: str | None = None
    rotated_at_s: float = 0.0


class SecretPlace(Protocol):
    """Where the secret is: a file of the home, or a sealed row of the market's database.

    `name` says where. A method may raise OSError or UnavailableError while it cannot be read.
    """

    name: str

    def stamp(self) -> object:
        """Return what changes with the content; never waits."""

    def read(self) -> bytes | None:
        """Return the content, None where there is none."""

    def write(self, content: bytes, *, replace: bool) -> None:
        """Write it durably; without `replace`, content that is there stays."""

    def close(self) -> None:
        """Release what is held open."""


class SecretFile:
    """See SecretPlace."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)

    def stamp(self) -> object:
        """See SecretPlace."""
        status = self._path.stat()
        return status.st_ino, status.st_mtime_ns

    def read(self) -> bytes | None:
        """See SecretPlace."""
        return self._path.read_bytes() if self._path.exists() else None

    def write(self, content: bytes, *, replace: bool) -> None:
        """See SecretPlace."""
        with contextlib.suppress(FileExistsError):
            write_durably(self._path, content, replace=replace)

    def close(self) -> None:
        """See SecretPlace."""


class Credentials:
    """Makes and checks tokens under one market's secret; thread-safe.

    Every method raises ConfigError when the place does not hold a secret of ours.
    """

    def __init__(self, place: SecretPlace, clock: Callable[[], float] = time.time) -> None:
        """Read the secret that is at a place, or make it."""
        self._place = place
        self._clock = clock
        self._stamp: object = None
        self._fresh_until_s = 0.0
        try:
            if place.read() is None:
                # A secret that another process makes meanwhile stays.
                place.write(_encode(_Secrets(_new_secret())), replace=False)
            self._known = self._read()
        except BaseException:
            place.close()
            raise

    @classmethod
    def of_home(cls, home: Path, clock: Callable[[], float] = time.time) -> Credentials:
        """Read the home's secret, or make it; a home of ours becomes private (mode 0700)."""
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_private(home)
        return cls(SecretFile(home / SECRET_FILE), clock)

    def close(self) -> None:
        """Release the place."""
        self._place.close()

    def sign(self, purpose: Purpose, text: str) -> str:
        """The token for `text` and one purpose: 64 hexadecimal digits, the same each time."""
        return _sign(self._current().secret, purpose, text)

    def verifies(self, purpose: Purpose, text: str, token: str) -> bool:
        """Whether `token` was made for exactly this; compares in constant time."""
        if self._matches(purpose, text, token):
            return True
        # Another process may have seen a new secret sooner.
        self._fresh_until_s = 0.0
        return self._matches(purpose, text, token)

    def _matches(self, purpose: Purpose, text: str, token: str) -> bool:
        known = self._current()
        candidates = [known.secret]
        if known.previous is not None and self._clock() < known.rotated_at_s + GRACE_S:
            candidates.append(known.previous)
        return any(
            hmac.compare_digest(_sign(secret, purpose, text).encode(), token.encode())
            for secret in candidates
        )

    def sign_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A request's parameters with `expires_at_s` and the `token` over all the others.

        They must be JSON values. A `request_id` among them binds the token to one request.
        """
        signed = {**params, "expires_at_s": self._clock() + REQUEST_LIFETIME_S}
        signed.pop("token", None)
        return {**signed, "token": self.sign("request", _canonical(signed))}

    def allows_params(self, params: Mapping[str, Any]) -> bool:
        """Whether `sign_params` made exactly these parameters, less than a minute ago."""
        expires_at_s, token = params.get("expires_at_s"), params.get("token")
        if not isinstance(expires_at_s, int | float) or not isinstance(token, str):
            return False
        left_s = expires_at_s - self._clock()
        if not 0 < left_s <= REQUEST_LIFETIME_S + CLOCK_SKEW_S:
            return False
        try:
            text = _canonical({key: params[key] for key in params if key != "token"})
        except (TypeError, ValueError):
            return False
        return self.verifies("request", text, token)

    def rotate(self) -> None:
        """Make a new secret; the old one is good for GRACE_S more. Mutates the home."""
        known = self._read()
        made = _Secrets(_new_secret(), known.secret, self._clock())
        self._place.write(_encode(made), replace=True)
        self._fresh_until_s = 0.0

    def _current(self) -> _Secrets:
        # Two threads may both read here; they find the same.
        now_s = time.monotonic()
        if now_s >= self._fresh_until_s:
            # A running process continues without the file: a backup may be restored meanwhile.
            with contextlib.suppress(OSError, UnavailableError):
                if self._place.stamp() != self._stamp:
                    self._known = self._read()
            self._fresh_until_s = now_s + REFRESH_S
        return self._known

    def _read(self) -> _Secrets:
        stamp = self._place.stamp()
        try:
            found = msgspec.json.decode(self._place.read() or b"", type=_Secrets)
            if any(
                len(bytes.fromhex(secret)) != SECRET_BYTES
                for secret in (found.secret, found.previous)
                if secret is not None
            ):
                raise ValueError
        except (msgspec.DecodeError, ValueError):
            raise ConfigError(
                f"{self._place.name} does not hold an operator's secret; restore it from a backup, "
                "or remove it to have a new one made (tokens from before then end)"
            ) from None
        self._stamp = stamp
        return found


def _new_secret() -> str:
    return secrets.token_hex(SECRET_BYTES)


def _encode(known: _Secrets) -> bytes:
    return msgspec.json.encode(known) + b"\n"


def _sign(secret: str, purpose: Purpose, text: str) -> str:
    key = blake3(bytes.fromhex(secret), derive_key_context=f"kvmarket 2026-11 {purpose}").digest()
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _canonical(params: Mapping[str, Any]) -> str:
    """JSON with sorted keys and no blanks: the same text in the gate and in the engine."""
    return json.dumps(params, sort_keys=True, separators=(",", ":"), allow_nan=False)
