"""Writing a document into a signed bundle, and taking one in: all of it, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
from blake3 import blake3

from vllm_kvmarket.auth.signing_keys import (
    SIGNATURE_BYTES,
    PublicKey,
    read_jwks,
)
from vllm_kvmarket.bundles.bundle_format import (
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
    Reader,
    Share,
    arrange,
    check,
    header,
    opened,
    padded,
    pieces,
    write,
)
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.durable_files import durable_file
from vllm_kvmarket.core.errors import (
    BundleError,
    ChunkDamagedError,
    ChunkMissingError,
    NotFoundError,
    StoreError,
)
from vllm_kvmarket.core.model_identity import pack_tokens
from vllm_kvmarket.ledger import ACCOUNT_ID
from vllm_kvmarket.market.garbage_collection import release_refuted, release_unneeded
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.store import open_chunk
from vllm_kvmarket.store.packings import own_share


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """The result of `export`."""

    document_id: str
    path: Path
    bytes: int
    kid: str


def export(
    market: Market, document_id: str, path: Path, on_progress: Progress | None = None
) -> Exported:
    """Write a live document into one file, signed with the home's key; replaces what is at `path`.

    `on_progress` gets the bytes done and all bytes. Raises NotFoundError; BundleError for a
    document that is not live or a file that cannot be written; ChunkMissingError,
    ChunkDamagedError, StoreError. The file is there whole and durable, or as it was before.
    """
    listing = market.catalogue.get(document_id)
    if listing.state != "live":
        raise BundleError(f"{document_id} is {listing.state}; only a live document can be exported")
    key = market.signing_keys.current()
    chunks = tuple(_survey(market, chunk) for chunk in listing.chunk_keys)
    manifest = Manifest(
        format=FORMAT,
        exporter=key.public.jwk(),
        exported_at_s=time.time(),
        document_id=document_id,
        namespace=listing.namespace.hex(),
        terms=listing.terms,
        created_at_s=listing.created_at_s,
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
    there = set(market.store.files(key))
    shares = []
    for each in sorted(there, key=lambda share: (share[1:], share[0])):
        if all(each._replace(rank=other) in there for other in range(each.world_size)):
            market.store.fetch(key, *each)
            try:
                size = market.store.disk.path(key, *each).stat().st_size
            except FileNotFoundError:
                raise _gone(key.hex()) from None
            shares.append(Share(each.rank, each.world_size, size, NO_DIGEST, each.layout))
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
    key, rank, world_size, layout = file.place
    with market.store.open_share(key, rank, world_size, layout=layout) as chunk:
        chunk.verify()
    try:
        source = market.store.disk.path(*file.place).open("rb", buffering=0)
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


def _with_digests(manifest: Manifest, digests: dict[tuple[bytes, int, int, str], str]) -> Manifest:
    replace = msgspec.structs.replace
    chunks = tuple(
        replace(
            chunk,
            shares=tuple(
                replace(
                    share,
                    blake3=digests[File(bytes.fromhex(chunk.key), share, 0).place],
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


def trusted_keys(market: Market, files: Iterable[Path] = ()) -> list[PublicKey]:
    """Whose bundles are imported: the market's own, those it trusts, and those in `files` (JWK).

    Raises ConfigError for a file that is no key.
    """
    own = market.signing_keys.public_keys()
    return [
        *own,
        *market.trusted_keys.all().values(),
        *(key for file in files for key in read_jwks(file)),
    ]


def import_(
    market: Market,
    path: Path,
    trusted: Iterable[PublicKey],
    *,
    publisher: str | None = None,
    relist: bool = False,
    on_progress: Progress | None = None,
) -> Listing:
    """Take a bundle in and put its document on offer; returns its listing.

    The account that earns is the one of the bundle's publisher's name here, or `publisher`. A
    document that is on offer already keeps its terms, and is repaired; one that this market
    delisted is refused, unless `relist`. `on_progress` gets the bytes stored and all bytes.

    Raises BundleError with the reason, and what the store raises (StoreFullError). Then nothing is
    listed, and every chunk that was stored for it and that no other listing needs is gone.
    """
    market.identity.confirm()
    with opened(path) as descriptor:
        reader = Reader(descriptor, path.name)
        # Of two copies of a key, the one that says that it was revoked is believed.
        by_kid = {key.kid: key for key in sorted(trusted, key=lambda key: key.revoked_at_s)}
        manifest = reader.manifest(by_kid)
        document = check(manifest, path.name, market.config.chunk_tokens)
        terms = manifest.terms
        if publisher:
            terms = msgspec.structs.replace(terms, publisher=publisher)
        listing = Listing.of(document, terms, created_at_s=manifest.created_at_s)
        offered = _check_home(market, listing, path.name, relist=relist)
        files = reader.files()
        stored: dict[bytes, int] = {}
        release_refuted(market, document.keys)
        try:
            _store_files(market, reader, files, stored, on_progress)
            _note_stored(market, files)
            market.catalogue.heal(*listing.chunk_keys)
            if not offered:
                market.create_account(terms.publisher, "publisher")
                made = dataclasses.replace(listing, stored_bytes=sum(stored.values()))
                market.catalogue.adopt(made, document, force=relist)
        except BaseException:
            # What the object store keeps because it does not answer is left to the next gc.
            with contextlib.suppress(StoreError):
                release_unneeded(market, list(stored))
            raise
        _store_again(market, reader, files)
        # Another process's gc may have forgotten them with what it took.
        _note_stored(market, files)
    return market.catalogue.get(listing.document_id)


def _note_stored(market: Market, files: Sequence[File]) -> None:
    stored = [market.store.describe(*file.place) for file in files]
    market.catalogue.shares.note([share for share in stored if share is not None])


def _store_again(market: Market, reader: Reader, files: Sequence[File]) -> None:
    """Store what another process's gc took before the listing protected it."""
    missing = [file for file in files if not market.store.has(*file.place)]
    if not missing:
        return
    try:
        _store_files(market, reader, missing, {}, None)
    except BaseException:
        for file in missing:
            market.catalogue.report_damage(file.key)
        raise
    market.catalogue.heal(*(file.key for file in missing))


def _store_files(
    market: Market,
    reader: Reader,
    files: Sequence[File],
    stored: dict[bytes, int],
    on_progress: Progress | None,
) -> None:
    """Store those files that the store does not have whole; notes in `stored` what was written."""
    total, done = sum(file.share.bytes for file in files), 0
    for file in files:
        if not _has_whole(market, file):
            # Noted first: what is interrupted may have been stored already.
            stored[file.key] = stored.get(file.key, 0) + file.share.bytes
            try:
                key, rank, world_size, layout = file.place
                size = file.share.bytes
                with market.store.receive(key, rank, world_size, size, layout) as target:
                    reader.copy(file, target)
            except ChunkDamagedError as error:
                raise BundleError(
                    f"{reader.name}: its exporter signed a damaged chunk ({error})"
                ) from error
        done += file.share.bytes
        if on_progress:
            on_progress(done, total)


def _has_whole(market: Market, file: File) -> bool:
    """Whether the store has the chunk's file already, durable and whole, in any layout."""
    try:
        with open_chunk(market.store.disk.path(*file.place), file.key) as chunk:
            chunk.verify()
        market.store.disk.make_durable(*file.place)
    except StoreError:
        return False
    return own_share(chunk.header.layout) == file.place[1:] and market.store.make_durable(
        *file.place
    )


def _check_home(market: Market, listing: Listing, name: str, *, relist: bool) -> bool:
    """See that this home can take the listing; whether it is on offer here already."""
    with contextlib.suppress(NotFoundError):
        state = market.catalogue.get(listing.document_id).state
        if state in ("live", "damaged"):
            return True
        if state == "delisted" and not relist:
            raise BundleError(
                f"{name}: {listing.document_id} was delisted here; import it with --relist to put "
                "it on offer again"
            )
    earner = listing.terms.publisher
    if not ACCOUNT_ID.fullmatch(earner):
        raise BundleError(f"{name}: {earner!r} is no account's id; name another one")
    with contextlib.suppress(NotFoundError):
        kind = market.ledger.account(earner).kind
        if kind != "publisher":
            raise BundleError(
                f"{name}: its publisher {earner!r} is a {kind} here; name the account "
                "that earns with --publisher"
            )
    return False
