"""`ledger` and `receipts`: what was moved, and for which reuse."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli.accounts import describe, show_accounts
from vllm_kvmarket.cli.command import Command, count, open_market
from vllm_kvmarket.cli.output import emit, moment, table

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_LIMIT = 20


def _configure_ledger(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--account", help="only transfers of this account")
    _add_limit(parser, "transfers")


def _add_limit(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--limit",
        type=count,
        default=DEFAULT_LIMIT,
        help=f"how many {what} to show, newest first (default: {DEFAULT_LIMIT})",
    )


def _run_ledger(args: argparse.Namespace) -> int:
    import msgspec

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
    from vllm_kvmarket.core.pricing import format_nano

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


def _configure_receipts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--account", help="only receipts of this buyer")
    _add_limit(parser, "receipts")


def _run_receipts(args: argparse.Namespace) -> int:
    import msgspec

    with open_market(args) as market:
        if args.account:
            market.ledger.account(args.account)
        receipts = market.receipts(args.account, args.limit)
    document = {"receipts": msgspec.to_builtins(receipts)}
    emit(args, document, lambda where: _show_receipts(where, document["receipts"]))
    return 0


def _show_receipts(where: Console, receipts: list[dict[str, Any]]) -> None:
    from vllm_kvmarket.core.pricing import format_nano

    table(
        where,
        ["time", "account", "~title", ">reused", ">computed", ">charge", ">saved", "~receipt"],
        [
            (
                moment(receipt["created_at_s"]),
                receipt["account"],
                receipt["title"],
                receipt["tokens_reused"],
                receipt["tokens_computed"],
                format_nano(receipt["charge_nano"]),
                format_nano(receipt["recompute_nano"] - receipt["charge_nano"]),
                receipt["id"],
            )
            for receipt in receipts
        ],
        empty="no receipts yet",
    )


COMMANDS = (
    Command(
        "ledger", "show accounts, recent transfers, and the balance", _run_ledger, _configure_ledger
    ),
    Command(
        "receipts", "list receipts: what was reused and charged", _run_receipts, _configure_receipts
    ),
)
