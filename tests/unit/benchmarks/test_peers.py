"""The parts of benchmarks/peers.py that need no engine: damage, verdicts, figures, merging."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peer_systems import faults, installing, report, timing
from benchmarks.peer_systems.processes import Bench, error_text
from benchmarks.peer_systems.systems import BY_NAME, SYSTEMS, System


def answer(tokens, logprobs=None, ttft_s=1.0):
    logprobs = [repr(value) for value in logprobs or [-0.5] * len(tokens)]
    return {"tokens": tokens, "logprobs": logprobs, "ttft_s": ttft_s, "market": {}}


@pytest.mark.parametrize(
    ("got", "outcome", "bad"),
    [
        (answer([1, 2, 3], ttft_s=0.1), "right", False),
        (answer([1, 2, 3], ttft_s=0.5), "recomputes in part", False),
        (answer([1, 2, 3], ttft_s=1.1), "recomputes", False),
        (answer([1, 2, 4], ttft_s=0.1), "wrong tokens, silently", True),
        (answer([1, 2, 3], [-0.5, -0.5, -0.6]), "wrong log-probabilities, silently", True),
        (answer([1, 2, 3], [-0.5, float("nan"), -0.5]), "NaN, silently", True),
        (answer([1, 2, 3], [-0.5, -0.5, -0.50001], 0.1), "right", False),
    ],
)
def test_a_wrong_answer_is_never_called_right(got, outcome, bad):
    """The verdict looks at tokens, then at log-probabilities, then at how long it took."""
    said = faults.compare(got, answer([1, 2, 3]))
    assert (said["outcome"], said["bad"]) == (outcome, bad)


def test_equal_tokens_count_only_the_leading_ones():
    """Once an answer has gone astray, later equal tokens are chance."""
    said = faults.compare(answer([1, 9, 3]), answer([1, 2, 3]))
    assert said["equal_tokens"] == 1


def test_each_damage_changes_what_it_says(tmp_path):
    """A byte, 4 KiB, and the second half."""
    content = bytes(range(256)) * 100
    for name, changed in (("byte", 1), ("piece", faults.PIECE)):
        path = tmp_path / name
        path.write_bytes(content)
        faults.DAMAGE[name](path)
        damaged = path.read_bytes()
        assert len(damaged) == len(content)
        assert sum(a != b for a, b in zip(damaged, content, strict=True)) == changed
    path = tmp_path / "truncated"
    path.write_bytes(content)
    faults.DAMAGE["truncated"](path)
    assert path.read_bytes() == content[: len(content) // 2]


def test_the_cause_is_named_and_not_its_consequence():
    """vLLM's log ends with what every failed start ends with."""
    log = (
        "(EngineCore pid=7) ERROR [core.py:1] RuntimeError: Engine core initialization failed.\n"
        "(Worker pid=8) ERROR 11-24 [x.py:2] ValueError: no such layer in /var/tmp/x/layer.bin\n"
        "(APIServer) RuntimeError: later\n"
    )
    assert error_text(log) == "ValueError: no such layer in layer.bin"
    assert error_text("nothing\n") == "no error text"


def test_ratios_are_of_medians_and_missing_figures_stay_missing():
    """An APC hit of the same process, and plain vLLM's prefill, are what reuse is divided by."""
    seconds = {"miss/512": [1.2], "apc/512": [0.1, 0.3, 0.2], "reuse/512": [0.4]}
    row = timing.columns(seconds, {"miss/512": [2.0]}, 512)
    assert row["reuse_over_apc"] == pytest.approx(2.0)
    assert row["prefill_over_reuse"] == pytest.approx(5.0)
    assert row["miss_over_prefill"] == pytest.approx(0.6)
    assert row["new_over_apc"] is None and row["prefill_over_new"] is None


def test_every_round_measures_all_parts_on_one_document():
    """A slow moment of the machine hits miss, prefix-cache hit and reuse alike."""
    steps = timing.same_process((512, 2048), 2, reuses=True)
    asked = [s for s in steps if s["op"] == "ask" and not s["name"].startswith("warm")]
    kinds = [s["name"].split("/")[0] for s in asked]
    assert kinds == ["miss", "apc", "reuse", "reuse"] * 4
    assert len({tuple(s["document"]) for s in asked}) == 4
    before_reuse = [steps[i - 1]["op"] for i, s in enumerate(steps) if "reuse" in s.get("name", "")]
    assert set(before_reuse) == {"empty"}


def test_a_part_that_was_skipped_keeps_its_older_result(tmp_path):
    """Timing and faults may be measured in different runs."""
    path = tmp_path / "peers.json"
    report.merge(path, "example", {"label": "E", "seconds": {}, "rows": {"512": {}}})
    report.merge(path, "example", {"label": "E", "faults": {"byte": {"outcome": "right"}}})
    system = json.loads(path.read_text())["systems"]["example"]
    assert system["rows"] == {"512": {}} and system["faults"]["byte"]["outcome"] == "right"
    report.merge(path, "example", {"label": "E", "error": "no more"})
    assert "rows" not in json.loads(path.read_text())["systems"]["example"]


def test_packages_never_go_into_our_environment(tmp_path, monkeypatch):
    """pip gets a target folder below .cache and no dependencies."""
    commands = []

    def run(command, **_):
        commands.append(command)
        (tmp_path / "lmcache-0.5.6").mkdir(exist_ok=True)
        return installing.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(installing, "ROOT", tmp_path)
    monkeypatch.setattr(installing.subprocess, "run", run)
    folder = installing.install(BY_NAME["lmcache"])
    assert folder == tmp_path / "lmcache-0.5.6"
    assert "--no-deps" in commands[0]
    assert commands[0][commands[0].index("--target") + 1] == str(folder)
    installing.install(BY_NAME["lmcache"])
    assert len(commands) == 1


def test_a_failed_installation_is_a_result(tmp_path, monkeypatch):
    """The installer's last words are kept."""
    failed = installing.subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution\n")
    monkeypatch.setattr(installing, "ROOT", tmp_path)
    monkeypatch.setattr(installing.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="could not be installed: ERROR: no matching"):
        installing.install(BY_NAME["lmcache"])


def test_names_are_unique_and_kvmarket_is_among_them():
    """A system's name is its key in the results."""
    assert len(BY_NAME) == len(SYSTEMS)
    assert BY_NAME["kvmarket"].kvmarket


@pytest.fixture
def fake_engine(tmp_path, monkeypatch):
    """A program in the engine's place, given as its source."""

    def use(source):
        program = tmp_path / "engine.py"
        program.write_text(source)
        monkeypatch.setattr(
            "benchmarks.peer_systems.processes.ENGINE", [sys.executable, str(program)]
        )
        return Bench(System("x", "x", lambda _: None), None, {"model": "m", "seed": 1})

    return use


def test_an_engine_that_dies_or_hangs_is_a_result(fake_engine):
    """The steps before its end, how it ended, and what it said are kept."""
    write = "import sys, json\nopen(sys.argv[2], 'w').write(json.dumps({'name': 'a'}) + '\\n')\n"
    with fake_engine(write + "raise ValueError('spoilt')\n") as bench:
        run = bench.run([], timeout_s=30)
        assert (run.ended, run.error()) == ("died", "ValueError: spoilt")
        assert run.named("a") and run.named("b") is None
    with fake_engine(write + "import time\ntime.sleep(60)\n") as bench:
        assert bench.run([], timeout_s=0.5).ended == "hung"


def test_nothing_that_an_engine_started_survives_it(fake_engine, tmp_path):
    """-9 reaches the whole session, at the moment that the watch says."""
    note = tmp_path / "child"
    source = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\ntime.sleep(60)\n"
    )
    with fake_engine(source) as bench:
        run = bench.run([], 30, kill_when=lambda _: note.exists() and bool(note.read_text()))
        assert run.ended == "killed"
        deadline = time.monotonic() + 10
        while alive(int(note.read_text())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(int(note.read_text()))


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    os.kill(pid, 0)
    return state != "Z"
