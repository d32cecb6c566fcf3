"""`fsck`: check everything that the market has stored; changes nothing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli.command import Command, open_market
from vllm_kvmarket.cli.output import emit, progress
from vllm_kvmarket.errors import StoreError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_kvmarket.market import Market

LISTED_STATES = ("live", "damaged")


def check(market: Market) -> dict[str, Any]:
    """Check ledger, catalogue and every listed chunk; report what is wrong, in words."""
    problems = [f"ledger: {problem}" for problem in market.ledger.check_integrity()]
    problems += [f"catalogue: {problem}" for problem in market.catalogue.check_integrity()]
    holders: dict[bytes, str] = {}
    for listing in market.catalogue.listings():
        if listing.state in LISTED_STATES:
            for key in listing.chunk_keys:
                holders.setdefault(key, listing.document_id)
    bad = _verify_chunks(market, holders)
    unlisted = set(market.store.keys()) - holders.keys()
    problems += bad
    return {
        "ok": not problems,
        "home": str(market.home),
        "problems": problems,
        "chunks_verified": len(holders),
        "chunks_damaged": len(bad),
        "chunks_unlisted": len(unlisted),
        "stored_bytes": market.store.bytes_used(),
    }


def _verify_chunks(market: Market, holders: dict[bytes, str]) -> list[str]:
    problems = []
    with progress() as bar:
        task = bar.add_task("verifying chunks", total=len(holders), note="")
        for number, (key, document_id) in enumerate(holders.items(), 1):
            try:
                market.store.verify(key)
            except StoreError as error:
                problems.append(f"store: {error} (document {document_id})")
            bar.update(task, advance=1, note=f"{number}/{len(holders)}")
    return problems


def _run(args: argparse.Namespace) -> int:
    with open_market(args) as market:
        report = check(market)
    emit(args, report, lambda where: _show(where, report))
    return 0 if report["ok"] else 1


def _show(where: Console, report: dict[str, Any]) -> None:
    from vllm_kvmarket.cli.output import clean, size

    for problem in report["problems"]:
        where.print(clean(problem))
    unlisted = report["chunks_unlisted"]
    where.print(
        f"{'good' if report['ok'] else 'BAD'}: {report['chunks_verified']} chunks verified, "
        f"{len(report['problems'])} problems, {size(report['stored_bytes'])} stored"
        + (f", {unlisted} chunks of no listing" if unlisted else "")
    )
    if report["chunks_damaged"]:
        where.print("publish the damaged documents again to repair them")


COMMANDS = (Command("fsck", "check ledger, catalogue and every stored chunk", _run),)
