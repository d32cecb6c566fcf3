"""The programs in examples/ do what they say."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT

EXAMPLE = ROOT / "examples" / "offline_preloaded_documents.py"


def test_the_offline_example_publishes_preloads_and_sells(tiny, tmp_path):
    """Two agents buy the same document; it is under 40 lines."""
    document = tmp_path / "document.txt"
    document.write_text("Rivers run to the sea. " * 80)
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tiny(1)), str(document)],
        env=os.environ | {"KVMARKET_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sold = [line for line in done.stdout.splitlines() if line.endswith("tokens reused")]
    assert [line.split()[0] for line in sold] == ["ann", "ben"]
    assert all(int(line.split()[-3]) > 300 for line in sold)
    assert done.stdout.count("Receipt(") == 2
    assert len(EXAMPLE.read_text().splitlines()) < 40
