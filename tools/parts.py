"""Run commands one after the other and end with a table of their times.

python -m tools.parts NAME=COMMAND ...

`+NAME=COMMAND` runs beside the command before it; its output is shown when it has ended. The other
parts run after a failure too; the exit code is that of the first failure.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor


def main(arguments: list[str]) -> int:
    """Run the parts and print their times; returns the first exit code that is not 0."""
    started = time.monotonic()
    groups: list[list[str]] = []
    for argument in arguments:
        if not argument.startswith("+"):
            groups.append([])
        groups[-1].append(argument)
    rows = []
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            rows += pool.map(run, group)
    failed = next((code for _, _, code in rows if code), 0)
    rows.append(("together", time.monotonic() - started, failed))
    print()
    for name, seconds, code in rows:
        minutes = int(seconds) // 60
        print(f"{name:<10} {minutes:>3} min {seconds % 60:>4.1f} s  {'failed' if code else 'ok'}")
    return failed


def run(part: str) -> tuple[str, float, int]:
    """Run one part; returns its name, its seconds and its exit code."""
    name, _, command = part.removeprefix("+").partition("=")
    print(f"\n== {name}: {command}", flush=True)
    began = time.monotonic()
    output = subprocess.PIPE if part.startswith("+") else None
    done = subprocess.run(  # noqa: S602  # a command of our Makefile's
        command, shell=True, check=False, stdout=output, stderr=subprocess.STDOUT, text=True
    )
    if output:
        print(f"\n== {name} has ended:\n{done.stdout}", flush=True)
    return name, time.monotonic() - began, done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
