"""Memory, file handles, threads and disk over time, and whether they go on growing."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.soak_parts.plan import Story
from benchmarks.soak_parts.server import Soaked
from vllm_kvmarket.core.durable_files import OS_FILES
from vllm_kvmarket.store import CHUNKS_FOLDER
from vllm_kvmarket.store.quota import Quota

INTERVAL_S = 1.0
# Caches fill, allocators take their arenas, pools open their connections: not looked at.
WARM_UP_SHARE = 0.25
# The second half may rise by FLATTER of what the first half rose by, or by this much whatever the
# first half did: figures of a busy process are never still.
FLATTER = 0.5
TOLERANCE = {"rss_mib": 24.0, "handles": 12.0, "threads": 6.0}
# In a short soak allocators and caches are warming up to its end.
SHORT_S, SHORT_RSS_MIB = 300.0, 96.0


@dataclass(slots=True)
class Series:
    """One figure of one process over time."""

    at_s: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at_s: float, value: float) -> None:
        """Note a value; mutates."""
        self.at_s.append(at_s)
        self.values.append(value)


@dataclass(frozen=True, slots=True)
class Halves:
    """How much a figure rose in each half, along the line of least squares through it."""

    first: float
    second: float
    limit: float
    start: float
    end: float
    peak: float

    @property
    def grows(self) -> bool:
        """Whether the second half rose by more than is tolerated."""
        return self.second > self.limit

    def facts(self) -> dict[str, Any]:
        """For the report."""
        numbers = {name: round(getattr(self, name), 2) for name in self.__dataclass_fields__}
        return {**numbers, "grows": self.grows}


def halves(series: Series, tolerance: float) -> Halves | None:
    """Compare the two halves behind the warm-up; None where there are too few samples."""
    begin = int(len(series.values) * WARM_UP_SHARE)
    at_s, values = series.at_s[begin:], series.values[begin:]
    middle = len(values) // 2
    if middle < 5:
        return None
    first = _rise(at_s[:middle], values[:middle])
    second = _rise(at_s[middle:], values[middle:])
    limit = max(tolerance, FLATTER * first)
    return Halves(first, second, limit, values[0], values[-1], max(values))


def _rise(at_s: Sequence[float], values: Sequence[float]) -> float:
    count = len(values)
    mean_at, mean = sum(at_s) / count, sum(values) / count
    spread = sum((at - mean_at) ** 2 for at in at_s)
    if spread == 0:
        return 0.0
    slope = sum((a - mean_at) * (v - mean) for a, v in zip(at_s, values, strict=True)) / spread
    return slope * (at_s[-1] - at_s[0])


class Sampler:
    """Looks every second, in its own thread, at processes, the store's folder and evictions.

    The folder is walked under the store's lock: then no file changes its name meanwhile, and the
    sum of sizes is the truth, against which the store's own count and its quota are held.
    """

    def __init__(self, server: Soaked, story: Story) -> None:
        self._server = server
        self._story = story
        self._root = server.market.home / CHUNKS_FOLDER
        self._quota = Quota(self._root, server.plan.quota_bytes, OS_FILES)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._evicted: set[str] = set()
        self._started_s = time.monotonic()
        self.series: dict[str, dict[str, Series]] = {}
        self.disk = Series()
        self.database = Series()

    def start(self) -> None:
        """Begin."""
        self._started_s = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """End, after the sample under way."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(INTERVAL_S):
            try:
                self._sample(time.monotonic() - self._started_s)
            except Exception as error:  # noqa: BLE001  # a sample that fails is reported, and the others go on
                self._story.fail(f"sampling failed: {error!r}")

    def _sample(self, at_s: float) -> None:
        self._sample_disk(at_s)
        listings = self._server.market.catalogue.listings()
        self._story.on_offer = {each.document_id for each in listings if each.state == "live"}
        evicted = {each.document_id for each in listings if each.state == "evicted"}
        self._story.counts["evicted"] += len(evicted - self._evicted)
        self._evicted = evicted
        for number, process in enumerate(self._server.family()):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                name = "api server" if number == 0 else process.name()
                if name.startswith("VLLM") or number == 0:
                    self._sample_process(at_s, name, process)

    def _sample_process(self, at_s: float, name: str, process: psutil.Process) -> None:
        with process.oneshot():
            figures = {
                "rss_mib": process.memory_info().rss / 2**20,
                "handles": process.num_fds(),
                "threads": process.num_threads(),
            }
        kept = self.series.setdefault(name, {figure: Series() for figure in figures})
        for figure, value in figures.items():
            kept[figure].add(at_s, value)

    def _sample_disk(self, at_s: float) -> None:
        with self._quota.locked() as held:
            used, counted = _bytes_below(self._root), held.used
        self.disk.add(at_s, used)
        database = (self._server.market.home.glob("market.sqlite*"), os.stat)
        self.database.add(at_s, sum(database[1](file).st_size for file in database[0]))
        self._story.counts["disk samples"] += 1
        quota = self._server.plan.quota_bytes
        if used > quota:
            self._story.fail(f"after {at_s:.0f} s the store takes {used} bytes, above {quota}")
        if used > counted:
            self._story.fail(f"after {at_s:.0f} s the store takes {used} bytes, counts {counted}")

    def tolerance(self) -> dict[str, float]:
        """By how much a figure's second half may rise in any case."""
        short = self._server.plan.seconds < SHORT_S
        return {**TOLERANCE, "rss_mib": SHORT_RSS_MIB} if short else TOLERANCE

    def verdict(self) -> dict[str, Any]:
        """Each process's figures, halves compared; what grows is noted as a problem. Mutates."""
        report: dict[str, Any] = {}
        for process, figures in self.series.items():
            for figure, series in figures.items():
                compared = halves(series, self.tolerance()[figure])
                if compared is None:
                    continue
                report.setdefault(process, {})[figure] = compared.facts()
                if compared.grows:
                    self._story.fail(
                        f"{process}: {figure} rose by {compared.first:.1f} in the first half and "
                        f"by {compared.second:.1f} in the second"
                    )
        return report


def _bytes_below(folder: Path) -> int:
    """Sizes of all files in a store's folder, without its record."""
    total = 0
    for where, _, files in os.walk(folder):
        for file in files:
            if file != ".usage":
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(where, file)).st_size  # noqa: PTH118  # a sum of thousands
    return total
