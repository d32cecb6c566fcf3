"""The paper, reproduced: 'Can I Buy Your KV Cache?', arXiv 2606.13361, claim by claim.

    python -m benchmarks.paper [--only N ...] [--model FOLDER] [--seed 0] [--quick]

1  exactness: reuse gives the tokens and log-probabilities of full prefill and of vLLM's own hit
2  prefill against reuse over length, and after how many reuses publishing has paid
3  what lossless codecs make of a KV cache, by type of number
4  where the KV lives: shipping it, hosting it, or computing it again
5  the prize: 80 million readers of one document, and who earns what

Sections 1 to 3 run the model; 4 and 5 are arithmetic on the paper's figures and on those measured
here before. Prices are inputs (--input-price, --egress-prices, --storage-prices); where defaults
come from is in the result. Writes docs/results/paper.json (a run of some sections keeps the others)
and paper_*.png. Exits with 1 when an answer differed and float noise does not explain it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.paper_sections import exactness, growth, hosting, incompressible, pictures, prize
from benchmarks.paper_sections.inputs import add_prices, read_prices
from vllm_kvmarket import Market
from vllm_kvmarket.cli.engine import engine_output

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
PACKAGES = ("vllm", "torch", "transformers", "vllm-kvmarket", "numpy", "zstandard", "lz4")
PAPER = "Can I Buy Your KV Cache?, arXiv 2606.13361"
Result = dict[str, Any]


def with_market(run: Callable[[Market], Result]) -> Result:
    """Run a section's engines on a new market, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="kvmarket-paper-") as home, Market.open(home) as market:
        market.create_account("buyer")
        market.deposit("buyer", 10**15, "deposit")
        with engine_output():
            return run(market)


def section(number: int, args: argparse.Namespace, known: dict[str, Result]) -> Result:
    """Run one section. `known` are the sections' results so far, by name."""
    if number == 1:
        return with_market(lambda at: exactness.run(args.model, at, args.seed, args.quick))
    if number == 2:
        return with_market(lambda at: growth.run(args.model, at, args.repeats, args.quick))
    if number == 3:
        return incompressible.run(args.model, args.quick)
    work = hosting if number == 4 else prize
    return work.run(read_prices(args), known)


SECTIONS: dict[int, tuple[str, str, Callable[[Result], None]]] = {
    1: ("exactness", "Exactness", exactness.show),
    2: ("prefill_against_reuse", "Prefill against reuse", growth.show),
    3: ("incompressible", "KV is nearly incompressible", incompressible.show),
    4: ("hosting", "Where the KV lives", hosting.show),
    5: ("prize", "The prize", prize.show),
}


def facts(args: argparse.Namespace) -> Result:
    """The facts that every figure needs beside it."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": shlex.join(["python", "-m", "benchmarks.paper", *sys.argv[1:]]),
        "model": Path(args.model).name,
        "seed": args.seed,
        "quick": args.quick,
        "machine": describe_machine(),
        "versions": versions,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", choices=sorted(SECTIONS), metavar="N")
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=growth.REPEATS, help="of section 2")
    parser.add_argument("--quick", action="store_true", help="little of everything, to try it out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    add_prices(parser)
    return parser.parse_args(arguments)


def read_sections(path: Path) -> dict[str, Result]:
    """Results of earlier runs, by the sections' names."""
    found: dict[str, Result] = json.loads(path.read_text())["sections"] if path.exists() else {}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, print their tables, write JSON and pictures."""
    args = parse(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "paper.json"
    known = read_sections(path)
    for number in args.only or sorted(SECTIONS):
        name, title, show = SECTIONS[number]
        found = {**facts(args), **section(number, args, known)}
        # Read again: another section may have been run meanwhile.
        known = {**read_sections(path), name: found}
        path.write_text(json.dumps({"paper": PAPER, "sections": known}, indent=1) + "\n")
        machine, versions = found["machine"], found["versions"]
        print(f"\n{number}. {title}\n   {found['command']}")
        if number <= 3:
            print(
                f"   {found['model']} on {machine['cpu']}, {machine['cores']} cores, no "
                f"accelerator, vLLM {versions['vllm']}, torch {versions['torch']}"
            )
        print()
        show(found)
    for drawn in pictures.draw(known, args.output):
        print(f"\nwrote {drawn}", end="")
    print(f"\nwrote {path}")
    return 1 if exactness.unexplained(known.get("exactness", {"mismatches": []})) else 0


if __name__ == "__main__":
    sys.exit(main())
