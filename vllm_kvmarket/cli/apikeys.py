"""`apikey create`, `apikey list`, `apikey revoke`: who may use the market over HTTP."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli.command import Command, open_market
from vllm_kvmarket.cli.output import emit, moment, table

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_kvmarket.auth.api_keys import Keys

SCOPES = ("buyer", "publisher", "read-only", "admin")


@contextmanager
def _keys(args: argparse.Namespace, *, create: bool = False) -> Iterator[Keys]:
    from vllm_kvmarket.auth.api_keys import Keys
    from vllm_kvmarket.market.market import DATABASE_FILE

    with open_market(args, create=create) as market:
        keys = Keys.open(market.home / DATABASE_FILE)
        try:
            yield keys
        finally:
            keys.close()


def _configure_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("account", metavar="ACCOUNT", help="the account that the key speaks for")
    parser.add_argument(
        "--scope",
        action="append",
        choices=SCOPES,
        help="what it may do; repeat it for several (default: buyer)",
    )
    parser.add_argument("--label", default="", help="a note, for example who has it")


def _run_create(args: argparse.Namespace) -> int:
    scopes = args.scope or ["buyer"]
    with _keys(args, create=True) as keys:
        secret, key_id = keys.create(args.account, scopes, args.label)
    document = {"key": secret, "key_id": key_id, "account": args.account, "scopes": scopes}

    def show(where: Console) -> None:
        where.print(secret, soft_wrap=True)
        where.print(f"{key_id} of {args.account}: {', '.join(scopes)}; it is not shown again")

    emit(args, document, show)
    return 0


def _configure_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--account", help="only this account's")


def _run_list(args: argparse.Namespace) -> int:
    with _keys(args) as keys:
        found = keys.listed(account=args.account)
    described: list[dict[str, Any]] = [
        {
            "key_id": key.key_id,
            "account": key.account,
            "scopes": list(key.scopes),
            "label": key.label,
            "created_at_s": key.created_at_s,
            "revoked_at_s": key.revoked_at_s,
        }
        for key in found
    ]
    emit(args, {"keys": described}, lambda where: _show(where, described))
    return 0


def _show(where: Console, described: list[dict[str, Any]]) -> None:
    table(
        where,
        ["key", "account", "scopes", "~label", "created", "revoked"],
        [
            (
                key["key_id"],
                key["account"],
                ", ".join(key["scopes"]),
                key["label"],
                moment(key["created_at_s"]),
                moment(key["revoked_at_s"]) if key["revoked_at_s"] else "",
            )
            for key in described
        ],
        empty="no keys; make one with `kvmarket apikey create`",
    )


def _configure_revoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key_id", metavar="KEY_ID", help="the key's id, key_...")


def _run_revoke(args: argparse.Namespace) -> int:
    with _keys(args) as keys:
        keys.revoke(args.key_id)
    emit(args, {"key_id": args.key_id}, lambda where: where.print(f"revoked {args.key_id}"))
    return 0


GROUPS = {"apikey": "let clients in over HTTP"}
COMMANDS = (
    Command("apikey create", "make an account's key; shown once", _run_create, _configure_create),
    Command("apikey list", "list the keys, without their secrets", _run_list, _configure_list),
    Command("apikey revoke", "end a key, for good", _run_revoke, _configure_revoke),
)
