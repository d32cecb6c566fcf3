"""`publish`: one engine, many files, one listing each."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli.command import (
    Command,
    UsageError,
    amount,
    count,
    open_market,
    share,
    span_s,
)
from vllm_kvmarket.cli.output import clean, emit, progress
from vllm_kvmarket.core.errors import NotPublishableError, PublishFailedError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_kvmarket.market.market import Market

STDIN = "-"


@dataclass(frozen=True, slots=True)
class Source:
    """A file to publish; its text is taken verbatim, since tokens decide what is matched."""

    name: str
    title: str
    text: str


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="Markdown or plain text in UTF-8; - for stdin"
    )
    parser.add_argument("--model", required=True, help="model folder or hub name, as for vLLM")
    parser.add_argument("--title", help="of the one document (default: its heading or file name)")
    parser.add_argument(
        "--publisher", default="publisher", help="account that earns the royalty; made if missing"
    )
    parser.add_argument(
        "--price", type=amount, help="of a million reused tokens (default: by the tariff)"
    )
    parser.add_argument(
        "--royalty", type=share, help="publisher's share, from 0 to 1 (default: by the tariff)"
    )
    parser.add_argument(
        "--as",
        dest="as_",
        choices=("text", "chat"),
        default="text",
        help="as it stands, or as the first message of a chat (default: text)",
    )
    parser.add_argument("--ttl", type=span_s, help="on offer for: 90s, 15m, 12h, 7d, 4w")
    parser.add_argument("--max-model-len", type=count, help="context of the engine, in tokens")
    parser.add_argument("--dtype", help="of the engine, as for vLLM (float32 suits most CPUs)")


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
    """Find a Markdown document's title: the heading that it opens with."""
    first = text.lstrip().partition("\n")[0]
    return first[2:].strip(" #\r") if first.startswith("# ") else ""


def _run(args: argparse.Namespace) -> int:
    if args.title and len(args.files) > 1:
        raise UsageError("--title names one document; leave it out to publish several files")
    if args.files.count(STDIN) > 1:
        raise UsageError("standard input can be published once")
    # Everything that can be wrong is found before half a minute goes into starting an engine.
    sources = [read_source(name, args.title) for name in args.files]
    with open_market(args, create=True) as market:
        market.create_account(args.publisher, "publisher")
        outcomes = publish_all(args, market, sources)
    emit(args, {"documents": outcomes}, lambda where: _show(where, outcomes))
    return 0 if all(outcome["status"] != "failed" for outcome in outcomes) else 1


def publish_all(
    args: argparse.Namespace, market: Market, sources: list[Source]
) -> list[dict[str, Any]]:
    """Publish every source on one engine; one that fails does not stop the others."""
    from vllm_kvmarket.cli import engine

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
        # The engine's processes end here, while what they print still goes to stderr.
        del llm
    return outcomes


def _publish(args: argparse.Namespace, market: Market, llm: Any, source: Source) -> dict[str, Any]:
    from vllm_kvmarket.cli.documents import describe

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


def _show(where: Console, outcomes: list[dict[str, Any]]) -> None:
    from vllm_kvmarket.cli.documents import show_listings

    listed = [outcome for outcome in outcomes if outcome["status"] != "failed"]
    if listed:
        show_listings(where, listed)


COMMANDS = (
    Command(
        "publish",
        "prefill documents once, store their KV, and put them on offer",
        _run,
        _configure,
    ),
)
