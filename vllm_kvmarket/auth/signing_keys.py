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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from vllm_kvmarket.core.durable_files import locked, sweep_drafts, sync_path, write_durably
from vllm_kvmarket.core.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from vllm_kvmarket.auth.shared_keys import SharedKeys

KEYS_FOLDER = "signing"
TRUSTED_FOLDER = "trusted"
SIGNATURE_BYTES = 64
KEY_SUFFIX = ".pem"
JWK_SUFFIX = ".jwk"
MAX_JWK_BYTES = 1 << 20
_PUBLIC_BYTES = 32
_HEAD = re.compile(
    rb"Serial: ([0-9]{1,9})\n(?:Not-Before: ([0-9]{1,12})\nNot-After: ([0-9]{1,12})\n)?"
)
REVOKED_SUFFIX = ".revoked"
# A key signs for this long; then a new one does. What it signed still verifies.
VALID_S = 400 * 86_400
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
    """One Ed25519 public key, 32 bytes; two keys are equal if their bytes are.

    A market is named by its first key. `market` is set when that key endorsed this one, so that it
    may sign in the market's name; every key may sign in its own. Times are seconds of the epoch; 0
    is no limit.
    """

    raw: bytes
    market: str = field(default="", compare=False)
    endorsement: bytes = field(default=b"", compare=False)
    not_before_s: int = field(default=0, compare=False)
    not_after_s: int = field(default=0, compare=False)
    revoked_at_s: int = field(default=0, compare=False)

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
        try:
            claims = msgspec.convert(jwk.get("kvmarket") or {}, _Claims)
            endorsement = decode_base64url(claims.endorsement)
        except (msgspec.ValidationError, ValueError) as error:
            raise ConfigError(f"{where}: its kvmarket member is malformed ({error})") from None
        # Not believed before `bound` has checked the endorsement.
        return cls(
            raw,
            claims.market,
            endorsement,
            claims.not_before_s,
            claims.not_after_s,
            claims.revoked_at_s,
        )

    def may_sign_for(self, market: str) -> bool:
        """Whether this key signs in the name of the market whose first key has this kid."""
        return market in (self.market, self.kid)

    @property
    def kid(self) -> str:
        """The key's thumbprint, 43 characters of base64url."""
        members = {"crv": "Ed25519", "kty": "OKP", "x": encode_base64url(self.raw)}
        spelled = json.dumps(members, sort_keys=True, separators=(",", ":"))
        return encode_base64url(hashlib.sha256(spelled.encode()).digest())

    def jwk(self) -> dict[str, Any]:
        """Give the key as others read it, with its market's endorsement if it has one."""
        claims = _Claims(
            self.market,
            encode_base64url(self.endorsement),
            self.not_before_s,
            self.not_after_s,
            self.revoked_at_s,
        )
        ours = {"kvmarket": msgspec.to_builtins(claims)} if claims != _Claims() else {}
        return {
            **ours,
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


class _Claims(msgspec.Struct, frozen=True, omit_defaults=True):
    """The member "kvmarket" of a JWK."""

    market: str = ""
    endorsement: str = ""
    not_before_s: int = 0
    not_after_s: int = 0
    revoked_at_s: int = 0


def _endorsed_text(market: str, key: PublicKey) -> bytes:
    """The text that a market's first key signs about another key."""
    return (
        f"kvmarket-endorsement/1\n{market}\n{key.kid}\n{key.not_before_s}\n{key.not_after_s}\n"
    ).encode()


def bound(keys: Sequence[PublicKey]) -> list[PublicKey]:
    """Keys as others gave them, each with its market only where that market's key endorsed it.

    The endorsing key must be among them, and not revoked.
    """
    found = {key.kid: key for key in keys}

    def is_endorsed(key: PublicKey) -> bool:
        first = found.get(key.market)
        if first is None or first.revoked_at_s:
            return False
        return first.verifies(key.endorsement, _endorsed_text(key.market, key))

    return [key if is_endorsed(key) else replace(key, market="", endorsement=b"") for key in keys]


class SigningKey:
    """One key pair of this home; `serial` counts the home's keys, the highest signs."""

    def __init__(
        self,
        private: Ed25519PrivateKey,
        serial: int,
        not_before_s: int = 0,
        not_after_s: int = 0,
    ) -> None:
        self._private = private
        self.serial = serial
        self.not_before_s = not_before_s
        self.not_after_s = not_after_s
        self.public = PublicKey(private.public_key().public_bytes_raw())
        self.kid = self.public.kid

    def sign(self, message: bytes) -> bytes:
        """Sign; 64 bytes, the same each time."""
        return self._private.sign(message)

    def pem(self) -> bytes:
        """Encode as the key's file has it: PKCS #8, behind lines with its serial and validity."""
        encoded = self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        valid = ""
        if self.not_after_s:
            valid = f"Not-Before: {self.not_before_s}\nNot-After: {self.not_after_s}\n"
        return f"Serial: {self.serial}\n{valid}".encode() + encoded


class SigningKeys:
    """The key pairs of one market home; thread-safe, and safe for several processes.

    A home that was restored without its private keys has the public ones, and signs with a new key.
    Every call sees what another process added meanwhile, for the price of one stat(). With `shared`
    other machines know its public keys, and it knows theirs; that asks the database each time.
    """

    def __init__(self, home: Path, shared: SharedKeys | None = None) -> None:
        self._folder = home / KEYS_FOLDER
        self._shared = shared
        self._lock = threading.Lock()
        self._keys: tuple[SigningKey, ...] = ()
        self._public: tuple[tuple[int, PublicKey], ...] = ()
        self._revoked: dict[str, int] = {}
        self._as_of_ns: int | None = None

    def current(self) -> SigningKey:
        """The key that signs; made, and its file with mode 0600, where the home has none.

        A key that was revoked, or whose validity is over, is replaced by a new one. Raises
        ConfigError for a file that is no key.
        """
        found = self._usable()
        if found is None:
            with locked(self._folder):
                # Another process may have been faster: then its key is the home's.
                found = self._usable() or self._make(self._next_serial())
        if self._shared is not None:
            self.own_keys()  # the others know it before they see what it signs
        return found

    def _usable(self) -> SigningKey | None:
        """The newest key, if it may still sign."""
        for key in self._all()[:1]:
            over = 0 < key.not_after_s <= int(time.time())
            if key.kid not in self._revocations() and not over:
                return key
        return None

    def market(self) -> str:
        """The market's name: the kid of its first key that is here and is not revoked."""
        self.current()
        revoked = self._revocations()
        return next(key.kid for key in self._all()[::-1] if key.kid not in revoked)

    def rotate(self) -> SigningKey:
        """Make a new key, which signs from now on; older ones still verify. Raises ConfigError."""
        with locked(self._folder):
            return self._make(self._next_serial())

    def revoke(self, kid: str, reason: str) -> SigningKey:
        """Make a key worthless from now on; return the key of this home that signs.

        Somebody else may have it, so nothing that it ever signed verifies with this home's key set
        any more. When it is the market's first key, the market gets another name. Raises
        NotFoundError for an unknown key.
        """
        if self.find(kid) is None:
            raise NotFoundError(f"no signing key {kid!r}; see `kvmarket key show --all`")
        now_s = int(time.time())
        if self._shared is not None:
            self._shared.revoke(kid, now_s, reason)
        record = json.dumps({"revoked_at_s": now_s, "reason": reason}).encode()
        with locked(self._folder):
            write_durably(self._folder / f"{kid}{REVOKED_SUFFIX}", record)
        return self.current()

    def _revocations(self) -> dict[str, int]:
        """When keys were revoked, here or on another machine, by their kid."""
        return self._revoked | (self._shared.revoked() if self._shared is not None else {})

    def public_keys(self) -> list[PublicKey]:
        """Every key of this home, the one that signs first, then those of the other machines."""
        own = self.own_keys()
        if self._shared is None:
            return own
        kids, revoked = {key.kid for key in own}, self._revocations()
        others = [key for key in self._shared.signers() if key.kid not in kids]
        marked = [replace(key, revoked_at_s=revoked.get(key.kid, 0)) for key in others]
        return [*own, *bound(marked)]

    def own_keys(self) -> list[PublicKey]:
        """Every key of this home, the one that signs first; none where none was used yet.

        The other machines know them on return.
        """
        pairs = self._all()
        revoked = self._revocations()
        first = next((pair for pair in pairs[::-1] if pair.kid not in revoked), None)
        later = {pair.kid for pair in pairs if first is not None and pair is not first}
        keys = []
        for _, known in self._public:
            revoked_at_s = revoked.get(known.kid, known.revoked_at_s)
            key = replace(known, revoked_at_s=revoked_at_s)
            if first is not None and key.kid in later:
                signature = first.sign(_endorsed_text(first.kid, key))
                keys.append(replace(key, market=first.kid, endorsement=signature))
            else:
                keys.append(key)
        if self._shared is not None:
            self._shared.announce(keys, self._revoked.items())
        return bound(keys)

    def find(self, kid: str) -> PublicKey | None:
        """One of the market's keys, to verify what it signed before or after a rotation."""
        return next((key for key in self.public_keys() if key.kid == kid), None)

    def jwks(self) -> dict[str, list[dict[str, Any]]]:
        """Give all public keys as a JWK set."""
        return {"keys": [key.jwk() for key in self.public_keys()]}

    def public_files(self) -> dict[str, bytes]:
        """The public keys as files of the folder, by name, to restore a home without secrets."""
        self._all()
        return {
            f"{key.kid}{JWK_SUFFIX}": json.dumps({**key.jwk(), "serial": serial}).encode()
            for (serial, _), key in zip(self._public, self.own_keys(), strict=True)
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
                self._keys, self._public, self._revoked = (), (), {}
                return ()
            if changed_ns != self._as_of_ns:
                files = sorted(self._folder.glob(f"*{KEY_SUFFIX}"))
                read = [_read_key(file) for file in files if not file.name.startswith(".")]
                self._keys = tuple(sorted(read, key=lambda key: (-key.serial, key.kid)))
                self._revoked = {
                    file.name.removesuffix(REVOKED_SUFFIX): json.loads(file.read_bytes())[
                        "revoked_at_s"
                    ]
                    for file in self._folder.glob(f"[!.]*{REVOKED_SUFFIX}")
                }
                found = {
                    key.kid: (
                        key.serial,
                        replace(
                            key.public,
                            not_before_s=key.not_before_s,
                            not_after_s=key.not_after_s,
                        ),
                    )
                    for key in self._keys
                }
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
        now_s = int(time.time())
        validity = (serial, now_s, now_s + VALID_S)
        key = SigningKey(Ed25519PrivateKey.generate(), *validity)
        while key.kid.startswith("-"):
            # On a command line such a name would be taken for an option.
            key = SigningKey(Ed25519PrivateKey.generate(), *validity)
        write_durably(self._folder / f"{key.kid}{KEY_SUFFIX}", key.pem())
        return key


def _serial_in(file: Path) -> int:
    serial = json.loads(file.read_bytes()).get("serial")
    return serial if isinstance(serial, int) else 0


def _read_key(file: Path) -> SigningKey:
    content = file.read_bytes()
    head = _HEAD.match(content)
    try:
        private = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(
            f"{file}: not an Ed25519 key without a password; restore it from a backup, or move it "
            "away (what it signed then cannot be verified here)"
        )
    if head is None:
        return SigningKey(private, 0)
    return SigningKey(private, *(int(number or 0) for number in head.groups()))


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
    return bound([PublicKey.of_jwk(key, str(path)) for key in keys])


class TrustedKeys:
    """The keys whose bundles a home imports: one file each under `trusted`. A user may add some.

    With `shared` they are in the database instead, for all machines.
    """

    def __init__(self, home: Path, shared: SharedKeys | None = None) -> None:
        self._folder = home / TRUSTED_FOLDER
        self._shared = shared

    def all(self) -> dict[str, PublicKey]:
        """Every trusted key by its kid. Raises ConfigError for a file that is no key."""
        if self._shared is not None:
            return self._shared.trusted()
        return {key.kid: key for _, key in self._files()}

    def add(self, key: PublicKey) -> bool:
        """Trust a key from now on; False if it was trusted before."""
        if self._shared is not None:
            return self._shared.trust(key)
        if key.kid in self.all():
            return False
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = json.dumps(key.jwk(), indent=2) + "\n"
        write_durably(self._folder / f"{key.kid}{JWK_SUFFIX}", content.encode(), mode=0o644)
        return True

    def remove(self, kid: str) -> None:
        """Trust a key no more; what was imported stays. Raises NotFoundError."""
        if self._shared is not None:
            files, is_known = [], self._shared.distrust(kid)
        else:
            files = [file for file, key in self._files() if key.kid == kid]
            is_known = bool(files)
        if not is_known:
            hint = "" if _KID.fullmatch(kid) else ", a key's id has 43 characters"
            raise NotFoundError(f"no trusted key {kid!r}{hint}; see `kvmarket trust list`")
        for file in files:
            file.unlink(missing_ok=True)
        if files:
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
