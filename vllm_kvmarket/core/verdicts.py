"""Verdicts of self-tests: whether an engine's reuse gave the same answers as computing everything.

One small file in the market's home for each engine that was tested: its model's namespace, its
device and its settings, and the versions of vLLM and kvmarket. Where one of them is another, the
engine is tested again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import msgspec
from blake3 import blake3

from vllm_kvmarket.core.durable_files import write_durably

VERDICTS_FOLDER = "self-tests"


class Verdict(msgspec.Struct, frozen=True):
    """`engine` is all that makes it stale; `reason` says why reuse is not exact, "" where it is."""

    model: str
    engine: dict[str, str]
    reason: str
    seconds: float
    at_s: float

    @property
    def passed(self) -> bool:
        """Whether this engine may reuse."""
        return not self.reason


def read_verdict(home: Path, engine: Mapping[str, str]) -> Verdict | None:
    """The verdict on just this engine, if it was tested."""
    found = _read(_file(home, engine))
    return found if found is not None and found.engine == engine else None


def write_verdict(home: Path, verdict: Verdict) -> None:
    """Keep a verdict, durably. Raises OSError."""
    file = _file(home, verdict.engine)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(file, json.dumps(msgspec.to_builtins(verdict), indent=1).encode())


def verdicts(home: Path) -> list[Verdict]:
    """All verdicts of a home, the newest first."""
    found = [_read(file) for file in (home / VERDICTS_FOLDER).glob("*.json")]
    return sorted((each for each in found if each), key=lambda each: -each.at_s)


def forget_verdicts(home: Path) -> None:
    """Have every engine tested again at its next start."""
    for file in (home / VERDICTS_FOLDER).glob("*.json"):
        file.unlink(missing_ok=True)


def _file(home: Path, engine: Mapping[str, str]) -> Path:
    digest = blake3(json.dumps(dict(engine), sort_keys=True).encode()).hexdigest()
    return home / VERDICTS_FOLDER / f"{digest[:32]}.json"


def _read(file: Path) -> Verdict | None:
    """A verdict; None where there is none, or no readable one: then the engine is tested."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Verdict)
    except (OSError, msgspec.DecodeError):
        return None
