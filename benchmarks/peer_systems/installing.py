"""Installs a peer into its own folder, never into the environment that kvmarket runs in."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peer_systems.systems import System

ROOT = Path(__file__).parents[2] / ".cache" / "peers"


def install(system: System) -> Path | None:
    """The folder with the system's packages, None where it needs none.

    Without their dependencies: torch and vLLM are there already, and PyPI's torch is several GB.
    Raises RuntimeError with the installer's last words.
    """
    libraries(system.debian)
    if not system.packages:
        return None
    folder = ROOT / system.packages[0].replace("==", "-")
    ready = folder / ".ready"
    if ready.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, *system.packages], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("could not be installed: " + last_line(done.stderr or done.stdout))
    ready.touch()
    return folder


def libraries(packages: tuple[str, ...]) -> None:
    """Debian's libraries, if they are missing and we are root. Raises RuntimeError."""
    if not packages:
        return
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError as error:
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise RuntimeError(f"could not be installed: {error}; needs {packages}") from None
        command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError("could not be installed: " + last_line(done.stderr)) from None


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
