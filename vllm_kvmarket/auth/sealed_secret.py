"""The operator's secret in the market's database, for machines that share it.

It is sealed with ChaCha20-Poly1305 (RFC 8439) under a key that is not in the database: a copy of
the database, or of its backups, lets nobody in.
"""

from __future__ import annotations

import os
import secrets
import threading
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from vllm_kvmarket.core.database import Room, open_database
from vllm_kvmarket.core.errors import ConfigError, UnavailableError

KEY_VARIABLE = "KVMARKET_SECRETS_KEY"
KEY_BYTES = 32
NONCE_BYTES = 12
# A thread looks for a new secret this often, so that who checks a token never waits.
LOOKED_AT_S = 0.5
NAME = "operator"

SECRETS = Room(
    "secrets",
    (
        """
CREATE TABLE secret (
    name TEXT PRIMARY KEY,
    sealed BLOB NOT NULL CHECK (length(sealed) > 12)
) STRICT;
""",
    ),
    UnavailableError,
)


def secrets_key(file: str | None) -> bytes | None:
    """Read the key of 64 hexadecimal digits from a file, else from the environment; None for none.

    Raises ConfigError for anything else.
    """
    where = file or f"${KEY_VARIABLE}"
    try:
        text = Path(file).expanduser().read_text() if file else os.environ.get(KEY_VARIABLE)
        if text is None:
            return None
        key = bytes.fromhex(text.strip())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no hexadecimal digits"
        raise ConfigError(f"secrets_key_file: cannot read the key in {where} ({reason})") from None
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"secrets_key_file: the key in {where} has {len(key)} bytes, not {KEY_BYTES}; make one "
            f"with `openssl rand -hex {KEY_BYTES}`"
        )
    return key


class SealedSecret:
    """See operator_tokens.SecretPlace."""

    def __init__(self, place: Path | str, key: bytes) -> None:
        self._db = open_database(place, SECRETS)
        self._cipher = ChaCha20Poly1305(key)
        self.name = f"the secret in {self._db.place}"
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._sealed = self._look()

    def stamp(self) -> object:
        """See SecretPlace."""
        if self._watcher is None:
            self._watcher = threading.Thread(
                target=self._watch, name="kvmarket-secret", daemon=True
            )
            self._watcher.start()
        return self._sealed

    def read(self) -> bytes | None:
        """See SecretPlace. Raises ConfigError for another key than it was sealed with."""
        sealed = self._sealed
        if sealed is None:
            return None
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], NAME.encode())
        except InvalidTag:
            raise ConfigError(
                f"{self.name} does not open: set secrets_key_file or ${KEY_VARIABLE} to the key "
                "that the market's other machines have"
            ) from None

    def write(self, content: bytes, *, replace: bool) -> None:
        """See SecretPlace."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, content, NAME.encode())
        with self._db.transaction() as db:
            if replace:
                db.execute("DELETE FROM secret WHERE name = ?", (NAME,))
            db.execute("INSERT INTO secret VALUES (?, ?) ON CONFLICT DO NOTHING", (NAME, sealed))
        self._sealed = self._look()

    def close(self) -> None:
        """See SecretPlace."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        self._db.close()

    def _look(self) -> bytes | None:
        with self._db.reading() as db:
            found = db.execute("SELECT sealed FROM secret WHERE name = ?", (NAME,)).fetchall()
        return found[0][0] if found else None

    def _watch(self) -> None:
        while not self._closing.wait(LOOKED_AT_S):
            try:
                self._sealed = self._look()
            except UnavailableError:
                # The server is away: what is known goes on.
                continue
