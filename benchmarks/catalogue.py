"""How far the catalogue reaches: memory a token, match latency, opening, and matches in a database.

    python -m benchmarks.catalogue [--documents 1000000] [--memory-share 0.8] [--postgres URL]

Documents of random tokens, ten chunks each; a tenth begins with one of a thousand shared stems.
The tree is the market's own. What would not fit into a share of the free memory (a third; 16 GB
hold a million documents) is made smaller: the result says how many documents were asked for and how
many there were, and figures a token are measured at that size. All the nodes that were asked for
are then made with chunks of a few tokens ("nodes"), which shows the search at full width.

"in a database": the same match by two statements, for catalogues that no memory holds. One asks
which of the request's chunk keys are there, the other for the neighbours of what comes behind the
last. Measured on SQLite, and on PostgreSQL where its programs or a URL are there, waited for and
asked asynchronously. The market does this, in its own SQLite tables, where documents are beyond
`catalogue_chunks_in_memory` (vllm_kvmarket/catalogue/database_match.py); what is measured here
is the bare match, alike for both databases. Writes docs/results/catalogue.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.database_match import measure_databases
from benchmarks.ledger import percentiles
from benchmarks.machine import describe_machine
from vllm_kvmarket.catalogue import Catalogue
from vllm_kvmarket.catalogue.listing import Listing
from vllm_kvmarket.catalogue.prefix_tree import PrefixTree
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import CHUNK_TOKENS, TOKEN_BYTES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "catalogue.json"
NAMESPACE = bytes(range(32))
VOCABULARY = 150_000
CHUNKS_A_DOCUMENT = 10
STEMS = 1_000
STEM_CHUNKS = 4
# Only to decide what fits; what is reported is measured.
NODE_BYTES = 600
AIMS = {"bytes_per_token": 8, "match_4k_p99_us": 200, "match_32k_p99_us": 2_000}


def documents(count: int, chunk_tokens: int, seed: int) -> Iterator[tuple[Listing, list[bytes]]]:
    """Make listings and their packed chunks.

    Keys are random: the tree does not look at them, and hashing them all would take longer than all
    else.
    """
    random = np.random.default_rng(seed)
    width = chunk_tokens * TOKEN_BYTES

    def chunks(number: int) -> list[bytes]:
        packed = random.integers(VOCABULARY, size=number * chunk_tokens, dtype=np.uint32).tobytes()
        return [packed[start : start + width] for start in range(0, len(packed), width)]

    stems = [(chunks(STEM_CHUNKS), _keys(random, STEM_CHUNKS)) for _ in range(STEMS)]
    for number in range(count):
        packed, keys = chunks(CHUNKS_A_DOCUMENT), _keys(random, CHUNKS_A_DOCUMENT)
        # In the order of their tokens, as the market puts what it finds when it opens a catalogue.
        packed[0] = struct.pack(">I", number << 8) + packed[0][TOKEN_BYTES:]
        if number % 10 == 0:
            stem, stem_keys = stems[number // 10 % STEMS]
            packed, keys = stem + packed, stem_keys + keys
        yield (
            Listing(
                document_id=f"kvd_{number:032x}",
                namespace=NAMESPACE,
                terms=ListingTerms(title="A document"),
                token_count=len(packed) * chunk_tokens,
                state="live",
                chunk_keys=tuple(keys),
            ),
            packed,
        )


def _keys(random: np.random.Generator, count: int) -> list[bytes]:
    packed = random.bytes(32 * count)
    return [packed[start : start + 32] for start in range(0, len(packed), 32)]


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Memory that this machine could still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/meminfo does not say how much memory is free")


def fitting(count: int, chunk_tokens: int, share: float) -> int:
    """How many documents fit into a share of the memory that is free; at most `count`."""
    each = CHUNKS_A_DOCUMENT * (chunk_tokens * TOKEN_BYTES + NODE_BYTES)
    return min(count, int(available_bytes() * share) // each)


def measure_tree(
    asked: int, chunk_tokens: int, repeats: int, seed: int, share: float
) -> dict[str, Any]:
    """Build a tree and ask it; `chunk_tokens` scale the 4k and 32k requests too."""
    count = fitting(asked, chunk_tokens, share)
    before = resident_bytes()
    tree = PrefixTree(chunk_tokens)
    long = _long_document(chunk_tokens, seed + 1)
    sample: list[list[bytes]] = []
    gc.disable()
    started = time.perf_counter()
    for place, (listing, packed) in enumerate(documents(count, chunk_tokens, seed)):
        tree.put(listing, place, packed)
        if place % max(1, count // 2_000) == 0:
            sample.append(packed)
    seconds = time.perf_counter() - started
    tree.put(*long)
    gc.enable()
    tokens = tree.chunk_count * chunk_tokens
    used = resident_bytes() - before
    started = time.perf_counter()
    gc.collect()
    collection_s = time.perf_counter() - started
    gc.freeze()  # as vLLM does before it serves
    matches = measure_matches(tree, sample, long[2], repeats)
    result = {
        "documents_asked": asked,
        "documents": count,
        "chunks": tree.chunk_count,
        "chunk_tokens": chunk_tokens,
        "tokens": tokens,
        "bytes": used,
        "bytes_per_token": round(used / tokens, 2),
        "bytes_per_chunk": round(used / tree.chunk_count),
        "build_s": round(seconds, 1),
        "build_us_per_chunk": round(seconds / tree.chunk_count * 1e6, 2),
        "full_garbage_collection_s": round(collection_s, 2),
        "match_us": matches,
        "adding": measure_adding(tree, sample, chunk_tokens, seed + 2),
    }
    gc.unfreeze()
    return result


def _long_document(chunk_tokens: int, seed: int) -> tuple[Listing, int, list[bytes]]:
    """Make one of 128 chunks: 32k tokens in chunks of 256."""
    random = np.random.default_rng(seed)
    packed = [
        random.integers(VOCABULARY, size=chunk_tokens, dtype=np.uint32).tobytes()
        for _ in range(128)
    ]
    listing = Listing(
        document_id="kvd_long",
        namespace=NAMESPACE,
        terms=ListingTerms(title="A long document"),
        token_count=128 * chunk_tokens,
        state="live",
        chunk_keys=tuple(_keys(random, 128)),
    )
    return listing, 2**40, packed


def _tokens(packed: list[bytes]) -> list[int]:
    return np.frombuffer(b"".join(packed), np.uint32).tolist()


def timed(call: Callable[[list[int]], object], requests: list[list[int]]) -> dict[str, float]:
    """Microseconds of one call for each request; `cpu_p99` is untouched by busy neighbours."""
    seconds, cpu_seconds = [], []
    for tokens in requests:
        cpu_started, started = time.thread_time(), time.perf_counter()
        call(tokens)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.thread_time() - cpu_started)
    return percentiles(seconds, 1e-6) | {"cpu_p99": percentiles(cpu_seconds, 1e-6)["p99"]}


def measure_matches(
    tree: PrefixTree, sample: list[list[bytes]], long: list[bytes], repeats: int
) -> dict[str, Any]:
    """Requests of 16 chunks (4k tokens) and 128 chunks (32k) that match, partly match, do not."""
    random = np.random.default_rng(7)
    chosen = [sample[at] for at in random.integers(len(sample), size=repeats)]
    width = tree.chunk_tokens
    question = [VOCABULARY + 1] * (16 * width)
    whole = [(_tokens(packed) + question)[: 16 * width] for packed in chosen]
    inside = [(tokens[: 5 * width + width // 2] + question)[: 16 * width] for tokens in whole]
    far = [_tokens(long) for _ in range(max(100, repeats // 10))]
    nothing = [question + [0] * (112 * width)] * repeats

    def match(tokens: list[int]) -> object:
        return tree.match(NAMESPACE, tokens)

    found = match(far[0])
    assert found is not None and found.token_count == 128 * width
    return {
        "4k": timed(match, whole),
        "4k_ends_inside_a_chunk": timed(match, inside),
        "32k": timed(match, far),
        "32k_matches_nothing": timed(match, nothing),
    }


def measure_adding(
    tree: PrefixTree, sample: list[list[bytes]], chunk_tokens: int, seed: int
) -> dict[str, Any]:
    """Put 500 new documents from a second thread while the first goes on matching."""
    fresh = list(documents(500, chunk_tokens, seed))
    seconds: list[float] = []

    def add() -> None:
        for number, (listing, packed) in enumerate(fresh):
            # One a millisecond: a market that takes up a thousand documents a second.
            time.sleep(1e-3)
            started = time.perf_counter()
            tree.put(listing, 2**41 + number, packed)
            seconds.append(time.perf_counter() - started)

    requests = [_tokens(packed) for packed in sample[:200]]
    adding = threading.Thread(target=add)
    waits: list[float] = []
    adding.start()
    while adding.is_alive():
        for tokens in requests:
            started = time.perf_counter()
            tree.match(NAMESPACE, tokens)
            waits.append(time.perf_counter() - started)
    adding.join()
    return {"put_us": percentiles(seconds, 1e-6), "match_meanwhile_us": percentiles(waits, 1e-6)}


def measure_opening(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Fill a real catalogue, then open it as a starting engine does."""
    path = folder / "catalogue.sqlite"
    random = np.random.default_rng(seed)
    seconds = []
    with Catalogue.open(path) as catalogue:
        for number in range(count):
            size = CHUNKS_A_DOCUMENT * CHUNK_TOKENS
            tokens = random.integers(VOCABULARY, size=size, dtype=np.uint32).tolist()
            terms = ListingTerms(title=f"Document {number}")
            started = time.perf_counter()
            document = DocumentChunks.of(NAMESPACE, tokens)
            catalogue.adopt(Listing.of(document, terms), document)
            seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    with Catalogue.open(path) as catalogue:
        opened_s = time.perf_counter() - started
        chunks = catalogue.index.tree.chunk_count
    return {
        "documents": count,
        "chunks": chunks,
        "adopt_ms": percentiles(seconds, 1e-3),
        "open_s": round(opened_s, 3),
        "open_us_per_chunk": round(opened_s / max(1, chunks) * 1e6, 1),
        "database_bytes_per_token": round(path.stat().st_size / max(1, chunks * CHUNK_TOKENS), 2),
    }


def show(name: str, tree: dict[str, Any]) -> None:
    """The lines of one tree."""
    print(
        f"{name}: {tree['documents']:,} of {tree['documents_asked']:,} documents, "
        f"{tree['chunks']:,} chunks of {tree['chunk_tokens']} tokens: "
        f"{tree['bytes_per_token']} bytes a token, {tree['build_us_per_chunk']} us a chunk, "
        f"a full garbage collection {tree['full_garbage_collection_s']} s"
    )
    for kind, figures in tree["match_us"].items():
        print(
            f"  match {kind:24} p50 {figures['p50']:9} us  p99 {figures['p99']:9} us  "
            f"(CPU time: {figures['cpu_p99']} us)"
        )
    print(f"  adding {tree['adding']}", flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument(
        "--memory-share", type=float, default=1 / 3, help="most of the free memory to fill"
    )
    parser.add_argument("--opened", type=int, default=2_000, help="documents in a database")
    parser.add_argument("--node-tokens", type=int, default=4, help="tokens of a small chunk")
    parser.add_argument("--repeats", type=int, default=5_000)
    parser.add_argument("--postgres", metavar="URL", help="a server on which to make databases")
    parser.add_argument("--note", default="", help="what to know of this run, kept in the result")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python -m benchmarks.catalogue " + " ".join(sys.argv[1:]),
        "note": args.note,
        "machine": describe_machine(),
        "python": platform.python_version(),
        "aims": AIMS,
    }
    with tempfile.TemporaryDirectory(prefix="kvmarket-catalogue-") as name:
        result["opening"] = measure_opening(Path(name), args.opened, args.seed)
        print(f"opening: {result['opening']}", flush=True)
        result["in_a_database"] = measure_databases(
            Path(name), args.opened, args.postgres, args.seed
        )
    for kind, chunk_tokens in (("tokens", CHUNK_TOKENS), ("nodes", args.node_tokens)):
        # In a new process each: memory that one has freed must not look like none for the other.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            result[kind] = pool.submit(
                measure_tree,
                args.documents,
                chunk_tokens,
                args.repeats,
                args.seed,
                args.memory_share,
            ).result()
        show(kind, result[kind])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
