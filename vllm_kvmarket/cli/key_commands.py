"""`kvmarket apikey ...`, `kvmarket key ...`, `kvmarket trust ...`: who may do what, who signs."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_kvmarket.auth.api_keys import SCOPES, KeyLimits, Keys
from vllm_kvmarket.auth.operator_tokens import GRACE_S
from vllm_kvmarket.auth.signing_keys import PublicKey, read_jwks
from vllm_kvmarket.cli.command import amount, argument, command, one_of, open_market, span_s
from vllm_kvmarket.cli.output import emit, moment, table
from vllm_kvmarket.core.pricing import format_nano

if TYPE_CHECKING:
    from rich.console import Console

# API keys


@contextlib.contextmanager
def _api_keys(args: argparse.Namespace, *, create: bool = False) -> Iterator[Keys]:
    with (
        open_market(args, create=create) as market,
        contextlib.closing(Keys(market.database)) as keys,
    ):
        yield keys


@command(
    argument("account", metavar="ACCOUNT", help="the account that the key speaks for"),
    argument(
        "--scope",
        action="append",
        choices=SCOPES,
        help="one thing that it may do; may be repeated (default: buyer)",
    ),
    argument("--label", default="", help="a note, for example its owner's name"),
    argument(
        "--ttl", type=span_s, help="the key ends after 90s, 15m, 12h, 7d, 4w (default: never)"
    ),
    argument("--day-budget", type=amount, help="the most that it may spend on a day (UTC)"),
    argument("--budget", type=amount, help="the most that it may spend in all"),
    one_of(
        argument(
            "--price-cap",
            type=amount,
            help="it never buys from a listing dearer than this for a million tokens (default: "
            "requests that do not ask for reuse buy up to the tariff's price)",
        ),
        argument(
            "--no-consent",
            action="store_true",
            help="its requests buy reuse only when they ask for it",
        ),
    ),
    argument(
        "--network",
        action="append",
        default=[],
        help="an address range that it may be used from, like 10.0.0.0/8; may be repeated "
        "(default: everywhere)",
    ),
    changes=True,
)
def apikey_create(args: argparse.Namespace) -> None:
    """Make an account's key; shown once."""
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


@command(argument("--account", help="only keys of this account"))
def apikey_list(args: argparse.Namespace) -> None:
    """List the keys, without their secrets."""
    with _api_keys(args) as keys:
        found = keys.listed(account=args.account)
    described: list[dict[str, Any]] = msgspec.to_builtins(found)
    emit(args, {"keys": described}, lambda where: _show_api_keys(where, described))


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


@command(argument("key_id", metavar="KEY_ID", help="the key's id, key_..."), changes=True)
def apikey_revoke(args: argparse.Namespace) -> None:
    """End a key, for good."""
    with _api_keys(args) as keys:
        keys.revoke(args.key_id)
    emit(args, {"key_id": args.key_id}, lambda where: where.print(f"revoked {args.key_id}"))


# the key that signs


@command(
    argument(
        "--all", action="store_true", help="a JWK set that also has the keys before each rotation"
    )
)
def key_show(args: argparse.Namespace) -> None:
    """Print the public key to give to others."""
    with open_market(args) as market:
        keys = market.signing_keys
        document = keys.current().public.jwk()
        # JSON with and without --json: the output is a file for others.
        print(json.dumps(keys.jwks() if args.all else document, indent=2))


@command(changes=True)
def key_rotate(args: argparse.Namespace) -> None:
    """Make a new key, which signs from now on."""
    with open_market(args) as market:
        key = market.signing_keys.rotate()
    text = f"{key.kid} signs from now on; give `kvmarket key show` to everyone who trusted the last"
    emit(args, key.public.jwk(), lambda where: where.print(text))


@command(
    argument("kid", metavar="KID", help="the key's id, see `kvmarket key show --all`"),
    argument("--reason", required=True, help="why; it is recorded"),
    changes=True,
)
def key_revoke(args: argparse.Namespace) -> None:
    """Make a signing key worthless, because others may have it."""
    with open_market(args) as market:
        key = market.signing_keys.revoke(args.kid, args.reason)
    text = f"{args.kid} is revoked; {key.kid} signs: give `kvmarket key show --all` to everyone"
    emit(args, key.public.jwk(), lambda where: where.print(text))


@command(changes=True)
def key_rotate_operator(args: argparse.Namespace) -> None:
    """Make a new secret for tokens, salts and sessions; running processes follow."""
    with open_market(args) as market:
        market.credentials.rotate()
    text = (
        "a new operator's secret is in force: running processes use it within a second, "
        f"tokens from before end after {GRACE_S:.0f} s, and people sign in again"
    )
    emit(args, {"grace_s": GRACE_S}, lambda where: where.print(text))


# keys of others


@command(argument("file", metavar="FILE", type=Path, help="a JWK, or a JWK set"), changes=True)
def trust_add(args: argparse.Namespace) -> None:
    """Trust an exporter's public key."""
    # Read the file first: a wrong file must not create a market.
    keys = read_jwks(args.file)
    with open_market(args, create=True) as market:
        trusted = market.trusted_keys
        added = [trusted.add(key) for key in keys]

    def show(where: Console) -> None:
        for key, is_new in zip(keys, added, strict=True):
            where.print(f"{'trusted' if is_new else 'trusted already'}: {key.kid}")

    emit(args, {"keys": [key.jwk() for key in keys], "added": sum(added)}, show)


@command()
def trust_list(args: argparse.Namespace) -> None:
    """List the trusted keys."""
    with open_market(args) as market:
        keys = list(market.trusted_keys.all().values())
    emit(args, {"keys": [key.jwk() for key in keys]}, lambda where: _show_trusted(where, keys))


def _show_trusted(where: Console, keys: list[PublicKey]) -> None:
    rows = [(key.kid, key.jwk()["x"]) for key in keys]
    table(where, ["key", "x"], rows, empty="no key is trusted; see `kvmarket trust add`")


@command(
    argument("kid", metavar="KID", help="the key's id; put -- in front of one like -abc"),
    changes=True,
)
def trust_remove(args: argparse.Namespace) -> None:
    """Stop trusting a key."""
    with open_market(args) as market:
        market.trusted_keys.remove(args.kid)
    emit(args, {"kid": args.kid}, lambda where: where.print(f"no longer trusted: {args.kid}"))
