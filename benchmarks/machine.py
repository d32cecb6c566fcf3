"""Describes this machine, and measures how fast it copies memory."""

from __future__ import annotations

import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

PIECE_BYTES = 196_608  # a page of SmolLM2 in float32 with blocks of 128
PIECES = 900


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, system: what every figure needs beside it."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
        "accelerator": None,
    }


def memcpy_bytes_per_s(threads: int, repeats: int = 7) -> float:
    """Copy bandwidth between two large arrays in pages, the median of several."""
    source = np.ones((PIECES, PIECE_BYTES), np.uint8)
    target = np.zeros_like(source)

    def copy(first: int) -> None:
        for piece in range(first, PIECES, threads):
            np.copyto(target[piece], source[piece])

    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(copy, range(threads)))
            seconds.append(time.perf_counter() - started)
    return float(source.nbytes / statistics.median(seconds[1:]))


def read_whole(folder: Path) -> None:
    """Have the page cache hold a folder's files; a system may drop what nobody reads."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 22):
                    pass
