"""A ledger with a long past: what a statement of one second costs there, and a check of one day.

    python -m benchmarks.ledger_history [--transfers 10000000] [--whole]
    python -m benchmarks.ledger_history --only sqlite  # then --only postgres, into the same file

One sale a second is written past the rules, with its hold, charge, royalty, receipt and balances as
the rules would have left them: 10,000,000 transfers are 38 days. Then statements of random seconds
are drawn up for a buyer, a publisher and the provider, and the books of the last day are checked,
as `kvmarket ledger check` does daily; with --whole also those from the start.

Rows are made from a template of a real sale, indexes are made behind them, and a server of our own
does not sync: only reading is measured. Writes docs/results/ledger_history.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import msgspec

from benchmarks.ledger import percentiles, postgres_places, receipt_of
from benchmarks.machine import describe_machine
from vllm_kvmarket.ledger import Ledger, Operation, Receipt, Transfer, statements
from vllm_kvmarket.ledger.integrity import Balances, CheckedBooks
from vllm_kvmarket.ledger.model import digest_of, encode_receipt
from vllm_kvmarket.ledger.storage import RECEIPT_COLUMNS, NewReceipt, receipt_row
from vllm_kvmarket.proofs.leaves import indexes_of

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "ledger_history.json"
BUYERS, PUBLISHERS, DOCUMENTS = 1000, 100, 1000
START_S = 2_000_000_000.0  # behind the deposits, which are made now: books are in order of time
DAY_S = 86_400
FUNDS = 10**15
CHARGE_NANO, ROYALTY_NANO = 2_000, 1_000
PAGE = 50_000  # sales written at once
STATEMENTS = 40
TRANSFER_COLUMNS = Transfer.__struct_fields__
# Nothing is synced: a crash would lose what is made anew.
SERVER_OPTIONS = ("fsync=off", "full_page_writes=off", "max_wal_size=16GB", "autovacuum=off")
Row = tuple[Any, ...]


class Sale(msgspec.Struct, frozen=True, gc=False):
    """One sale's three transfers, and its receipt."""

    transfers: tuple[Transfer, Transfer, Transfer]
    receipt: Receipt


def names_of(number: int) -> tuple[float, str, str, str, str]:
    """When a sale is booked, its key, its buyer, publisher and document."""
    buyer, publisher = f"buyer{number % BUYERS:04}", f"publisher{number % PUBLISHERS:03}"
    document = f"kvd_{number % DOCUMENTS:016x}"
    return START_S + number + 0.25, f"sale:{number:09}", buyer, publisher, document


def sale(number: int) -> Sale:
    """The sale of this second: buyers, documents and their publishers by turns."""
    at_s, key, buyer, publisher, document = names_of(number)
    receipt = receipt_of(key, buyer, publisher, document, at_s)
    held = Operation(
        "pending", f"{key}:reserve", buyer, "provider", 3_000, "", 900, "reuse", document
    )
    settled = msgspec.structs.replace(
        held,
        kind="post",
        id=f"{key}:settle",
        amount_nano=CHARGE_NANO,
        pending_id=held.id,
        timeout_s=0,
        receipt_digest=digest_of(receipt),
    )
    royalty = Operation(
        "plain", f"{key}:royalty", "provider", publisher, ROYALTY_NANO, "", 0, "royalty", document
    )
    operations = ((held, at_s - 0.2), (settled, at_s), (royalty, at_s))
    first, second, third = (Transfer(*msgspec.structs.astuple(each), at) for each, at in operations)
    return Sale((first, second, third), receipt)


def balances(sales: int) -> dict[str, Balances]:
    """Every account's sums after so many sales; buyers and what they paid in come first."""
    found = {"world": Balances(debits_posted=FUNDS * BUYERS)}
    for number in range(BUYERS):
        bought = sales // BUYERS + (number < sales % BUYERS)
        found[f"buyer{number:04}"] = Balances(
            debits_posted=bought * CHARGE_NANO, credits_posted=FUNDS
        )
    for number in range(PUBLISHERS):
        sold = sales // PUBLISHERS + (number < sales % PUBLISHERS)
        found[f"publisher{number:03}"] = Balances(credits_posted=sold * ROYALTY_NANO)
    found["provider"] = Balances(
        debits_posted=sales * ROYALTY_NANO, credits_posted=sales * CHARGE_NANO
    )
    return {account: each for account, each in found.items() if each != Balances()}


def open_accounts(ledger: Ledger) -> None:
    """Accounts, and a deposit for each buyer: as many transfers as there are buyers."""
    for number in range(PUBLISHERS):
        ledger.create_account(f"publisher{number:03}", "publisher")
    for number in range(BUYERS):
        ledger.create_account(f"buyer{number:04}", "buyer")
        ledger.deposit(f"buyer{number:04}", FUNDS, f"deposit:{number}")


def rows_of(sold: Sale) -> tuple[list[Row], Row]:
    """A sale as the tables have it."""
    place = TRANSFER_COLUMNS.index("pending_id")
    transfers = [msgspec.structs.astuple(each) for each in sold.transfers]
    receipt = NewReceipt(sold.receipt, encode_receipt(sold.receipt))
    return (
        [(*row[:place], row[place] or None, *row[place + 1 :]) for row in transfers],
        receipt_row(receipt),
    )


class Template:
    """Makes the rows of any sale from those of the first, ten times as fast as `rows_of`."""

    def __init__(self) -> None:
        # No two of these are part of one another, nor of anything else in a receipt.
        self._first = sale(0)
        receipt = self._first.receipt
        self._body = encode_receipt(receipt).decode().replace("%", "%%")
        for old, new in (
            (receipt.request_id, "%(key)s"),
            (receipt.account, "%(buyer)s"),
            (receipt.publisher, "%(publisher)s"),
            (receipt.document_id, "%(document)s"),
            (repr(receipt.created_at_s), "%(at_s)r"),
        ):
            assert old in self._body
            self._body = self._body.replace(old, new)

    def rows(self, number: int) -> tuple[list[Row], Row]:
        """The three transfers and the receipt of a sale."""
        at_s, key, buyer, publisher, document = names_of(number)
        values = {"key": key, "buyer": buyer, "publisher": publisher, "document": document}
        body = self._body % (values | {"at_s": at_s})
        digest = hashlib.sha256(body.encode()).hexdigest()
        held = f"{key}:reserve"
        reuse = ("reuse", document)
        settled = ("post", f"{key}:settle", buyer, "provider", CHARGE_NANO, held, 0)
        royalty = ("plain", f"{key}:royalty", "provider", publisher, ROYALTY_NANO, None, 0)
        return [
            ("pending", held, buyer, "provider", 3_000, None, 900, *reuse, "", at_s - 0.2),
            (*settled, *reuse, digest, at_s),
            (*royalty, "royalty", document, "", at_s),
        ], (f"kvr_{key}", key, buyer, document, CHARGE_NANO, body)


def pages(sales: int) -> Iterator[list[tuple[list[Row], Row]]]:
    """All sales as rows, some at once; each page's first is compared with what it should be."""
    template = Template()
    for first in range(0, sales, PAGE):
        assert template.rows(first) == rows_of(sale(first))
        yield [template.rows(number) for number in range(first, min(first + PAGE, sales))]


def fill_sqlite(path: Path, sales: int) -> None:
    """Write the sales into tables that are there, with their triggers and indexes set aside."""
    with closing(apsw.Connection(str(path))) as db:
        db.pragma("synchronous", "off")
        db.pragma("cache_size", -500_000)
        found = db.execute(
            "SELECT type, name, sql FROM sqlite_master WHERE type <> 'table' AND sql IS NOT NULL"
        ).fetchall()
        for kind, name, _ in found:
            db.execute(f"DROP {kind} {name}")
        for page in pages(sales):
            with db:
                for table, columns, rows in tables_of(page):
                    marks = ", ".join("?" * len(columns))
                    db.executemany(
                        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})",  # noqa: S608  # names are ours
                        rows,
                    )
        with db:
            db.executemany(
                "UPDATE account SET debits_posted = ?, credits_posted = ? WHERE id = ?",
                [
                    (each.debits_posted, each.credits_posted, account)
                    for account, each in balances(sales).items()
                ],
            )
            for _, _, statement in found:
                db.execute(statement)


def fill_postgres(url: str, sales: int) -> None:
    """The same on PostgreSQL, with the sums and places in the log that follow."""
    import psycopg

    with psycopg.connect(url, options="-c search_path=kvmarket") as db:
        db.execute("SET session_replication_role = replica")  # no triggers
        db.execute("SET synchronous_commit = off")
        db.execute("SET maintenance_work_mem = '512MB'")
        found = db.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE tablename IN ('transfer', 'receipt') "
            "AND indexname NOT IN (SELECT conname FROM pg_constraint)"
        ).fetchall()
        for name, _ in found:
            db.execute(f"DROP INDEX {name}")
        for page in pages(sales):
            for table, columns, rows in tables_of(page):
                with db.cursor().copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy:
                    for row in rows:
                        copy.write_row(row)
        for _, statement in found:
            db.execute(statement)
        db.execute(
            "INSERT INTO balance_part SELECT account, 9999, 0, 0, debits, credits, 0 FROM ("
            "SELECT account, sum(debits) AS debits, sum(credits) AS credits FROM ("
            "SELECT debit AS account, amount_nano AS debits, 0 AS credits FROM transfer "
            "WHERE kind <> 'pending' AND code <> 'deposit' UNION ALL "
            "SELECT credit, 0, amount_nano FROM transfer "
            "WHERE kind <> 'pending' AND code <> 'deposit') AS side GROUP BY account) AS moved"
        )
        db.commit()
        for _ in range(2):  # the second finds that no transaction of before is under way
            db.execute("SELECT number_leaves()")
            db.commit()
        db.autocommit = True
        db.execute("ANALYZE")


def tables_of(page: list[tuple[list[Row], Row]]) -> list[tuple[str, tuple[str, ...], list[Row]]]:
    """Each table, its columns, and its rows of some sales."""
    return [
        ("transfer", TRANSFER_COLUMNS, [row for transfers, _ in page for row in transfers]),
        ("receipt", RECEIPT_COLUMNS, [receipt for _, receipt in page]),
    ]


def measure_statements(ledger: Ledger, sales: int, seed: int = 1) -> dict[str, Any]:
    """Statements of random seconds; milliseconds, by whose they are."""
    chosen = random.Random(seed)
    statements.statement(ledger, "provider", START_S + sales - 1, START_S + sales)  # sums, once
    found: dict[str, Any] = {}
    for kind in ("buyer", "publisher", "provider"):
        taken = []
        for _ in range(STATEMENTS):
            sold = sale(chosen.randrange(sales)).receipt
            accounts = {"buyer": sold.account, "publisher": sold.publisher, "provider": "provider"}
            second = math.floor(sold.created_at_s)
            started = time.perf_counter()
            made = statements.statement(
                ledger,
                accounts[kind],
                second,
                second + 1,
                documents=[sold.document_id] if kind == "publisher" else (),
                indexes_of=lambda ids: indexes_of(ledger, ids),
            )
            taken.append(time.perf_counter() - started)
            assert any(line.receipt_id == sold.id for line in made.lines), made
        found[kind] = percentiles(taken, 1e-3)
    return found


def measure_checks(ledger: Ledger, sales: int, *, whole: bool) -> dict[str, Any]:
    """Seconds for the books of the last day, and for all of them."""
    before = max(0, sales - DAY_S)
    start = CheckedBooks(
        size=BUYERS + 3 * before,
        receipts=before,
        last_receipt=before,
        balances=balances(before),
    )
    found = {"day_transfers": 3 * (sales - before)}
    for name, begin in (("day_s", start), *([("whole_s", None)] if whole else [])):
        started = time.perf_counter()
        problems, end = ledger.check_behind(begin)
        found[name] = round(time.perf_counter() - started, 1)
        assert problems == [], problems[:5]
        assert (end.size, end.receipts) == (BUYERS + 3 * sales, sales)
    return found


def measure(place: Path | str, fill: Callable[[Any, int], None], args: Any) -> dict[str, Any]:
    """Everything on one database."""
    sales = (args.transfers - BUYERS) // 3
    with Ledger.open(place) as ledger:
        open_accounts(ledger)
    started = time.perf_counter()
    fill(place, sales)
    found: dict[str, Any] = {"filled_s": round(time.perf_counter() - started)}
    with Ledger.open(place) as ledger:
        found["statement_ms"] = measure_statements(ledger, sales)
        print(f"  a statement of one second, ms: {found['statement_ms']}", flush=True)
        found["check"] = measure_checks(ledger, sales, whole=args.whole)
        print(f"  checks: {found['check']}", flush=True)
    return found


def main() -> None:
    """Fill, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--transfers", type=int, default=10_000_000)
    parser.add_argument("--only", choices=("sqlite", "postgres"))
    parser.add_argument("--postgres", metavar="URL", help="a server on which to make databases")
    parser.add_argument("--whole", action="store_true", help="also check the books from the start")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": describe_machine(), "transfers": args.transfers}
    if args.only and args.output.exists():
        # The other database's figures stay, if they are of the same machine and size.
        before = json.loads(args.output.read_text())
        result = before if result.items() <= before.items() else result
    if args.only != "postgres":
        print("SQLite")
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="kvmarket-ledger-") as name:
            result["sqlite"] = measure(Path(name) / "market.sqlite", fill_sqlite, args)
    if args.only != "sqlite":
        with postgres_places(args.postgres, *SERVER_OPTIONS) as new_place:
            if new_place is None:
                print("PostgreSQL: left out, no server and no psycopg here")
            else:
                print("PostgreSQL")
                result["postgres"] = measure(new_place(), fill_postgres, args)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
