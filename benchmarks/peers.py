"""kvmarket beside its peers, on one machine, one vLLM, one model, one run.

    python -m benchmarks.peers [--systems none,example,...] [--tokens 512,1024,2048,4000]
        [--repeats 3] [--skip-faults] [--skip-timing] [--cold] [--seed 1]

Each system's engine is a separate process. If it hangs or dies, that is the result. Engines
run one at a time, and each rests 1.3 s before it is asked. Peers are installed into .cache/peers.

For each system: a request that matches nothing, a hit in vLLM's own prefix cache (APC), reuse with
that emptied, and the first reuse in a new process, in turn within a round; medians. Then faults: a
byte and 4 KiB flipped in a stored file, a file cut in half, and -9 while saving, each followed by
the same question in a new process, compared with plain vLLM's answer. An engine without a connector
runs in each run, for the prefill that the ratios are of; systems that are not named keep their
results of an earlier run. Writes docs/results/peers.json and peers.png.
"""

from __future__ import annotations

import argparse
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.peer_systems import faults, report, timing
from benchmarks.peer_systems.installing import install
from benchmarks.peer_systems.processes import Bench
from benchmarks.peer_systems.systems import BY_NAME, System

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MODEL = Path(__file__).parents[1] / ".cache" / "models" / "SmolLM2-135M-Instruct"


def measure(
    system: System,
    args: argparse.Namespace,
    settings: dict[str, Any],
    expected: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything about one system; whatever keeps it from running is its `error`."""
    result: dict[str, Any] = {"label": system.label, "note": system.note}
    try:
        packages = install(system)
        if system.probe:
            with Bench(system, packages, settings) as bench:
                return result | timing.probe(bench, args.tokens[0])
        if not args.skip_timing:
            with Bench(system, packages, settings) as bench:
                result |= timing.measure(bench, args.tokens, args.repeats, cold=args.cold)
        if expected is not None and system.name != "none":
            with Bench(system, packages, settings) as bench:
                result["faults"] = faults.measure(bench, expected)
    except RuntimeError as error:
        result["error"] = str(error)
    return result


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--systems", default=",".join(BY_NAME))
    parser.add_argument("--tokens", default="512,1024,2048,4000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip-faults", action="store_true")
    parser.add_argument("--skip-timing", action="store_true")
    parser.add_argument("--cold", action="store_true", help="also with the page cache dropped")
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.systems = [name for name in args.systems.split(",") if name]
    args.tokens = tuple(int(number) for number in args.tokens.split(","))
    unknown = [name for name in args.systems if name not in BY_NAME]
    if unknown:
        parser.error(f"no such system: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    return args


def main() -> None:
    """Run the systems one after another, merge what was found, and show it."""
    args = arguments()
    # A timeout's SIGTERM ends it as Ctrl-C does: with its engines and servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("peers: ended from outside"))
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "peers.json"
    settings = {"model": args.model, "seed": args.seed}
    plain: dict[str, Any] = {}
    expected = None
    if not args.skip_faults:
        with Bench(BY_NAME["none"], None, settings) as bench:
            expected = faults.reference(bench)
    if not args.skip_timing:
        plain = measure(BY_NAME["none"], args, settings, None)
        report.merge(path, "none", plain)
    for name in args.systems:
        if name == "none":
            continue
        print(f"peers: {name}", file=sys.stderr, flush=True)
        found = measure(BY_NAME[name], args, settings, expected)
        if "seconds" in found:
            found["rows"] = {
                str(length): timing.columns(found["seconds"], plain["seconds"], length)
                for length in args.tokens
            }
        found["command"] = "python -m benchmarks.peers " + " ".join(sys.argv[1:])
        report.merge(path, name, found)
    facts = {
        "model": Path(args.model).name,
        "machine": describe_machine(),
        "versions": {name: metadata.version(name) for name in ("vllm", "torch", "vllm-kvmarket")},
    }
    result = report.describe(path, facts)
    report.show(result)
    report.plot(result, args.output / "peers.png")
    print(f"\nwrote {path} and peers.png")


if __name__ == "__main__":
    main()
