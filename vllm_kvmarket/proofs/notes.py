"""Checkpoints and proofs as text, in the forms of C2SP, and their verification without a market.

A checkpoint says: the log `origin` has `size` leaves and this root. It is a signed note:

    kvmarket/<kid of the home's first key>
    20852163
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

    — kvmarket/<the same> <base64 of 4 bytes of key id and the Ed25519 signature of the text above>

Sources: https://c2sp.org/tlog-checkpoint, https://c2sp.org/signed-note, https://c2sp.org/tlog-proof.
The text begins with "kvmarket/", which neither a bundle's manifest nor a JWS does (see signing.py).
The origin stays the same when keys are rotated: the first key endorses the later ones.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from vllm_kvmarket.auth.signing_keys import SIGNATURE_BYTES, PublicKey, SigningKey
from vllm_kvmarket.core.errors import ProofError
from vllm_kvmarket.proofs import merkle
from vllm_kvmarket.proofs.leaves import Leaf, read_entry

ORIGIN_PREFIX = "kvmarket/"
MAX_NOTE_CHARACTERS = 100_000
PROOF_HEADER = "c2sp.org/tlog-proof@v1"
_ED25519 = b"\1"
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log's statement about itself, and the signed note that contains it."""

    origin: str
    size: int
    root: bytes
    note: str


@dataclass(frozen=True, slots=True)
class InclusionProof:
    """That an entry is a leaf of a checkpoint's tree. Unverified until `verify` has returned."""

    index: int
    entry: bytes
    path: tuple[bytes, ...]
    checkpoint: Checkpoint

    def text(self) -> str:
        """Write the proof as c2sp.org/tlog-proof has it, with the entry as its extra data."""
        path = [encode_base64(each) for each in self.path]
        front = [PROOF_HEADER, f"extra {encode_base64(self.entry)}", f"index {self.index}", *path]
        return "\n".join(front) + "\n\n" + self.checkpoint.note

    def verify(self, keys: Iterable[PublicKey]) -> Leaf:
        """Check signature and path with the log's public keys; the transfer. Raises ProofError."""
        checkpoint = verify_checkpoint(self.checkpoint.note, keys)
        leaf = read_entry(self.entry)
        root = merkle.root_of_path(
            merkle.leaf_hash(self.entry), self.index, checkpoint.size, self.path
        )
        if root != checkpoint.root:
            raise ProofError(
                f"transfer {leaf.id} is not leaf {self.index} of the log of {checkpoint.size}: "
                "its path leads to another root"
            )
        return leaf


class ConsistencyProof(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """That a log only grew: hashes in base64, and the two checkpoints where they were signed."""

    old_size: int
    new_size: int
    old_root: str
    new_root: str
    path: tuple[str, ...]
    old_checkpoint: str = ""
    new_checkpoint: str = ""

    def verify(self, keys: Iterable[PublicKey]) -> None:
        """Check the path, and the signed checkpoints that there are. Raises ProofError."""
        known = list(keys)
        roots = [decode_base64(self.old_root), decode_base64(self.new_root)]
        path = [decode_base64(each) for each in self.path]
        merkle.verify_consistency(self.old_size, self.new_size, roots[0], roots[1], path)
        origins = set()
        for note, size, root in (
            (self.old_checkpoint, self.old_size, roots[0]),
            (self.new_checkpoint, self.new_size, roots[1]),
        ):
            if note:
                checkpoint = verify_checkpoint(note, known)
                origins.add(checkpoint.origin)
                if (checkpoint.size, checkpoint.root) != (size, root):
                    raise ProofError(f"the checkpoint of {size} leaves has another size or root")
        if len(origins) > 1:
            raise ProofError("the two checkpoints are of different logs")


def key_id(name: str, key: PublicKey) -> bytes:
    """The 4 bytes that name a key in a signed note."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + key.raw).digest()[:4]


def verifier_key(name: str, key: PublicKey) -> str:
    """The key as tools for signed notes take it: name+key id+base64."""
    return f"{name}+{key_id(name, key).hex()}+{encode_base64(_ED25519 + key.raw)}"


def sign_checkpoint(origin: str, size: int, root: bytes, key: SigningKey) -> Checkpoint:
    """Sign what a log says of itself."""
    text = f"{origin}\n{size}\n{encode_base64(root)}\n"
    signature = encode_base64(key_id(origin, key.public) + key.sign(text.encode()))
    return Checkpoint(origin, size, root, f"{text}\n— {origin} {signature}\n")


def is_signed_by(note: str, key: PublicKey) -> bool:
    """Whether a note has a signature by this key that holds."""
    try:
        return signer_of(note, [key]) == key
    except ProofError:
        return False


def signer_of(note: str, keys: Iterable[PublicKey]) -> PublicKey:
    """Who of `keys` signed a note. Raises ProofError when nobody did."""
    text, signatures = _divide(note)
    known = list(keys)
    for line in signatures:
        name, signature = _signature(line)
        for key in known:
            if signature[:4] == key_id(name, key):
                if key.revoked_at_s:
                    raise ProofError(f"it is signed by {key.kid}, a key that was revoked")
                if not key.verifies(signature[4:], text.encode()):
                    raise ProofError(f"the signature of {name} is wrong: the text was changed")
                return key
    names = ", ".join(sorted({_signature(line)[0] for line in signatures}))
    raise ProofError(
        f"it is signed by {names} with a key that is not among the {len(known)} known; "
        "get the log's keys with `kvmarket key show --all`"
    )


def verify_checkpoint(note: str, keys: Iterable[PublicKey]) -> Checkpoint:
    """Read a checkpoint that one of `keys` signed. Raises ProofError."""
    signer = signer_of(note, keys)
    checkpoint = read_checkpoint(note)
    if not signer.may_sign_for(market_of(checkpoint.origin)):
        raise ProofError(
            f"it is signed by {signer.kid}, which the market of {checkpoint.origin} has not "
            "endorsed; get that market's keys with `kvmarket key show --all`"
        )
    if not any(_signature(line)[0] == checkpoint.origin for line in _divide(note)[1]):
        raise ProofError("it is not signed in the name of its origin")
    return checkpoint


def market_of(origin: str) -> str:
    """The first key's kid in an origin: the market's name, without the number of an epoch."""
    return origin.removeprefix(ORIGIN_PREFIX).partition("/")[0]


def read_checkpoint(note: str) -> Checkpoint:
    """Read a checkpoint without asking who signed it. Raises ProofError for a malformed one."""
    lines = _divide(note)[0].splitlines()
    if len(lines) != 3 or not lines[0].startswith(ORIGIN_PREFIX) or not _SIZE.fullmatch(lines[1]):
        raise ProofError(f"no checkpoint: expected a line {ORIGIN_PREFIX}..., a size and a root")
    root = decode_base64(lines[2])
    if len(root) != merkle.HASH_BYTES:
        raise ProofError(f"no checkpoint: its root has {len(root)} bytes")
    return Checkpoint(lines[0], int(lines[1]), root, note)


def read_inclusion(text: str) -> InclusionProof:
    """Read what InclusionProof.text wrote. Raises ProofError."""
    head, _, note = text[:MAX_NOTE_CHARACTERS].partition("\n\n")
    lines = head.split("\n")
    if (
        len(lines) < 3
        or lines[0] != PROOF_HEADER
        or not lines[1].startswith("extra ")
        or not (index := re.fullmatch(r"index (0|[1-9][0-9]{0,18})", lines[2]))
    ):
        raise ProofError(f"no proof: expected {PROOF_HEADER}, the entry and its index")
    return InclusionProof(
        int(index[1]),
        decode_base64(lines[1].removeprefix("extra ")),
        tuple(decode_base64(line) for line in lines[3:]),
        read_checkpoint(note),
    )


def _divide(note: str) -> tuple[str, list[str]]:
    """A note's text, and its lines of signatures."""
    text, blank, signatures = note.rpartition("\n\n")
    lines = signatures.split("\n")[:-1]
    if (
        not blank
        or not lines
        or len(note) > MAX_NOTE_CHARACTERS
        or not note.endswith("\n")
        or not all(char == "\n" or char >= " " for char in note)
    ):
        raise ProofError("no signed note: expected a text, an empty line and signatures")
    return text + "\n", lines


def _signature(line: str) -> tuple[str, bytes]:
    """The name and the bytes of a line of signature; none for one of another algorithm."""
    mark, _, rest = line.partition(" ")
    name, _, encoded = rest.partition(" ")
    if mark != "—" or not name or "+" in name:
        raise ProofError("no signed note: a signature is spelled as \N{EM DASH} NAME BASE64")
    signature = decode_base64(encoded)
    return name, signature if len(signature) == 4 + SIGNATURE_BYTES else b""


def encode_base64(content: bytes) -> str:
    """Standard base64, as C2SP's texts have it."""
    return base64.b64encode(content).decode()


def decode_base64(text: str) -> bytes:
    """Decode `encode_base64`'s spelling. Raises ProofError for any other."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if encode_base64(content) != text:
        raise ProofError(f"{text[:80]!r} is not base64")
    return content
