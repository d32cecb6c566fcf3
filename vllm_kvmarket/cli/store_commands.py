"""`kvmarket store ...`: check, clean and repair the stored chunks."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.cli import engine
from vllm_kvmarket.cli.command import (
    UsageError,
    argument,
    command,
    engine_options,
    open_market,
)
from vllm_kvmarket.cli.output import clean, counted, emit, size
from vllm_kvmarket.core import config
from vllm_kvmarket.core.errors import NotPublishableError
from vllm_kvmarket.market import bucket_identity, check_and_repair, garbage_collection
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.store.tiers import objects_of

if TYPE_CHECKING:
    from rich.console import Console

# check


@command(
    argument(
        "--quick",
        action="store_true",
        help="check the ledger and the catalogue only; do not read the chunks",
    )
)
def store_check(args: argparse.Namespace) -> int:
    """Check ledger, catalogue and every stored chunk; changes nothing."""
    with open_market(args) as market, counted("verifying chunks") as step:
        report = check_and_repair.check(market, verify=not args.quick, on_progress=step)
    emit(args, msgspec.to_builtins(report), lambda where: _show_check(where, report))
    return 0 if report.ok else 1


def _show_check(where: Console, report: check_and_repair.CheckReport) -> None:
    for problem in report.problems:
        where.print(clean(problem))
    for file in report.quarantined:
        where.print(clean(f"in quarantine: {file['name']} ({file['reason']})"))
    unlisted = report.chunks_unlisted
    quota = f" of {size(report.quota_bytes)}" if report.quota_bytes is not None else ""
    where.print(
        f"{'good' if report.ok else 'BAD'}: {report.chunks_verified} chunks verified, "
        f"{len(report.problems)} problems, {size(report.stored_bytes)} stored, "
        f"{size(report.used_bytes)}{quota} used, {size(report.free_bytes)} free"
        + (f", {unlisted} chunks of no listing" if unlisted else "")
        + (f", {report.drafts} drafts" if report.drafts else "")
    )
    if unlisted:
        where.print("`kvmarket store gc` removes what no listing needs")
    if report.chunks_damaged or report.documents_damaged:
        where.print("publish the damaged documents again, with `kvmarket store repair`")


# gc


@command(
    argument("--dry-run", action="store_true", help="only report, delete nothing"), changes=True
)
def store_gc(args: argparse.Namespace) -> None:
    """Delete chunks that no listing needs."""
    with open_market(args) as market:
        report = garbage_collection.collect_garbage(market, dry_run=args.dry_run)
    emit(args, msgspec.to_builtins(report), lambda where: _show_garbage(where, report))


def _show_garbage(where: Console, report: garbage_collection.GcReport) -> None:
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


# upload


@command(changes=True)
def store_upload(args: argparse.Namespace) -> int:
    """Copy all chunks into a new object store, and make the disk a cache of it."""
    chosen = config.load(args.config)
    objects = objects_of(chosen)
    if objects is None:
        raise UsageError("there is no object store: give --config with object_store_url")
    without = msgspec.structs.replace(chosen, object_store_url=None, object_store_options={})
    args.config = config.to_mapping(without)
    with contextlib.closing(objects), open_market(args) as market, counted("uploading") as step:
        report = bucket_identity.upload(market, objects, step)
    emit(args, msgspec.to_builtins(report), lambda where: _show_upload(where, report))
    return 1 if report.damaged else 0


def _show_upload(where: Console, report: bucket_identity.UploadReport) -> None:
    where.print(
        clean(
            f"{report.url}: {report.uploaded} chunks uploaded, {size(report.uploaded_bytes)}; "
            f"{report.present} were there; {len(report.damaged)} damaged"
        )
    )
    where.print("restart the market's engines with this configuration")
    if report.damaged:
        where.print("publish the damaged documents again, with `kvmarket store repair`")


# repair


@command(
    argument(
        "document_ids",
        metavar="ID",
        nargs="*",
        help="documents, kvd_... (default: all that are on offer)",
    ),
    *engine_options(model_required=False),
    changes=True,
)
def store_repair(args: argparse.Namespace) -> int:
    """Verify documents, and publish damaged ones again."""
    with open_market(args) as market, counted("verifying chunks") as step:
        computer = _Engine(args, market)
        try:
            report = check_and_repair.repair(
                market, args.document_ids or None, computer.publish, step
            )
        finally:
            computer.close()
    emit(args, msgspec.to_builtins(report), lambda where: _show_repair(where, report))
    return 1 if report.failed else 0


def _show_repair(where: Console, report: check_and_repair.RepairReport) -> None:
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
    """The engine that computes lost chunks; it starts when the first document needs it."""

    def __init__(self, args: argparse.Namespace, market: Market) -> None:
        self._args = args
        self._market = market
        self._llm: Any = None
        self._namespace = b""
        self._failure: Exception | None = None

    def publish(self, document_id: str) -> Listing:
        """Publish a document again. Raises NotPublishableError for a document of another model."""
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
        """End the engine, while its processes' output still goes to stderr."""
        if self._llm is not None:
            with engine.engine_output():
                self._llm = None


def namespace_of(llm: Any, market: Market) -> bytes:
    """The namespace that an engine publishes in, without an adapter."""
    from vllm_kvmarket.connector.namespaces import base_facts
    from vllm_kvmarket.core.model_identity import namespace_digest

    return namespace_digest(base_facts(llm.llm_engine.vllm_config, market.home))
