"""`account create`, `account list`, `account deposit`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli.command import Command, amount, open_market
from vllm_kvmarket.cli.output import emit, table

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_kvmarket.ledger import Account


def describe(account: Account) -> dict[str, Any]:
    """Put an account into JSON values, with its balance and what of it can be spent."""
    import msgspec

    return {
        **msgspec.to_builtins(account),
        "balance_nano": account.balance_nano,
        "available_nano": account.available_nano,
    }


def show_accounts(where: Console, described: Iterable[dict[str, Any]]) -> None:
    """Print accounts as a table."""
    from vllm_kvmarket.core.pricing import format_nano

    table(
        where,
        ["account", "kind", ">balance", ">reserved", ">available", "currency"],
        [
            (
                account["id"],
                account["kind"],
                format_nano(account["balance_nano"]),
                format_nano(account["debits_pending"]),
                format_nano(account["available_nano"]),
                account["currency"],
            )
            for account in described
        ],
    )


def _configure_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("account", metavar="ACCOUNT", help="an id like alice or team:search")
    parser.add_argument(
        "--kind", choices=("buyer", "publisher"), default="buyer", help="default: buyer"
    )


def _run_create(args: argparse.Namespace) -> int:
    with open_market(args, create=True) as market:
        account = describe(market.create_account(args.account, args.kind))
    emit(args, account, lambda where: show_accounts(where, [account]))
    return 0


def _run_list(args: argparse.Namespace) -> int:
    with open_market(args) as market:
        accounts = [describe(account) for account in market.ledger.accounts()]
    emit(args, {"accounts": accounts}, lambda where: show_accounts(where, accounts))
    return 0


def _configure_deposit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("account", metavar="ACCOUNT", help="the account that the money goes to")
    parser.add_argument(
        "amount", metavar="AMOUNT", type=amount, help="in currency units, like 12.5"
    )
    parser.add_argument(
        "--id", help="the transfer's id: repeating a deposit under the same id changes nothing"
    )


def _run_deposit(args: argparse.Namespace) -> int:
    import msgspec

    with open_market(args) as market:
        transfer = market.deposit(args.account, args.amount, args.id)
        account = describe(market.ledger.account(args.account))
    document = {"transfer": msgspec.to_builtins(transfer), "account": account}
    emit(args, document, lambda where: show_accounts(where, [account]))
    return 0


COMMANDS = (
    Command("account create", "open an account", _run_create, _configure_create),
    Command("account list", "list all accounts with their balances", _run_list),
    Command("account deposit", "bring money into an account", _run_deposit, _configure_deposit),
)
