"""Which loads a step waits for, and what a failed one costs the other requests of the step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.support.paged import one_group
from tests.unit.connector.test_request_state import BLOCK, CHUNK, FACTS, KEYS, admit, asking
from vllm_kvmarket.connector.idle_time import IdleTime
from vllm_kvmarket.connector.messages import LoadReport, WorkerReport
from vllm_kvmarket.connector.request_state import EngineFacts
from vllm_kvmarket.connector.step_loads import MOST_BYTES, StepLoads
from vllm_kvmarket.store import DiskStore


def loads_of(disk, *, busy=True, facts=FACTS, asynchronous=False, stages=1, nodes=1):
    """Of an engine that runs another request, unless it is not `busy`."""
    engine = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages, nnodes=nodes),
    )
    idle_time = IdleTime()
    idle_time.step_ended(["other"] if busy else [])
    return StepLoads(engine, facts, disk, idle_time)


@pytest.fixture
def disk(tmp_path):
    """Has the document's chunks in files."""
    opened = DiskStore(tmp_path)
    for key in KEYS:
        path = opened.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"c" * 3_000_000)
    return opened


def test_a_small_load_from_memory_is_one(disk):
    """Of the chunks that the request still needs, not of those in front of them."""
    reuse = asking(250)
    external = reuse.external_tokens(0)
    assert loads_of(disk).suits(reuse, external)
    disk.path(KEYS[0]).unlink()
    assert not loads_of(disk).suits(reuse, external)
    assert loads_of(disk).suits(reuse, reuse.external_tokens(CHUNK))


@pytest.mark.parametrize(
    "how", [{"busy": False}, {"asynchronous": True}, {"stages": 2}, {"nodes": 2}]
)
def test_other_engines_load_beside_their_steps(disk, how):
    """One that runs nothing else, or whose scheduler hears of a failed load too late."""
    reuse = asking(250)
    assert not loads_of(disk, **how).suits(reuse, reuse.external_tokens(0))


def test_a_large_load_goes_beside_the_step(disk):
    """The others that run would wait for it too long."""
    reuse = asking(250)
    external = reuse.external_tokens(0)
    pages = -(-external // BLOCK)
    for page_bytes, small in ((MOST_BYTES // pages, True), (MOST_BYTES // pages + 1, False)):
        group = replace(one_group(["layer"], BLOCK), page_bytes=page_bytes)
        facts = EngineFacts("e", (group,), CHUNK, 1)
        assert loads_of(disk, facts=facts).suits(reuse, external) is small


def test_nobody_pays_for_what_a_failed_load_was_to_bring(disk):
    """The request that loaded, and one of the same step that took its blocks for loaded."""
    loads = loads_of(disk)
    loading, finding, asynchronous = asking(250), asking(250), asking(250)
    loading.in_step = True
    for name, reuse in (("loading", loading), ("finding", finding), ("later", asynchronous)):
        reuse.request.request_id = name
        loads.admitted(reuse)
    assert admit(loading, 0)
    assert not admit(finding, 240, most=240)
    assert admit(asynchronous, 2 * CHUNK)
    assert finding.reused == 240
    failed = LoadReport(failures={KEYS[1]: "gone"})
    report = WorkerReport(loads={"loading": failed, "later": LoadReport()})
    ended = loads.ended(report)
    assert ended == {"loading": failed}
    assert set(report.loads) == {"later"}
    loading.load_ended(ended["loading"], FACTS)
    asynchronous.load_ended(report.loads["later"], FACTS)
    for reuse in (loading, finding, asynchronous):
        assert (reuse.reused, reuse.loaded + reuse.cached) == (CHUNK, CHUNK)
    assert loads.ended(report) == {}


def test_a_failed_load_costs_nobody_what_was_there_before(disk):
    """A request whose part of the document ended in front of it."""
    loads = loads_of(disk)
    loading, before = asking(250), asking(CHUNK)
    loading.in_step = True
    loading.request.request_id = "loading"
    loads.admitted(loading)
    loads.admitted(before)
    assert admit(loading, CHUNK)
    assert not admit(before, CHUNK, most=CHUNK)
    loads.ended(WorkerReport(loads={"loading": LoadReport(failures={KEYS[1]: "gone"})}))
    assert (before.reused, before.cached) == (CHUNK, CHUNK)
