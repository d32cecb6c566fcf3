"""Taking a signed bundle in: all of it, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from vllm_kvmarket.auth.signing_keys import PublicKey, SigningKeys, TrustedKeys, read_jwks
from vllm_kvmarket.bundles.format import File, Manifest, Progress, Reader, check, opened
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.errors import BundleError, ChunkDamagedError, NotFoundError, StoreError
from vllm_kvmarket.ledger import ACCOUNT_ID
from vllm_kvmarket.market import shared_bucket
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.store import open_chunk


def trusted_keys(market: Market, files: Iterable[Path] = ()) -> list[PublicKey]:
    """Whose bundles are imported: the home's own, those it trusts, and those in `files` (JWK).

    Raises ConfigError for a file that is no key.
    """
    own = SigningKeys(market.home).public_keys()
    return [
        *own,
        *TrustedKeys(market.home).all().values(),
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
    delisted is refused, unless `relist`. `on_progress` is told of bytes stored and of all.

    Raises BundleError with the reason, and what the store raises (StoreFullError). Then nothing is
    listed, and every chunk that was stored for it and that no other listing needs is gone. Raises
    StoreError with the document on offer when a shared object store could not be told of it.
    """
    with opened(path) as descriptor:
        reader = Reader(descriptor, path.name)
        manifest = reader.manifest({key.kid: key for key in trusted})
        tokens = check(manifest, path.name, market.config.chunk_tokens)
        listing = _listing_of(manifest, len(tokens), publisher)
        offered = _check_home(market, listing, path.name, relist=relist)
        files = reader.files()
        stored: dict[bytes, int] = {}
        try:
            _store(market, reader, files, stored, on_progress)
            market.catalogue.heal_all(listing.chunk_keys)
            if not offered:
                market.create_account(listing.publisher, "publisher")
                made = dataclasses.replace(listing, stored_bytes=sum(stored.values()))
                market.catalogue.adopt(made, tokens, force=relist)
        except BaseException:
            market.catalogue.release(list(stored), market.store.delete)
            raise
        _store_again(market, reader, files)
    shared_bucket.offer(market.store, market.catalogue, listing.document_id)
    return market.catalogue.get(listing.document_id)


def _store_again(market: Market, reader: Reader, files: Sequence[File]) -> None:
    """Store what another process's gc took before the listing protected it."""
    missing = [file for file in files if not market.store.has(*file.place)]
    if not missing:
        return
    try:
        _store(market, reader, missing, {}, None)
    except BaseException:
        for file in missing:
            market.catalogue.report_damage(file.key)
        raise
    market.catalogue.heal_all([file.key for file in missing])


def _listing_of(manifest: Manifest, token_count: int, publisher: str | None) -> Listing:
    return Listing(
        document_id=manifest.document_id,
        namespace=bytes.fromhex(manifest.namespace),
        title=manifest.title,
        publisher=publisher or manifest.publisher,
        token_count=token_count,
        rendered_as=manifest.rendered_as,
        cache_read_nano_per_mtok=manifest.cache_read_nano_per_mtok,
        royalty_ppm=manifest.royalty_ppm,
        created_at_s=manifest.created_at_s,
        expires_at_s=manifest.expires_at_s,
        chunk_keys=tuple(bytes.fromhex(chunk.key) for chunk in manifest.chunks),
    )


def _store(
    market: Market,
    reader: Reader,
    files: Sequence[File],
    stored: dict[bytes, int],
    on_progress: Progress | None,
) -> None:
    """Store those files that the store does not have whole; notes in `stored` what was written."""
    total, done = sum(file.share.bytes for file in files), 0
    for file in files:
        if not _is_kept(market, file):
            # Noted first: what is interrupted may have been stored already.
            stored[file.key] = stored.get(file.key, 0) + file.share.bytes
            try:
                with market.store.receive(*file.place, file.share.bytes) as target:
                    reader.copy(file, target)
            except ChunkDamagedError as error:
                raise BundleError(
                    f"{reader.name}: its exporter signed a damaged chunk ({error})"
                ) from error
        done += file.share.bytes
        if on_progress:
            on_progress(done, total)


def _is_kept(market: Market, file: File) -> bool:
    """Whether the chunk's file is there for good already, whole, in whatever layout."""
    try:
        with open_chunk(market.store.path(*file.place), file.key) as chunk:
            chunk.verify()
        market.store.disk.make_durable(file.key)
    except StoreError:
        return False
    layout = chunk.header.layout
    return (layout.rank, layout.world_size) == file.place[1:] and market.store.keep(*file.place)


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
    if not ACCOUNT_ID.fullmatch(listing.publisher):
        raise BundleError(f"{name}: {listing.publisher!r} is no account's id; name another one")
    with contextlib.suppress(NotFoundError):
        kind = market.ledger.account(listing.publisher).kind
        if kind != "publisher":
            raise BundleError(
                f"{name}: its publisher {listing.publisher!r} is a {kind} here; name the account "
                "that earns with --publisher"
            )
    return False
