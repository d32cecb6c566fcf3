"""`statement`, `payout`, `backup`, `restore`: what a market's keeper does with its books."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kvmarket.cli.command import Command, UsageError, amount, open_market
from vllm_kvmarket.cli.output import clean, emit, moment, progress, size, table
from vllm_kvmarket.cli.proofs import home_of, show_check

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_kvmarket.ledger.statements import Statement
    from vllm_kvmarket.proofs import BackupReport


def time_s(text: str) -> float:
    """Read an option's time: a day, which begins at midnight UTC, or a moment of ISO 8601."""
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a day like 2026-11-01 or a time like 2026-11-01T12:00:00Z, not {text!r}"
        ) from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()


def _configure_statement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--account", required=True, help="whose statement")
    parser.add_argument(
        "--from",
        dest="from_s",
        type=time_s,
        metavar="TIME",
        help="from this day or moment on (UTC; default: the beginning)",
    )
    parser.add_argument(
        "--to",
        dest="to_s",
        type=time_s,
        metavar="TIME",
        help="up to, and without, this day or moment (default: now)",
    )
    parser.add_argument("--csv", action="store_true", help="print CSV")


def _run_statement(args: argparse.Namespace) -> int:
    import sys

    import msgspec

    from vllm_kvmarket import proofs
    from vllm_kvmarket.ledger import statements

    if args.csv and args.json:
        raise UsageError("--csv and --json do not go together; give one of them")
    if args.from_s is not None and args.to_s is not None and args.to_s <= args.from_s:
        raise UsageError("--to is not after --from; give a later time")
    with open_market(args) as market:
        log = proofs.TransparencyLog(market.ledger, market.home)
        own = [
            listing.document_id
            for listing in market.catalogue.listings()
            if listing.publisher == args.account
        ]
        made = statements.statement(
            market.ledger,
            args.account,
            args.from_s,
            args.to_s,
            documents=own,
            indexes_of=log.indexes_of,
        )
        checkpoint = log.checkpoint()
    if args.csv:
        sys.stdout.write(statements.as_csv(made))
        return 0
    document = {**msgspec.to_builtins(made), "checkpoint": checkpoint.note}
    emit(args, document, lambda where: _show_statement(where, made))
    return 0


def _show_statement(where: Console, made: Statement) -> None:
    from vllm_kvmarket.core.pricing import format_nano

    table(
        where,
        ["time", "kind", ">amount", ">balance", ">tokens", ">sale", "~title", "~transfer"],
        [
            (
                "" if made.from_s is None else moment(made.from_s),
                "brought forward",
                "",
                format_nano(made.brought_forward_nano),
                *[""] * 4,
            ),
            *(
                (
                    moment(line.at_s),
                    line.kind,
                    format_nano(line.amount_nano),
                    format_nano(line.balance_nano),
                    line.tokens_reused or "",
                    format_nano(line.sale_nano) if line.receipt_id else "",
                    line.title or line.reference,
                    line.transfer_id,
                )
                for line in made.lines
            ),
        ],
    )
    closing = f"\nclosing balance {format_nano(made.closing_nano)} {made.currency}"
    sold = f", {made.sales} sales of {made.tokens_sold} tokens" if made.sales else ""
    where.print(closing + sold)


def _configure_payout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("account", metavar="ACCOUNT", help="whose balance is moved out")
    parser.add_argument(
        "amount",
        metavar="AMOUNT",
        nargs="?",
        type=amount,
        help="in currency units, like 12.5 (default: all that is available)",
    )
    parser.add_argument(
        "--reference",
        required=True,
        help="the payment's name outside, such as a bank's: the same again changes nothing",
    )


def _run_payout(args: argparse.Namespace) -> int:
    import msgspec

    from vllm_kvmarket.cli.accounts import describe
    from vllm_kvmarket.core.pricing import format_nano
    from vllm_kvmarket.ledger import statements

    with open_market(args) as market:
        transfer, is_new = statements.payout(
            market.ledger, args.account, args.reference, args.amount
        )
        account = describe(market.ledger.account(args.account))
    document = {"transfer": msgspec.to_builtins(transfer), "new": is_new, "account": account}
    done = "paid out" if is_new else "paid out before, nothing is changed:"
    emit(
        args,
        document,
        lambda where: where.print(
            clean(
                f"{done} {format_nano(transfer.amount_nano)} of {args.account}, "
                f"reference {args.reference}; {format_nano(account['balance_nano'])} is left"
            )
        ),
    )
    return 0


def _configure_backup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--chunks", action="store_true", help="also the chunks of every document on offer"
    )


def _run_backup(args: argparse.Namespace) -> int:
    from vllm_kvmarket import proofs

    with open_market(args) as market, progress() as bar:
        task = bar.add_task("copying", total=None, note="")
        report = proofs.backup(
            market,
            args.folder,
            with_chunks=args.chunks,
            on_progress=lambda name: bar.update(task, note=name),
        )
    return _tell(args, report, f"backed up {report.home} to {report.folder}")


def _configure_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what `kvmarket backup` made")


def _run_restore(args: argparse.Namespace) -> int:
    from vllm_kvmarket import proofs
    from vllm_kvmarket.core import config

    with progress() as bar:
        task = bar.add_task("restoring", total=None, note="")
        report = proofs.restore(
            args.folder,
            home_of(args),
            lambda name: bar.update(task, note=name),
            ledger_url=config.load(args.config).ledger_url,
        )
    return _tell(args, report, f"restored {report.folder} to {report.home}")


def _tell(args: argparse.Namespace, report: BackupReport, what: str) -> int:
    import msgspec

    def show(where: Console) -> None:
        for chunk in report.chunks_missing:
            where.print(clean(f"not in the backup: chunk {chunk}"))
        show_check(where, report.check)
        where.print(clean(f"{what}: {report.files} files, {size(report.bytes)}"))

    emit(args, msgspec.to_builtins(report), show)
    return 0 if report.check.ok and not report.chunks_missing else 1


COMMANDS = (
    Command(
        "statement",
        "an account's movements, with the balance brought forward",
        _run_statement,
        _configure_statement,
    ),
    Command("payout", "move a balance out, once for a reference", _run_payout, _configure_payout),
    Command(
        "backup",
        "copy a market while it goes on: books, keys, and chunks if told",
        _run_backup,
        _configure_backup,
    ),
    Command(
        "restore", "put a backup into the empty folder of --home", _run_restore, _configure_restore
    ),
)
GROUPS: dict[str, str] = {}
