"""Write docs/RESULTS.md from the measured results in docs/results: what has no result is left out.

python -m tools.results_page
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peer_systems import report
from benchmarks.simulation.scaling import with_ledgers
from tools.results_paper import (
    RESULTS,
    Result,
    exactness,
    growth,
    hosting,
    incompressible,
    picture,
    prize,
    table,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "RESULTS.md"

HEAD = """# Results

One picture or table for each claim. Every figure comes from a script in `benchmarks/` and a file in
`docs/results/`, and this page is written from those files (`tools/results_page.py`). Unless said otherwise it ran on
2 cores of an AMD EPYC without a GPU, with vLLM 0.32's CPU build, and the model is SmolLM2-135M-Instruct in float32.
Such a machine's seconds are noisy: read the ratios. What goes against us is at the end of each part.
"""
NOT_PROVEN = """## What is not proven

- **No GPU has run any of this.** The device path (pinned buffers, streams) is written, not run; on a GPU prefill
  is faster, copies are too, and the ratios will differ.
- Models of more than 135 million parameters have not run here; `--model` takes them where a machine has them.
- A fleet of more than two engines is simulated, from the measured capacity of each part.
- Prices are inputs, with their sources in the result files; the paper's own are used where it gives them.
"""


def peers(found: Result) -> str:
    """The systems side by side."""
    text = """## Beside the peers

`make bench-peers`: the same machine, vLLM, model, documents and questions; each system in its own processes.
`/ APC` is over vLLM's own prefix-cache hit in the same process.
"""
    text += picture("peers.png", "reuse by system, and what each does with damaged data")
    lengths = sorted({n for s in found["systems"].values() for n in s.get("rows", {})}, key=int)
    for length in lengths:
        rows = report.timing_rows(found, length)
        text += f"\n{int(length):,} tokens ({report.plain_line(found, length)}):\n\n"
        text += table(report.HEAD, rows) + "\n"
    faults = [
        (
            system["label"],
            *(
                report.fault_cell(system["faults"][name])
                if name in system.get("faults", {})
                else "-"
                for name in report.FAULTS
            ),
        )
        for system in found["systems"].values()
        if system.get("faults")
    ]
    if faults:
        text += "\n" + table(("damage", *report.FAULTS.values()), faults) + "\n"
    cannot = [
        f"- {system['label']}: {system['error']}"
        for system in found["systems"].values()
        if "error" in system
    ]
    notes = {s["note"] for s in found["systems"].values() if s.get("note", "").startswith("(*)")}
    return text + "\n" + "\n".join([*sorted(notes), "", *cannot]) + "\n" + behind(found, lengths)


def behind(found: Result, lengths: Sequence[str]) -> str:
    """Where a peer is ahead of kvmarket, and why."""
    columns = {"reuse": "reuse in the same process", "new": "new process", "cold": "cold"}
    ahead = []
    for column, name in columns.items():
        for length in lengths:
            seconds = by_label(found, length, column)
            first = sorted(seconds, key=seconds.__getitem__)
            better = ", ".join(
                f"{label} {seconds[label]:.3f}" for label in first[: first.index("kvmarket")]
            )
            if better:
                own = seconds["kvmarket"]
                ahead.append(f"- {name}, {int(length):,} tokens: {better}; kvmarket {own:.3f}")
    listed = "\n".join(ahead) or "- nowhere"
    ours, example = (found["systems"][name]["bytes_per_token"] for name in ("kvmarket", "example"))
    return f"""
Where a peer is ahead of kvmarket, in seconds:

{listed}

Each system runs in its own processes, and two processes of the same system differ by more than most of these. What
remains has causes. In the same process Mooncake's and LMCache's chunks lie in memory and are copied as they are, while
kvmarket reads files in the page cache and verifies every byte (of 2,048 tokens 96 MB; the next table has the speed),
after a reservation that is on disk. From the disk a peer reads unverified, too. *In ratios to a hit* kvmarket looks worse than in
seconds, because vLLM's own hits are quicker in its processes: in new ones {ratio_of_hits(found, lengths)} of the
quickest peer's. *KB/token*: {ours / example - 1:.1%} more than ExampleConnector for checksums, headers and a document's last tokens, which fill no block.
"""


def ratio_of_hits(found: Result, lengths: Sequence[str]) -> str:
    """By length, a hit of kvmarket's new process over the quickest one of a peer's."""
    told = []
    for length in lengths:
        hits = by_label(found, length, "new_apc")
        own = hits.pop("kvmarket")
        told.append(f"{own / min(hits.values()):.2f}")
    return ", ".join(told)


def by_label(found: Result, length: str, column: str) -> dict[str, float]:
    """A column's seconds, of the systems that have it."""
    rows = {s["label"]: s["rows"][length] for s in found["systems"].values() if "rows" in s}
    return {label: row[column] for label, row in rows.items() if row.get(column)}


def crowd(found: Result) -> str:
    """Many buyers of one document."""
    by = {(row["documents"], row["at_a_time"], row["system"]): row for row in found["rows"]}
    names = {"one": "3,774 tokens", "blocks": "2,816 tokens, 22 blocks", "zipf": "8 documents"}
    rows = []
    for (documents, at_a_time, system), row in by.items():
        plain = by[documents, at_a_time, "plain"]
        rows.append(
            (
                names.get(documents, documents),
                str(at_a_time),
                system.replace("_", " "),
                f"{row['requests_per_s']:.2f}",
                f"{row['requests_per_s'] / plain['requests_per_s']:.2f}",
                f"{row['ttft_p50_s']:.2f}",
                f"{row['ttft_p99_s']:.2f}",
                f"{row['peak_usage']:.0%}",
                f"{row['chunks_loaded']:.0f}",
            )
        )
    head = (
        *("document", "at a time", "system", "requests/s", "/ plain"),
        *("TTFT p50 s", "p99 s", "paged cache", "chunks loaded"),
    )
    return f"""## A crowd of buyers

`{found["command"]}`: a real server, {found["requests"]} requests of {found["accounts"]} accounts, in turn with one
account and with plain vLLM, whose prefix cache is warm ("plain", and with blocks of 32 tokens) or off. Measured on
{found["machine"]["cores"]} cores of an {found["machine"]["cpu"]}. A document's last block, if it is not full, is loaded
for each request.

{table(head, rows)}
"""


def under_load(found: Result) -> str:
    """A reuse while others decode, beside a hit."""
    rows = [
        (
            f"{row['tokens']:,}",
            *(f"{seconds:.3f}" for seconds in row["seconds"].values()),
            f"{row['same_process_over_hit']:.2f}",
            f"{row['new_process_over_hit']:.2f}",
        )
        for row in found["rows"]
    ]
    head = (
        *("tokens", "hit s", "reuse s", "hit, new process s", "reuse, new process s"),
        *("reuse / hit", "in a new process"),
    )
    return f"""## While others decode

`{found["command"]}`: seconds to the first token while {found["others"]} requests decode, of a reuse and of a hit in vLLM's own prefix
cache, in turn. Measured on {found["machine"]["cores"]} cores of an {found["machine"]["cpu"]}. A new process loads the document from the page
cache; it is asked about the shortest document first, where its first purchase costs 0.08 s more than a hit (why was not
found).

{table(head, rows)}
"""


def miss_cost(found: Result) -> str:
    """What the plugin costs those who buy nothing."""
    low, high = found["interval_95"]
    return f"""## A request that matches nothing

`{found["command"]}`: prompts of {found["tokens"]} tokens to a plain server and to one on a market, in turn,
{len(found["rounds"])} rounds. The market's time to the first token is **{found["ratio"]:.2f}** of plain vLLM's (95 %: {low:.2f} to {high:.2f}),
on {found["machine"]["cores"]} cores of an {found["machine"]["cpu"]}. Below 1, probably because kvmarket has Python
switch threads more often while vLLM's processes spin.
"""


def store(found: Result) -> str:
    """Loading and saving."""
    parts = ("host", "disk", "cold", "save", "objects", "save, objects")
    rows = []
    for dtype, codec in dict.fromkeys((row["dtype"], row["codec"]) for row in found["rows"]):
        got = {
            row["part"]: row
            for row in found["rows"]
            if (row["dtype"], row["codec"]) == (dtype, codec)
        }
        rows.append(
            (
                f"{dtype}, {codec}",
                f"{got['memcpy']['bytes_per_s'] / 1e9:.1f}",
                *(
                    f"{got[part]['bytes_per_s'] / 1e9:.2f} ({got[part]['of_memcpy']:.0%})"
                    if part in got
                    else "-"
                    for part in parts
                ),
            )
        )
    return f"""## Loading at the speed of memory

`python -m benchmarks.store`: GB/s of KV, verified, two threads, and the share of memcpy in the same round; disk is
in the page cache, cold is not, objects is SeaweedFS on the same machine.

{table(("KV", "memcpy", *parts), rows)}
"""


def ledger(found: Result) -> str:
    """Durable pairs a second."""
    rows = []
    for name, label in (("sqlite", "SQLite"), ("postgres", "PostgreSQL 15")):
        if name in found:
            pairs = {p["in_flight"]: p for p in found[name]["pairs"] if not p["bare"]}
            calls = found[name]["callbacks"]
            rows.append(
                (
                    label,
                    *(f"{pairs[n]['pairs_per_s']:,}" for n in (1, 8, 64, 512)),
                    f"{found[name]['fdatasync_per_s']:,}",
                    f"{calls['reserve_us']['p99']:.0f} / {calls['settle_us']['p99']:.0f} us",
                )
            )
    head = ("backend", "1 in flight", "8", "64", "512", "raw fdatasync/s", "callback p99")
    return f"""## Money, durably

`python -m benchmarks.ledger`: pairs of a reservation and its settlement (charge, royalty, receipt) a second, each
committed to disk before it counts.

{table(head, rows)}
{_clients(found.get("postgres", {}).get("clients", []))}"""


def _clients(runs: list[Result]) -> str:
    """Several processes on one ledger."""
    if not runs:
        return ""
    rows = [
        (
            str(run["clients"]),
            f"{run['pairs_per_s']:,}",
            f"{run['groups_per_s']:,}",
            f"{run['reserve_ms']['p99']:.1f}",
            f"{run['paced']['pairs']:,}",
            f"{run['paced']['busy_cores']:.2f}",
            f"{run['paced']['reserve_ms']['p50']:.1f}",
            f"{run['paced']['reserve_ms']['p99']:.1f}",
        )
        for run in runs
    ]
    head = (
        "clients", "pairs/s", "groups/s", "p99 ms", "paced pairs", "cores busy", "p50 ms", "p99 ms",
    )  # fmt: skip
    rate = runs[0]["paced"]["pairs_per_s_each"]
    return f"""
Client processes on one PostgreSQL, each an engine. On the left each keeps eight pairs in flight, which fills both
cores: waits are those of the queue for a core. On the right each makes {rate:g} requests a second at random moments,
and a reservation's wait counts from when it was due.

{table(head, rows)}
"""


def ledger_history(found: Result) -> str:
    """A ledger with a long past."""
    rows = []
    for name, label in (("sqlite", "SQLite"), ("postgres", "PostgreSQL 15")):
        if name in found:
            drawn, check = found[name]["statement_ms"], found[name]["check"]
            rows.append(
                (
                    label,
                    *(f"{drawn[who]['p99']:.0f}" for who in ("buyer", "publisher", "provider")),
                    f"{check['day_s']:.0f}",
                    f"{check['whole_s']:.0f}" if "whole_s" in check else "-",
                )
            )
    head = ("backend", "a buyer's, p99 ms", "a publisher's", "the provider's", "day, s", "all, s")
    return f"""## A ledger with a long past

`python -m benchmarks.ledger_history`: {found["transfers"]:,} transfers, a sale each second. Statements of one second
(aim 100 ms), and checks of the books of the last day and from the start.

{table(head, rows)}
"""


def catalogue(found: Result) -> str:
    """A million documents."""
    index, process, adding = found["index"], found["new_process"], found["adding"]
    kinds = {
        "4k": "4,096 tokens",
        "4k_ends_inside_a_chunk": "4,096, ends inside a chunk",
        "32k": "32,768 tokens",
        "32k_ends_inside_a_chunk": "32,768, ends inside a chunk",
        "32k_matches_nothing": "32,768, nothing matches",
    }
    head = ("a match in a new process", "p50", "p99", "CPU p99")
    rows = [
        (
            text,
            *(f"{process['match_us'][kind][part]:,.0f} us" for part in ("p50", "p99", "cpu_p99")),
        )
        for kind, text in kinds.items()
    ]
    return f"""## The catalogue's index

`python -m benchmarks.catalogue`: {index["documents"]:,} documents, {index["chunks"]:,} chunks of 256 tokens,
{index["index_bytes"] / 1e9:.2f} GB, {index["bytes_per_token"]:.2f} bytes a token (aim 2), shared by all processes of a
machine. A new process opens it in {process["open_s"] * 1000:.0f} ms (aim 1 s) and needs {process["private_mb"]:.0f} MB of its
own (aim 200). What another process publishes is there {adding["visible_ms"]["p50"]:.1f} ms after its commit returned,
p99 {adding["visible_ms"]["p99"]:.1f} ms (aim 100). Aims of a match: 200 us for 4,096 tokens, 2,000 us for 32,768.
{found["note"]}

{table(head, rows)}

"""


def simulation(found: Result) -> str:
    """Eviction, routing, what breaks first."""
    rows = []
    for name, workload in found["workloads"].items():
        for row in workload["rows"]:
            share = row["saved_share"]
            rows.append(
                (
                    f"{name}, {row['budget_share']:.0%}",
                    *(
                        f"{share[p]:.3f}" if p in share else "-"
                        for p in ("lru", "s3-fifo", "w-tinylfu", "gdsf", "value", "belady")
                    ),
                    f"{share['value'] / share['belady']:.2f}",
                )
            )
    verdict = found["verdict"]
    behind = ", ".join(verdict["behind_lru_of_documents"]) or "nowhere"
    out = ", ".join(verdict["out_of_reach_even_with_known_rates"]) or "nowhere"
    scaling = found["scaling"]["prefix-aware"]
    breaks = [
        (
            part["part"],
            f"{part['capacity']:,} {part['unit']}",
            "-" if part["breaks_beyond_engines"] is None else f"{part['breaks_beyond_engines']:,}",
            part["then"],
        )
        for part in with_ledgers(
            scaling["breaks"], scaling["one_engine_of_ten"]["reads_per_s"], RESULTS
        )
    ]
    head = (
        "workload, storage", "LRU", "S3-FIFO", "W-TinyLFU", "GDSF", "ours", "Belady",
        "ours / Belady",
    )  # fmt: skip
    return f"""## Eviction, and a fleet of engines

`python -m benchmarks.cdn_simulation` (two public traces by `--trace`, their second halves; three synthetic
populations): share of prefill time spared, by storage as a share of all that is read. The constants of our policy were
chosen on other seeds and the traces' first halves.
{picture("cdn_simulation.png", "prefill time spared by storage budget and policy")}
{table(head, rows)}

Behind LRU of documents: {behind}. Belady knows the future and keeps nothing that is not read again; our store takes
every paid publication. Within 10 % of it is out of reach even for a policy that knows every document's true reading
rate at: {out}. "Within 10 % on every trace" is not met.

What breaks first as engines are added (prefix-aware routing), by the capacities measured here:

{table(("part", "capacity", "beyond engines", "then"), breaks)}
"""


def fleet(found: Result) -> str:
    """Two machines of one market."""
    sale, notify = found["rows"]["sale"], found["rows"]["notify"]
    rows = [
        (name, *(f"{part[key][each] / scale:.2f}" for each in ("p50", "p99", "max")))
        for name, part, key, scale in (
            ("a request on the other machine that reuses all of it, s", sale, "to_ask_ms", 1e3),
            ("the end of its answer, s", sale, "to_answer_ms", 1e3),
            ("(an answer that computes it takes), s", sale, "computed_ms", 1e3),
            (
                "a price that was changed holds elsewhere, from the call, ms",
                notify,
                "from_call_ms",
                1,
            ),
            ("the same, from its return, ms", notify, "from_return_ms", 1),
        )
    ]
    measured = found["measured"]
    return f"""## Two machines of one market

`{found["command"]}`: two servers with homes of their own on one PostgreSQL and one SeaweedFS, all on this machine.
{len(measured["sale"])} documents of {found["tokens"]:,} tokens are published on one and asked for on the other at once, in
turn; {len(measured["notify"])} prices are changed. Counted from when the first machine says that the document is live:
the first request after that reused all of it {sum(each["to_ask_s"] < 1 for each in measured["sale"])} times of {len(measured["sale"])}.

{table(("until", "p50", "p99", "worst"), rows)}
"""


def soak(found: Result) -> str:
    """Everything at once."""
    seen, money = found["evidence"], found["money"]
    oracle = found.get("exactness", {})
    compared = oracle.get("compared")
    text = f"""## Everything at once, with faults

`{found["command"]}`: a real server for {found["minutes"]:g} minutes. {seen["documents_published"]} documents published,
{seen["left"]} clients left in the middle, {seen["preemptions"]} preemptions, {seen["evictions"]} evictions,
{seen["faults_injected"]} faults injected, {seen["load_failures"]} loads failed and computed; {money["receipts"]} receipts
over {money["transfers"]:,} transfers, debits equal credits, every hold ended."""
    if compared:
        text += f" {compared} answers compared with full prefill: {oracle['wrong']} wrong."
    problems = found.get("problems", [])
    text += (
        " No problem was found.\n"
        if not problems
        else "\n\n" + "\n".join(f"- {each}" for each in problems) + "\n"
    )
    return text


PAPER: dict[str, Callable[[Result], str]] = {
    "exactness": exactness,
    "prefill_against_reuse": growth,
    "incompressible": incompressible,
    "hosting": hosting,
    "prize": prize,
}
FILES: dict[str, Callable[[Result], str]] = {
    "crowd": crowd,
    "under_load": under_load,
    "miss_cost": miss_cost,
    "peers": peers,
    "store": store,
    "ledger": ledger,
    "ledger_history": ledger_history,
    "catalogue": catalogue,
    "cdn_simulation": simulation,
    "fleet": fleet,
    "soak": soak,
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    paper = RESULTS / "paper.json"
    known = json.loads(paper.read_text())["sections"] if paper.exists() else {}
    parts += [write(known[name]) for name, write in PAPER.items() if name in known]
    for name, write in FILES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(write(json.loads(path.read_text())))
    return "\n".join([*parts, NOT_PROVEN])


if __name__ == "__main__":
    PAGE.write_text(page())
