"""Who reads what, when: public traces, and populations of agents that are made from a seed.

A read's `path` is what it begins with, as numbers: equal numbers stand for equal chunks behind
equal chunks, like chunk keys. A path is published when it is not there, as a separate document.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_kvmarket.core.model_identity import CHUNK_TOKENS

TRACE_CHUNK_TOKENS = 512  # what one hash id of Mooncake's traces stands for
DAY_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Read:
    """One request: when, which chunks it begins with, and its listing's own price, if any."""

    at_s: float
    path: tuple[int, ...]
    cache_read_nano_per_mtok: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Reads in the order of their time; a chunk has `chunk_tokens` tokens.

    What is reported is counted from the read of number `counted_from` on.
    """

    name: str
    chunk_tokens: int
    reads: list[Read]
    counted_from: int = 0

    @property
    def distinct_chunks(self) -> int:
        """How many chunks are read at all: the storage that would hold everything."""
        return len({chunk for read in self.reads for chunk in read.path})


def read_trace(path: Path, limit: int | None = None) -> Workload:
    """Read a trace of Mooncake's format: a JSON object a line, timestamp in ms and hash_ids.

    Raises ValueError for a file that is none.
    """
    reads: list[Read] = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if limit is not None and number > limit:
                break
            try:
                row = json.loads(line)
                reads.append(Read(row["timestamp"] / 1000, tuple(row["hash_ids"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is no line of a trace: {error!r}") from None
    reads.sort(key=lambda read: read.at_s)
    return Workload(path.stem, TRACE_CHUNK_TOKENS, reads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """Agents who read documents: how many reads of how many documents, over how many days.

    The document of rank r is read with a weight of r ** -zipf. Each day a share of `churn` of the
    ranks goes to new documents. A quarter of the documents begins with one of `stems` (a system
    prompt, a library's preface). `swing` is how far the load goes above and below its mean in a
    day. A tenth of the documents costs four times the tariff's price.
    """

    name: str
    reads: int
    documents: int
    zipf: float = 0.9
    days: float = 7.0
    churn: float = 0.05
    stems: int = 20
    swing: float = 0.8
    mean_tokens: int = 4_000
    dear_nano_per_mtok: int = 2_000_000_000
    seed: int = 1

    def generate(self) -> Workload:
        """Make the reads; the same seed makes the same."""
        random = np.random.default_rng(self.seed)
        times, ranks, versions = self.draw(random)
        made: dict[tuple[int, int], tuple[tuple[int, ...], int | None]] = {}
        number = 0
        reads = []
        for at_s, rank, version in zip(
            times.tolist(), ranks.tolist(), versions.tolist(), strict=True
        ):
            if (rank, version) not in made:
                path, number = self._document(random, number)
                dear = self.dear_nano_per_mtok if random.random() < 0.1 else None
                made[rank, version] = path, dear
            reads.append(Read(at_s, *made[rank, version]))
        return Workload(self.name, CHUNK_TOKENS, reads)

    def weights(self) -> np.ndarray:
        """Return each rank's share of the reads."""
        weights: np.ndarray = np.arange(1, self.documents + 1) ** -self.zipf
        return np.asarray(weights / weights.sum())

    def draw(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw the reads' times, ranks, and which of its rank's documents each is of.

        A rank's documents follow one another; its first change is anywhere in its first period.
        """
        times = self._times(random)
        ranks = np.searchsorted(np.cumsum(self.weights()), random.random(self.reads))
        ranks = np.minimum(ranks, self.documents - 1)
        period_s = DAY_S / self.churn if self.churn else math.inf
        offsets = random.random(self.documents)
        return times, ranks, np.floor(times / period_s + offsets[ranks]).astype(int)

    def _times(self, random: np.random.Generator) -> np.ndarray:
        """Draw times whose rate swings with the hour, by the inverse of its integral."""
        at_s = np.linspace(0, self.days * DAY_S, 4_096)
        turns = 2 * np.pi * at_s / DAY_S
        passed = turns + self.swing * (1 - np.cos(turns))
        drawn = np.sort(random.random(self.reads)) * passed[-1]
        return np.interp(drawn, passed, at_s)

    def _document(self, random: np.random.Generator, number: int) -> tuple[tuple[int, ...], int]:
        """Number a document's chunks: its stem's, if it has one, then new ones from `number` on."""
        tokens = random.lognormal(math.log(self.mean_tokens) - 0.32, 0.8)
        chunks = max(1, min(256, round(tokens / CHUNK_TOKENS)))
        stem: tuple[int, ...] = ()
        if self.stems and random.random() < 0.25:
            chosen = int(random.integers(self.stems))
            # Stems are numbered below 0, out of the documents' way.
            stem = tuple(range(-8 * chosen - 8, -8 * chosen - 6 + chosen % 6))
        own = tuple(range(number, number + chunks))
        return stem + own, number + chunks
