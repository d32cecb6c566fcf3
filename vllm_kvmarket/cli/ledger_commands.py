"""`kvmarket account ...` and `kvmarket ledger ...`: money, and the check that it adds up."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec

from vllm_kvmarket import proofs
from vllm_kvmarket.catalogue import ListingFilter
from vllm_kvmarket.cli.command import (
    UsageError,
    amount,
    argument,
    command,
    limit,
    open_market,
    time_s,
)
from vllm_kvmarket.cli.output import clean, emit, moment, progress, read_text, table
from vllm_kvmarket.core.pricing import format_nano
from vllm_kvmarket.ledger import Account, statements

if TYPE_CHECKING:
    from rich.console import Console

# accounts


def describe(account: Account) -> dict[str, Any]:
    """An account as JSON values, with its balance and the part of it that can be spent."""
    return {
        **msgspec.to_builtins(account),
        "balance_nano": account.balance_nano,
        "available_nano": account.available_nano,
        "debt_nano": account.debt_nano,
    }


def show_accounts(where: Console, described: Iterable[dict[str, Any]]) -> None:
    """Print accounts as a table."""
    table(
        where,
        ["account", "kind", ">balance", ">reserved", ">available", ">debt", "currency"],
        [
            (
                account["id"],
                account["kind"],
                format_nano(account["balance_nano"]),
                format_nano(account["debits_pending"]),
                format_nano(account["available_nano"]),
                format_nano(account["debt_nano"]),
                account["currency"],
            )
            for account in described
        ],
    )


@command(
    argument("account", metavar="ACCOUNT", help="an id like alice or team:search"),
    argument("--kind", choices=("buyer", "publisher"), default="buyer", help="default: buyer"),
    changes=True,
)
def account_create(args: argparse.Namespace) -> None:
    """Open an account."""
    with open_market(args, create=True) as market:
        account = describe(market.create_account(args.account, args.kind))
    emit(args, account, lambda where: show_accounts(where, [account]))


@command()
def account_list(args: argparse.Namespace) -> None:
    """List all accounts with their balances."""
    with open_market(args) as market:
        accounts = [describe(account) for account in market.ledger.accounts()]
    emit(args, {"accounts": accounts}, lambda where: show_accounts(where, accounts))


@command(
    argument("account", metavar="ACCOUNT", help="the account that receives the money"),
    argument("amount", metavar="AMOUNT", type=amount, help="in currency units, like 12.5"),
    argument(
        "--id", help="the transfer's id: repeating a deposit under the same id changes nothing"
    ),
    changes=True,
)
def account_deposit(args: argparse.Namespace) -> None:
    """Bring money into an account."""
    with open_market(args) as market:
        # A repetition without this id is another deposit; an unknown outcome names it.
        transfer = market.deposit(args.account, args.amount, args.id or f"deposit:{uuid4().hex}")
        account = describe(market.ledger.account(args.account))
    document = {"transfer": msgspec.to_builtins(transfer), "account": account}
    emit(args, document, lambda where: show_accounts(where, [account]))


@command(
    argument("account", metavar="ACCOUNT", help="the account that is paid out"),
    argument(
        "amount",
        metavar="AMOUNT",
        nargs="?",
        type=amount,
        help="in currency units, like 12.5 (default: all that is available)",
    ),
    argument(
        "--reference",
        required=True,
        help="the payment's id at a bank or the like: repeating it changes nothing",
    ),
    changes=True,
)
def account_payout(args: argparse.Namespace) -> None:
    """Pay out a balance, once for a reference."""
    with open_market(args) as market:
        transfer, is_new = statements.payout(
            market.ledger, args.account, args.reference, args.amount
        )
        account = describe(market.ledger.account(args.account))
    document = {"transfer": msgspec.to_builtins(transfer), "new": is_new, "account": account}
    done = "paid out" if is_new else "paid out before, nothing is changed:"
    text = (
        f"{done} {format_nano(transfer.amount_nano)} of {args.account}, "
        f"reference {args.reference}; {format_nano(account['balance_nano'])} is left"
    )
    emit(args, document, lambda where: where.print(clean(text)))


# the ledger


@command(argument("--account", help="only transfers of this account"), limit("transfers"))
def ledger_show(args: argparse.Namespace) -> int:
    """Show accounts, recent transfers, and the balance."""
    with open_market(args) as market:
        if args.account:
            market.ledger.account(args.account)
        accounts = market.ledger.accounts()
        transfers = market.ledger.transfers(account=args.account, limit=args.limit)
    debits = sum(account.debits_posted for account in accounts)
    credits_ = sum(account.credits_posted for account in accounts)
    document = {
        "accounts": [describe(account) for account in accounts],
        "transfers": msgspec.to_builtins(transfers),
        "debits_nano": debits,
        "credits_nano": credits_,
        "balanced": debits == credits_,
    }
    emit(args, document, lambda where: _show_ledger(where, document))
    return 0 if document["balanced"] else 1


def _show_ledger(where: Console, document: dict[str, Any]) -> None:
    show_accounts(where, document["accounts"])
    where.print()
    table(
        where,
        ["time", "kind", "for", "debit", "credit", ">amount", "~transfer"],
        [
            (
                moment(transfer["created_at_s"]),
                transfer["kind"],
                transfer["code"],
                transfer["debit"],
                transfer["credit"],
                format_nano(transfer["amount_nano"]),
                transfer["id"],
            )
            for transfer in document["transfers"]
        ],
        empty="no transfers yet",
    )
    sign = "=" if document["balanced"] else "DIFFER FROM"
    debits, credits_ = (format_nano(document[f"{side}_nano"]) for side in ("debits", "credits"))
    where.print(f"\ndebits {debits} {sign} credits {credits_}")


@command(
    argument(
        "--checkpoint",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="also check this checkpoint from earlier; may be repeated",
    ),
    argument(
        "--from-the-start",
        action="store_true",
        help="also what was checked before (default: what was booked since the last check)",
    ),
    argument(
        "--backup", metavar="FOLDER", type=Path, help="check this backup instead of the market"
    ),
)
def ledger_check(args: argparse.Namespace) -> int:
    """Recompute balances and signed roots from the transfers since the last check."""
    given = [read_text(path) for path in args.checkpoint]
    if args.backup:
        report = proofs.check_backup(args.backup, given)
    else:
        with open_market(args) as market, progress() as bar:
            task = bar.add_task("hashing transfers", total=None, note="")
            report = proofs.check_new(
                market.ledger,
                market.home,
                given,
                lambda done: bar.update(task, note=str(done)),
                keys=market.signing_keys,
                from_the_start=args.from_the_start,
            )
    emit(args, msgspec.to_builtins(report), lambda where: show_check(where, report))
    return 0 if report.ok else 1


def show_check(where: Console, report: proofs.LedgerCheck) -> None:
    """Print the result of a check of the ledger."""
    for problem in report.problems:
        where.print(clean(problem))
    where.print(
        f"{'good' if report.ok else 'BAD'}: {report.accounts} accounts, {report.transfers} "
        f"transfers, {report.receipts} receipts, {report.checkpoints} checkpoints, "
        f"{len(report.problems)} problems"
    )
    if report.since:
        where.print(f"the first {report.since} transfers were checked before")
    for currency, debits in report.debits_nano.items():
        credits_ = report.credits_nano[currency]
        where.print(f"{currency}: debits {format_nano(debits)}, credits {format_nano(credits_)}")
    where.print(f"root {report.root}")


@command(
    argument("--account", required=True, help="the account"),
    argument(
        "--from",
        dest="from_s",
        type=time_s,
        metavar="TIME",
        help="from this day or moment on (UTC; default: the beginning)",
    ),
    argument(
        "--to",
        dest="to_s",
        type=time_s,
        metavar="TIME",
        help="up to, and without, this day or moment (default: now)",
    ),
    argument("--csv", action="store_true", help="print CSV"),
)
def ledger_statement(args: argparse.Namespace) -> None:
    """An account's movements, with the balance brought forward."""
    if args.csv and args.json:
        raise UsageError("--csv and --json do not go together; give one of them")
    if args.from_s is not None and args.to_s is not None and args.to_s <= args.from_s:
        raise UsageError("--to is not after --from; give a later time")
    with open_market(args) as market:
        log = proofs.TransparencyLog.of(market)
        wanted = ListingFilter(publisher=args.account, any_state=True, seen_by=args.account)
        made = statements.statement(
            market.ledger,
            args.account,
            args.from_s,
            args.to_s,
            documents=market.catalogue.ids(wanted),
            indexes_of=log.indexes_of,
        )
        checkpoint = log.checkpoint()
    if args.csv:
        sys.stdout.write(statements.as_csv(made))
        return
    document = {**msgspec.to_builtins(made), "checkpoint": checkpoint.note}
    emit(args, document, lambda where: _show_statement(where, made))


def _show_statement(where: Console, made: statements.Statement) -> None:
    begin = "" if made.from_s is None else moment(made.from_s)
    forward = format_nano(made.brought_forward_nano)
    table(
        where,
        ["time", "kind", ">amount", ">balance", ">tokens", ">sale", "~title", "~transfer"],
        [
            (begin, "brought forward", "", forward, *[""] * 4),
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
    if made.debt_nano:
        closing += f", a debt of {format_nano(made.debt_nano)} for answers booked late"
    sold = f", {made.sales} sales of {made.tokens_sold} tokens" if made.sales else ""
    where.print(closing + sold)
