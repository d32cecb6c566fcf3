"""Start vLLM's processes as forks of one that has imported vLLM: each start saves its imports.

A start of vLLM makes two or three new processes, and each one imports for seconds. Here
multiprocessing's fork server imports once for a whole test run. The code that runs, its arguments
and its environment are those of vLLM's own start. Two differences: threads of OpenMP are not bound
to cores, and an engine is no child of the process that asked for it. KVMARKET_TESTS_FORK=0 starts
everything as a user's command does.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import context, forkserver, reduction
from pathlib import Path
from typing import Any

from tests.support import ROOT

IMPORTS = "tests.support.forked_imports"
# Names the folder where forked engines keep the verdicts of their self-tests, whatever their home.
VERDICTS = "KVMARKET_TESTS_VERDICTS"


def forks() -> bool:
    """Whether processes start by a fork; otherwise as vLLM starts them."""
    return os.environ.get("KVMARKET_TESTS_FORK", "1") == "1"


class ForkedProcess(context.ForkServerProcess):
    """A process that takes environment and output from the one that starts it, as a spawn does."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        _ensure_server()
        super().start()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_output": [reduction.DupFd(1), reduction.DupFd(2)]}

    def run(self) -> None:
        for number, given in enumerate(self._output, start=1):
            os.dup2(given.detach(), number)
        os.environ.clear()
        os.environ.update(self._environment)
        if "OMP_NUM_THREADS" in os.environ:  # which a new process reads when it loads torch
            import torch

            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        super().run()


class ForkedContext(context.ForkServerContext):
    """The fork server's context, for those who ask for `spawn`."""

    Process = ForkedProcess


def replace_spawn() -> None:
    """From now on `spawn` means a fork, in this process and in those that it starts."""
    context._concrete_contexts["spawn"] = ForkedContext()  # type: ignore[attr-defined]


@contextmanager
def forked_engines() -> Iterator[None]:
    """Engines that are started meanwhile are forked."""
    before = context._concrete_contexts["spawn"]  # type: ignore[attr-defined]
    if forks():
        replace_spawn()
    try:
        yield
    finally:
        context._concrete_contexts["spawn"] = before  # type: ignore[attr-defined]


def _ensure_server() -> None:
    """Start the fork server, if this process is not itself a fork of it."""
    if IMPORTS in sys.modules:
        return
    kept = {name: os.environ.get(name) for name in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept["PYTHONPATH"]]))
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        forkserver.set_forkserver_preload([IMPORTS])
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class ForkedCommand:
    """`vllm ...` in a fork, with the part of Popen's interface that tests use."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._process = ForkedProcess(target=_run, args=(list(command), log, dict(environment)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._process.exitcode

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def wait(self, timeout: float) -> int:
        """Wait for its end; fails when it takes longer."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"process {self.pid} does not end"
        return self._process.exitcode


def _run(command: list[str], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = command
    from vllm.entrypoints.cli.main import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # a fork ends without them
