"""How far the catalogue's index reaches: size, memory, match latency, opening, and what is news.

    python -m benchmarks.catalogue [--documents 1000000]

Documents of random tokens, ten chunks each; a tenth begins with one of a thousand shared stems, and
one has 32,000 tokens. They are put straight into a home's index, and a sample of their tokens into
its database; then new processes open that home and match. "adding": while one process publishes,
another matches. Writes docs/results/catalogue.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ledger import percentiles
from benchmarks.machine import describe_machine
from vllm_kvmarket.catalogue import Catalogue, Listing
from vllm_kvmarket.catalogue.first_offers import (
    REVISION,
    FirstOffers,
    set_fact,
)
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import (
    CHUNK_TOKENS,
    ROOT,
    TOKEN_BYTES,
    chunk_key,
    unpack_tokens,
)

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "catalogue.json"
NAMESPACE = bytes(range(32))
VOCABULARY = 150_000
CHUNKS_A_DOCUMENT = 10
STEMS = 1_000
STEM_CHUNKS = 4
SAMPLED = 1_000
PUBLISHED = 100
AT_ONCE = 2_000
AIMS = {
    "bytes_per_token": 2,
    "match_4k_p99_us": 200,
    "match_32k_p99_us": 2_000,
    "private_mb": 200,
    "open_s": 1,
    "visible_p99_ms": 100,
}


def chunked(packed: bytes) -> DocumentChunks:
    """Cut and hash packed tokens."""
    width = CHUNK_TOKENS * TOKEN_BYTES
    chunks = tuple(packed[start : start + width] for start in range(0, len(packed), width))
    keys = [ROOT]
    for chunk in chunks:
        keys.append(chunk_key(NAMESPACE, keys[-1], chunk))
    return DocumentChunks(NAMESPACE, tuple(keys[1:]), chunks, len(packed) // TOKEN_BYTES)


def documents(count: int, seed: int) -> Iterator[DocumentChunks]:
    """Make the documents, the long one first."""
    random = np.random.default_rng(seed)

    def packed(chunks: int) -> bytes:
        return random.integers(VOCABULARY, size=chunks * CHUNK_TOKENS, dtype=np.uint32).tobytes()

    yield chunked(packed(128))
    stems = [packed(STEM_CHUNKS) for _ in range(STEMS)]
    for number in range(count):
        stem = stems[number // 10 % STEMS] if number % 10 == 0 else b""
        yield chunked(stem + packed(CHUNKS_A_DOCUMENT))


def listed(document: DocumentChunks) -> Listing:
    """The listing of a document."""
    return Listing.of(document, ListingTerms(title="A document"))


def fill(
    writing: Callable[[], Any], count: int, seed: int
) -> tuple[float, list[DocumentChunks], int, dict[bytes, bytes]]:
    """Put documents into rows; how long putting took, the long one and a sample, all tokens.

    And the tokens of the chunks in which documents part from the first with the same beginning.
    """
    sample: list[DocumentChunks] = []
    kept: dict[bytes, bytes] = {}
    begun: set[bytes] = set()
    seconds, tokens, place = 0.0, 0, 0
    source = documents(count, seed)
    while some := [each for each, _ in zip(source, range(AT_ONCE), strict=False)]:
        for document in some:
            at = 0 if len(document.keys) != STEM_CHUNKS + CHUNKS_A_DOCUMENT else STEM_CHUNKS
            beginning = document.tokens[0] if at else document.tokens[0][:TOKEN_BYTES]
            if beginning not in begun:
                begun.add(beginning)
                kept |= {document.keys[part]: document.tokens[part] for part in {0, at}}
        started = time.perf_counter()
        with writing() as rows:
            offers = FirstOffers(rows, CHUNK_TOKENS, kept.get)
            for document in some:
                place += 1
                offers.put(listed(document), place, document.tokens)
            set_fact(rows, REVISION, place)
        seconds += time.perf_counter() - started
        for document in some:
            is_longer = len(document.keys) == STEM_CHUNKS + CHUNKS_A_DOCUMENT
            tokens += document.token_count - is_longer * STEM_CHUNKS * CHUNK_TOKENS
        sample += some[:: max(1, count // SAMPLED)][: SAMPLED + 1 - len(sample)]
    kept |= {key: each for d in sample for key, each in zip(d.keys, d.tokens, strict=True)}
    return seconds, sample, tokens + STEMS * STEM_CHUNKS * CHUNK_TOKENS, kept


def make_home(path: Path, count: int, seed: int) -> dict[str, Any]:
    """Fill a home's index, and the database with the sample; what that took."""
    with Catalogue.open(path) as catalogue:
        file = catalogue.index._file
        seconds, sample, tokens, kept = fill(file.writing, count, seed)
        with catalogue._db.transaction() as db:
            db.executemany("INSERT INTO chunk (key, tokens) VALUES (?, ?)", kept.items())
            db.execute("UPDATE catalogue SET revision = ?", (count + 1,))
        chunks = catalogue.index.chunks
    size = sum(each.stat().st_blocks * 512 for each in path.parent.rglob("index.sqlite*"))
    np.savez(
        path.parent / "sample.npz", *(np.frombuffer(b"".join(d.tokens), "<u4") for d in sample)
    )
    return {
        "documents": count,
        "chunks": chunks,
        "tokens": tokens,
        "index_bytes": size,
        "bytes_per_token": round(size / tokens, 3),
        "put_us": round(seconds / (count + 1) * 1e6, 1),
    }


def requests(folder: Path, repeats: int) -> dict[str, list[list[int]]]:
    """Prompts of 4,096 and 32,768 tokens that match, partly match, do not."""
    with np.load(folder / "sample.npz") as stored:
        long, *sample = [stored[name].tolist() for name in stored.files]
    random = np.random.default_rng(7)
    question = [VOCABULARY + 1] * 4096
    chosen = [sample[at] for at in random.integers(len(sample), size=repeats)]
    inside = 5 * CHUNK_TOKENS + 77
    return {
        "4k": [(tokens + question)[:4096] for tokens in chosen],
        "4k_ends_inside_a_chunk": [(tokens[:inside] + question)[:4096] for tokens in chosen],
        "32k": [long[:32_768]] * max(50, repeats // 10),
        "32k_ends_inside_a_chunk": [[*long[:32_700], *question[:68]]] * max(50, repeats // 10),
        "32k_matches_nothing": [question * 8] * repeats,
    }


def timed(call: Callable[[list[int]], object], prompts: list[list[int]]) -> dict[str, float]:
    """Microseconds of one call for each prompt; `cpu_p99` is untouched by busy neighbours."""
    seconds, cpu_seconds = [], []
    for tokens in prompts:
        cpu_started, started = time.thread_time(), time.perf_counter()
        call(tokens)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.thread_time() - cpu_started)
    return percentiles(seconds, 1e-6) | {"cpu_p99": percentiles(cpu_seconds, 1e-6)["p99"]}


def private_bytes() -> int:
    """Memory of this process that it shares with no file and no other process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


def ask(path: Path, repeats: int) -> dict[str, Any]:
    """Open the home in this new process, and match."""
    prompts = requests(path.parent, repeats)
    before = private_bytes()
    started = time.perf_counter()
    with Catalogue.open(path) as catalogue:
        open_s = time.perf_counter() - started

        def match(tokens: list[int]) -> object:
            return catalogue.match(NAMESPACE, tokens)

        found = {name: catalogue.match(NAMESPACE, asked[0]) for name, asked in prompts.items()}
        assert found["4k"] and found["4k"].token_count % CHUNK_TOKENS == 0
        assert found["4k_ends_inside_a_chunk"].token_count == 5 * CHUNK_TOKENS + 77
        assert found["32k"].token_count == 32_768
        assert found["32k_ends_inside_a_chunk"].token_count == 32_700
        assert found["32k_matches_nothing"] is None
        first = timed(match, prompts["4k"][1:200])
        return {
            "open_s": round(open_s, 4),
            "first_4k": first,
            "match_us": {name: timed(match, asked) for name, asked in prompts.items()},
            "private_mb": round((private_bytes() - before) / 1e6, 1),
            "private_mb_with_python": round(private_bytes() / 1e6, 1),
        }


def publish(path: Path, seed: int) -> tuple[list[float], list[float]]:
    """Publish documents, a few a second; when each was committed, and how long that took."""
    committed, seconds = [], []
    with Catalogue.open(path) as catalogue:
        for document in list(documents(PUBLISHED, seed))[1:]:
            time.sleep(0.02)
            started = time.perf_counter()
            catalogue.adopt(listed(document), document)
            committed.append(time.monotonic())
            seconds.append(time.perf_counter() - started)
    return committed, seconds


def watch(path: Path, seed: int) -> list[float]:
    """Match all the time; when each document was there."""
    seen = []
    with Catalogue.open(path) as catalogue:
        for document in list(documents(PUBLISHED, seed))[1:]:
            tokens = unpack_tokens(b"".join(document.tokens))
            while getattr(catalogue.match(NAMESPACE, tokens), "token_count", 0) < len(tokens):
                time.sleep(0.001)
            seen.append(time.monotonic())
    return seen


def measure_adding(pool: ProcessPoolExecutor, path: Path, seed: int) -> dict[str, Any]:
    """One process publishes while another, which does not poll, waits for each document."""
    watching = pool.submit(watch, path, seed)
    committed, seconds = pool.submit(publish, path, seed).result()
    seen = watching.result()
    late = [max(0.0, b - a) for a, b in zip(committed, seen, strict=True)]
    return {"adopt_ms": percentiles(seconds, 1e-3), "visible_ms": percentiles(late, 1e-3)}


def show(name: str, found: dict[str, Any]) -> None:
    """The lines of one result."""
    matches = found.pop("match_us", {})
    print(f"{name}: {json.dumps(found)}")
    for kind, figures in matches.items():
        print(
            f"  match {kind:24} p50 {figures['p50']:9} us  p99 {figures['p99']:9} us  "
            f"(CPU time: {figures['cpu_p99']} us)"
        )
    sys.stdout.flush()
    if matches:
        found["match_us"] = matches


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5_000)
    parser.add_argument("--note", default="", help="what to know of this run, kept in the result")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", help="where to make the home; about 1 KB a document")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python -m benchmarks.catalogue " + " ".join(sys.argv[1:]),
        "note": args.note,
        "machine": describe_machine(),
        "python": platform.python_version(),
        "aims": AIMS,
    }
    with (
        tempfile.TemporaryDirectory(prefix="kvmarket-catalogue-", dir=args.folder) as name,
        ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        folder = Path(name)
        path = folder / "home" / "market.sqlite"
        result["index"] = pool.submit(make_home, path, args.documents, args.seed).result()
        show("index", result["index"])
        result["new_process"] = pool.submit(ask, path, args.repeats).result()
        show("new process", result["new_process"])
        result["adding"] = measure_adding(pool, path, args.seed + 1)
        show("adding", result["adding"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
