"""Writing a document into a signed bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from blake3 import blake3

from vllm_kvmarket.auth.signing_keys import SIGNATURE_BYTES, SigningKeys
from vllm_kvmarket.bundles.format import (
    BLOCK,
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    NO_DIGEST,
    SIGNATURE,
    BundledChunk,
    File,
    Manifest,
    Progress,
    Share,
    arrange,
    header,
    padded,
    pieces,
    write,
)
from vllm_kvmarket.core.durable_files import durable_file
from vllm_kvmarket.core.errors import BundleError, ChunkMissingError, StoreError
from vllm_kvmarket.core.model_identity import pack_tokens
from vllm_kvmarket.market.market import Market


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """What `export` wrote."""

    document_id: str
    path: Path
    bytes: int
    kid: str


def export(
    market: Market, document_id: str, path: Path, on_progress: Progress | None = None
) -> Exported:
    """Write a live document into one file, signed with the home's key; replaces what is at `path`.

    `on_progress` is told of bytes done and of all. Raises NotFoundError; BundleError for a document
    that is not live or a file that cannot be written; ChunkMissingError, ChunkDamagedError,
    StoreError. The file is there whole and durable, or as it was before.
    """
    listing = market.catalogue.get(document_id)
    if listing.state != "live":
        raise BundleError(f"{document_id} is {listing.state}; only a live document can be exported")
    key = SigningKeys(market.home).current()
    chunks = tuple(_survey(market, chunk) for chunk in listing.chunk_keys)
    manifest = Manifest(
        format=FORMAT,
        exporter=key.public.jwk(),
        exported_at_s=time.time(),
        document_id=document_id,
        namespace=listing.namespace.hex(),
        title=listing.title,
        publisher=listing.publisher,
        rendered_as=listing.rendered_as,
        cache_read_nano_per_mtok=listing.cache_read_nano_per_mtok,
        royalty_ppm=listing.royalty_ppm,
        created_at_s=listing.created_at_s,
        expires_at_s=listing.expires_at_s,
        chunk_tokens=market.config.chunk_tokens,
        tokens=pack_tokens(market.catalogue.tokens_of(document_id)),
        chunks=chunks,
    )
    # Digests are of one length, so that the manifest's place is known before they are.
    front = len(msgspec.json.encode(manifest))
    if front > MAX_MANIFEST_BYTES:
        raise BundleError(f"{document_id} has too many tokens for a bundle")
    files, size = arrange(manifest, front)
    with _written_whole(path) as descriptor:
        os.ftruncate(descriptor, size)
        digests = {}
        for file in files:
            write(descriptor, header(file.name, file.share.bytes), file.position - BLOCK)
            digests[file.place] = _copy_out(market, file, descriptor)
            if on_progress:
                on_progress(file.position + file.share.bytes, size)
        signed = msgspec.json.encode(_with_digests(manifest, digests))
        assert len(signed) == front
        write(descriptor, header(MANIFEST, front) + signed, 0)
        signature = header(SIGNATURE, SIGNATURE_BYTES) + key.sign(signed)
        write(descriptor, signature, BLOCK + padded(front))
    return Exported(document_id, path, size, key.kid)


def _survey(market: Market, key: bytes) -> BundledChunk:
    """Find a chunk's files and their sizes; sets of which a rank is missing are left out."""
    there = set(market.store.shares(key))
    shares = []
    for rank, world_size in sorted(there, key=lambda share: (share[1], share[0])):
        if all((other, world_size) in there for other in range(world_size)):
            market.store.fetch(key, rank, world_size)
            try:
                size = market.store.path(key, rank, world_size).stat().st_size
            except FileNotFoundError:
                raise _gone(key.hex()) from None
            shares.append(Share(rank, world_size, size, NO_DIGEST))
    if not shares:
        raise ChunkMissingError(
            f"{key.hex()}: not every rank's file is in the store; publish its document again"
        )
    return BundledChunk(key.hex(), tuple(shares))


def _gone(name: str) -> StoreError:
    return StoreError(
        f"{name}: left the disk while it was exported; export again, with a larger disk quota when "
        "the disk is a cache"
    )


def _copy_out(market: Market, file: File, descriptor: int) -> str:
    """Copy a chunk's file into the bundle; its digest."""
    digest = blake3()
    position = file.position
    with market.store.open_share(*file.place) as chunk:
        chunk.verify()
    try:
        source = market.store.path(*file.place).open("rb", buffering=0)
    except FileNotFoundError:
        raise _gone(file.name) from None
    with source:
        for piece in pieces(source.fileno(), 0, file.share.bytes):
            digest.update(piece)
            write(descriptor, piece, position)
            position += len(piece)
        size = os.fstat(source.fileno()).st_size
    if size != file.share.bytes or position != file.position + size:
        raise BundleError(f"{file.name} was replaced while it was exported; export again")
    return digest.hexdigest()


def _with_digests(manifest: Manifest, digests: dict[tuple[bytes, int, int], str]) -> Manifest:
    replace = msgspec.structs.replace
    chunks = tuple(
        replace(
            chunk,
            shares=tuple(
                replace(
                    share,
                    blake3=digests[bytes.fromhex(chunk.key), share.rank, share.world_size],
                )
                for share in chunk.shares
            ),
        )
        for chunk in manifest.chunks
    )
    return replace(manifest, chunks=chunks)


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[int]:
    try:
        with durable_file(path, mode=0o644) as descriptor:
            yield descriptor
    except OSError as error:
        raise BundleError(
            f"cannot write {path} ({error.strerror}); make room, or name another file"
        ) from error
