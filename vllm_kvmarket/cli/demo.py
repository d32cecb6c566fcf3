"""`kvmarket demo`: publish a document, sell it to three buyers, refuse one without funds."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.cli import engine, output
from vllm_kvmarket.cli.command import argument, command, count
from vllm_kvmarket.core.errors import KVMarketError
from vllm_kvmarket.core.pricing import format_nano
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.timed_requests import Answer, ask, empty_prefix_cache

if TYPE_CHECKING:
    from rich.console import Console

DOCUMENT_TOKENS = 3774
CONTEXT_TOKENS = 4096
ANSWER_TOKENS = 24
DEPOSIT_NANO = 1_000_000_000
PUBLISHER = "free-software-foundation"
TITLE = "GNU General Public License, version 3"
BUYERS = {
    "alice": "May I sell copies of a program under this license?",
    "bob": "What must I do when I convey a covered work in object code form?",
    "carol": "Does this license grant me a patent license?",
}
PAUPER = "dave"


@dataclass(frozen=True, slots=True)
class Sale:
    """One question, asked by a buyer and by the one without funds, for whom all is computed."""

    buyer: str
    question: str
    reuse: Answer
    prefill: Answer


@command(
    argument("--model", help="model folder or hub name (default: the demo's own)"),
    argument("--output", help="folder for result.json (default: .demo)"),
    argument("--max-model-len", type=count, help="context of the engine, in tokens"),
)
def demo(args: argparse.Namespace) -> int:
    """Publish, reuse and charge for a real document, end to end."""
    folder = Path(args.output or ".demo").resolve()
    home = Path(args.home or folder / "home").resolve()
    if args.home is None:
        shutil.rmtree(home, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    model = args.model or ".cache/models/SmolLM2-135M-Instruct"
    context = args.max_model_len or CONTEXT_TOKENS
    started = time.monotonic()

    document = folder / "document.txt"
    write_document(document, model)
    say(f"1/3 publishing {TITLE!r} in another process (an engine starts, then stops)")
    publish(document, model, home, context)
    say("2/3 a new engine on the same market: three buyers, and one without funds")
    from vllm_kvmarket.connector.offline_engine import close_llm

    with Market.open(home, args.config) as market:
        (listing,) = market.catalogue.listings(state="live")
        with engine.engine_output():
            llm = engine.open_engine(model, market, context, None)
            sales, hits = sell(llm, market, listing.document_id)
            close_llm(llm)
        say("3/3 the money")
        result = report(market, model, listing.token_count, sales, hits)
        result["seconds"] = round(time.monotonic() - started, 1)
        target = folder / "result.json"
        target.write_text(json.dumps(result, indent=2) + "\n")
        output.emit(args, result, lambda console: show(console, result, sales))
        say(f"wrote {target}")
    kept = (
        result["greedy_equal"] == result["greedy_total"]
        and result["reused_tokens"] == result["tokens"]
        and result["prefill_cached_tokens"] == 0
        and result["ledger_balanced"]
    )
    return 0 if kept else 1


def say(text: str) -> None:
    """Report a step on stderr."""
    print(f"kvmarket demo: {text}", file=sys.stderr, flush=True)


def write_document(path: Path, model: str) -> None:
    """The first tokens of the licence text, as a file."""
    from transformers import AutoTokenizer

    text = resources.files("vllm_kvmarket.cli").joinpath("gpl-3.0.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(text)["input_ids"][:DOCUMENT_TOKENS]
    path.write_text(str(tokenizer.decode(tokens, skip_special_tokens=True)))


def publish(document: Path, model: str, home: Path, context: int) -> None:
    """Publish the file with the command, as a user would. Raises KVMarketError."""
    command = [sys.executable, "-m", "vllm_kvmarket.cli", "document", "publish"]
    command += [str(document), "--model", model, "--home", str(home)]
    command += ["--max-model-len", str(context), "--title", TITLE, "--publisher", PUBLISHER]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise KVMarketError(f"publishing failed with exit code {done.returncode}; see above")


def sell(llm: Any, market: Market, document_id: str) -> tuple[list[Sale], list[Answer]]:
    """Ask every question twice, bought and computed; also time vLLM's own cache hits."""
    tokenizer = llm.get_tokenizer()
    document = market.catalogue.tokens_of(document_id)
    for buyer in BUYERS:
        market.create_account(buyer)
        market.deposit(buyer, DEPOSIT_NANO, f"demo:{buyer}")
    market.create_account(PAUPER)
    prompts = {
        buyer: document + tokenizer(f"\n\nQuestion: {question}\nAnswer:")["input_ids"]
        for buyer, question in BUYERS.items()
    }
    # Without its first token the text matches no published prefix: plain vLLM, to compare.
    control = document[1:]
    ask(llm, control[:1000], max_tokens=1)  # the first request of a process is slow
    bought = {}
    for buyer, prompt in prompts.items():
        bought[buyer] = ask(llm, prompt, market.params(buyer), ANSWER_TOKENS)
    sales = []
    for buyer, prompt in prompts.items():
        # It would find what the question before has computed for the same account.
        empty_prefix_cache(llm)
        full = ask(llm, prompt, market.params(PAUPER), ANSWER_TOKENS)
        sales.append(Sale(buyer, BUYERS[buyer], bought[buyer], full))
    tails = [prompt[len(document) :] for prompt in prompts.values()]
    ask(llm, control + tails[0], max_tokens=1)
    hits = [ask(llm, control + tail, max_tokens=1) for tail in (*tails[1:], *tails)]
    return sales, hits


def report(
    market: Market, model: str, tokens: int, sales: list[Sale], hits: list[Answer]
) -> dict[str, Any]:
    """The contents of `.demo/result.json`."""
    receipts = [
        market.receipt(sale.reuse.market["receipt_id"])
        for sale in sales
        if sale.reuse.market.get("receipt_id")
    ]
    problems = market.ledger.check_integrity() + market.catalogue.check_integrity()
    return {
        "model": model,
        "tokens": tokens,
        "reused_tokens": min(sale.reuse.market.get("reused_tokens", 0) for sale in sales),
        # Nothing, or the time beside it is no prefill's.
        "prefill_cached_tokens": max(sale.prefill.cached_tokens for sale in sales),
        "ttft_prefill_s": statistics.median(sale.prefill.ttft_s for sale in sales),
        "ttft_reuse_s": sales[0].reuse.ttft_s,
        "ttft_later_reuse_s": statistics.median(sale.reuse.ttft_s for sale in sales[1:]),
        "ttft_apc_hit_s": statistics.median(hit.ttft_s for hit in hits),
        "greedy_equal": sum(sale.reuse.equal_tokens(sale.prefill) for sale in sales),
        "greedy_total": ANSWER_TOKENS * len(sales),
        "max_abs_logprob_diff": max(sale.reuse.logprob_difference(sale.prefill) for sale in sales),
        "charges_nano": {receipt.account: receipt.charge_nano for receipt in receipts},
        "recompute_nano": {receipt.account: receipt.recompute_nano for receipt in receipts},
        "declined": sales[0].prefill.market.get("declined", ""),
        "royalty_nano": market.ledger.account(PUBLISHER).balance_nano,
        "ledger_balanced": not problems,
        "problems": problems,
        "receipts": [receipt.id for receipt in receipts],
    }


def show(console: Console, result: dict[str, Any], sales: list[Sale]) -> None:
    """The demo's tables."""
    rows = []
    for sale in sales:
        charge = result["charges_nano"].get(sale.buyer, 0)
        saved = result["recompute_nano"].get(sale.buyer, 0) - charge
        rows.append(
            (
                sale.buyer,
                sale.reuse.market.get("reused_tokens", 0),
                sale.reuse.market.get("computed_tokens", 0),
                f"{sale.reuse.ttft_s:.3f} s",
                f"{sale.prefill.ttft_s:.3f} s",
                f"{sale.prefill.ttft_s / sale.reuse.ttft_s:.1f}x",
                f"{sale.reuse.equal_tokens(sale.prefill)}/{ANSWER_TOKENS}",
                format_nano(charge),
                format_nano(saved),
            )
        )
    refused = statistics.median(sale.prefill.ttft_s for sale in sales)
    computed = sales[0].prefill.market.get("computed_tokens", 0)
    rows.append((PAUPER, 0, computed, "-", f"{refused:.3f} s", "-", "-", format_nano(0), "-"))
    columns = ("buyer", ">reused", ">computed", ">TTFT reuse", ">TTFT prefill", ">ratio")
    output.table(console, (*columns, ">same tokens", ">charge", ">saved"), rows)
    console.print()
    output.pairs(
        console,
        [
            ("document", f"{TITLE}, {result['tokens']} tokens"),
            ("first reuse, new process", f"{result['ttft_reuse_s']:.3f} s"),
            ("vLLM's own prefix-cache hit", f"{result['ttft_apc_hit_s']:.3f} s"),
            ("largest log-probability difference", f"{result['max_abs_logprob_diff']:.2e}"),
            (f"{PAUPER} was not sold to", result["declined"]),
            (f"royalty of {PUBLISHER}", format_nano(result["royalty_nano"])),
            ("ledger", "debits equal credits" if result["ledger_balanced"] else "DOES NOT ADD UP"),
            ("took", f"{result['seconds']} s"),
        ],
    )
