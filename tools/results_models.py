"""Write docs/MODELS.md from docs/results/models.json: which models are served, and what was measured.

`python -m tools.update_docs` and `python -m benchmarks.models` do.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tools.results_paper import table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "MODELS.md"
RESULTS = ROOT / "docs" / "results" / "models.json"

Row = dict[str, Any]

HEAD = """# Which models

<!-- written by tools/results_models.py; do not edit -->

kvmarket serves a model only where a reuse was shown to give the tokens that full prefill gives. Others are
refused at the start, in one line that says why. Plain vLLM on a CPU is the judge.

{summary}

Each row is `python -m benchmarks.models --only NAME`, with `--quick` where there are 12 answers and not 60. One
process answers three questions about each document, 24 greedy tokens each, by full prefill and by vLLM's own prefix-cache hit, and
publishes the documents (300 to 512 tokens, computed in pieces of 256). A **new process** answers from the store. Random weights are made by
`tools/make_tiny_model.py`: a few layers of the family's own kind, for which a wrong KV cache gives other tokens at
once. {machine}; vLLM {vllm}.

## Served
"""
MEANING = """
- *flags*: what `vllm serve MODEL --kv-connector kvmarket` was given beside.
- *wrong*: answers that vLLM could not have given. Where hit and reuse computed the same tokens, any token that
  differs is wrong. Elsewhere float sums come in another order; an answer that is neither the hit's nor full
  prefill's is wrong unless the tokens were nearer to each other than vLLM's own hits are to its full prefill.
- The *hit* of a model with recurrent state, where vLLM caches nothing, is vLLM's own prefill in two pieces: the
  document, and what is behind it. Then hit and reuse compute the same tokens.
- *forks*: greedy answers that are not full prefill's to the last token: of vLLM's own hits, of reuses, and of reuses
  whose hit is full prefill's (none of them where both computed the same tokens, or it would count as wrong).
- *bits*: answers whose 20 likeliest tokens at each step have the hit's log-probabilities to the bit, of those where
  hit and reuse computed the same tokens.
- *reused*: tokens that came from the store, of the documents' tokens.
- *prefill / reuse*: medians of the time to the first token, measured in turn in the new process, on a machine that was
  busy with other work. Random weights have a few tiny layers, whose prefill costs next to nothing: only rows with real
  weights say what a reuse saves.

## Not served here

The KV cache is as vLLM builds it for the family: from its specifications alone where no engine ran (`-`: not built yet).
A family that is refused and one that vLLM itself does not run on this machine are different things.
"""
TAIL = """
Of a model with recurrent state (Mamba2, and beside attention in hybrids) a document is reused to its last token: of 900
tokens 900. A prompt that leaves it half-way, or is just the document, reuses what ends with the last state before: the
longest shorter document on offer, or a multiple of `state_every_tokens`. Prompts are computed behind a document in
another order of sums than full prefill has, so log-probabilities are close and not equal to the bit. vLLM's prefix
caching must be off (`--no-enable-prefix-caching`): it keeps states in another place, which was not tried.
Of recurrent layers Mamba2's, gated delta nets and short convolutions are taken: of each vLLM keeps all of a request's
state in one block, which is copied alike. Whether a model's reuse is exact with it, its self-test says. In bfloat16
(Qwen3-Next, Qwen3.5) vLLM's own prefill in two pieces forks now and then from that in one, and a reuse is as its own
prefill in two pieces, to the bit. A tiny random LFM2 (short convolutions) is refused by its self-test,
and rightly: vLLM's CPU operation `rotary_embedding` wants queries and keys as (tokens, heads * head size), gets them as
(tokens, heads, head size), and takes heads for tokens. So the KV cache of a prompt depends on the pieces in which it
was computed. With `-cc.custom_ops+=-rotary_embedding` vLLM computes LFM2 rightly, and the model is served.

The text of models that see is served as any other text (`--language-model-only`). vLLM's classes of them import
torchvision, which breaks beside a CPU build of torch when it comes from PyPI: here they ran with its Python code
(`make bench-models`, `make test-long`). Bamba is no longer among vLLM's models; Granite 4 has the same layers.

Latent attention (DeepSeek-V2 and V3, Kimi K2) is served on a CPU with AMX, whose kernel takes bfloat16 only. That kernel
adds up a cached prefix in tiles of 64 or 256 tokens, then the new ones in tiles of their own, and rounds after each. So
in bfloat16 vLLM's own hit and its own prefill in two pieces differ from prefill in one, by one unit in the last place, which
can turn a tie over. A reuse therefore ends with a whole block, as vLLM's hit does, and then computes the same numbers:
of a document of 900 tokens 896 are reused and charged. A quote does not know the engine's blocks and says 900 at most.
Without YaRN (Moonlight, GLM-4.7-Flash) such a model is refused with `--enforce-eager`: vLLM's operation
`rotary_embedding` takes the keys, which are slices of a wider row, for rows of their own. Of 398 keys it rotated none
at the right position but the first and left 354 as they were; which ones depends on how many tokens are computed at
once. With `-cc.custom_ops+=-rotary_embedding`, or compiled, vLLM rotates by other code, and the model is served.

Also refused: context parallelism, connector roles other than `kv_both`, speculative decoding with a KV cache of its
own, and attention layers that are not causal. Publishing, charging, audits, damage and repair of a family are tested
by `python -m pytest tests/engine/test_model_families.py`.
"""


def page() -> str:
    """The page as the results are now."""
    found = json.loads(RESULTS.read_text())
    rows: dict[str, Row] = found["rows"]
    served = {name: row for name, row in rows.items() if "answers" in row}
    machine = found["machine"]
    head = HEAD.format(
        summary=summary(list(served.values())),
        machine=f"{machine['cpu']}, {machine['cores']} cores",
        vllm=found["versions"]["vllm"],
    )
    told = [
        (name, row["title"], row["dtype"], cache(row), f"{row['outcome']}: {_plain(row['reason'])}")
        for name, row in rows.items()
        if name not in served
    ]
    return (
        head
        + "\n"
        + table(SERVED, [served_cells(name, row) for name, row in served.items()])
        + "\n"
        + MEANING
        + "\n"
        + table(("name", "family", "numbers", "KV cache", "why"), told)
        + "\n"
        + TAIL
    )


SERVED = (
    "name", "family", "weights", "flags", "KV cache", "answers", "wrong",
    "forks: hit, reuse, only reuse", "bits", "reused", "KB a token", "prefill / reuse",
)  # fmt: skip


def served_cells(name: str, row: Row) -> tuple[str, ...]:
    """One family that was measured."""
    forks = row["forks"]
    return (
        name,
        row["title"],
        row["weights"],
        flags(row),
        cache(row),
        f"{row['answers']}",
        f"{row['wrong']}",
        ", ".join(str(forks.get(kind, "-")) for kind in ("hit", "reuse", "only_reuse")),
        f"{row['identical']} of {row['alike']}" if row["alike"] else "-",
        f"{row['reused_tokens']:,} of {row['document_tokens']:,}",
        f"{row['bytes_per_token'] / 1000:.1f}",
        f"{row['prefill_over_reuse']:.1f}",
    )


def summary(served: list[Row]) -> str:
    """How many answers were wrong, and over which kinds of cache."""
    kinds: set[str] = set()
    for row in served:
        kinds.add(" and ".join(sorted({_kind(group) for group in row["groups"]})))
    answers, wrong = (sum(row[key] for row in served) for key in ("answers", "wrong"))
    told = "; ".join(sorted(kinds))
    return f"**{wrong} wrong of {answers:,} answers** in new processes, over {len(kinds)} kinds of KV cache: {told}."


def cache(row: Row) -> str:
    """A row's groups, equal ones once."""
    groups = row["groups"]
    counted = [f"{groups.count(each)} groups of {each}" for each in dict.fromkeys(groups)]
    return "; ".join(each.removeprefix("1 groups of ") for each in counted) or "-"


def _kind(group: str) -> str:
    return re.sub(r"^\d+ x | of \d+|, blocks.*", "", group)


def flags(row: Row) -> str:
    """What `vllm serve` was given."""
    told = [f"--dtype {row['dtype']}"]
    for key, value in row["engine"].items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            told.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            told.append(f"--{flag} '{json.dumps(value)}'")
        else:
            told.append(f"--{flag} {value}")
    return f"`{' '.join(told)}`"


def _plain(reason: str) -> str:
    return reason.replace("|", "/").replace("\n", " ")
