"""`kvmarket bundle ...` and `kvmarket backup ...`: a document in a file, a market in a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_kvmarket import bundles, proofs
from vllm_kvmarket.cli.command import (
    DOCUMENT_ID,
    Argument,
    UsageError,
    argument,
    command,
    home_of,
    open_market,
)
from vllm_kvmarket.cli.document_commands import describe, show_listings
from vllm_kvmarket.cli.ledger_commands import show_check
from vllm_kvmarket.cli.output import clean, counted, emit, progress, read_text, size
from vllm_kvmarket.core import config

if TYPE_CHECKING:
    from rich.console import Console


@command(
    DOCUMENT_ID,
    argument("file", metavar="FILE", type=Path, help="the bundle; replaced if it exists"),
    changes=True,
)
def bundle_export(args: argparse.Namespace) -> None:
    """Write a document into one signed file."""
    with open_market(args) as market, counted("exporting", size) as show:
        done = bundles.export(market, args.document_id, args.file, show)
    document = {
        "document_id": done.document_id,
        "file": str(done.path),
        "bytes": done.bytes,
        "kid": done.kid,
    }
    text = f"exported {done.document_id} to {done.path}, {size(done.bytes)}, signed by {done.kid}"
    emit(args, document, lambda where: where.print(text))


@command(
    argument("file", metavar="FILE", type=Path, help="a bundle that was exported"),
    argument(
        "--trust",
        metavar="JWK_FILE",
        type=Path,
        action="append",
        default=[],
        help="also trust this exporter's key, this once; may be repeated",
    ),
    argument("--publisher", help="the account that earns (default: the bundle's publisher)"),
    argument("--relist", action="store_true", help="also when this market delisted the document"),
    changes=True,
)
def bundle_import(args: argparse.Namespace) -> None:
    """Read a signed file and put its document on offer."""
    with open_market(args, create=True) as market:
        trusted = bundles.trusted_keys(market, args.trust)
        with counted("importing", size) as show:
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


def _passphrase_file(text: str) -> Argument:
    return argument(
        "--passphrase-file",
        metavar="FILE",
        type=Path,
        help=f"{text}; - for stdin (default: without them)",
    )


def _passphrase(args: argparse.Namespace) -> str | None:
    return read_text(args.passphrase_file).strip() if args.passphrase_file else None


@command(
    argument("folder", metavar="FOLDER", type=Path, help="a new or empty folder"),
    argument("--chunks", action="store_true", help="also the chunks of every document on offer"),
    _passphrase_file("also the secret keys, encrypted with the passphrase in this file"),
    changes=True,
)
def backup_create(args: argparse.Namespace) -> int:
    """Copy a running market: its database and log; on request its chunks and keys."""
    with open_market(args) as market, progress() as bar:
        task = bar.add_task("copying", total=None, note="")
        report = proofs.backup(
            market,
            args.folder,
            with_chunks=args.chunks,
            passphrase=_passphrase(args),
            on_progress=lambda name: bar.update(task, note=name),
        )
    return _emit_backup(args, report, f"backed up {report.home} to {report.folder}")


@command(
    argument("folder", metavar="FOLDER", type=Path, help="the backup's folder"),
    _passphrase_file("also its secret keys, with the passphrase in this file"),
)
def backup_restore(args: argparse.Namespace) -> int:
    """Put a backup into the empty folder of --home."""
    if config.load(args.config).database_url is not None:
        raise UsageError("a backup is restored into a home: leave database_url out")
    with progress() as bar:
        task = bar.add_task("restoring", total=None, note="")
        report = proofs.restore(
            args.folder,
            home_of(args),
            lambda name: bar.update(task, note=name),
            ledger_url=config.load(args.config).ledger_url,
            passphrase=_passphrase(args),
        )
    return _emit_backup(args, report, f"restored {report.folder} to {report.home}")


def _emit_backup(args: argparse.Namespace, report: proofs.BackupReport, text: str) -> int:
    def show(where: Console) -> None:
        for chunk in report.chunks_missing:
            where.print(clean(f"not in the backup: chunk {chunk}"))
        show_check(where, report.check)
        keys = "with" if report.with_keys else "without"
        where.print(
            clean(f"{text}: {report.files} files, {size(report.bytes)}, {keys} its secret keys")
        )

    emit(args, msgspec.to_builtins(report), show)
    return 0 if report.check.ok and not report.chunks_missing else 1
