"""The worker stores and compares chunks, and its reports add up."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.support.paged import (
    CHUNK_TOKENS,
    NAMESPACE,
    PLENTY,
    Bench,
    blocks_of,
    chunk_save,
    content,
    fill,
    into,
    latent_cache,
    paged_cache,
    same,
    stored,
)
from vllm_kvmarket.connector.messages import (
    ChunkLoad,
    GroupPages,
    LoadReport,
    SavePlan,
    WorkerReport,
)
from vllm_kvmarket.store import disk

RESULTS = ("exact", "close", "different", "unread")


@pytest.fixture
def bench(tmp_path):
    with Bench(tmp_path, host_bytes=PLENTY) as opened:
        yield opened


def test_a_full_store_is_reported_as_full(tmp_path):
    """The chunks that fitted are stored, a prefix of the document, and loads go on."""
    with Bench(tmp_path / "measured") as bench:
        size = bench.save(chunk_save(1, CHUNK_TOKENS, range(4))).stored_bytes
    with Bench(tmp_path / "small", quota_bytes=int(2.9 * size)) as bench:
        chunks = [chunk_save(seed, CHUNK_TOKENS, range(4)) for seed in range(4)]
        report = bench.save(*chunks)
        assert report.is_full
        assert "quota" in report.failure
        assert [bench.store.has(chunk.key) for chunk in chunks] == [True, True, False, False]
        assert bench.count("save_failures/full") == 1
        assert bench.load(into(chunks[0], 20)).failures == {}


@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (0, 1), (1, 4)])
def test_what_each_rank_has_whole_is_stored_once_and_loaded_by_any(tmp_path, rank, ranks):
    """Latent attention under tensor parallelism; also by engines of other ranks."""
    chunk = chunk_save(1, CHUNK_TOKENS - 5, range(4))
    for writer in (1, 0):
        with Bench(tmp_path, latent_cache(writer, ranks=2)) as bench:
            fill(bench.cache, range(4), seed=1)
            report = bench.save(chunk)
            assert (report.stored_bytes > 0, len(report.shares)) == (writer == 0, writer == 0)
            expected = content(bench.cache, range(4), chunk.token_count)
    assert [file.name for file in tmp_path.rglob("*.kv")] == [f"{chunk.key.hex()}.kv"]
    with Bench(tmp_path, latent_cache(rank, ranks)) as bench:
        blocks = tuple(range(20, 20 + bench.cache.layout.page_count(chunk.token_count)))
        load = ChunkLoad(chunk.key, (GroupPages(0, blocks),))
        assert bench.load(load).failures == {}
        assert same(content(bench.cache, blocks, chunk.token_count), expected)


def test_closing_finishes_a_save(tmp_path):
    """A document of many chunks is stored whole when the engine ends."""
    chunks = tuple(chunk_save(seed, CHUNK_TOKENS, range(4)) for seed in range(10))
    bench = Bench(tmp_path)
    with bench:
        bench.transfers.save(SavePlan("r", NAMESPACE, chunks))
    assert all(bench.store.has(chunk.key) for chunk in chunks)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_new_chunk_is_stored_without_looking_for_others(bench, monkeypatch, is_new):
    """No folder is scanned and no bucket listed for what was never on offer."""
    scanned = []
    files = disk._scan
    monkeypatch.setattr(disk, "_scan", lambda folder: scanned.append(folder) or files(folder))
    chunk = replace(chunk_save(1, CHUNK_TOKENS, range(4)), is_new=is_new)
    assert bench.save(chunk).stored_bytes > 0
    assert bool(scanned) == (not is_new)


def test_a_store_that_has_gone_fails_the_save_with_the_reason(tmp_path):
    """The engine goes on."""
    with Bench(tmp_path / "store") as bench:
        shutil.rmtree(tmp_path / "store")
        (tmp_path / "store").write_text("in the way")
        report = bench.save(chunk_save(1, CHUNK_TOKENS, range(4)))
        assert report.failure
        assert not report.is_full
        (tmp_path / "store").unlink()


def test_a_document_is_stored_as_the_same_bytes_whatever_lay_in_its_last_page(tmp_path):
    """The slots behind the last token hold somebody else's prompt, which must not be stored."""
    files = []
    for publisher in ("first", "second"):
        with Bench(tmp_path / publisher) as bench:
            fill(bench.cache, range(4), seed=1)
            chunk = chunk_save(1, 37, [0, 1, 2])
            behind = slice(37, 48)
            for layer in range(bench.cache.layer_count):
                page = bench.cache.host_pages(layer, [2])[0].view(np.float32)
                keys, values = page.reshape(2, 2, -1)[:, 0], page.reshape(2, 2, -1)[:, 1]
                keys.reshape(2, 32, 16)[:, :, 5:] = len(files) + 7
                values.reshape(2, 16, 32)[:, 5:] = len(files) + 8
            before = content(bench.cache, [0, 1, 2], 48)
            assert before[0][behind].any()
            assert bench.save(chunk).stored_bytes > 0
            assert same(content(bench.cache, [0, 1, 2], 48), before), "the cache is not changed"
            files.append(bench.store.disk.path(chunk.key).read_bytes())
            assert bench.load(into(chunk, 8)).failures == {}
            loaded = content(bench.cache, blocks_of(into(chunk, 8)), 48)
            assert same([layer[:37] for layer in loaded], [layer[:37] for layer in before])
            assert not loaded[0][behind].any()
    assert files[0] == files[1]


# Comparing


def test_an_audit_finds_equal_pages_exact_whatever_lies_behind_the_last_token(bench):
    """The last page of a document is partly filled; what is in its other slots means nothing."""
    whole, short = stored(bench, 1), stored(bench, 2, tokens=37, first_block=8)
    page = bench.cache.rows[0].numpy()[blocks_of(short)[-1]].view(np.float32)
    tokens = content(bench.cache, blocks_of(short), 48)[0][37:].view(np.float32)
    page[np.isin(page, tokens)] = 5.0
    report = bench.audit(whole, short)
    assert [report.count(result) for result in RESULTS] == [2, 0, 0, 0]
    assert report.worst_difference == 0.0
    assert report.details == []


@pytest.mark.parametrize(
    ("change", "result"),
    [(1e-6, "close"), (1.0, "different"), (float("nan"), "different"), (np.inf, "different")],
)
def test_an_audit_tells_rounding_from_poison(bench, change, result):
    """Rounding is far below a layer's largest value, poison is not; the difference is reported."""
    chunk = stored(bench)
    bench.cache.rows[1].numpy()[blocks_of(chunk)[2]].view(np.float32)[7] += change
    report = bench.audit(chunk)
    assert report.chunks[chunk.key].result == result
    assert report.count(result) == 1
    assert "layer.1" in report.details[0]
    if np.isfinite(change):
        assert report.worst_difference == pytest.approx(change, rel=0.2)
    else:
        assert report.worst_difference == np.inf


def test_an_audit_compares_across_block_sizes(tmp_path):
    """Another engine's chunk is converted first."""
    with Bench(tmp_path, paged_cache(32)) as publisher:
        chunk = stored(publisher, tokens=37)
    with Bench(tmp_path, paged_cache(16)) as auditor:
        blocks = (3, 4, 5)
        auditor.load(ChunkLoad(chunk.key, (GroupPages(0, blocks),)))
        again = chunk_save(1, 37, blocks)
        assert auditor.audit(again).count("exact") == 1
        auditor.cache.rows[0].numpy()[3].view(np.float32)[:] += 1
        assert auditor.audit(again).count("different") == 1


def test_an_audit_of_what_is_not_there_is_no_verdict(bench):
    """It says why."""
    report = bench.audit(chunk_save(1, CHUNK_TOKENS, range(4)))
    assert (report.count("exact"), report.count("unread")) == (0, 1)
    assert "no such chunk" in report.details[0]


# Messages


def test_reports_of_ranks_add_up():
    """Bytes add up, the slowest rank's time stands, and a chunk's worst audit."""
    first = WorkerReport(loads={"a": LoadReport(10, 1.0, {b"k": "x"}, {b"k"}, {"damaged": 1})})
    second = WorkerReport(loads={"a": LoadReport(5, 2.0, {b"l": "y"}, set(), {"damaged": 1})})
    assert WorkerReport().is_empty
    assert not first.is_empty
    merged = first.aggregate(second).loads["a"]
    assert (merged.loaded_bytes, merged.seconds) == (15, 2.0)
    assert merged.reasons == {"damaged": 2}
    assert set(merged.failures) == {b"k", b"l"}
