"""How soon one machine of a fleet sells what another published, and how soon a change is known.

    python -m benchmarks.fleet [--model FOLDER] [--documents 12] [--changes 200] [--tokens 1408]

Two `vllm serve` with homes of their own run on one PostgreSQL and one SeaweedFS, on this machine.

`sale`: each document is published on one machine, in turn, and asked for on the other as soon as
the first says that it is live, again and again. What is told is the time from `live` to the
beginning of the first answer that reuses it whole, and to its end; and the time of an answer that
computes it.

`notify`: a price is changed through one process' catalogue, and another's, which polls only once a
minute, is watched. What is told is the time from the call, and from its return, to the price that
the other one would charge.

Writes docs/results/fleet.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.ledger import percentiles
from benchmarks.machine import describe_machine
from tests.support.catalogue_documents import NAMESPACE, publish, tokens
from tests.support.engines import SMOLLM, words
from tests.support.fleet import Fleet, running_fleet
from vllm_kvmarket.catalogue import Catalogue

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "fleet.json"
POLLED_S = 60.0
DOCUMENT = 9300  # the seed of the first document


def sales(fleet: Fleet, documents: int, length: int) -> list[dict[str, float]]:
    """Publish on one machine and buy on the other, in turn."""
    rows = []
    for number in range(documents):
        document = words(DOCUMENT + number, length)
        seller, other = number % 2, 1 - number % 2
        started = time.perf_counter()
        full = fleet.ask(other, document + words(1, 9))
        computed_s = time.perf_counter() - started
        fleet.publish(seller, document)
        live = time.perf_counter()
        while True:
            asked = time.perf_counter()
            answer = fleet.ask(other, document + words(1, 9), "alice", is_emptied=False)
            if answer["kv_transfer_params"]["kvmarket"]["reused_tokens"] == length:
                break
        ended = time.perf_counter()
        if answer["choices"][0]["text"] != full["choices"][0]["text"]:
            raise RuntimeError("an answer with reuse differs from full prefill")
        rows.append(
            {"to_ask_s": asked - live, "to_answer_s": ended - live, "computed_s": computed_s}
        )
    return rows


def changes(url: str, count: int) -> list[dict[str, float]]:
    """Change a price again and again, and wait for it in another catalogue."""
    document = tokens(600, 1)
    rows = []
    with Catalogue.open(url) as catalogue, Catalogue.open(url) as watched:
        name = publish(catalogue, document).document_id
        watched.watch(POLLED_S)
        time.sleep(1)  # until it listens
        with ThreadPoolExecutor(1) as pool:
            for price_nano in range(1, count + 1):
                seen = pool.submit(_seen_at, watched, document, price_nano)
                called = time.perf_counter()
                catalogue.set_price(name, price_nano)
                returned = time.perf_counter()
                at = seen.result()
                rows.append({"from_call_s": at - called, "from_return_s": at - returned})
        catalogue.delist(name)
    return rows


def _seen_at(catalogue: Catalogue, token_ids: Sequence[int], price_nano: int) -> float:
    while True:
        match = catalogue.match(NAMESPACE, token_ids)
        if match and match.listing.terms.cache_read_nano_per_mtok == price_nano:
            return time.perf_counter()
        time.sleep(0.0005)


def summary(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Percentiles of each time, in milliseconds."""
    return {
        f"{key.removesuffix('_s')}_ms": percentiles([row[key] for row in rows], 1e-3)
        for key in rows[0]
    }


def main() -> None:
    """Measure, print the figures, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SMOLLM)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1408)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory(prefix="kvmarket-bench-") as folder:
        running = running_fleet(Path(folder).resolve(), args.model)
        with running as (fleet, postgres, _):
            rows = {
                "sale": sales(fleet, args.documents, args.tokens),
                "notify": changes(postgres.create_database("changes"), args.changes),
            }
    result = {
        "command": "python -m benchmarks.fleet " + " ".join(sys.argv[1:]),
        "model": args.model.name,
        "tokens": args.tokens,
        "machine": describe_machine(),
        "rows": {name: summary(each) for name, each in rows.items()},
        "measured": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, each in rows.items():
        print(name, len(each), " ".join(f"{key} {told}" for key, told in summary(each).items()))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
