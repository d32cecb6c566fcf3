"""Who signed what: a home's Ed25519 keys, and the public keys of others that it trusts.

Keys are named by `kid`, their RFC 7638 thumbprint (RFC 8037 for Ed25519), and leave a home as JWK.
One key signs messages of several kinds, which must differ in how they begin: a bundle's manifest
with "{", a JWS with base64url, so that a signature on one never holds for another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from vllm_kvmarket.core.durable_files import locked, sweep_drafts, sync_path, write_durably
from vllm_kvmarket.core.errors import ConfigError, NotFoundError

KEYS_FOLDER = "signing"
TRUSTED_FOLDER = "trusted"
SIGNATURE_BYTES = 64
KEY_SUFFIX = ".pem"
JWK_SUFFIX = ".jwk"
MAX_JWK_BYTES = 1 << 20
_PUBLIC_BYTES = 32
_SERIAL = re.compile(rb"Serial: ([0-9]{1,9})\n")
_KID = re.compile(r"[A-Za-z0-9_-]{43}")
# A folder's time of change may be this coarse: what was read sooner after it may be out of date.
_SETTLED_NS = 2_000_000_000


def encode_base64url(content: bytes) -> str:
    """Base64url without padding, as JOSE writes it."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def decode_base64url(text: str) -> bytes:
    """Decode what `encode_base64url` wrote; ValueError for any other spelling of the same bytes."""
    try:
        content = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        content = b""
    if encode_base64url(content) != text:
        raise ValueError("not base64url without padding")
    return content


@dataclass(frozen=True, slots=True)
class PublicKey:
    """One Ed25519 public key, 32 bytes; equal keys are one key, wherever they came from."""

    raw: bytes

    @classmethod
    def of_jwk(cls, jwk: Any, where: str = "the key") -> Self:
        """Read a JWK. Raises ConfigError that names `where` for anything but a public Ed25519 key.

        Its own `kid` is not believed: keys are named by what they are.
        """
        if not isinstance(jwk, Mapping) or (jwk.get("kty"), jwk.get("crv")) != ("OKP", "Ed25519"):
            raise ConfigError(
                f'{where}: not a JWK with "kty": "OKP" and "crv": "Ed25519"; '
                "give what `kvmarket key show` prints"
            )
        if "d" in jwk:
            raise ConfigError(
                f"{where}: holds a private key; give its public part only, and make its owner "
                "replace it, as you have seen it"
            )
        try:
            raw = decode_base64url(str(jwk.get("x")))
            Ed25519PublicKey.from_public_bytes(raw)
        except ValueError:
            raise ConfigError(
                f'{where}: its "x" is not {_PUBLIC_BYTES} bytes in base64url; ask for the key again'
            ) from None
        return cls(raw)

    @property
    def kid(self) -> str:
        """The key's thumbprint, 43 characters of base64url."""
        members = {"crv": "Ed25519", "kty": "OKP", "x": encode_base64url(self.raw)}
        spelled = json.dumps(members, sort_keys=True, separators=(",", ":"))
        return encode_base64url(hashlib.sha256(spelled.encode()).digest())

    def jwk(self) -> dict[str, str]:
        """Give the key as others read it."""
        return {
            "kty": "OKP",
            "crv": "Ed25519",
            "x": encode_base64url(self.raw),
            "kid": self.kid,
            "alg": "EdDSA",
            "use": "sig",
        }

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the owner of this key signed exactly these bytes."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True


class SigningKey:
    """One key pair of this home; `serial` counts the home's keys, the highest signs."""

    def __init__(self, private: Ed25519PrivateKey, serial: int) -> None:
        self._private = private
        self.serial = serial
        self.public = PublicKey(private.public_key().public_bytes_raw())
        self.kid = self.public.kid

    def sign(self, message: bytes) -> bytes:
        """Sign; 64 bytes, the same each time."""
        return self._private.sign(message)

    def pem(self) -> bytes:
        """Encode as the key's file has it: PKCS #8, with the serial on a line in front."""
        encoded = self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return f"Serial: {self.serial}\n".encode() + encoded


class SigningKeys:
    """The key pairs of one market home; thread-safe, and safe for several processes.

    A home that was restored without its private keys has the public ones, and signs with a new key.
    Every call sees what another process added meanwhile, for the price of one stat().
    """

    def __init__(self, home: Path) -> None:
        self._folder = home / KEYS_FOLDER
        self._lock = threading.Lock()
        self._keys: tuple[SigningKey, ...] = ()
        self._public: tuple[tuple[int, PublicKey], ...] = ()
        self._as_of_ns: int | None = None

    def current(self) -> SigningKey:
        """The key that signs; made, and its file with mode 0600, where the home has none.

        Raises ConfigError for a file that is no key.
        """
        keys = self._all()
        if keys:
            return keys[0]
        with locked(self._folder):
            # Another process may have been faster: then its key is the home's.
            keys = self._all()
            return keys[0] if keys else self._make(self._next_serial())

    def rotate(self) -> SigningKey:
        """Make a new key, which signs from now on; older ones still verify. Raises ConfigError."""
        with locked(self._folder):
            return self._make(self._next_serial())

    def public_keys(self) -> list[PublicKey]:
        """Every key of this home, the one that signs first; none where none was used yet."""
        self._all()
        return [key for _, key in self._public]

    def find(self, kid: str) -> PublicKey | None:
        """One of this home's keys, to verify what it signed before or after a rotation."""
        return next((key for key in self.public_keys() if key.kid == kid), None)

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """Give all public keys as a JWK set."""
        return {"keys": [key.jwk() for key in self.public_keys()]}

    def public_files(self) -> dict[str, bytes]:
        """The public keys as files of the folder, by name, to restore a home without secrets."""
        self._all()
        return {
            f"{key.kid}{JWK_SUFFIX}": json.dumps({**key.jwk(), "serial": serial}).encode()
            for serial, key in self._public
        }

    def _next_serial(self) -> int:
        self._all()
        return max((serial for serial, _ in self._public), default=0) + 1

    def _all(self) -> tuple[SigningKey, ...]:
        """Every key pair, newest first, from memory while the folder is as it was."""
        with self._lock:
            try:
                changed_ns = self._folder.stat().st_mtime_ns
            except FileNotFoundError:
                self._keys, self._public = (), ()
                return ()
            if changed_ns != self._as_of_ns:
                files = sorted(self._folder.glob(f"*{KEY_SUFFIX}"))
                read = [_read_key(file) for file in files if not file.name.startswith(".")]
                self._keys = tuple(sorted(read, key=lambda key: (-key.serial, key.kid)))
                found = {key.kid: (key.serial, key.public) for key in self._keys}
                for file in self._folder.glob(f"[!.]*{JWK_SUFFIX}"):
                    (public,) = read_jwks(file)
                    found.setdefault(public.kid, (_serial_in(file), public))
                self._public = tuple(
                    sorted(found.values(), key=lambda each: (-each[0], each[1].kid))
                )
                settled = abs(time.time_ns() - changed_ns) > _SETTLED_NS
                self._as_of_ns = changed_ns if settled else None
            return self._keys

    def _make(self, serial: int) -> SigningKey:
        sweep_drafts(self._folder)
        key = SigningKey(Ed25519PrivateKey.generate(), serial)
        while key.kid.startswith("-"):
            # On a command line such a name would be taken for an option.
            key = SigningKey(Ed25519PrivateKey.generate(), serial)
        write_durably(self._folder / f"{key.kid}{KEY_SUFFIX}", key.pem())
        return key


def _serial_in(file: Path) -> int:
    serial = json.loads(file.read_bytes()).get("serial")
    return serial if isinstance(serial, int) else 0


def _read_key(file: Path) -> SigningKey:
    content = file.read_bytes()
    serial = _SERIAL.match(content)
    try:
        private = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(
            f"{file}: not an Ed25519 key without a password; restore it from a backup, or move it "
            "away (what it signed then cannot be verified here)"
        )
    return SigningKey(private, int(serial[1]) if serial else 0)


def read_jwks(path: Path) -> list[PublicKey]:
    """Read a file with one JWK or a JWK set. Raises ConfigError for anything else in it."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_JWK_BYTES + 1)
        if len(content) > MAX_JWK_BYTES:
            raise ValueError("too long")
        document = json.loads(content)
    except OSError as error:
        raise ConfigError(
            f"cannot read the key {path} ({error.strerror}); give the file of a JWK"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JWK ({error}); ask for the key again") from None
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list):
        keys = [document]
    return [PublicKey.of_jwk(key, str(path)) for key in keys]


class TrustedKeys:
    """Whose bundles a home takes: a file a key under `trusted`, which may be put there by hand."""

    def __init__(self, home: Path) -> None:
        self._folder = home / TRUSTED_FOLDER

    def all(self) -> dict[str, PublicKey]:
        """Every trusted key by its kid. Raises ConfigError for a file that is no key."""
        return {key.kid: key for _, key in self._files()}

    def add(self, key: PublicKey) -> bool:
        """Trust a key from now on; whether that is news."""
        if key.kid in self.all():
            return False
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = json.dumps(key.jwk(), indent=2) + "\n"
        write_durably(self._folder / f"{key.kid}{JWK_SUFFIX}", content.encode(), mode=0o644)
        return True

    def remove(self, kid: str) -> None:
        """Trust a key no more; what was imported stays. Raises NotFoundError."""
        files = [file for file, key in self._files() if key.kid == kid]
        if not files:
            hint = "" if _KID.fullmatch(kid) else ", a key's id has 43 characters"
            raise NotFoundError(f"no trusted key {kid!r}{hint}; see `kvmarket trust list`")
        for file in files:
            file.unlink(missing_ok=True)
        sync_path(self._folder)

    def _files(self) -> list[tuple[Path, PublicKey]]:
        found = []
        for file in sorted(self._folder.glob(f"*{JWK_SUFFIX}")):
            if file.name.startswith("."):
                continue
            keys = read_jwks(file)
            if len(keys) != 1:
                raise ConfigError(
                    f"{file}: holds {len(keys)} keys instead of one; move it away, then give it to "
                    "`kvmarket trust add`"
                )
            found.append((file, keys[0]))
        return found
