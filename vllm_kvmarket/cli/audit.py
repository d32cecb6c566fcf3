"""`audit`, `pin`, `unpin`: is a document what it says, and does it stay in the paged cache?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli.command import Command, count, open_market
from vllm_kvmarket.cli.output import emit, pairs, progress

if TYPE_CHECKING:
    from rich.console import Console

# Rounding differs between engines, batches and kernels; poison differs by orders of magnitude.
VERDICTS = {
    "exact": "bit for bit what this engine computes",
    "close": "what this engine computes, up to rounding",
    "different": "NOT what this engine computes",
    "unread": "not all could be read: missing, damaged, or in a foreign layout; see kvmarket fsck",
}


def _configure_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("document_id", metavar="ID", help="the document's id, kvd_...")
    parser.add_argument(
        "--model", required=True, help="model folder or hub name that it was published with"
    )
    parser.add_argument(
        "--chunks", type=count, default=3, help="how many, chosen at random (default: 3)"
    )
    parser.add_argument("--seed", type=count, help="choose the same chunks again")
    parser.add_argument("--max-model-len", type=count, help="context of the engine, in tokens")
    parser.add_argument("--dtype", help="of the engine, as it was published with")


def _run_audit(args: argparse.Namespace) -> int:
    from vllm_kvmarket.cli import engine

    with open_market(args) as market:
        market.catalogue.get(args.document_id)
        with engine.engine_output(), progress() as bar:
            bar.add_task(f"computing {args.document_id} again", total=None, note="")
            llm = engine.open_engine(args.model, market, args.max_model_len, args.dtype)
            audit = market.audit(llm, args.document_id, chunks=args.chunks, seed=args.seed)
            # The engine's processes end here, while what they print still goes to stderr.
            del llm
        report: dict[str, Any] = {
            "document_id": audit.document_id,
            "at_s": audit.at_s,
            "chunks": audit.chunks,
            "result": audit.result,
            "worst_difference": audit.worst_difference,
            "detail": audit.detail,
        }
    emit(args, report, lambda where: _show_audit(where, report))
    return 0 if audit.result in ("exact", "close") else 1


def _show_audit(where: Console, report: dict[str, Any]) -> None:
    facts = [
        ("document", report["document_id"]),
        ("chunks", str(report["chunks"])),
        ("result", f"{report['result']}: {VERDICTS[report['result']]}"),
        ("largest difference", f"{report['worst_difference']:.3g}"),
    ]
    if report["detail"]:
        facts.append(("detail", report["detail"]))
    pairs(where, facts)


def _configure_one(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("document_id", metavar="ID", help="the document's id, kvd_...")


def _run_pin(args: argparse.Namespace) -> int:
    return _set_pinned(args, pinned=True)


def _run_unpin(args: argparse.Namespace) -> int:
    return _set_pinned(args, pinned=False)


def _set_pinned(args: argparse.Namespace, *, pinned: bool) -> int:
    with open_market(args) as market:
        listing = market.catalogue.set_pinned(args.document_id, pinned=pinned)
    text = (
        "pinned: every engine keeps it in its paged cache from its next use on, within pin_budget"
        if pinned
        else "not pinned any more"
    )
    document = {"document_id": listing.document_id, "pinned": listing.pinned}
    emit(args, document, lambda where: where.print(f"{listing.document_id}: {text}"))
    return 0


COMMANDS = (
    Command(
        "audit",
        "compute chunks of a document again and compare them with what is stored",
        _run_audit,
        _configure_audit,
    ),
    Command("pin", "keep a document in the engines' paged caches", _run_pin, _configure_one),
    Command("unpin", "let engines drop a document again", _run_unpin, _configure_one),
)
