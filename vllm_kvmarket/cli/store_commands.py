"""`kvmarket store ...`: check, clean, repair and measure the stored chunks."""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.cli import engine
from vllm_kvmarket.cli.command import (
    DOCUMENT_ID,
    UsageError,
    argument,
    command,
    count,
    engine_options,
    open_market,
)
from vllm_kvmarket.cli.output import clean, counted, emit, size, table
from vllm_kvmarket.core import config
from vllm_kvmarket.core.errors import NotPublishableError, StoreError
from vllm_kvmarket.market import bucket_identity, check_and_repair, garbage_collection
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.store import aligned_empty
from vllm_kvmarket.store import codec as codecs
from vllm_kvmarket.store.tiers import objects_of

if TYPE_CHECKING:
    from rich.console import Console

SAMPLE_BYTES = 64_000_000
REPEATS = 5

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


# codecs


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of one stored chunk, decoded: uint8 (pages * page_bytes,)."""

    dtype: str
    page_bytes: int
    pages: codecs.Bytes


@dataclass(frozen=True, slots=True)
class Speeds:
    """One codec measured on one core; speeds are in decoded bytes a second."""

    codec: str
    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float

    def effective_bytes_per_s(self, source_bytes_per_s: float, threads: int) -> float:
        """The rate of pages from a source while `threads` read and decode at once."""
        return min(self.ratio * source_bytes_per_s, threads * self.decode_bytes_per_s)


def measure(layers: list[Layer], codec: str) -> Speeds:
    """Encode and decode a sample, on one core. Raises StoreError when a bit has changed."""
    # Aligned to cache lines and decoded into one buffer, as when read from a file.
    stored = [aligned_empty(len(each)) for each in _encode(layers, codec)]
    for memory, each in zip(stored, _encode(layers, codec), strict=True):
        memory[:] = each
    buffer = aligned_empty(max(layer.pages.nbytes for layer in layers))

    def decode(check: bool = False) -> None:
        for layer, memory in zip(layers, stored, strict=True):
            place = buffer[: layer.pages.nbytes]
            codecs.decode_into(codec, layer.dtype, memory, [place], page_bytes=layer.page_bytes)
            if check and not np.array_equal(place, layer.pages):
                raise StoreError(f"codec {codec} is not exact here; check this machine's memory")

    decode(check=True)
    total = sum(layer.pages.nbytes for layer in layers)
    return Speeds(
        codec,
        ratio=total / sum(len(memory) for memory in stored),
        encode_bytes_per_s=total / _median_s(lambda: _encode(layers, codec)),
        decode_bytes_per_s=total / _median_s(decode),
    )


def _encode(layers: list[Layer], codec: str) -> list[codecs.Bytes]:
    return [
        codecs.encode(codec, layer.dtype, [layer.pages], page_bytes=layer.page_bytes)
        for layer in layers
    ]


def _median_s(work: Callable[[], object]) -> float:
    """Median CPU time of this thread, so that a running engine does not count."""
    seconds = []
    for _ in range(REPEATS):
        started = time.thread_time()
        work()
        seconds.append(time.thread_time() - started)
    return max(statistics.median(seconds), 1e-9)


def winners(measured: list[Speeds], threads: int) -> list[tuple[float, float, str]]:
    """Ranges of a source's speed, in bytes a second, each with the codec that loads fastest there.

    The ranges go from 0 to infinity; of two equal codecs the one that comes first in `measured`
    wins.
    """
    # Each rate is a straight line that bends once; the fastest changes only where two lines cross.
    ceilings = [threads * each.decode_bytes_per_s for each in measured]
    crossings = {ceiling / each.ratio for ceiling in ceilings for each in measured}
    edges = [0.0, *sorted(crossings), math.inf]
    ranges: list[tuple[float, float, str]] = []
    for start, stop in pairwise(edges):
        middle = (start + stop) / 2 if math.isfinite(stop) else 2 * start + 1
        rates = [each.effective_bytes_per_s(middle, threads) for each in measured]
        best = measured[rates.index(max(rates))]
        if ranges and ranges[-1][2] == best.codec:
            ranges[-1] = (ranges[-1][0], stop, best.codec)
        else:
            ranges.append((start, stop, best.codec))
    return ranges


def _sample(market: Market, document_id: str, limit: int) -> tuple[list[Layer], int]:
    """Decoded layers of a document's chunks, up to `limit` bytes; and the document's tokens."""
    listing = market.catalogue.get(document_id)
    layers: list[Layer] = []
    total = 0
    for layer in _layers(market, listing.chunk_keys):
        total += layer.pages.nbytes
        if layers and total > limit:
            break
        layers.append(layer)
    if not layers:
        raise StoreError(f"{document_id}: none of its chunks is stored; publish it again")
    return layers, listing.token_count


def _layers(market: Market, keys: tuple[bytes, ...]) -> Iterator[Layer]:
    for key in keys:
        for rank, world_size in market.store.shares(key):
            with market.store.open_share(key, rank, world_size) as chunk:
                layout = chunk.header.layout
                for index, described in enumerate(layout.layers):
                    yield Layer(layout.dtype, described.page_bytes, chunk.layer(index))


@command(
    DOCUMENT_ID,
    argument("--threads", type=count, help="threads that load at once (default: io_threads)"),
    argument(
        "--sample",
        type=count,
        default=SAMPLE_BYTES,
        help="most bytes of KV to measure (default: 64M)",
    ),
)
def store_codecs(args: argparse.Namespace) -> None:
    """Measure each codec on a stored document, and where it pays."""
    with open_market(args) as market:
        threads = args.threads or market.config.io_threads
        layers, tokens = _sample(market, args.document_id, args.sample)
    measured = [measure(layers, codec) for codec in codecs.CODECS]
    document = {
        "document_id": args.document_id,
        "tokens": tokens,
        "dtype": layers[0].dtype,
        "sampled_bytes": sum(layer.pages.nbytes for layer in layers),
        "threads": threads,
        "codecs": [
            {
                "codec": each.codec,
                "ratio": round(each.ratio, 4),
                # Raw pages are written without a copy.
                "encode_bytes_per_s": (
                    None if each.codec == codecs.CODEC_RAW else round(each.encode_bytes_per_s)
                ),
                "decode_bytes_per_s": round(each.decode_bytes_per_s),
            }
            for each in measured
        ],
        "winners": [
            {
                "from_bytes_per_s": round(start),
                "to_bytes_per_s": round(stop) if math.isfinite(stop) else None,
                "codec": codec,
            }
            for start, stop, codec in winners(measured, threads)
        ],
    }
    emit(args, document, lambda where: _show_codecs(where, document))


def _show_codecs(where: Console, document: dict[str, Any]) -> None:
    where.print(
        clean(
            f"{document['document_id']}: {document['tokens']:,} tokens of {document['dtype']}, "
            f"{size(document['sampled_bytes'])} measured on one core"
        )
    )
    table(
        where,
        ["codec", ">ratio", ">encode", ">decode"],
        [
            (
                each["codec"],
                f"{each['ratio']:.3f}",
                f"{size(each['encode_bytes_per_s'])}/s" if each["encode_bytes_per_s"] else "-",
                f"{size(each['decode_bytes_per_s'])}/s",
            )
            for each in document["codecs"]
        ],
    )
    for each in document["winners"]:
        last = each["to_bytes_per_s"]
        until = f"up to {size(last)}/s" if last is not None else "and more"
        where.print(
            f"{each['codec']} loads fastest from a source of {size(each['from_bytes_per_s'])}/s "
            f"{until}, with {document['threads']} threads"
        )
