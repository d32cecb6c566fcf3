"""`kvmarket bundle ...` and `kvmarket backup ...`: a document in a file, a market in a folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vllm_kvmarket import bundles, proofs
from vllm_kvmarket.cli.command import Command, add_document_id, home_of, open_market
from vllm_kvmarket.cli.document_commands import describe, show_listings
from vllm_kvmarket.cli.ledger_commands import show_check
from vllm_kvmarket.cli.output import clean, emit, progress, read_text, size
from vllm_kvmarket.core import config

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def _bytes_done(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show how many of all bytes are done."""
    with progress() as bar:
        task = bar.add_task(text, total=None, note="")
        yield lambda done, total: bar.update(
            task, completed=done, total=total, note=f"{size(done)} of {size(total)}"
        )


def _configure_export(parser: argparse.ArgumentParser) -> None:
    add_document_id(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="the bundle; replaced if it exists")


def _run_export(args: argparse.Namespace) -> int:
    with open_market(args) as market, _bytes_done("exporting") as show:
        done = bundles.export(market, args.document_id, args.file, show)
    document = {
        "document_id": done.document_id,
        "file": str(done.path),
        "bytes": done.bytes,
        "kid": done.kid,
    }
    text = f"exported {done.document_id} to {done.path}, {size(done.bytes)}, signed by {done.kid}"
    emit(args, document, lambda where: where.print(text))
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
    with open_market(args, create=True) as market:
        trusted = bundles.trusted_keys(market, args.trust)
        with _bytes_done("importing") as show:
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


def _add_passphrase(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--passphrase-file",
        metavar="FILE",
        type=Path,
        help=f"{text}; - for stdin (default: without them)",
    )


def _passphrase(args: argparse.Namespace) -> str | None:
    return read_text(args.passphrase_file).strip() if args.passphrase_file else None


def _configure_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--chunks", action="store_true", help="also the chunks of every document on offer"
    )
    _add_passphrase(parser, "also the secret keys, encrypted with the passphrase in this file")


def _run_create(args: argparse.Namespace) -> int:
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


def _configure_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the backup's folder")
    _add_passphrase(parser, "also its secret keys, with the passphrase in this file")


def _run_restore(args: argparse.Namespace) -> int:
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


COMMANDS = (
    Command(
        "bundle export",
        "write a document into one signed file",
        _run_export,
        _configure_export,
        changes=True,
    ),
    Command(
        "bundle import",
        "read a signed file and put its document on offer",
        _run_import,
        _configure_import,
        changes=True,
    ),
    Command(
        "backup create",
        "copy a running market: its database and log; on request its chunks and keys",
        _run_create,
        _configure_create,
        changes=True,
    ),
    Command(
        "backup restore",
        "put a backup into the empty folder of --home",
        _run_restore,
        _configure_restore,
    ),
)
