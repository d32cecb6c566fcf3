"""Faults: damaged chunk files, processes that stand still; and an operator's commands meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.soak_parts.plan import Story
from benchmarks.soak_parts.server import Soaked
from vllm_kvmarket.store import CHUNKS_FOLDER

Damage = Callable[[Path, random.Random], None]


def _flip(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as file:
        place = rng.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _fill(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as file:
        file.write(rng.randbytes(path.stat().st_size))


def _remove(path: Path, _: random.Random) -> None:
    path.unlink()


def _replace(path: Path, rng: random.Random) -> None:
    """Another chunk's file, whole, which is not larger: the quota is not the fault's to break."""
    size = path.stat().st_size
    others = [other for other in chunk_files(path.parents[1]) if other != path]
    others = [other for other in others if other.stat().st_size <= size]
    if not others:
        return _remove(path, rng)
    draft = path.with_name("fault")
    shutil.copyfile(rng.choice(others), draft)
    draft.rename(path)
    return None


def _folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[int, Damage]] = {
    "a bit flipped": (40, _flip),
    "truncated": (15, _truncate),
    "overwritten": (10, _fill),
    "removed": (15, _remove),
    "replaced by another chunk": (10, _replace),
    "replaced by a folder": (5, _folder),
}


def chunk_files(root: Path) -> list[Path]:
    """The chunk files that are there."""
    return sorted(path for path in root.glob("??/*.kv") if path.is_file())


class FaultInjector:
    """Damages a chunk every few seconds, and stops a process for a moment now and then."""

    def __init__(self, server: Soaked, story: Story) -> None:
        self._server = server
        self._story = story
        self._root = server.market.home / CHUNKS_FOLDER
        self._rng = random.Random(f"faults {server.plan.seed}")

    async def damage(self, stopping: asyncio.Event) -> None:
        """Damage chunks until `stopping`."""
        names = list(DAMAGE)
        weights = [weight for weight, _ in DAMAGE.values()]
        while not await _waited(stopping, self._rng.uniform(1.0, 5.0)):
            (name,) = self._rng.choices(names, weights)
            files = chunk_files(self._root)
            if not files:
                continue
            # It may be evicted, or replaced by a whole one, at this moment.
            with contextlib.suppress(FileNotFoundError, ValueError, IsADirectoryError):
                DAMAGE[name][1](self._rng.choice(files), self._rng)
                self._story.counts[f"fault: {name}"] += 1

    async def pause(self, stopping: asyncio.Event) -> None:
        """Stop one of the server's processes for up to 1.5 s, now and then, until `stopping`."""
        while not await _waited(stopping, self._rng.uniform(6, 15)):
            process = self._rng.choice(self._server.family())
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(process.pid, signal.SIGSTOP)
                try:
                    await asyncio.sleep(self._rng.uniform(0.1, 1.5))
                finally:
                    os.kill(process.pid, signal.SIGCONT)
                self._story.counts["fault: a process stopped"] += 1


class Operator:
    """Runs the market's commands while it serves; what they find must be the faults and no more."""

    def __init__(self, server: Soaked, story: Story) -> None:
        self._server = server
        self._story = story
        self._rng = random.Random(f"operator {server.plan.seed}")

    async def run(self, stopping: asyncio.Event) -> None:
        """A command every few seconds until `stopping`."""
        commands = [self.checkpoint, self.gc, self.fsck, self.audit, self.repair]
        turn = 0
        while not await _waited(stopping, self._rng.uniform(4, 9)):
            await asyncio.to_thread(commands[turn % len(commands)])
            turn += 1

    def gc(self) -> None:
        """Collect garbage."""
        self.execute("store", "gc", good={0})

    def fsck(self) -> None:
        """Check everything: only chunks may be bad."""
        report = self.execute("store", "check", good={0, 1})
        self._story.counts["found by fsck"] += report.get("chunks_damaged", 0)
        for problem in report.get("problems", []):
            if not problem.startswith("store: "):
                self._story.fail(f"kvmarket store check: {problem}")

    def repair(self) -> None:
        """Verify everything; what is damaged needs an engine, which is the publishers' part."""
        report = self.execute("store", "repair", good={0, 1})
        self._story.counts["found by repair"] += report.get("chunks_damaged", 0)
        self._story.counts["healed by repair"] += len(report.get("healed", []))
        for name, reason in report.get("failed", {}).items():
            if "give --model" not in reason and " is " not in reason:
                self._story.fail(f"kvmarket store repair: {name}: {reason}")

    def audit(self) -> None:
        """Recompute the books."""
        report = self.execute("ledger", "check", good={0})
        for problem in report.get("problems", []):
            self._story.fail(f"kvmarket ledger check: {problem}")

    def checkpoint(self) -> None:
        """Sign the log as it stands, for the proofs at the end."""
        code, printed = self._server.command("log", "checkpoint")
        if code:
            self._story.fail(f"kvmarket log checkpoint: exit code {code}: {printed[-300:]}")
        else:
            self._story.checkpoints.append(printed)

    def execute(self, *command: str, good: set[int]) -> dict[str, Any]:
        """Run a command, whose exit code must be `good`; what it reports, or nothing."""
        code, printed = self._server.command(*command, "--json")
        self._story.counts[f"kvmarket {' '.join(command)}"] += 1
        if code not in good:
            said = printed[-300:]
            self._story.fail(f"kvmarket {' '.join(command)}: exit code {code}: {said}")
            return {}
        report: dict[str, Any] = json.loads(printed)
        return report


async def _waited(stopping: asyncio.Event, seconds: float) -> bool:
    """Whether it is time to stop, after so many seconds at most."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), seconds)
    return stopping.is_set()
