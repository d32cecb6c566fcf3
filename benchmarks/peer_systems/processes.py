"""Engines and servers as processes that may hang or die: their end is a result, not an accident."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peer_systems.systems import System

ROOT = Path(__file__).parents[2]
ENGINE = [sys.executable, "-m", "benchmarks.peer_systems.engine"]
SHARED = Path("/dev/shm")  # noqa: S108 - where the kernel puts it
PEERS_NAMES = ("vllm_offload_", "lmcache_l1_pool_kvmarket-peers-")
Watch = Callable[["Run"], bool]
# An exception's line in a log, without vLLM's prefixes. The first says why; these follow from it.
EXCEPTION = re.compile(r"((?:\w+\.)*\w*(?:Error|Exception|Exit)\b: .*|^\S*Exception: .*)")
FOLDERS = re.compile(r"(?<!\w)/(?:[\w.+@-]+/)+")  # a result names no folder of this machine
CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "EngineCore encountered")


class Run:
    """One engine process and what it has answered so far."""

    def __init__(self, folder: Path, results: Path, log: Path) -> None:
        self.folder, self.results, self.log = folder, results, log
        self.ended = "finished"  # or died, hung, killed

    def lines(self) -> list[dict[str, Any]]:
        """The steps that were done."""
        text = self.results.read_text() if self.results.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def named(self, name: str) -> dict[str, Any] | None:
        """The step of that name, None if it was not reached."""
        return next((line for line in self.lines() if line.get("name") == name), None)

    def error(self) -> str:
        """Why it died, in its own words."""
        return error_text(self.log.read_text(errors="replace"))


def error_text(log: str) -> str:
    """The first exception in a log that is not merely the consequence of another one."""
    for line in log.splitlines():
        found = EXCEPTION.search(line)
        if found and not any(word in line for word in CONSEQUENCES):
            return FOLDERS.sub("", found.group(1)).strip()[:300]
    return "no error text"


class Bench:
    """A system in its own folder: its servers, and one engine after another."""

    def __init__(self, system: System, packages: Path | None, settings: dict[str, Any]) -> None:
        self.system, self.packages, self.settings = system, packages, settings
        self.folder = Path(tempfile.mkdtemp(prefix=f"peers-{system.name}-"))
        (self.folder / "stored").mkdir()
        self.started = 0
        self._prefix: list[str] = []
        self._servers: list[subprocess.Popen[bytes]] = []
        self._shared = shared_memory()

    def __enter__(self) -> Bench:
        try:
            if self.system.isolated:
                self._isolate()
            self.start_servers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_servers()
        if self._prefix:
            os.kill(int(self._prefix[2]), signal.SIGKILL)
        for name in shared_memory() - self._shared:
            with contextlib.suppress(OSError):
                (SHARED / name).unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _isolate(self) -> None:
        """A network namespace with loopback only; what runs in it can bind every interface."""
        script = "ip link set lo up && echo up && exec sleep infinity"
        holder = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert holder.stdout and holder.stderr
        if holder.stdout.readline().strip() != b"up":
            raise RuntimeError("no network namespace: " + holder.stderr.read().decode().strip())
        self._prefix = ["nsenter", "-t", str(holder.pid), "-n"]

    def environment(self) -> dict[str, str]:
        """This process's environment with the system's own packages and variables."""
        paths = [str(ROOT), *([str(self.packages)] if self.packages else [])]
        own = {k: v.format(folder=self.folder) for k, v in self.system.environment.items()}
        quiet = {"DO_NOT_TRACK": "1", "LMCACHE_TRACK_USAGE": "false"}  # some report home otherwise
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **quiet, **own}

    def start_servers(self) -> None:
        """Start what the system needs beside the engine. Raises RuntimeError if it dies at once."""
        for server in self.system.servers(self.folder, self.packages or Path()):
            log = self.folder / f"server-{len(self._servers)}-{time.monotonic_ns()}.log"
            command = [sys.executable if a == "{python}" else a for a in server.command]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [*self._prefix, *command],
                    env=self.environment(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._servers.append(process)
            await_port(process, server.port)
            time.sleep(server.wait_s)
            if process.poll() is not None:
                text = log.read_text(errors="replace")
                raise RuntimeError(f"its server ended: {error_text(text)} {text[-300:]}")

    def stop_servers(self, patience_s: float = 10.0) -> None:
        """End them, with what they started; -9 for what has not ended in time."""
        for process in reversed(self._servers):
            if patience_s:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience_s)
            kill_group(process)
        self._servers.clear()

    def run(
        self, steps: list[dict[str, Any]], timeout_s: float, kill_when: Watch | None = None
    ) -> Run:
        """An engine that does `steps`. It is ended by -9 after `timeout_s`, or when `kill_when`."""
        self.started += 1
        name = self.folder / f"engine-{self.started}"
        run = Run(self.folder, name.with_suffix(".jsonl"), name.with_suffix(".log"))
        plan = {
            **self.settings,
            "folder": str(self.folder),
            "transfer": self.system.connector(self.folder),
            "kvmarket": self.system.kvmarket,
            "engine_args": self.system.engine_args,
            "process": self.started,
            "steps": steps,
        }
        name.with_suffix(".json").write_text(json.dumps(plan))
        command = [*self._prefix, *ENGINE]
        with run.log.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(name.with_suffix(".json")), str(run.results)],
                env=self.environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            run.ended = self._wait(process, run, time.monotonic() + timeout_s, kill_when)
        finally:  # also when the benchmark itself is interrupted
            kill_group(process)
        return run

    @staticmethod
    def _wait(
        process: subprocess.Popen[bytes], run: Run, deadline: float, kill_when: Watch | None
    ) -> str:
        """How it ends: by itself, late, or when the watch says so."""
        while process.poll() is None:
            if kill_when and kill_when(run):
                return "killed"
            if time.monotonic() > deadline:
                return "hung"
            time.sleep(0.005 if kill_when else 0.1)
        return "died" if process.returncode else "finished"

    def stored_bytes(self) -> int:
        """Bytes of the files in the system's folder."""
        total = 0
        for path in (self.folder / "stored").rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
        return total

    def forget_pages(self) -> None:
        """Drop the stored files from the page cache, and nothing else of the machine."""
        for path in (self.folder / "stored").rglob("*"):
            if path.is_file():
                file = os.open(path, os.O_RDONLY)
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)

    def shared_left(self) -> int:
        """Bytes of shared memory that were not there before, after the engines have ended."""
        sizes = 0
        for name in shared_memory() - self._shared:
            with contextlib.suppress(OSError):
                sizes += (SHARED / name).stat().st_size
        return sizes


def shared_memory() -> set[str]:
    """Files that only peers have in this machine's shared memory."""
    return {name for name in os.listdir(SHARED) if name.startswith(PEERS_NAMES)}  # noqa: PTH208


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """-9 to a process and all that it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    time.sleep(0.3)


def await_port(process: subprocess.Popen[bytes], port: int | None, timeout_s: float = 90) -> None:
    """Until the server answers on loopback, has ended, or was too slow."""
    deadline = time.monotonic() + timeout_s
    while port and process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
