"""`export`, `import`, `trust ...`, `key ...`: documents that travel, and who signs them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kvmarket.cli.command import Command, open_market
from vllm_kvmarket.cli.output import emit, progress, size, table

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_kvmarket.auth.signing_keys import PublicKey


@contextmanager
def _progress_of(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show how many of all bytes are done."""
    with progress() as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda done, total: bar.update(
            task, completed=done, total=total, note=f"{size(done)} of {size(total)}"
        )


def _configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("document_id", metavar="ID", help="the document's id, kvd_...")
    parser.add_argument("file", metavar="FILE", type=Path, help="the bundle; replaced if it exists")


def _run_export(args: argparse.Namespace) -> int:
    from vllm_kvmarket import bundles

    with open_market(args) as market, _progress_of("exporting") as show:
        done = bundles.export(market, args.document_id, args.file, show)
    document = {
        "document_id": done.document_id,
        "file": str(done.path),
        "bytes": done.bytes,
        "kid": done.kid,
    }
    emit(
        args,
        document,
        lambda where: where.print(
            f"exported {done.document_id} to {done.path}, {size(done.bytes)}, signed by {done.kid}"
        ),
    )
    return 0


def _configure_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a bundle that was exported")
    parser.add_argument(
        "--trust",
        metavar="JWK_FILE",
        type=Path,
        action="append",
        default=[],
        help="also trust this exporter's key, this once; may be repeated",
    )
    parser.add_argument(
        "--publisher", help="the account that earns (default: the bundle's publisher)"
    )
    parser.add_argument(
        "--relist", action="store_true", help="also when this market delisted the document"
    )


def _run_import(args: argparse.Namespace) -> int:
    from vllm_kvmarket import bundles
    from vllm_kvmarket.cli.documents import describe, show_listings

    with open_market(args, create=True) as market:
        trusted = bundles.trusted_keys(market, args.trust)
        with _progress_of("importing") as show:
            listing = bundles.import_(
                market,
                args.file,
                trusted,
                publisher=args.publisher,
                relist=args.relist,
                on_progress=show,
            )
        document = describe(market, listing)
    emit(args, document, lambda where: show_listings(where, [document]))
    return 0


def _configure_trust_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a JWK, or a JWK set")


def _run_trust_add(args: argparse.Namespace) -> int:
    from vllm_kvmarket.auth.signing_keys import TrustedKeys, read_jwks

    # Before there is a market: a wrong file shall not make one.
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
    from vllm_kvmarket.auth.signing_keys import TrustedKeys

    with open_market(args) as market:
        keys = list(TrustedKeys(market.home).all().values())
    emit(
        args,
        {"keys": [key.jwk() for key in keys]},
        lambda where: _show_keys(where, keys, "nobody is trusted; see `kvmarket trust add`"),
    )
    return 0


def _show_keys(where: Console, keys: list[PublicKey], empty: str) -> None:
    table(where, ["key", "x"], [(key.kid, key.jwk()["x"]) for key in keys], empty=empty)


def _configure_trust_remove(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kid", metavar="KID", help="the key's id; put -- in front of one like -abc")


def _run_trust_remove(args: argparse.Namespace) -> int:
    from vllm_kvmarket.auth.signing_keys import TrustedKeys

    with open_market(args) as market:
        TrustedKeys(market.home).remove(args.kid)
    emit(args, {"kid": args.kid}, lambda where: where.print(f"not trusted any more: {args.kid}"))
    return 0


def _configure_key_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all", action="store_true", help="a JWK set with the keys of before a rotation as well"
    )


def _run_key_show(args: argparse.Namespace) -> int:
    import json

    from vllm_kvmarket.auth.signing_keys import SigningKeys

    with open_market(args) as market:
        keys = SigningKeys(market.home)
        document = keys.current().public.jwk()
        # JSON in either way: the output is a file for those who shall trust it.
        print(json.dumps(keys.jwks() if args.all else document, indent=2))
    return 0


def _run_key_rotate(args: argparse.Namespace) -> int:
    from vllm_kvmarket.auth.signing_keys import SigningKeys

    with open_market(args) as market:
        key = SigningKeys(market.home).rotate()
    emit(
        args,
        key.public.jwk(),
        lambda where: where.print(
            f"{key.kid} signs from now on; give `kvmarket key show` to those who trusted the last"
        ),
    )
    return 0


GROUPS = {
    "trust": "say whose bundles are imported",
    "key": "the key that this market signs with",
}
COMMANDS = (
    Command("export", "write a document into one signed file", _run_export, _configure_export),
    Command(
        "import",
        "take a signed file in and put its document on offer",
        _run_import,
        _configure_import,
    ),
    Command("trust add", "trust an exporter's public key", _run_trust_add, _configure_trust_add),
    Command("trust list", "list the keys that are trusted", _run_trust_list),
    Command("trust remove", "trust a key no more", _run_trust_remove, _configure_trust_remove),
    Command(
        "key show", "print the public key to give to others", _run_key_show, _configure_key_show
    ),
    Command("key rotate", "make a new key, which signs from now on", _run_key_rotate),
)
