"""`fsck`: check everything that the market has stored; changes nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_kvmarket.cli.command import Command, open_market
from vllm_kvmarket.cli.output import emit, progress

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_kvmarket.market.check_and_repair import CheckReport, Progress


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="leave the chunks' bytes unread: books and lists only"
    )


@contextmanager
def counted(description: str) -> Iterator[Progress]:
    """Show a progress bar; yields what is to be called with the steps done and all steps."""
    with progress() as bar:
        task = bar.add_task(description, total=None, note="")
        yield lambda done, total: bar.update(
            task, completed=done, total=total, note=f"{done}/{total}"
        )


def _run(args: argparse.Namespace) -> int:
    import msgspec

    from vllm_kvmarket.market import check_and_repair

    with open_market(args) as market, counted("verifying chunks") as step:
        report = check_and_repair.check(market, verify=not args.quick, on_progress=step)
    emit(args, msgspec.to_builtins(report), lambda where: _show(where, report))
    return 0 if report.ok else 1


def _show(where: Console, report: CheckReport) -> None:
    from vllm_kvmarket.cli.output import clean, size

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
        where.print("`kvmarket gc` removes what no listing needs")
    if report.chunks_damaged or report.documents_damaged:
        where.print("publish the damaged documents again, with `kvmarket repair`")


COMMANDS = (Command("fsck", "check ledger, catalogue and every stored chunk", _run, _configure),)
