"""`list`, `show`, `delist`: what is on offer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli.command import Command, open_market
from vllm_kvmarket.cli.output import emit, moment, pairs, size, table

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_kvmarket.catalogue import Listing
    from vllm_kvmarket.market.market import Market

STATES = ("publishing", "live", "damaged", "failed", "delisted", "expired", "evicted")


def describe(market: Market, listing: Listing) -> dict[str, Any]:
    """Put a listing into JSON values, with the prices that hold for it and what its reuse costs."""
    import msgspec

    terms = market.config.tariff.terms(listing.cache_read_nano_per_mtok, listing.royalty_ppm)
    return {
        "document_id": listing.document_id,
        "title": listing.title,
        "publisher": listing.publisher,
        "state": listing.state,
        "reason": listing.reason,
        "token_count": listing.token_count,
        "chunk_count": len(listing.chunk_keys),
        "stored_bytes": listing.stored_bytes,
        "rendered_as": listing.rendered_as,
        "namespace": listing.namespace.hex(),
        "created_at_s": listing.created_at_s,
        "expires_at_s": listing.expires_at_s,
        "pinned": listing.pinned,
        "own_cache_read_nano_per_mtok": listing.cache_read_nano_per_mtok,
        "own_royalty_ppm": listing.royalty_ppm,
        "terms": msgspec.to_builtins(terms),
        "charge_nano": terms.charge_nano(listing.token_count),
        "recompute_nano": terms.recompute_nano(listing.token_count),
    }


def show_listings(where: Console, described: list[dict[str, Any]]) -> None:
    """Print listings as a table; the price is that of a million reused tokens."""
    from vllm_kvmarket.core.pricing import format_nano

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
        empty="no documents; publish one with `kvmarket publish`",
    )


def _configure_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", choices=STATES, help="only documents in this state")
    parser.add_argument(
        "--search", help="only documents whose title, publisher or id has this text"
    )


def _run_list(args: argparse.Namespace) -> int:
    with open_market(args) as market:
        listings = market.catalogue.listings(state=args.state, search=args.search)
        described = [describe(market, listing) for listing in listings]
    emit(args, {"documents": described}, lambda where: show_listings(where, described))
    return 0


def _configure_one(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("document_id", metavar="ID", help="the document's id, kvd_...")


def _run_show(args: argparse.Namespace) -> int:
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
    return 0


def _show(where: Console, document: dict[str, Any]) -> None:
    from vllm_kvmarket.core.pricing import PPM, format_nano

    terms, sales = document["terms"], document["sales"]
    reason = f" ({document['reason']})" if document["reason"] else ""
    own_price = document["own_cache_read_nano_per_mtok"] is not None
    own_royalty = document["own_royalty_ppm"] is not None
    facts = [
        ("document", document["document_id"]),
        ("title", document["title"]),
        ("publisher", document["publisher"]),
        ("state", document["state"] + reason),
        ("published", f"{moment(document['created_at_s'])} as {document['rendered_as']}"),
        (
            "on offer",
            (
                "for good"
                if document["expires_at_s"] is None
                else f"until {moment(document['expires_at_s'])}"
            )
            + (", pinned" if document["pinned"] else ""),
        ),
        ("tokens", f"{document['token_count']} in {document['chunk_count']} chunks"),
        ("stored", size(document["stored_bytes"])),
        ("namespace", document["namespace"]),
        (
            "price",
            f"{format_nano(terms['cache_read_nano_per_mtok'])} per million tokens "
            f"({'its own' if own_price else 'by the tariff'})",
        ),
        (
            "royalty",
            f"{terms['royalty_ppm'] / PPM:g} of the charge "
            f"({'its own' if own_royalty else 'by the tariff'})",
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


def _run_delist(args: argparse.Namespace) -> int:
    with open_market(args) as market:
        market.delist(args.document_id)
        document = describe(market, market.catalogue.get(args.document_id))
    emit(args, document, lambda where: where.print(f"delisted {document['document_id']}"))
    return 0


COMMANDS = (
    Command("list", "list the documents of the market", _run_list, _configure_list),
    Command("show", "show one document: prices, size, sales", _run_show, _configure_one),
    Command("delist", "take a document off the market at once", _run_delist, _configure_one),
)
