"""The bundle's format: its manifest, its tar, and reading it without believing it.

    manifest.json       the listing, its tokens, and size and BLAKE3 of each chunk file
    manifest.sig        Ed25519 over exactly manifest.json's bytes, 64 bytes
    chunks/NAME.kv ...  each chunk's files as the store has them, in the manifest's order

These members, in this order and nothing else, in an uncompressed tar. Nothing is unpacked by the
names that a file gives: the signed manifest says what must come next, and where.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from blake3 import blake3

from vllm_kvmarket.auth.signing_keys import SIGNATURE_BYTES, PublicKey
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import BundleError, ConfigError
from vllm_kvmarket.core.listing_terms import YEAR_9999_S, ListingTerms
from vllm_kvmarket.core.model_identity import TOKEN_BYTES, unpack_tokens
from vllm_kvmarket.store.chunk_format import chunk_name

FORMAT = "kvmarket-bundle/1"
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
# A document of ten million tokens has a manifest of 60 MB.
MAX_MANIFEST_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
BLOCK = tarfile.BLOCKSIZE
NO_DIGEST = "0" * 64

Progress = Callable[[int, int], None]
Hex = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Moment = Annotated[float, msgspec.Meta(ge=0, le=YEAR_9999_S)]


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One rank's file of a chunk; `layout` as in store.chunk_format.Share."""

    rank: Natural
    world_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    bytes: Annotated[int, msgspec.Meta(gt=0, lt=1 << 50)]
    blake3: Hex
    layout: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{16})?$")] = ""


class BundledChunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A chunk and its files: for each number of ranks and layout, every rank's."""

    key: Hex
    shares: Annotated[tuple[Share, ...], msgspec.Meta(min_length=1)]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part that the exporter signs. `tokens` are packed little-endian uint32."""

    format: str
    exporter: dict[str, str]
    exported_at_s: Moment
    document_id: str
    namespace: Hex
    terms: ListingTerms
    created_at_s: Moment
    chunk_tokens: Annotated[int, msgspec.Meta(gt=0)]
    tokens: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES)]
    chunks: Annotated[tuple[BundledChunk, ...], msgspec.Meta(min_length=1)]


class _Claim(msgspec.Struct, frozen=True):
    """As much of a manifest as is read before its signature holds."""

    format: str
    exporter: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """One chunk file of a bundle: what it is, and where its bytes begin."""

    key: bytes
    share: Share
    position: int

    @property
    def place(self) -> tuple[bytes, int, int, str]:
        """How the store names it."""
        return self.key, self.share.rank, self.share.world_size, self.share.layout

    @property
    def name(self) -> str:
        """How the bundle names it."""
        return f"chunks/{chunk_name(*self.place).rpartition('/')[2]}"


def padded(size: int) -> int:
    """Round up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def arrange(manifest: Manifest, manifest_bytes: int) -> tuple[list[File], int]:
    """Say where a bundle's chunk files begin, and how many bytes the whole file has."""
    position = 3 * BLOCK + padded(manifest_bytes) + padded(SIGNATURE_BYTES)
    files = []
    for chunk in manifest.chunks:
        for share in chunk.shares:
            files.append(File(bytes.fromhex(chunk.key), share, position))
            position += padded(share.bytes) + BLOCK
    # `position` is past a header that does not follow: one of the two empty blocks at the end.
    record = tarfile.RECORDSIZE
    return files, -(-(position + BLOCK) // record) * record


def header(name: str, size: int) -> bytes:
    """Encode what stands in front of a member, one block."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)


def pieces(descriptor: int, position: int, size: int) -> Iterator[bytes]:
    """Read up to `size` bytes from there on, piece by piece; fewer where the file ends sooner."""
    while size:
        piece = os.pread(descriptor, min(size, _PIECE_BYTES), position)
        if not piece:
            return
        yield piece
        position += len(piece)
        size -= len(piece)


def write(descriptor: int, content: bytes, position: int) -> None:
    """Write all of it there."""
    view = memoryview(content)
    while view:
        done = os.pwrite(descriptor, view, position)
        view, position = view[done:], position + done


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor for reading a bundle's file. Raises BundleError when it is no ordinary file."""
    try:
        # O_NONBLOCK keeps us from waiting for ever on a named pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"cannot read {path} ({error.strerror}); name a bundle") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BundleError(f"{path} is no ordinary file; name a bundle")
        yield descriptor
    finally:
        os.close(descriptor)


class Reader:
    """Reads a bundle's file, and says in one line what is wrong with it."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._position = 0
        self._files: list[File] = []
        self._end = 0

    def manifest(self, trusted: Mapping[str, PublicKey]) -> Manifest:
        """Read the manifest, signed by one of `trusted`, which has their kids as its keys.

        Raises BundleError. Needs at most MAX_MANIFEST_BYTES of memory for any file.
        """
        encoded = self._content(MANIFEST, None)
        signature = self._content(SIGNATURE, SIGNATURE_BYTES)
        manifest = self._signed(encoded, signature, trusted)
        self._files, self._end = arrange(manifest, len(encoded))
        return manifest

    def files(self) -> list[File]:
        """Verify every byte behind the manifest; the chunk files. Raises BundleError."""
        for file in self._files:
            self._enter(file.name, file.share.bytes)
            self._position = file.position + padded(file.share.bytes)
        if self._size != self._end:
            behind = (
                "bytes behind its end" if self._size > self._end else "bytes missing at its end"
            )
            raise self._refuse(f"{abs(self._size - self._end)} {behind}")
        for file in self._files:
            self.copy(file, None)
            self._position = file.position + file.share.bytes
            self._expect_zeros(padded(file.share.bytes) - file.share.bytes)
        self._expect_zeros(self._end - self._position)
        return self._files

    def copy(self, file: File, target: int | None) -> None:
        """Read a chunk's file, into `target` if there is one; raises BundleError when it differs
        from what was signed, after it was written.
        """
        digest = blake3()
        done = 0
        for piece in pieces(self._descriptor, file.position, file.share.bytes):
            digest.update(piece)
            if target is not None:
                write(target, piece, done)
            done += len(piece)
        if digest.hexdigest() != file.share.blake3:
            raise self._refuse(f"{file.name} is not what its exporter signed")

    def _signed(
        self, encoded: bytes, signature: bytes, trusted: Mapping[str, PublicKey]
    ) -> Manifest:
        """Decode the manifest, which is believed only when someone who is trusted signed it."""
        try:
            claim = msgspec.json.decode(encoded, type=_Claim)
            kid = PublicKey.of_jwk(claim.exporter).kid
        except (msgspec.MsgspecError, ValueError, RecursionError, ConfigError) as error:
            raise self._refuse(f"unreadable manifest: {error}") from None
        if claim.format != FORMAT:
            raise self._refuse(f"has format {claim.format[:40]!r}, this kvmarket reads {FORMAT}")
        key = trusted.get(kid)
        if key is None:
            raise BundleError(
                f"{self.name}: signed by {kid}, which this market does not trust; when that is the "
                "id of its exporter's key, get the key from them, and run `kvmarket trust add FILE`"
            )
        if key.revoked_at_s:
            raise BundleError(
                f"{self.name}: signed by {kid}, a key that was revoked; ask for a bundle that was "
                "exported again"
            )
        if not key.verifies(signature, encoded):
            raise self._refuse(f"its manifest is not what {kid} signed")
        try:
            return msgspec.json.decode(encoded, type=Manifest)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise self._refuse(f"unreadable manifest: {error}") from None

    def _content(self, member: str, size: int | None) -> bytes:
        size = self._enter(member, size)
        content = b"".join(pieces(self._descriptor, self._position, size))
        if len(content) != size:
            raise self._refuse(f"ends inside {member}")
        self._position += size
        self._expect_zeros(padded(size) - size)
        return content

    def _enter(self, member: str, size: int | None) -> int:
        """Read the header in front of a member, and go behind it; the member's size."""
        header = os.pread(self._descriptor, BLOCK, self._position)
        if len(header) < BLOCK:
            raise self._refuse(f"ends before {member}")
        try:
            found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise self._refuse(f"no tar header in front of {member} ({error})") from None
        if found.name != member:
            raise self._refuse(f"has {found.name[:200]!a} in place of {member}")
        if found.type != tarfile.REGTYPE:
            raise self._refuse(f"{member} is a link or something else than an ordinary file")
        if size is None and not 0 < found.size <= MAX_MANIFEST_BYTES:
            raise self._refuse(f"{member} of {found.size} bytes")
        if size is not None and found.size != size:
            raise self._refuse(f"{member} has {found.size} bytes instead of {size}")
        self._position += BLOCK
        return int(found.size)

    def _expect_zeros(self, size: int) -> None:
        for piece in pieces(self._descriptor, self._position, size):
            if piece.strip(b"\0"):
                raise self._refuse(f"something is hidden around byte {self._position}")
        self._position += size

    def _refuse(self, what: str) -> BundleError:
        return BundleError(f"{self.name}: {what}; it was damaged or tampered with: get it again")


def check(manifest: Manifest, name: str, chunk_tokens: int) -> DocumentChunks:
    """See that a signed manifest does not contradict itself; its chunks. Raises BundleError."""
    if manifest.chunk_tokens != chunk_tokens:
        raise BundleError(
            f"{name}: its chunks have {manifest.chunk_tokens} tokens, this market's "
            f"{chunk_tokens}; import it into a home with the same chunk_tokens"
        )
    if len(manifest.tokens) % TOKEN_BYTES:
        raise BundleError(f"{name}: its tokens are not packed in {TOKEN_BYTES} bytes each")
    ends_at_s = manifest.terms.expires_at_s
    if ends_at_s is not None and ends_at_s <= time.time():
        raise BundleError(f"{name}: its time to live is over; ask its exporter for a newer one")
    tokens = unpack_tokens(manifest.tokens)
    document = DocumentChunks.of(bytes.fromhex(manifest.namespace), tokens, chunk_tokens)
    if [key.hex() for key in document.keys] != [chunk.key for chunk in manifest.chunks]:
        raise BundleError(f"{name}: its chunks are not those of its tokens")
    if document.document_id != manifest.document_id:
        raise BundleError(f"{name}: {manifest.document_id} is not the id of its tokens")
    for chunk in manifest.chunks:
        shares = [(share.rank, (share.world_size, share.layout)) for share in chunk.shares]
        kinds = {kind for _, kind in shares}
        whole = {(rank, kind) for kind in kinds for rank in range(kind[0])}
        if len(shares) != len(whole) or set(shares) != whole:
            raise BundleError(f"{name}: chunk {chunk.key} is not there with every rank's file once")
    return document
