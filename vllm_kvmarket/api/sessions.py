"""Sessions of people who signed in on the pages: signed cookies, good in every server process.

A cookie names an API key by its id and holds no secret of it. The key is looked at again for every
page, so a revoked key ends its sessions. That a session was ended is in the market's database, for
the servers of all machines.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from vllm_kvmarket.auth.api_keys import Keys, Principal
from vllm_kvmarket.auth.operator_tokens import Credentials
from vllm_kvmarket.auth.signing_keys import decode_base64url, encode_base64url

LIFETIME_S = 8 * 3600.0
IDLE_S = 3600.0
# An older cookie is replaced by a new one, so that a session in use does not end by idleness.
RENEW_S = 300.0


class Session(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One browser's session. `id` is 128 random bits; times are seconds of the epoch."""

    id: str
    key_id: str
    began_at_s: float
    seen_at_s: float


@dataclass(frozen=True, slots=True)
class Sessions:
    """The sessions of one market; every process on its database knows them. Thread-safe."""

    credentials: Credentials
    keys: Keys
    clock: Callable[[], float] = time.time

    def open(self, principal: Principal) -> str:
        """Begin a session; the cookie's value."""
        now_s = self.clock()
        return self._cookie(Session(secrets.token_hex(16), principal.key_id, now_s, now_s))

    def find(self, cookie: str, address: str = "") -> tuple[Session, Principal] | None:
        """The session of a cookie, with the rights that its key has now; None if it is over.

        Raises KeysUnavailableError.
        """
        payload, _, signature = cookie.partition(".")
        if not self.credentials.verifies("session", payload, signature):
            return None
        try:
            session = msgspec.json.decode(decode_base64url(payload), type=Session)
        except ValueError:
            return None
        now_s = self.clock()
        ends_at_s = min(session.began_at_s + LIFETIME_S, session.seen_at_s + IDLE_S)
        if now_s >= ends_at_s or self.keys.has_ended(session.id):
            return None
        principal = self.keys.principal(session.key_id, address)
        return None if principal is None else (session, principal)

    def renewed(self, session: Session) -> str | None:
        """The next cookie of a session in use; None while the present one is young."""
        now_s = self.clock()
        if now_s - session.seen_at_s < RENEW_S:
            return None
        return self._cookie(msgspec.structs.replace(session, seen_at_s=now_s))

    def close(self, session: Session) -> None:
        """End a session for every process; mutates the database. Raises KeysUnavailableError."""
        now_s = self.clock()
        self.keys.end_session(session.id, now_s, now_s - LIFETIME_S)

    def _cookie(self, session: Session) -> str:
        payload = encode_base64url(msgspec.json.encode(session))
        return f"{payload}.{self.credentials.sign('session', payload)}"
