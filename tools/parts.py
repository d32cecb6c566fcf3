"""Run commands one after the other and end with a table of their times.

python -m tools.parts NAME=COMMAND ...

A part that fails does not keep the others from running; the exit code is the first failure's.
"""

from __future__ import annotations

import subprocess
import sys
import time


def main(arguments: list[str]) -> int:
    """Run the parts and print their times; returns the first exit code that is not 0."""
    rows, failed = [], 0
    started = time.monotonic()
    for argument in arguments:
        name, _, command = argument.partition("=")
        print(f"\n== {name}: {command}", flush=True)
        began = time.monotonic()
        code = subprocess.run(command, shell=True, check=False).returncode  # noqa: S602  # our Makefile's
        failed = failed or code
        rows.append((name, time.monotonic() - began, "failed" if code else "ok"))
    rows.append(("together", time.monotonic() - started, "failed" if failed else "ok"))
    print()
    for name, seconds, result in rows:
        print(f"{name:<10} {int(seconds) // 60:>3} min {seconds % 60:>4.1f} s  {result}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
