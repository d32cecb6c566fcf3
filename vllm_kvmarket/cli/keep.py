"""`gc`, `repair`, `expire`: keep the store in order."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli.command import Command, count, open_market, span_s
from vllm_kvmarket.cli.fsck import counted
from vllm_kvmarket.cli.output import clean, emit, moment, size
from vllm_kvmarket.core.errors import NotPublishableError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_kvmarket.catalogue import Listing
    from vllm_kvmarket.market.check_and_repair import RepairReport
    from vllm_kvmarket.market.garbage_collection import GcReport
    from vllm_kvmarket.market.market import Market

# gc


def _configure_gc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")


def _run_gc(args: argparse.Namespace) -> int:
    import msgspec

    from vllm_kvmarket.market import garbage_collection

    with open_market(args) as market:
        report = garbage_collection.collect_garbage(market, dry_run=args.dry_run)
    emit(args, msgspec.to_builtins(report), lambda where: _show_garbage(where, report))
    return 0


def _show_garbage(where: Console, report: GcReport) -> None:
    for document_id in report.expired:
        where.print(f"{'would expire' if report.dry_run else 'expired'}: {document_id}")
    for document_id in report.abandoned:
        where.print(f"given up by its publisher: {document_id}")
    verb = "would delete" if report.dry_run else "deleted"
    where.print(
        f"{verb} {report.chunks_deleted} chunks of no listing, {size(report.bytes_freed)}"
        + (f"; {report.drafts_swept} drafts" if report.drafts_swept else "")
        + (f"; {report.objects_deleted} objects" if report.objects_deleted else "")
    )


# repair


def _configure_repair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "document_ids",
        metavar="ID",
        nargs="*",
        help="documents, kvd_... (default: all that are on offer)",
    )
    parser.add_argument(
        "--model", help="model folder or hub name that they were published with, to compute them"
    )
    parser.add_argument("--max-model-len", type=count, help="context of the engine, in tokens")
    parser.add_argument("--dtype", help="of the engine, as they were published with")


def _run_repair(args: argparse.Namespace) -> int:
    import msgspec

    from vllm_kvmarket.market import check_and_repair

    with open_market(args) as market, counted("verifying chunks") as step:
        engine = _Engine(args, market)
        try:
            report = check_and_repair.repair(
                market, args.document_ids or None, engine.publish, step
            )
        finally:
            engine.close()
    emit(args, msgspec.to_builtins(report), lambda where: _show_repair(where, report))
    return 1 if report.failed else 0


def _show_repair(where: Console, report: RepairReport) -> None:
    for document_id in report.healed:
        where.print(f"{document_id}: whole again")
    for document_id in report.repaired:
        where.print(f"{document_id}: published again")
    for document_id, reason in report.failed.items():
        where.print(clean(f"{document_id}: failed: {reason}"))
    where.print(
        f"{report.chunks_verified} chunks verified, {report.chunks_damaged} damaged; "
        f"{len(report.healed) + len(report.repaired)} documents repaired, "
        f"{len(report.failed)} failed"
    )


class _Engine:
    """The engine that computes what is lost, started when the first document needs it."""

    def __init__(self, args: argparse.Namespace, market: Market) -> None:
        self._args = args
        self._market = market
        self._llm: Any = None
        self._namespace = b""
        self._failure: Exception | None = None

    def publish(self, document_id: str) -> Listing:
        """Publish a document again. Raises NotPublishableError for another model's."""
        from vllm_kvmarket.cli import engine

        if self._args.model is None:
            raise NotPublishableError("it has to be computed again: give --model")
        with engine.engine_output():
            self._start()
            listing = self._market.catalogue.get(document_id)
            if listing.namespace != self._namespace:
                raise NotPublishableError(
                    f"it was published with another model, dtype or adapter than {self._args.model}"
                )
            return self._market.republish(self._llm, document_id)

    def _start(self) -> None:
        """Start the engine, once; a failure is raised again for each document."""
        from vllm_kvmarket.cli import engine

        if self._failure is not None:
            raise self._failure
        if self._llm is None:
            args = self._args
            try:
                self._llm = engine.open_engine(
                    args.model, self._market, args.max_model_len, args.dtype
                )
                self._namespace = namespace_of(self._llm, self._market)
            except Exception as error:
                self._failure = error
                raise

    def close(self) -> None:
        """End the engine, while what its processes print still goes to stderr."""
        from vllm_kvmarket.cli import engine

        if self._llm is not None:
            with engine.engine_output():
                self._llm = None


def namespace_of(llm: Any, market: Market) -> bytes:
    """Say which namespace an engine publishes in, without an adapter."""
    from vllm_kvmarket.connector.namespaces import base_facts
    from vllm_kvmarket.core.model_identity import namespace_digest

    return namespace_digest(base_facts(llm.llm_engine.vllm_config, market.home))


# expire


def _configure_expire(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("document_id", metavar="ID", help="the document's id, kvd_...")
    until = parser.add_mutually_exclusive_group(required=True)
    until.add_argument("--ttl", type=span_s, help="from now on: 90s, 15m, 12h, 7d, 4w")
    until.add_argument("--never", action="store_true", help="keep it on offer for good")


def _run_expire(args: argparse.Namespace) -> int:
    from vllm_kvmarket.cli.documents import describe
    from vllm_kvmarket.market import eviction

    expires_at_s = None if args.never else time.time() + args.ttl
    with open_market(args) as market:
        listing = eviction.set_time_to_live(market, args.document_id, expires_at_s)
        document = {**describe(market, listing), "expires_at_s": listing.expires_at_s}
    until = "for good" if expires_at_s is None else f"until {moment(expires_at_s)}"
    emit(args, document, lambda where: where.print(f"{listing.document_id}: on offer {until}"))
    return 0


COMMANDS = (
    Command("gc", "delete chunks that no listing needs", _run_gc, _configure_gc),
    Command(
        "repair", "verify documents, and publish damaged ones again", _run_repair, _configure_repair
    ),
    Command("expire", "say until when a document is on offer", _run_expire, _configure_expire),
)
