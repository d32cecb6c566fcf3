"""`kvmarket document ...`: documents on offer, from publishing to delisting."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote

import msgspec

from vllm_kvmarket.catalogue import Audit, Listing, ListingFilter, ListingState
from vllm_kvmarket.cli import engine
from vllm_kvmarket.cli.command import (
    DOCUMENT_ID,
    UsageError,
    amount,
    argument,
    command,
    count,
    engine_options,
    one_of,
    open_market,
    share,
    span_s,
)
from vllm_kvmarket.cli.output import clean, emit, moment, pairs, progress, size, table
from vllm_kvmarket.core.errors import (
    ConfigError,
    NotPublishableError,
    PublishFailedError,
    RefusedError,
    UnavailableError,
)
from vllm_kvmarket.core.pricing import PPM, format_nano
from vllm_kvmarket.market import garbage_collection
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.publishers import ensure_account

if TYPE_CHECKING:
    from urllib.error import HTTPError

    from rich.console import Console

STATES: tuple[ListingState, ...] = get_args(ListingState)
STDIN = "-"
KEY_VARIABLE = "KVMARKET_API_KEY"
# An engine with much to do is slow to answer.
SERVER_TIMEOUT_S = 600.0
# Rounding differs between engines, batches and kernels; wrong KV differs by orders of magnitude.
VERDICTS = {
    "exact": "bit for bit what this engine computes",
    "close": "what this engine computes, up to rounding",
    "different": "NOT what this engine computes",
    "unread": "some could not be read (missing, damaged, or of another layout); "
    "see kvmarket store check",
}


def describe(market: Market, listing: Listing) -> dict[str, Any]:
    """A listing as JSON values, with the prices in force and the cost of one reuse."""
    terms = market.config.tariff.terms(listing.terms)
    return {
        "document_id": listing.document_id,
        "title": listing.terms.title,
        "publisher": listing.terms.publisher,
        "state": listing.state,
        "reason": listing.reason,
        "token_count": listing.token_count,
        "chunk_count": len(listing.chunk_keys),
        "stored_bytes": listing.stored_bytes,
        "rendered_as": listing.terms.rendered_as,
        "namespace": listing.namespace.hex(),
        "created_at_s": listing.created_at_s,
        "expires_at_s": listing.terms.expires_at_s,
        "pinned": listing.pinned,
        "own_cache_read_nano_per_mtok": listing.terms.cache_read_nano_per_mtok,
        "own_royalty_ppm": listing.terms.royalty_ppm,
        "terms": msgspec.to_builtins(terms),
        "charge_nano": terms.charge_nano(listing.token_count),
        "recompute_nano": terms.recompute_nano(listing.token_count),
    }


def show_listings(where: Console, described: list[dict[str, Any]]) -> None:
    """Print listings as a table; the price is that of a million reused tokens."""
    table(
        where,
        ["document", "~title", "publisher", "state", ">tokens", ">price"],
        [
            (
                listing["document_id"],
                listing["title"],
                listing["publisher"],
                listing["state"],
                listing["token_count"],
                format_nano(listing["terms"]["cache_read_nano_per_mtok"]),
            )
            for listing in described
        ],
        empty="no documents; publish one with `kvmarket document publish`",
    )


# publish


@dataclass(frozen=True, slots=True)
class Source:
    """A file to publish; its text is used unchanged, because its tokens decide what matches."""

    name: str
    title: str
    text: str


def read_source(name: str, title: str | None) -> Source:
    """Read a document. Raises NotPublishableError when there is no text in it."""
    shown = "standard input" if name == STDIN else os.fsencode(name).decode("utf-8", "replace")
    try:
        content = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise NotPublishableError(f"cannot read {shown}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise NotPublishableError(f"{shown} is not text in UTF-8; convert it first") from None
    if not text.strip():
        raise NotPublishableError(f"{shown} is empty; there is nothing to publish")
    return Source(shown, title or _heading(text) or Path(shown).stem, text)


def _heading(text: str) -> str:
    """A Markdown document's title: the heading on its first line."""
    first = text.lstrip().partition("\n")[0]
    return first[2:].strip(" #\r") if first.startswith("# ") else ""


@command(
    argument(
        "files", metavar="FILE", nargs="+", help="Markdown or plain text in UTF-8; - for stdin"
    ),
    argument("--title", help="of the one document (default: its heading or file name)"),
    argument(
        "--publisher", default="publisher", help="account that earns the royalty; made if missing"
    ),
    argument("--price", type=amount, help="of a million reused tokens (default: by the tariff)"),
    argument(
        "--royalty", type=share, help="publisher's share, from 0 to 1 (default: by the tariff)"
    ),
    argument(
        "--as",
        dest="as_",
        choices=("text", "chat"),
        default="text",
        help="as it stands, or as the first message of a chat (default: text)",
    ),
    argument("--ttl", type=span_s, help="on offer for: 90s, 15m, 12h, 7d, 4w"),
    *engine_options(),
    changes=True,
)
def document_publish(args: argparse.Namespace) -> int:
    """Prefill documents once, store their KV, and put them on offer."""
    if args.title and len(args.files) > 1:
        raise UsageError("--title names one document; leave it out to publish several files")
    if args.files.count(STDIN) > 1:
        raise UsageError("standard input can be published once")
    # Find every error in the files before spending half a minute on starting an engine.
    sources = [read_source(name, args.title) for name in args.files]
    with open_market(args, create=True) as market:
        ensure_account(market.ledger, args.publisher)
        outcomes = _publish_all(args, market, sources)
    listed = [outcome for outcome in outcomes if outcome["status"] != "failed"]
    emit(
        args,
        {"documents": outcomes},
        lambda where: show_listings(where, listed) if listed else None,
    )
    return 0 if len(listed) == len(outcomes) else 1


def _publish_all(
    args: argparse.Namespace, market: Market, sources: list[Source]
) -> list[dict[str, Any]]:
    """Publish every source on one engine; one that fails does not stop the others."""
    with engine.engine_output(), progress() as bar:
        task = bar.add_task(f"starting {args.model}", total=None, note="")
        llm = engine.open_engine(args.model, market, args.max_model_len, args.dtype)
        bar.update(task, total=sum(len(source.text) for source in sources))
        outcomes = []
        for number, source in enumerate(sources, 1):
            bar.update(task, description=clean(source.title), note=f"{number}/{len(sources)}")
            outcomes.append(_publish(args, market, llm, source))
            bar.console.print(_line(outcomes[-1]))
            bar.advance(task, len(source.text))
        # The engine's processes end here, while their output still goes to stderr.
        del llm
    return outcomes


def _publish(args: argparse.Namespace, market: Market, llm: Any, source: Source) -> dict[str, Any]:
    live = {listing.document_id for listing in market.catalogue.listings(state="live")}
    started = time.monotonic()
    try:
        listing = market.publish(
            llm,
            source.text,
            title=source.title,
            publisher=args.publisher,
            cache_read_nano_per_mtok=args.price,
            royalty_ppm=args.royalty,
            as_=args.as_,
            ttl_s=args.ttl,
        )
    except (NotPublishableError, PublishFailedError) as error:
        return {"file": source.name, "status": "failed", "error": str(error)}
    return {
        "file": source.name,
        "status": "listed already" if listing.document_id in live else "published",
        "seconds": round(time.monotonic() - started, 3),
        **describe(market, listing),
    }


def _line(outcome: dict[str, Any]) -> str:
    if outcome["status"] == "failed":
        return clean(f"{outcome['file']}: failed: {outcome['error']}")
    return clean(
        f"{outcome['file']}: {outcome['status']} as {outcome['title']!r}, "
        f"{outcome['token_count']} tokens in {outcome['seconds']:.1f} s"
    )


# list and show


@command(
    argument("--state", choices=STATES, help="only documents in this state"),
    argument("--search", help="only documents whose title, publisher or id has this text"),
)
def document_list(args: argparse.Namespace) -> None:
    """List the documents of the market."""
    with open_market(args) as market:
        wanted = ListingFilter(
            search=args.search or "", state=args.state, any_state=True, sees_all=True
        )
        described = [describe(market, listing) for listing, _ in market.catalogue.page(wanted)]
    emit(args, {"documents": described}, lambda where: show_listings(where, described))


@command(DOCUMENT_ID)
def document_show(args: argparse.Namespace) -> None:
    """Show one document: prices, size, sales."""
    with open_market(args) as market:
        listing = market.catalogue.get(args.document_id)
        receipts = market.ledger.receipts(document_id=args.document_id)
        document = describe(market, listing)
        document["chunk_keys"] = [key.hex() for key in listing.chunk_keys]
        document["sales"] = {
            "reuses": len(receipts),
            "tokens_reused": sum(receipt.tokens_reused for receipt in receipts),
            "charge_nano": sum(receipt.charge_nano for receipt in receipts),
            "royalty_nano": sum(receipt.royalty_nano for receipt in receipts),
        }
        document["audits"] = [
            {"at_s": audit.at_s, "result": audit.result, "worst_difference": audit.worst_difference}
            for audit in market.catalogue.audits_of(args.document_id)
        ]
    emit(args, document, lambda where: _show(where, document))


def _show(where: Console, document: dict[str, Any]) -> None:
    terms, sales = document["terms"], document["sales"]
    reason = f" ({document['reason']})" if document["reason"] else ""
    expires_at_s = document["expires_at_s"]
    until = "for good" if expires_at_s is None else f"until {moment(expires_at_s)}"

    def origin(field: str) -> str:
        return "by the tariff" if document[field] is None else "its own"

    facts = [
        ("document", document["document_id"]),
        ("title", document["title"]),
        ("publisher", document["publisher"]),
        ("state", document["state"] + reason),
        ("published", f"{moment(document['created_at_s'])} as {document['rendered_as']}"),
        ("on offer", until + (", pinned" if document["pinned"] else "")),
        ("tokens", f"{document['token_count']} in {document['chunk_count']} chunks"),
        ("stored", size(document["stored_bytes"])),
        ("namespace", document["namespace"]),
        (
            "price",
            f"{format_nano(terms['cache_read_nano_per_mtok'])} per million tokens "
            f"({origin('own_cache_read_nano_per_mtok')})",
        ),
        (
            "royalty",
            f"{terms['royalty_ppm'] / PPM:g} of the charge ({origin('own_royalty_ppm')})",
        ),
        (
            "one reuse",
            f"{format_nano(document['charge_nano'])}; "
            f"computing it {format_nano(document['recompute_nano'])}",
        ),
        (
            "sold",
            f"{sales['reuses']} times, {sales['tokens_reused']} tokens, "
            f"{format_nano(sales['charge_nano'])}, royalty {format_nano(sales['royalty_nano'])}",
        ),
    ]
    facts += [
        (
            "audited",
            f"{moment(audit['at_s'])}: {audit['result']}, "
            f"largest difference {audit['worst_difference']:.3g}",
        )
        for audit in document["audits"]
    ]
    pairs(where, facts)


# what is on offer, and how long


@command(DOCUMENT_ID, changes=True)
def document_delist(args: argparse.Namespace) -> None:
    """Take a document off the market at once."""
    with open_market(args) as market:
        market.delist(args.document_id)
        document = describe(market, market.catalogue.get(args.document_id))
    emit(args, document, lambda where: where.print(f"delisted {document['document_id']}"))


@command(
    argument("document_ids", metavar="ID", nargs="*", help="documents, kvd_..."),
    argument(
        "--older-than",
        type=span_s,
        help="without IDs: all that were delisted, expired or failed so long ago, for example 30d "
        "(default: the configuration's retention_s)",
    ),
    changes=True,
)
def document_purge(args: argparse.Namespace) -> None:
    """Remove the tokens of documents that left the market; docs/DEPLOYMENT.md: what remains."""
    if args.document_ids and args.older_than is not None:
        raise UsageError("give documents or --older-than, not both")
    with open_market(args) as market:
        age_s = market.config.retention_s if args.older_than is None else args.older_than
        chosen = args.document_ids
        if not chosen:
            if age_s is None:
                raise UsageError("name the documents, or give --older-than")
            chosen = market.catalogue.leftovers.overdue(time.time() - age_s)
        report = garbage_collection.purge(market, chosen)
        has_bucket = market.store.objects is not None
    emit(
        args,
        {**msgspec.to_builtins(report), "document_ids": chosen},
        lambda where: _show_purged(where, report, has_bucket),
    )


def _show_purged(where: Console, report: garbage_collection.PurgeReport, has_bucket: bool) -> None:
    where.print(f"removed the tokens of {report.purged} documents")
    if has_bucket:
        where.print(f"deleted {report.objects_deleted} objects; what other documents need stays")


@command(
    DOCUMENT_ID,
    one_of(
        argument("--ttl", type=span_s, help="from now on: 90s, 15m, 12h, 7d, 4w"),
        argument("--never", action="store_true", help="keep it on offer for good"),
        required=True,
    ),
    changes=True,
)
def document_expire(args: argparse.Namespace) -> None:
    """Set the time until which a document is on offer."""
    expires_at_s = None if args.never else time.time() + args.ttl
    with open_market(args) as market:
        listing = market.catalogue.set_expiry(args.document_id, expires_at_s)
        document = {**describe(market, listing), "expires_at_s": listing.terms.expires_at_s}
    until = "for good" if expires_at_s is None else f"until {moment(expires_at_s)}"
    emit(args, document, lambda where: where.print(f"{listing.document_id}: on offer {until}"))


@command(DOCUMENT_ID, changes=True)
def document_pin(args: argparse.Namespace) -> int:
    """Keep a document in the engines' paged caches."""
    text = "pinned: every engine keeps it in its paged cache from its next use, within pin_budget"
    return _set_pinned(args, True, text)


@command(DOCUMENT_ID, changes=True)
def document_unpin(args: argparse.Namespace) -> int:
    """Let engines drop a pinned document again."""
    return _set_pinned(args, False, "no longer pinned")


def _set_pinned(args: argparse.Namespace, pinned: bool, text: str) -> int:
    with open_market(args) as market:
        listing = market.catalogue.set_pinned(args.document_id, pinned=pinned)
    document = {"document_id": listing.document_id, "pinned": listing.pinned}
    emit(args, document, lambda where: where.print(f"{listing.document_id}: {text}"))
    return 0


@command(
    DOCUMENT_ID,
    argument("--server", required=True, help="its address, such as http://127.0.0.1:8000"),
)
def document_preload(args: argparse.Namespace) -> None:
    """Bring a document into a running server's paged cache; needs an admin's key in
    $KVMARKET_API_KEY.
    """
    preloaded = _post(
        args.server, f"/v1/kvmarket/documents/{quote(args.document_id, safe='')}/preload"
    )
    facts = [
        ("document", args.document_id),
        ("in the paged cache", f"{preloaded['reused_tokens']} tokens"),
        ("loaded now", f"{preloaded['loaded_tokens']} tokens"),
        ("pinned", f"{preloaded['pinned_tokens']} tokens"),
    ]
    if preloaded["not_pinned"]:
        facts.append(("not pinned", str(preloaded["not_pinned"])))
    emit(args, preloaded, lambda where: pairs(where, facts))


def _post(server: str, path: str) -> dict[str, Any]:
    """Send a POST request without a body; the answer.

    The key comes from the environment: other users of a machine can read a command's arguments.
    Raises ConfigError, RefusedError, and UnavailableError.
    """
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise ConfigError(
            f"{KEY_VARIABLE} is not set; it must hold an admin's key of {server} "
            "(`kvmarket apikey create --scope admin`)"
        )
    if not server.startswith(("http://", "https://")):
        raise ConfigError(f"{server!r} is no address of a server, such as http://127.0.0.1:8000")
    request = urllib.request.Request(  # noqa: S310  # the scheme was checked
        server.rstrip("/") + path, method="POST", headers={"authorization": f"Bearer {key}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SERVER_TIMEOUT_S) as answer:  # noqa: S310
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise RefusedError(f"{server} answered {error.code}: {_message(error)}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise UnavailableError(f"{server} cannot be reached: {error}; is it running?") from None


def _message(error: HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError):
        return str(error.reason)


# audit


@command(
    DOCUMENT_ID,
    argument("--chunks", type=count, default=3, help="how many, chosen at random (default: 3)"),
    argument("--seed", type=count, help="choose the same chunks again"),
    *engine_options(),
)
def document_audit(args: argparse.Namespace) -> int:
    """Compute chunks of a document again and compare them with the stored ones."""
    with open_market(args) as market:
        market.catalogue.get(args.document_id)
        with engine.engine_output(), progress() as bar:
            bar.add_task(f"computing {args.document_id} again", total=None, note="")
            llm = engine.open_engine(args.model, market, args.max_model_len, args.dtype)
            audit = market.audit(llm, args.document_id, chunks=args.chunks, seed=args.seed)
            # The engine's processes end here, while their output still goes to stderr.
            del llm
    emit(args, msgspec.to_builtins(audit), lambda where: _show_audit(where, audit))
    return 0 if audit.result in ("exact", "close") else 1


def _show_audit(where: Console, audit: Audit) -> None:
    facts = [
        ("document", audit.document_id),
        ("chunks", str(audit.chunks)),
        ("result", f"{audit.result}: {VERDICTS[audit.result]}"),
        ("largest difference", f"{audit.worst_difference:.3g}"),
    ]
    pairs(where, [*facts, *([("detail", audit.detail)] if audit.detail else [])])
