"""`kvmarket apikey ...`, `kvmarket key ...`, `kvmarket trust ...`: who may do what, who signs."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_kvmarket.auth.api_keys import SCOPES, KeyLimits, Keys
from vllm_kvmarket.auth.operator_tokens import GRACE_S
from vllm_kvmarket.auth.signing_keys import PublicKey, SigningKeys, TrustedKeys, read_jwks
from vllm_kvmarket.cli.command import Command, amount, open_market, span_s
from vllm_kvmarket.cli.output import emit, moment, table
from vllm_kvmarket.core.pricing import format_nano
from vllm_kvmarket.market.market import DATABASE_FILE

if TYPE_CHECKING:
    from rich.console import Console

# API keys


@contextmanager
def _api_keys(args: argparse.Namespace, *, create: bool = False) -> Iterator[Keys]:
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
        help="one thing that it may do; may be repeated (default: buyer)",
    )
    parser.add_argument("--label", default="", help="a note, for example its owner's name")
    parser.add_argument(
        "--ttl", type=span_s, help="the key ends after 90s, 15m, 12h, 7d, 4w (default: never)"
    )
    parser.add_argument(
        "--day-budget", type=amount, help="the most that it may spend on a day (UTC)"
    )
    parser.add_argument("--budget", type=amount, help="the most that it may spend in all")
    consent = parser.add_mutually_exclusive_group()
    consent.add_argument(
        "--price-cap",
        type=amount,
        help="it never buys from a listing dearer than this for a million tokens (default: "
        "requests that do not ask for reuse buy up to the tariff's price)",
    )
    consent.add_argument(
        "--no-consent", action="store_true", help="its requests buy reuse only when they ask for it"
    )
    parser.add_argument(
        "--network",
        action="append",
        default=[],
        help="an address range that it may be used from, like 10.0.0.0/8; may be repeated "
        "(default: everywhere)",
    )


def _run_create(args: argparse.Namespace) -> int:
    scopes = args.scope or ["buyer"]
    limits = KeyLimits(
        expires_at_s=None if args.ttl is None else time.time() + args.ttl,
        day_budget_nano=args.day_budget,
        total_budget_nano=args.budget,
        consents=not args.no_consent,
        max_cache_read_nano_per_mtok=args.price_cap,
        networks=tuple(args.network),
    )
    with _api_keys(args, create=True) as keys:
        secret, key_id = keys.create(args.account, scopes, args.label, limits)
    document = {
        "key": secret,
        "key_id": key_id,
        "account": args.account,
        "scopes": scopes,
        "limits": msgspec.to_builtins(limits),
    }

    def show(where: Console) -> None:
        where.print(secret, soft_wrap=True)
        where.print(f"{key_id} of {args.account}: {', '.join(scopes)}; it is not shown again")

    emit(args, document, show)
    return 0


def _configure_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--account", help="only keys of this account")


def _run_list(args: argparse.Namespace) -> int:
    with _api_keys(args) as keys:
        found = keys.listed(account=args.account)
    described: list[dict[str, Any]] = msgspec.to_builtins(found)
    emit(args, {"keys": described}, lambda where: _show_api_keys(where, described))
    return 0


def _show_api_keys(where: Console, described: list[dict[str, Any]]) -> None:
    table(
        where,
        ["key", "account", "scopes", "~label", "created", "last used", ">spent", "ends"],
        [
            (
                key["key_id"],
                key["account"],
                ", ".join(key["scopes"]),
                key["label"],
                moment(key["created_at_s"]),
                moment(key["last_used_at_s"]) if key["last_used_at_s"] else "never",
                format_nano(key["spent_nano"]),
                _end(key),
            )
            for key in described
        ],
        empty="no keys; make one with `kvmarket apikey create`",
    )


def _end(key: dict[str, Any]) -> str:
    if key["revoked_at_s"]:
        return f"revoked {moment(key['revoked_at_s'])}"
    expires_at_s = key["limits"]["expires_at_s"]
    return "" if expires_at_s is None else moment(expires_at_s)


def _configure_revoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key_id", metavar="KEY_ID", help="the key's id, key_...")


def _run_revoke(args: argparse.Namespace) -> int:
    with _api_keys(args) as keys:
        keys.revoke(args.key_id)
    emit(args, {"key_id": args.key_id}, lambda where: where.print(f"revoked {args.key_id}"))
    return 0


# the key that signs


def _configure_key_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all", action="store_true", help="a JWK set that also has the keys before each rotation"
    )


def _run_key_show(args: argparse.Namespace) -> int:
    with open_market(args) as market:
        keys = SigningKeys(market.home)
        document = keys.current().public.jwk()
        # JSON with and without --json: the output is a file for others.
        print(json.dumps(keys.jwks() if args.all else document, indent=2))
    return 0


def _run_key_rotate(args: argparse.Namespace) -> int:
    with open_market(args) as market:
        key = SigningKeys(market.home).rotate()
    text = (
        f"{key.kid} signs from now on; give `kvmarket key show` to everybody who trusted the last"
    )
    emit(args, key.public.jwk(), lambda where: where.print(text))
    return 0


def _configure_key_revoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kid", metavar="KID", help="the key's id, see `kvmarket key show --all`")
    parser.add_argument("--reason", required=True, help="why; it is recorded")


def _run_key_revoke(args: argparse.Namespace) -> int:
    with open_market(args) as market:
        key = SigningKeys(market.home).revoke(args.kid, args.reason)
    text = f"{args.kid} is revoked; {key.kid} signs: give `kvmarket key show --all` to everybody"
    emit(args, key.public.jwk(), lambda where: where.print(text))
    return 0


def _run_rotate_operator(args: argparse.Namespace) -> int:
    with open_market(args) as market:
        market.credentials.rotate()
    text = (
        "a new operator's secret is in force: running processes use it within a second, "
        f"tokens from before end after {GRACE_S:.0f} s, and people sign in again"
    )
    emit(args, {"grace_s": GRACE_S}, lambda where: where.print(text))
    return 0


# keys of others


def _configure_trust_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a JWK, or a JWK set")


def _run_trust_add(args: argparse.Namespace) -> int:
    # Read the file first: a wrong file must not create a market.
    keys = read_jwks(args.file)
    with open_market(args, create=True) as market:
        trusted = TrustedKeys(market.home)
        added = [trusted.add(key) for key in keys]

    def show(where: Console) -> None:
        for key, is_new in zip(keys, added, strict=True):
            where.print(f"{'trusted' if is_new else 'trusted already'}: {key.kid}")

    emit(args, {"keys": [key.jwk() for key in keys], "added": sum(added)}, show)
    return 0


def _run_trust_list(args: argparse.Namespace) -> int:
    with open_market(args) as market:
        keys = list(TrustedKeys(market.home).all().values())
    emit(args, {"keys": [key.jwk() for key in keys]}, lambda where: _show_trusted(where, keys))
    return 0


def _show_trusted(where: Console, keys: list[PublicKey]) -> None:
    rows = [(key.kid, key.jwk()["x"]) for key in keys]
    table(where, ["key", "x"], rows, empty="no key is trusted; see `kvmarket trust add`")


def _configure_trust_remove(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kid", metavar="KID", help="the key's id; put -- in front of one like -abc")


def _run_trust_remove(args: argparse.Namespace) -> int:
    with open_market(args) as market:
        TrustedKeys(market.home).remove(args.kid)
    emit(args, {"kid": args.kid}, lambda where: where.print(f"no longer trusted: {args.kid}"))
    return 0


COMMANDS = (
    Command(
        "apikey create",
        "make an account's key; shown once",
        _run_create,
        _configure_create,
        changes=True,
    ),
    Command("apikey list", "list the keys, without their secrets", _run_list, _configure_list),
    Command("apikey revoke", "end a key, for good", _run_revoke, _configure_revoke, changes=True),
    Command(
        "key show", "print the public key to give to others", _run_key_show, _configure_key_show
    ),
    Command("key rotate", "make a new key, which signs from now on", _run_key_rotate, changes=True),
    Command(
        "key revoke",
        "make a signing key worthless, because others may have it",
        _run_key_revoke,
        _configure_key_revoke,
        changes=True,
    ),
    Command(
        "key rotate-operator",
        "make a new secret for tokens, salts and sessions; running processes follow",
        _run_rotate_operator,
        changes=True,
    ),
    Command(
        "trust add",
        "trust an exporter's public key",
        _run_trust_add,
        _configure_trust_add,
        changes=True,
    ),
    Command("trust list", "list the trusted keys", _run_trust_list),
    Command(
        "trust remove",
        "stop trusting a key",
        _run_trust_remove,
        _configure_trust_remove,
        changes=True,
    ),
)
