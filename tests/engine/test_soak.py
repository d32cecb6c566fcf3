"""The soak in small: benchmarks/soak.py as its users run it, for a minute."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

MINUTES = 1.25
SEED = 20


@pytest.fixture(scope="module")
def report(smollm, tmp_path_factory):
    """A short soak's report; it compares with the server's own prefill, to save a start."""
    folder = tmp_path_factory.mktemp("soak")
    out = folder / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", str(MINUTES)]
    command += ["--seed", str(SEED), "--oracle", "server", "--compare", "150"]
    command += ["--out", str(out), "--keep", str(folder / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    print(done.stdout[-6000:])
    assert out.exists(), done.stderr[-3000:]
    found = json.loads(out.read_text("utf-8"))
    found["exit code"] = done.returncode
    return found


def test_nothing_went_wrong(report):
    """No wrong token, lost or doubled charge, growth, bad book, or anything that broke."""
    assert report["problems"] == []
    assert report["ok"]
    assert report["exit code"] == 0


def test_everything_took_place(report):
    """Published, bought, left, preempted, evicted, damaged: without them it proves little."""
    evidence = report["evidence"]
    assert evidence["documents_published"] >= 10
    assert evidence["left"] >= 5
    assert evidence["preemptions"] > 0
    assert evidence["evictions"] > 0
    assert evidence["faults_injected"] >= 10
    assert evidence["load_failures"] > 0
    assert report["money"]["answers_charged"] >= 20
    assert report["money"]["publishings_charged"] >= 10
    assert report["counts"]["refused: 402"] + report["counts"].get("refused: 404", 0) > 0


def test_answers_were_compared_and_the_money_adds_up(report):
    """Many answers with reuse against full prefill; charges = income + royalties - publishing."""
    exactness, money = report["exactness"], report["money"]
    assert exactness["wrong"] == 0
    assert exactness["compared_with_reuse"] >= 20
    assert exactness["compared_partial"] > 0
    assert money["charges_nano"] > 0
    earned = money["income_nano"] + money["royalties_nano"]
    assert money["charges_nano"] + money["publishing_nano"] == earned
    assert money["debits_nano"] == money["credits_nano"]
    assert money["transfers_proven"] > 0
    assert money["checkpoints_consistent"] > 0


def test_the_disk_stayed_below_its_quota_at_every_sample(report):
    """And was used for the most part, so that the quota mattered."""
    assert report["counts"]["disk samples"] >= 30
    assert report["quota_bytes"] // 2 < report["disk"]["peak_bytes"] <= report["quota_bytes"]
