"""How many reuses the ledger books a second, durably, and what a scheduler callback spends in it.

    python -m benchmarks.ledger [--postgres URL] [--pairs 8000] [--repeats 3]
    python -m benchmarks.ledger --clients 1 4 12 --pairs 500

A pair is what one request costs: a reservation (one pending transfer), and once that is durable its
settlement (a post, the royalty, the receipt; one transaction). So many pairs are kept in flight.
"bare" pairs settle with a post only, for comparison with other ledgers. Beside them stands the rate
at which the same disk syncs an appended page, measured in the same run: without group commit, no
ledger is faster than half of it.

Then 1 to 32 client processes share one PostgreSQL, each an engine: as fast as they can, which fills
the machine's cores, and at a fixed rate of requests that come at random moments, as an engine's do.

Without --postgres a server is started from the programs on this machine, if there are any. Writes
docs/results/ledger.json. Measure on a quiet machine; medians of the repeats are shown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import queue
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe_machine
from vllm_kvmarket.ledger import Ledger, Operation, Receipt, Result, pending, plain, post

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "ledger.json"
IN_FLIGHT = (1, 8, 64, 512)
CLIENTS = (1, 4, 12, 32)
CLIENT_IN_FLIGHT = 8
CALLBACK_REQUESTS_PER_S = 200
FUNDS = 10**15


def reservation(key: str, buyer: str = "buyer") -> list[Operation]:
    """Operations that a request's arrival submits."""
    return [
        pending(
            id=f"{key}:reserve",
            debit=buyer,
            credit="provider",
            amount_nano=3000,
            timeout_s=900,
            code="reuse",
            user_data="kvd_0123456789abcdef",
        )
    ]


def settlement(
    key: str, buyer: str = "buyer", *, bare: bool = False
) -> tuple[list[Operation], Receipt | None]:
    """Operations that a request's end submits."""
    moved = post(id=f"{key}:settle", pending_id=f"{key}:reserve", amount_nano=2000)
    if bare:
        return [moved], None
    royalty = plain(
        id=f"{key}:royalty",
        debit="provider",
        credit="publisher",
        amount_nano=1000,
        code="royalty",
        user_data="kvd_0123456789abcdef",
    )
    receipt = receipt_of(key, buyer, "publisher", "kvd_0123456789abcdef", time.time())
    return [moved, royalty], receipt


def receipt_of(
    key: str, buyer: str, publisher: str, document_id: str, created_at_s: float
) -> Receipt:
    """The receipt of one sale, whose transfers are named by its key."""
    return Receipt(
        id=f"kvr_{key}",
        request_id=key,
        account=buyer,
        document_id=document_id,
        title="A document",
        publisher=publisher,
        tokens_matched=4096,
        tokens_reused=4096,
        tokens_loaded=4096,
        tokens_from_paged_cache=0,
        tokens_failed=0,
        tokens_computed=32,
        tokens_output=64,
        input_nano_per_mtok=5_000_000,
        cache_read_nano_per_mtok=500_000,
        royalty_ppm=500_000,
        charge_nano=2000,
        royalty_nano=1000,
        recompute_nano=20_000,
        reservation_id=f"{key}:reserve",
        transfer_ids=(f"{key}:settle", f"{key}:royalty"),
        created_at_s=created_at_s,
        model="model",
        namespace="00" * 32,
    )


class Load:
    """Keeps pairs in flight: each settles when it is reserved, the next begins when it is settled.

    One thread does all the asking, like an engine's scheduler; answers come to it by a queue.
    """

    def __init__(self, ledger: Ledger, pairs: int, *, bare: bool, buyer: str = "buyer") -> None:
        self._ledger = ledger
        self._buyer = buyer
        self._pairs = pairs
        self._bare = bare
        self._answers: queue.SimpleQueue[tuple[str, bool, float, Future[list[Result]]]]
        self._answers = queue.SimpleQueue()
        self.reserve_s: list[float] = []
        self.settle_s: list[float] = []

    def run(self, in_flight: int) -> float:
        """Pairs a second."""
        keys = iter([f"{os.getpid()}:{number}" for number in range(self._pairs)])
        started = time.perf_counter()
        for _ in range(min(in_flight, self._pairs)):
            self._reserve(next(keys))
        settled = 0
        while settled < self._pairs:
            key, reserved, at_s, answer = self._answers.get()
            assert answer.result()[0].outcome.good, answer.result()
            if reserved:
                self.reserve_s.append(time.perf_counter() - at_s)
                self._settle(key)
            else:
                self.settle_s.append(time.perf_counter() - at_s)
                settled += 1
                following = next(keys, None)
                if following is not None:
                    self._reserve(following)
        return self._pairs / (time.perf_counter() - started)

    def _reserve(self, key: str) -> None:
        at_s = time.perf_counter()
        # More patience than an engine has: a disk that stalls is part of the figure.
        self._ledger.submit(reservation(key, self._buyer), patience_s=60).add_done_callback(
            lambda answer: self._answers.put((key, True, at_s, answer))
        )

    def _settle(self, key: str) -> None:
        operations, receipt = settlement(key, self._buyer, bare=self._bare)
        at_s = time.perf_counter()
        self._ledger.submit(operations, receipt=receipt).add_done_callback(
            lambda answer: self._answers.put((key, False, at_s, answer))
        )


def percentiles(seconds: list[float], unit: float) -> dict[str, float]:
    """Median, 99th percentile and worst, in units of `unit` seconds."""
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    return {name: round(ordered[math.floor(part * last)] / unit, 3) for name, part in at.items()}


@contextmanager
def funded(place: Path | str) -> Iterator[Ledger]:
    """A new ledger with a buyer who can pay."""
    with Ledger.open(place) as ledger:
        ledger.create_account("buyer", "buyer")
        ledger.create_account("publisher", "publisher")
        ledger.deposit("buyer", FUNDS, "deposit")
        yield ledger


def measure_pairs(
    new_place: Any, in_flight: int, pairs: int, repeats: int, *, bare: bool = False
) -> dict[str, Any]:
    """The median of several runs, each on a new database."""
    rates, reserve_s, settle_s = [], [], []
    for _ in range(repeats):
        with funded(new_place()) as ledger:
            load = Load(ledger, pairs, bare=bare)
            rates.append(load.run(in_flight))
        reserve_s += load.reserve_s
        settle_s += load.settle_s
    return {
        "in_flight": in_flight,
        "bare": bare,
        "pairs_per_s": round(statistics.median(rates)),
        "pairs_per_s_of_each_run": [round(rate) for rate in rates],
        "reserve_ms": percentiles(reserve_s, 1e-3),
        "settle_ms": percentiles(settle_s, 1e-3),
    }


class PacedLoad:
    """An engine's requests at random moments, whatever the ledger does meanwhile.

    A reservation's time runs from when it was due, so that nobody's lateness is left out.
    """

    def __init__(self, ledger: Ledger, buyer: str) -> None:
        self._ledger = ledger
        self._buyer = buyer
        self._reserved: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.reserve_s: list[float] = []
        self.settle_s: list[float] = []

    def run(self, rate_per_s: float, seconds: float) -> None:
        """Make requests for some seconds; each is settled when a later one comes."""
        chosen = random.Random(self._buyer)
        due = time.perf_counter()
        end, answers = due + seconds, []
        for number in itertools.count():
            due += chosen.expovariate(rate_per_s)
            if due > end:
                break
            time.sleep(max(0.0, due - time.perf_counter()))
            key = f"{os.getpid()}:paced:{number}"
            asked = self._ledger.submit(reservation(key, self._buyer), patience_s=60)
            asked.add_done_callback(partial(self._answered, key, due))
            answers.append(asked)
            while not self._reserved.empty():
                operations, receipt = settlement(self._reserved.get(), self._buyer)
                at_s = time.perf_counter()
                asked = self._ledger.submit(operations, receipt=receipt)
                asked.add_done_callback(partial(self._answered, "", at_s))
                answers.append(asked)
        assert all(answer.result()[0].outcome.good for answer in answers)

    def _answered(self, key: str, at_s: float, _: Future[list[Result]]) -> None:
        taken_s = time.perf_counter() - at_s
        if key:
            self.reserve_s.append(taken_s)
            self._reserved.put(key)
        else:
            self.settle_s.append(taken_s)


class ClientRun(NamedTuple):
    """What one process saw: as fast as it could, then at a given rate."""

    pairs_per_s: float
    groups_per_s: float
    reserve_s: list[float]
    paced_reserve_s: list[float]
    paced_settle_s: list[float]


def _client(place: str, buyer: str, args: argparse.Namespace, start: Any, results: Any) -> None:
    """One engine's process, with a buyer of its own."""
    with Ledger.open(place) as ledger:
        groups: list[float] = []
        ledger.on_commit(groups.append)
        load = Load(ledger, args.pairs, bare=False, buyer=buyer)
        start.wait()
        rate = load.run(CLIENT_IN_FLIGHT)
        groups_per_s = len(groups) * rate / args.pairs
        start.wait()
        paced = PacedLoad(ledger, buyer)
        start.wait()
        paced.run(args.rate, args.paced_seconds)
        start.wait()
        run = ClientRun(rate, groups_per_s, load.reserve_s, paced.reserve_s, paced.settle_s)
        results.put(run)


def measure_clients(new_place: Any, clients: int, args: argparse.Namespace) -> dict[str, Any]:
    """Several processes on one database: pairs a second, and how long reservations wait.

    First each keeps some pairs in flight: the machine is saturated, and waits are those of its
    queue. Then each makes requests at an engine's rate, and `busy_cores` says what that takes.
    """
    context, place = multiprocessing.get_context("spawn"), new_place()
    buyers = [f"buyer{number}" for number in range(clients)]
    with funded(place) as ledger:
        for buyer in buyers:
            ledger.create_account(buyer, "buyer")
            ledger.deposit(buyer, FUNDS, f"deposit {buyer}")
    start, results = context.Barrier(clients + 1), context.Queue()
    processes = [
        context.Process(target=_client, args=(place, buyer, args, start, results))
        for buyer in buyers
    ]
    for process in processes:
        process.start()
    for _ in range(3):  # all are there, all are through, all begin again
        start.wait()
    busy_s, started = busy_cpu_s(), time.perf_counter()
    start.wait()
    busy_cores = (busy_cpu_s() - busy_s) / (time.perf_counter() - started)
    runs: list[ClientRun] = [results.get() for _ in processes]
    for process in processes:
        process.join()
    found = {
        "clients": clients,
        "pairs_per_s": round(sum(each.pairs_per_s for each in runs)),
        "groups_per_s": round(sum(each.groups_per_s for each in runs)),
        "reserve_ms": percentiles([s for each in runs for s in each.reserve_s], 1e-3),
        "paced": {
            "pairs_per_s_each": args.rate,
            "pairs": sum(len(each.paced_reserve_s) for each in runs),
            "busy_cores": round(busy_cores, 2),
            "reserve_ms": percentiles([s for each in runs for s in each.paced_reserve_s], 1e-3),
            "settle_ms": percentiles([s for each in runs for s in each.paced_settle_s], 1e-3),
        },
    }
    show_clients(found)
    return found


def show_clients(found: dict[str, Any]) -> None:
    """One line of the table."""
    closed, paced = found["reserve_ms"], found["paced"]
    print(
        f"  {found['clients']:4} clients: {found['pairs_per_s']:7,} pairs/s in "
        f"{found['groups_per_s']:,} groups, reserve p50 {closed['p50']}, p99 {closed['p99']} ms; "
        f"at {paced['pairs_per_s_each']:g}/s each ({paced['busy_cores']} cores busy): "
        f"p50 {paced['reserve_ms']['p50']}, p99 {paced['reserve_ms']['p99']} ms",
        flush=True,
    )


def busy_cpu_s() -> float:
    """CPU seconds that anybody used on this machine since it started."""
    user, nice, system, _, _, *interrupts = (
        Path("/proc/stat").read_text().split("\n")[0].split()[1:8]
    )
    ticks = sum(map(int, (user, nice, system, *interrupts)))
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_callbacks(new_place: Any, seconds: float) -> dict[str, Any]:
    """Time in the ledger of a paced scheduler thread, which never waits for an answer.

    It sleeps between requests and is awake a millisecond before the next, like an engine's.
    """
    reserve_s, settle_s = [], []
    with funded(new_place()) as ledger:
        requests = int(seconds * CALLBACK_REQUESTS_PER_S)
        answers = []
        started = time.perf_counter()
        for number in range(requests):
            due = started + number / CALLBACK_REQUESTS_PER_S
            time.sleep(max(0.0, due - 1e-3 - time.perf_counter()))
            while time.perf_counter() < due:
                pass
            at_s = time.perf_counter()
            answers.append(ledger.submit(reservation(f"{number}")))
            then_s = time.perf_counter()
            reserve_s.append(then_s - at_s)
            if number >= 20:  # one that came a tenth of a second ago ends
                at_s = time.perf_counter()
                operations, receipt = settlement(f"{number - 20}")
                answers.append(ledger.submit(operations, receipt=receipt))
                settle_s.append(time.perf_counter() - at_s)
        assert all(answer.result()[0].outcome.good for answer in answers)
    return {
        "requests_per_s": CALLBACK_REQUESTS_PER_S,
        "reserve_us": percentiles(reserve_s, 1e-6),
        "settle_us": percentiles(settle_s, 1e-6),
    }


def measure_fsync(folder: Path, seconds: float = 1.0) -> float:
    """Appended pages of 4 KiB that the disk makes durable a second, one after another."""
    path = folder / "fsync"
    with path.open("wb", buffering=0) as file:
        count, started = 0, time.perf_counter()
        while time.perf_counter() < started + seconds:
            file.write(b"x" * 4096)
            os.fdatasync(file.fileno())
            count += 1
        elapsed = time.perf_counter() - started
    path.unlink()
    return count / elapsed


@contextmanager
def postgres_places(url: str | None, *settings: str) -> Iterator[Any]:
    """A maker of new databases on a given server, else on one of our own with these settings; None
    without any.
    """
    try:
        import psycopg

        from tests.support.postgres import PostgreSQL, binaries
    except ImportError:
        yield None
        return
    numbers = iter(range(10_000))
    if url is not None:

        def create() -> str:
            name = f"kvmarket-benchmark-{os.getpid()}-{next(numbers)}"
            with psycopg.connect(url, autocommit=True) as db:
                db.execute(
                    psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name))
                )
            return f"{url.rpartition('/')[0]}/{name}"

        yield create
        return
    programs = binaries()
    if programs is None:
        yield None
        return
    server = PostgreSQL(programs)
    try:
        server.start(*(word for setting in settings for word in ("-c", setting)))
        yield lambda: server.create_database(f"benchmark-{next(numbers)}")
    finally:
        server.close()


def measure_backend(new_place: Any, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every load on one database, the raw sync rate before and after."""
    before = measure_fsync(folder)
    runs = []
    for in_flight in IN_FLIGHT:
        pairs = min(args.pairs, 200 * in_flight + 100)
        runs.append(measure_pairs(new_place, in_flight, pairs, args.repeats))
        show(runs[-1])
    runs.append(measure_pairs(new_place, IN_FLIGHT[-1], args.pairs, args.repeats, bare=True))
    show(runs[-1])
    callbacks = measure_callbacks(new_place, args.seconds)
    print(f"  callbacks: reserve {callbacks['reserve_us']} settle {callbacks['settle_us']} us")
    return {
        "fdatasync_per_s": round(statistics.mean([before, measure_fsync(folder)])),
        "pairs": runs,
        "callbacks": callbacks,
    }


def show(run: dict[str, Any]) -> None:
    """One line of the table."""
    kind = "bare pairs/s" if run["bare"] else "pairs/s"
    print(
        f"  {run['in_flight']:4} in flight: {run['pairs_per_s']:7,} {kind}, "
        f"reserve p99 {run['reserve_ms']['p99']} ms, settle p99 {run['settle_ms']['p99']} ms",
        flush=True,
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--postgres", metavar="URL", help="a server on which to make databases")
    parser.add_argument("--pairs", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clients", type=int, nargs="+", help="only: so many processes on one PostgreSQL"
    )
    parser.add_argument("--no-clients", action="store_true", help="one process alone")
    parser.add_argument("--rate", type=float, default=10.0, help="pairs/s of a paced client")
    parser.add_argument("--paced-seconds", type=float, default=20.0, help="of paced clients")
    parser.add_argument("--seconds", type=float, default=5.0, help="of paced callbacks")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.clients:
        with postgres_places(args.postgres) as new_place:
            for clients in args.clients:
                measure_clients(new_place, clients, args)
        return
    result: dict[str, Any] = {"machine": describe_machine(), "pairs_a_run": args.pairs}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="kvmarket-ledger-") as name:
        folder, numbers = Path(name), iter(range(10_000))
        print("SQLite (WAL, synchronous=FULL)")
        result["sqlite"] = measure_backend(lambda: folder / f"{next(numbers)}.sqlite", args, folder)
        with postgres_places(args.postgres) as new_place:
            if new_place is None:
                print("PostgreSQL: left out, no server and no psycopg here")
            else:
                print("PostgreSQL (synchronous_commit=on)")
                result["postgres"] = measure_backend(new_place, args, folder)
                if not args.no_clients:
                    args.pairs = min(args.pairs, 1000)
                    result["postgres"]["clients"] = [
                        measure_clients(new_place, clients, args) for clients in CLIENTS
                    ]
    for backend in ("sqlite", "postgres"):
        if backend in result:
            print(f"{backend}: raw fdatasync {result[backend]['fdatasync_per_s']:,}/s beside it")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
