"""Documents for the catalogue's tests: listings that fit their tokens, published in one call."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from tests.support import ROOT as REPOSITORY
from vllm_kvmarket.catalogue import Catalogue, Listing, queries
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import ROOT, pack_tokens
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.store import ChunkLayout, LayerLayout

NAMESPACE = bytes(range(32))
OTHER_NAMESPACE = bytes(32)
LENGTH = 600
LAYOUT = ChunkLayout("012/test-tokens", "uint8", 16, (LayerLayout("layer", (1, 16, 4), 64),))


def tokens(count: int, seed: int = 0) -> list[int]:
    """Make a document's token ids from a seed."""
    return random.Random(seed).choices(range(1, 50_000), k=count)


def chunks_of(token_ids: Sequence[int], chunk_tokens: int = 256) -> DocumentChunks:
    """Cut a document into chunks."""
    return DocumentChunks.of(NAMESPACE, token_ids, chunk_tokens)


def changed(listing: Listing, **fields: Any) -> Listing:
    """Return a listing with other fields, also of its terms."""
    names = ListingTerms.__struct_fields__
    terms = {name: value for name, value in fields.items() if name in names}
    own = {name: value for name, value in fields.items() if name not in names}
    replaced = msgspec.structs.replace(listing.terms, **terms)
    return dataclasses.replace(listing, terms=replaced, **own)


def listing_of(token_ids: Sequence[int], chunk_tokens: int = 256, **fields: object) -> Listing:
    """Make the listing of a document, with the id that its tokens give it."""
    terms = ListingTerms(title="a document")
    return changed(Listing.of(chunks_of(token_ids, chunk_tokens), terms), **fields)


def publish(
    catalogue: Catalogue, token_ids: Sequence[int], chunk_tokens: int = 256, **terms: object
) -> Listing:
    """Publish a document: begin and commit; returns the live listing."""
    chunks = chunks_of(token_ids, chunk_tokens)
    begun = catalogue.begin(listing_of(token_ids, chunk_tokens, **terms), chunks)
    return catalogue.commit(begun.document_id, stored_bytes=1000)


def store_and_list(market: Market, token_ids: Sequence[int], **terms: object) -> Listing:
    """Store a document's chunks, each of 64 bytes a page, and put it on offer, without a model."""
    width = market.config.chunk_tokens
    listing = listing_of(token_ids, width, **terms)
    stored = 0
    if market.catalogue.begin(listing, chunks_of(token_ids, width)).state == "publishing":
        for number, key in enumerate(listing.chunk_keys):
            part = token_ids[number * width : (number + 1) * width]
            pages = np.full(LAYOUT.page_count(len(part)) * 64, number, dtype=np.uint8)
            stored += market.store.put(
                key=key,
                parent=listing.chunk_keys[number - 1] if number else ROOT,
                namespace=NAMESPACE,
                tokens=pack_tokens(part),
                layout=LAYOUT,
                layers=[[pages]],
            )
        shares = [market.store.describe(key) for key in listing.chunk_keys]
        market.catalogue.shares.note([share for share in shares if share is not None])
        market.catalogue.heal(*listing.chunk_keys)
        market.catalogue.commit(listing.document_id, stored)
    return market.catalogue.get(listing.document_id)


def store(market: Market, seed: int, **terms: object) -> Listing:
    """Store and list the document of 600 tokens that a seed gives."""
    return store_and_list(market, tokens(LENGTH, seed), **terms)


def file_bytes(market: Market, keys: Sequence[bytes]) -> int:
    """Add up the sizes of chunks' files."""
    return sum(market.store.disk.path(key).stat().st_size for key in keys)


def revision(catalogue: Catalogue) -> int:
    """Return the number of the last change that other processes take over."""
    with catalogue._db.snapshot() as db:
        return queries.revision(db)


def matched(catalogue: Catalogue, token_ids: Sequence[int]) -> int:
    """Count the tokens of a request that a catalogue matches."""
    match = catalogue.match_anywhere(NAMESPACE, token_ids)
    return match.token_count if match else 0


def start_process(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a script in a separate process that talks over stdin and stdout.

    Everything of this module is imported already. Its first argument is `home` as a path, and
    `place` as the path or the URL of a database.
    """
    preamble = (
        "import sys, time, os\n"
        "from pathlib import Path\n"
        "from tests.support.catalogue_documents import *\n"
        "home = Path(sys.argv[1])\n"
        "place = sys.argv[1] if '://' in sys.argv[1] else home\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", preamble + script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def heard(process: subprocess.Popen[str]) -> str:
    """Wait for the next line that a process says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    """Say a line to a process."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def ended(process: subprocess.Popen[str]) -> int:
    """Close the pipes and wait for a process; returns its exit code."""
    process.communicate(timeout=60)
    return process.returncode
