"""How many of our files run during one purchase over HTTP: what a newcomer has to read.

    python -m benchmarks.purchase_files [--model FOLDER] [--most 32]

A real server answers one request that reuses a published document. In each of its processes every
call of a function of ours is watched; what an idle server runs in the same time is listed apart.
Ends with 1 if more than `--most` files run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.support import ROOT
from tests.support.engines import SMOLLM, words
from tests.support.serving import DOCUMENT, serving, sold
from tools.make_tiny_model import make_tiny_model

PACKAGE = ROOT / "vllm_kvmarket"
WINDOW_S = 2.0
# Python imports a module of this name at the start of every process.
WATCH = """
import os, pathlib, sys, threading, time

folder, package = pathlib.Path(os.environ["KVMARKET_WATCH"]), os.environ["KVMARKET_WATCHED"]
seen = set()

def called(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(package) and code.co_name[0] != "<":
        seen.add(code.co_filename)

def collect():
    sys.setprofile(None)
    done = set()
    while True:
        for begin in set(folder.glob("*.begin")) - done:
            done.add(begin)
            seen.clear()
            while not begin.with_suffix(".end").exists():
                time.sleep(0.01)
            out = begin.with_suffix(f".{os.getpid()}")
            out.write_text("\\n".join(sorted(seen)))
        time.sleep(0.01)

def watch():
    threading.setprofile(called)
    threading.Thread(target=collect, daemon=True).start()
    sys.setprofile(called)

os.register_at_fork(after_in_child=watch)
watch()
"""


class Watch:
    """Which files run in the server's processes during a window of time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "sitecustomize.py").write_text(WATCH)
        os.environ["KVMARKET_WATCH"] = str(folder)
        os.environ["KVMARKET_WATCHED"] = f"{PACKAGE}{os.sep}"
        paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def begin(self, name: str) -> None:
        """Forget what ran before."""
        (self._folder / f"{name}.begin").touch()
        time.sleep(0.2)

    def end(self, name: str) -> set[str]:
        """The files, relative to the package."""
        (self._folder / f"{name}.end").touch()
        time.sleep(1.0)
        lists = [
            path.read_text("utf-8")
            for path in self._folder.glob(f"{name}.*")
            if path.suffix not in (".begin", ".end")
        ]
        files = {line for text in lists for line in text.splitlines()}
        return {str(Path(file).relative_to(PACKAGE)) for file in files}


def main() -> int:
    """Watch one purchase and print its files; 1 if there are too many."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--most", type=int, default=32)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        watch = Watch(folder)
        model = args.model or make_tiny_model(1, SMOLLM, folder / "tiny")
        with serving(model, folder / "home") as server:
            key = server.key("buyer")
            server.publish(DOCUMENT, "watched")
            server.complete(DOCUMENT + words(1, 20), key)  # what is made once, is made now
            time.sleep(2)
            watch.begin("idle")
            time.sleep(WINDOW_S)
            idle = watch.end("idle")
            watch.begin("purchase")
            answer = server.complete(DOCUMENT + words(2, 20), key)
            assert sold(answer)["reused_tokens"] == len(DOCUMENT)
            time.sleep(WINDOW_S)  # until it is booked
            ran = watch.end("purchase")
    for file in sorted(ran):
        print(f"{file}  (idle too)" if file in idle else file)
    print(
        f"\n{len(ran)} files run during one purchase; {len(ran & idle)} of them run when idle too"
    )
    return int(len(ran) > args.most)


if __name__ == "__main__":
    sys.exit(main())
