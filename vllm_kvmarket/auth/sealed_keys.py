"""A home's secret keys in one file that only a passphrase opens, for backups.

The key is derived by scrypt (RFC 7914) and used once, with ChaCha20-Poly1305 (RFC 8439): without
the passphrase the file neither opens nor can be changed.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from vllm_kvmarket.core.errors import ConfigError

MIN_PASSPHRASE_CHARACTERS = 12
_CONTEXT = b"kvmarket sealed keys 1"
_COST = 1 << 17  # 128 MiB and a third of a second for each guess


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    salt: bytes
    nonce: bytes
    box: bytes
    # Bounded, so that a changed file cannot ask for all memory.
    cost: Annotated[int, msgspec.Meta(ge=2, le=1 << 20)] = _COST


def seal(files: Mapping[str, bytes], passphrase: str) -> bytes:
    """Encrypt files by name. Raises ConfigError for a passphrase that is too short."""
    if len(passphrase) < MIN_PASSPHRASE_CHARACTERS:
        raise ConfigError(
            f"the passphrase is too short; use {MIN_PASSPHRASE_CHARACTERS} characters or more"
        )
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    box = ChaCha20Poly1305(_key(passphrase, salt, _COST)).encrypt(
        nonce, msgspec.json.encode(files), _CONTEXT
    )
    return msgspec.json.encode(_Sealed(salt, nonce, box))


def unseal(sealed: bytes, passphrase: str) -> dict[str, bytes]:
    """Decrypt what `seal` made. Raises ConfigError for a wrong passphrase or a changed file."""
    try:
        read = msgspec.json.decode(sealed, type=_Sealed)
        key = _key(passphrase, read.salt, read.cost)
        content = ChaCha20Poly1305(key).decrypt(read.nonce, read.box, _CONTEXT)
        return msgspec.json.decode(content, type=dict[str, bytes])
    except (msgspec.DecodeError, ValueError, InvalidTag):
        raise ConfigError(
            "the sealed keys do not open: the passphrase is wrong, or the file was changed"
        ) from None


def _key(passphrase: str, salt: bytes, cost: int) -> bytes:
    return Scrypt(salt=salt, length=32, n=cost, r=8, p=1).derive(passphrase.encode())
