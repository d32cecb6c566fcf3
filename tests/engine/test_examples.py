"""The programs in examples/ do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support import ROOT

pytest_plugins = ("tests.support.gate_server", "tests.support.clients_server")

EXAMPLE = ROOT / "examples" / "offline_preloaded_documents.py"


@pytest.mark.long
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


def run(shop, key, *command):
    """An example's output, run with the server and the key in its environment."""
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"KVMARKET_URL": shop.base, "KVMARKET_KEY": key},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_publisher_and_its_buyers_are_square(shop, pat, ann, tmp_path):
    """Published, bought twice by the agent and twice with curl: what the buyer paid, her receipts
    and the publisher's royalties are of the same four sales.
    """
    text = tmp_path / "rivers.md"
    text.write_text("# Rivers\n\n" + "Rivers run to the sea, and the sea is not full. " * 40)
    publish = (sys.executable, ROOT / "examples" / "publisher.py", text, "--title", "Rivers")
    first = run(shop, pat, *publish)
    document, tokens = re.search(r"document (kvd_\S+) is live: (\d+) tokens", first).groups()
    tokens = int(tokens)
    assert "sold 0 times" in first
    before = shop.spent("ann")
    agent = ROOT / "examples" / "buying_agent.py"
    reply = run(shop, ann, sys.executable, agent, document, "Where to?", "Is it full?")
    assert reply.count(f"  {tokens} tokens reused") == 2
    assert "receipts verified offline: 2" in reply
    charge = tokens * 500
    assert f"paid {2 * charge / 1e9:.9f}, saved {18 * charge / 1e9:.9f}" in reply
    assert shop.spent("ann") - before == 2 * charge
    shown = run(shop, ann, ROOT / "examples" / "curl.sh", document, "Where to?")
    parts = dict(part.split("\n", 1) for part in shown.split("# ") if part)
    assert json.loads(parts["Its price"])["charge_nano"] == charge
    answer = json.loads(parts["An answer"])
    assert answer["kv_transfer_params"]["kvmarket"]["reused_tokens"] == tokens
    events = parts["An answer as a stream, with its receipt at the end"].strip().splitlines()
    (receipt,) = json.loads(events[-1].removeprefix("data: "))["receipts"]
    assert receipt["charge_nano"] == charge
    assert shop.spent("ann") - before == 4 * charge
    again = run(shop, pat, *publish)
    assert f"sold 4 times, earned {4 * (charge // 2) / 1e9:.9f}" in again


def test_the_agent_says_why_it_could_not_buy(shop, tokens_on_offer):
    """An account without funds: the error names the price and the cure."""
    key = shop.key("penniless", funds_nano=0)
    agent = ROOT / "examples" / "buying_agent.py"
    done = subprocess.run(
        [sys.executable, str(agent), tokens_on_offer, "Why?", "--url", shop.base, "--key", key],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "make a deposit" in done.stderr
