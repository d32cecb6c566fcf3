"""docs/TUTORIAL.md, run from top to bottom as its reader does."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import psutil

from tests.support import ROOT

TUTORIAL = ROOT / "docs" / "TUTORIAL.md"
BLOCK = re.compile(r"(?:^<!-- ([^>]+) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "not run here"
END = "--- end of block ---"


def blocks():
    """(marker, language, content) of every fenced block, in order."""
    found = [match.groups() for match in BLOCK.finditer(TUTORIAL.read_text())]
    assert TUTORIAL.read_text().count("```") == 2 * len(found), "a block that is not understood"
    return found


class Shell:
    """One bash for all blocks; the reader's clone is a folder that has what a clone has."""

    def __init__(self, folder: Path) -> None:
        # Nothing of the reader's own settings, nor of other tests'.
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("KVMARKET", "VLLM"))
        }
        self._bash = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        # As a terminal does: background jobs get names, and a failure ends what is shown.
        self._write("set -o pipefail\n")

    def _write(self, text: str) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(text)
        self._bash.stdin.flush()

    def run(self, block: str) -> str:
        """Run a block and return its output; each of its commands must succeed."""
        assert self._bash.stdout is not None
        trap = "trap 'echo failed: $BASH_COMMAND' ERR"
        self._write(f"{trap}\n{block}\ntrap - ERR\necho; echo '{END}'\n")
        said = []
        for line in self._bash.stdout:
            if line.rstrip() == END:
                break
            said.append(line)
        else:
            raise AssertionError("".join(said))
        printed_text = "".join(said)
        assert "failed: " not in printed_text, printed_text
        return printed_text

    def close(self) -> None:
        """End whatever the blocks have left."""
        assert self._bash.stdin is not None
        family = psutil.Process(self._bash.pid).children(recursive=True)
        self._bash.stdin.close()
        self._bash.send_signal(signal.SIGKILL)
        self._bash.wait()
        assert self._bash.stdout is not None
        self._bash.stdout.close()
        for process in family:
            if process.is_running():
                process.kill()


def as_pattern(shown: str) -> str:
    """Turn shown output into a pattern: `...` stands for anything; columns may have any width."""
    lines = [line for line in shown.strip().splitlines() if line.strip()]
    return r"\s+".join(
        r"\s+".join(re.escape(word).replace(r"\.\.\.", r".*?") for word in line.split())
        for line in lines
    )


def test_the_tutorial_does_what_it_says(smollm, tmp_path):
    """Every command succeeds, and what is shown below it is what it prints."""
    for name in (".venv", ".cache", "examples", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shell = Shell(tmp_path)
    printed = ""
    skipped = []
    try:
        for marker, language, written in blocks():
            content = written.replace("8000", port)
            if marker == NOT_RUN:
                skipped.append(content.strip())
            elif marker is not None:
                (tmp_path / marker.removeprefix("file: ")).write_text(content)
            elif language == "sh":
                printed = shell.run(content)
            else:
                assert language == "text"
                assert re.search(as_pattern(content), printed, re.DOTALL), (content, printed)
    except AssertionError:
        log = tmp_path / "server.log"
        print(log.read_text()[-3000:] if log.exists() else "no server")
        raise
    finally:
        shell.close()
    # Blocks not run here are run by users who install: they must be there.
    assert skipped == ["make demo"]
    assert "\ndemo: " in (ROOT / "Makefile").read_text()
    assert not [each for each in psutil.process_iter() if str(tmp_path) in _folder(each)]


def _folder(process: psutil.Process) -> str:
    try:
        return str(process.cwd())
    except psutil.Error:
        return ""
