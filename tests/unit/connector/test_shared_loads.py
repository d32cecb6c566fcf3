"""Who loads published blocks when many want them, called as vLLM's scheduler calls the half."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from tests.support.catalogue_documents import NAMESPACE, store_and_list, tokens
from tests.support.scheduler_half import (
    BLOCK_TOKENS,
    cache_blocks,
    half_of,
    local_tokens,
    opened_market,
    request_of,
)
from vllm_kvmarket.connector.messages import LoadReport, WorkerReport

# Ten whole blocks, in five chunks.
LONG = tokens(1280, 3)


@pytest.fixture
def market(tmp_path):
    with opened_market(tmp_path) as opened:
        store_and_list(opened, LONG, publisher="pat")
        yield opened


@pytest.fixture
def crowd(market, monkeypatch):
    made = Crowd(market, half_of(market, monkeypatch, object_store_timeout_s=5.0))
    yield made
    made.half.close()


class Crowd:
    """Requests for published tokens, each with a salt of its own."""

    def __init__(self, market, half) -> None:
        self.half, self._market = half, market
        self.now_s = 0.0
        half._engine.loads._clock = lambda: self.now_s

    def arrives(self, name, prompt):
        request = request_of([*prompt, 7], self._market.params("alice"), name, salt=name)
        self.half.arrived(request)
        return request

    def look(self, request):
        """The local and the external tokens that vLLM goes on with; None where it is to wait."""
        while (found := self.half._requests[request.request_id].ready()).value == "pending":
            self.half.take_instructions()
        assert found.value == "hit"
        local = local_tokens(self.half, request)
        external, _ = self.half.ready(request, local)
        return None if external is None else (local, external)

    def loads(self, request, external):
        """vLLM has found room; the chunks of the plan."""
        blocks = SimpleNamespace(get_block_ids=lambda: (list(range(1, 31)),))
        self.half.allocated(request, blocks, external)
        plans = self.half.take_instructions().loads
        assert [plan.request_id for plan in plans] == [request.request_id]
        return plans[0].chunks

    def reports(self, request, failed=(), *, damaged=False, finished=True):
        """A rank's report; `finished`: it was the last rank's."""
        report = LoadReport(failures=dict.fromkeys(failed, "gone"))
        report.damaged = set(failed) if damaged else set()
        self.half.worker_reported(
            KVConnectorOutput(
                finished_recving={request.request_id} if finished else None,
                kv_connector_worker_meta=WorkerReport(loads={request.request_id: report}),
            )
        )

    def ends(self, request, status=RequestStatus.FINISHED_STOPPED):
        request.status = status
        return self.half.finished(request, [])[1]["kvmarket"]


def in_cache(crowd, request, blocks):
    """vLLM caches a request's first blocks: they have been loaded."""
    hashes, request.block_hashes = request.block_hashes, request.block_hashes[:blocks]
    cache_blocks(crowd.half, request)
    request.block_hashes = hashes


def test_of_a_crowd_one_loads_and_all_others_find_it(crowd):
    """Each of them pays."""
    requests = [crowd.arrives(f"r{number}", LONG) for number in range(4)]
    assert crowd.look(requests[0]) == (0, 1280)
    crowd.loads(requests[0], 1280)
    assert [crowd.look(each) for each in requests[1:]] == [None] * 3
    assert crowd.half.take_instructions().prefetches == []
    in_cache(crowd, requests[0], 10)
    crowd.reports(requests[0])
    assert [crowd.look(each) for each in requests[1:]] == [(1280, 0)] * 3
    for request in requests[1:]:
        crowd.half.allocated(request, SimpleNamespace(get_block_ids=lambda: ([],)), 0)
    assert [crowd.ends(each)["charge_nano"] for each in requests] == [1280 * 500] * 4


@pytest.mark.parametrize("how", ["fails", "is aborted", "takes too long"])
def test_when_a_load_does_not_come_the_next_request_loads(crowd, how):
    """And the others wait for that one."""
    one, two, three = (crowd.arrives(name, LONG) for name in ("r1", "r2", "r3"))
    crowd.loads(one, crowd.look(one)[1])
    assert crowd.look(two) is crowd.look(three) is None
    if how == "fails":
        crowd.reports(one, [chunk.key for chunk in crowd.half._requests["r1"].reuse.match.chunks])
    elif how == "is aborted":
        crowd.ends(one, RequestStatus.FINISHED_ABORTED)
    else:
        crowd.now_s = 5.1
    assert crowd.look(two) == (0, 1280)
    crowd.loads(two, 1280)
    assert crowd.look(three) == (None if how != "takes too long" else (0, 1280))
    assert crowd.half._engine.loads._loader.keys() == set(two.block_hashes[:10])


def test_a_load_that_covers_a_part_is_waited_for_and_the_rest_is_loaded(crowd, market):
    """The shorter document is a part of the longer one."""
    store_and_list(market, LONG[:640], publisher="pat")
    crowd.half._market.catalogue.refresh()
    short, long = crowd.arrives("short", LONG[:640]), crowd.arrives("long", LONG)
    crowd.loads(short, crowd.look(short)[1])
    assert crowd.look(long) is None
    in_cache(crowd, short, 5)
    crowd.reports(short)
    assert crowd.look(long) == (640, 640)
    chunks = crowd.loads(long, 640)
    again = crowd.arrives("again", LONG)
    assert crowd.look(again) is None
    assert [chunk.key for chunk in chunks] == list(
        market.match(NAMESPACE, LONG).listing.chunk_keys[2:]
    )


def test_nobody_waits_twice_for_a_block_that_was_loaded(crowd):
    """Where vLLM does not find it: the window of a match that ends there begins elsewhere."""
    one, two, three = (crowd.arrives(name, LONG) for name in ("r1", "r2", "r3"))
    crowd.loads(one, crowd.look(one)[1])
    assert crowd.look(two) is crowd.look(three) is None
    crowd.reports(one)
    assert crowd.look(two) == (0, 1280)
    crowd.loads(two, 1280)
    assert crowd.look(three) == (0, 1280)


def test_nobody_waits_for_a_page_that_is_not_shared(crowd, market):
    """The last, partly filled one: the question goes into the same block."""
    document = tokens(200, 4)
    store_and_list(market, document, publisher="pat")
    crowd.half._market.catalogue.refresh()
    one, two, three = (crowd.arrives(name, document) for name in ("r1", "r2", "r3"))
    crowd.loads(one, crowd.look(one)[1])
    assert crowd.look(two) is None
    in_cache(crowd, one, 1)
    crowd.reports(one)
    assert crowd.look(two) == (BLOCK_TOKENS, 72)
    crowd.loads(two, 72)
    assert crowd.look(three) == (BLOCK_TOKENS, 72)


def test_damage_that_one_load_finds_is_not_looked_for_by_those_who_wait(crowd, market):
    """They load what lies before it, and pay for that."""
    one, two = (crowd.arrives(name, LONG) for name in ("r1", "r2"))
    chunks = crowd.loads(one, crowd.look(one)[1])
    assert crowd.look(two) is None
    crowd.reports(one, [chunks[2].key], damaged=True)
    assert crowd.look(two) == (0, 512)
    crowd.loads(two, 512)
    crowd.reports(two)
    assert crowd.ends(two)["charge_nano"] == 512 * 500


def test_a_load_counts_when_every_rank_has_reported_it(crowd):
    """A rank that fails a step after another was done takes its chunks off the bill."""
    one, two = (crowd.arrives(name, LONG) for name in ("r1", "r2"))
    chunks = crowd.loads(one, crowd.look(one)[1])
    crowd.reports(one, finished=False)
    assert crowd.look(two) is None, "it is not in the cache of every rank yet"
    assert crowd.half._requests["r1"].reuse.reused == 0
    crowd.reports(one, [chunks[1].key])
    assert crowd.half._requests["r1"].reuse.reused == 256
    assert crowd.ends(one)["charge_nano"] == 256 * 500
    assert crowd.half._load_reports == {}
