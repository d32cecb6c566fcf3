"""Bundles for the tests: markets with small documents, and every way to forge a bundle's file."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from tests.support.catalogue_documents import NAMESPACE, chunks_of, listing_of, tokens
from tests.support.store_chunks import layout_of
from vllm_kvmarket.auth.signing_keys import SigningKeys
from vllm_kvmarket.bundles.bundle_format import MANIFEST, SIGNATURE, Manifest
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.core.model_identity import ROOT, pack_tokens
from vllm_kvmarket.market.market import Market

CHUNK_TOKENS = 16
DOCUMENT = tokens(40)  # two whole chunks, and one of 8 tokens


def open_market(home: Path, **config: Any) -> Market:
    """Open a market with small chunks."""
    return Market.open(home, {"chunk_tokens": CHUNK_TOKENS, **config})


def store(
    market: Market,
    token_ids: list[int],
    world_size: int = 1,
    ranks: tuple[int, ...] | None = None,
    tag: str = "012/test-tokens",
) -> None:
    """Store every chunk of a document, for each rank or some of them; bytes come from the seed."""
    listing = listing_of(token_ids, CHUNK_TOKENS)
    for rank in range(world_size) if ranks is None else ranks:
        layout = layout_of(rank=rank, world_size=world_size, tag=tag)
        for number, key in enumerate(listing.chunk_keys):
            part = token_ids[number * CHUNK_TOKENS : (number + 1) * CHUNK_TOKENS]
            rng = np.random.default_rng([number, rank, world_size])
            size = layout.page_count(len(part)) * layout.layers[0].page_bytes
            market.store.put(
                key=key,
                parent=listing.chunk_keys[number - 1] if number else ROOT,
                namespace=NAMESPACE,
                tokens=pack_tokens(part),
                layout=layout,
                layers=[[rng.integers(0, 256, size, dtype=np.uint8)] for _ in layout.layers],
            )


def publish(
    market: Market, token_ids: list[int] = DOCUMENT, world_size: int = 1, **terms: Any
) -> Listing:
    """Store and list a document."""
    store(market, token_ids, world_size)
    chunks = chunks_of(token_ids, CHUNK_TOKENS)
    return market.catalogue.adopt(listing_of(token_ids, CHUNK_TOKENS, **terms), chunks)


def members(bundle: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Read a bundle as any tar program would."""
    with tarfile.open(bundle) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def pack(path: Path, parts: list[tuple[tarfile.TarInfo, bytes]], **options: Any) -> Path:
    """Write a tar of these members."""
    with tarfile.open(path, "w", **options) as tar:
        for member, content in parts:
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name: str, content: bytes = b"", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Make a member; `facts` are fields of TarInfo."""
    made = tarfile.TarInfo(name)
    made.size = len(content)
    for field, value in facts.items():
        setattr(made, field, value)
    return made, content


def forge(
    bundle: Path,
    signer: Path,
    change: Callable[[dict[str, Any]], object] = lambda _: None,
    contents: dict[str, bytes] | None = None,
) -> Path:
    """Sign another manifest with a home's key: `change(manifest as JSON values)`.

    `contents` replaces members, whose digests and sizes in the manifest follow.
    """
    parts = members(bundle)
    files = [(info.name, (contents or {}).get(info.name, content)) for info, content in parts[2:]]
    manifest = msgspec.json.decode(parts[0][1])
    shares = [share for chunk in manifest["chunks"] for share in chunk["shares"]]
    for share, (_, content) in zip(shares, files, strict=True):
        share["bytes"], share["blake3"] = len(content), blake3(content).hexdigest()
    key = SigningKeys(signer).current()
    manifest["exporter"] = key.public.jwk()
    change(manifest)
    encoded = msgspec.json.encode(manifest)
    front = [member(MANIFEST, encoded), member(SIGNATURE, key.sign(encoded))]
    return pack(bundle.with_name("forged.kvb"), [*front, *(member(*file) for file in files)])


def manifest_of(bundle: Path) -> Manifest:
    """Read a bundle's manifest."""
    return msgspec.json.decode(members(bundle)[0][1], type=Manifest)


def files_in(folder: Path) -> dict[str, bytes]:
    """Every chunk file below a folder, unfinished ones included, but not what counts them."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent != folder
    }
