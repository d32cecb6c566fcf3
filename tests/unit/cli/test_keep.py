"""`store gc`, `store repair`, `store check` and `document expire`."""

import argparse
import time

import pytest

from vllm_kvmarket.cli import engine, store_commands
from vllm_kvmarket.cli.command import span_s
from vllm_kvmarket.core.errors import PublishFailedError
from vllm_kvmarket.market.market import Market


def damage(market, key):
    path = market.store.disk.path(key)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def repairs(monkeypatch, list_document):
    """An engine that is none: it stores again what is computed in the conftest's namespace."""
    started = []

    def open_engine(model, market, max_model_len, dtype):
        started.append((model, max_model_len, dtype))
        return object()

    def republish(market, llm, document_id):
        listing = market.catalogue.get(document_id)
        list_document(market, market.catalogue.tokens_of(document_id), title=listing.terms.title)
        market.catalogue.heal(*listing.chunk_keys)
        return market.catalogue.get(document_id)

    monkeypatch.setattr(engine, "open_engine", open_engine)
    monkeypatch.setattr(Market, "republish", republish)
    monkeypatch.setattr(store_commands, "namespace_of", lambda *_: bytes(range(32)))
    return started


def test_gc_says_what_goes_and_then_it_is_gone(run, run_json, sold):
    """A dry run changes nothing; what is on offer stays."""
    assert run_json("store", "gc")["chunks_deleted"] == 0
    run("document", "delist", sold.document_id)
    expected = run_json("store", "gc", "--dry-run")
    assert (expected["chunks_deleted"], expected["dry_run"]) == (3, True)
    assert run("store", "gc", "--dry-run").out.startswith("would delete 3 chunks of no listing, ")
    assert run_json("store", "check")["chunks_unlisted"] == 3
    assert "`kvmarket store gc` removes" in run("store", "check").out
    assert run_json("store", "gc") == {**expected, "dry_run": False}
    assert run_json("store", "check")["stored_bytes"] == 0
    assert run("store", "gc").out == "deleted 0 chunks of no listing, 0 B\n"


def test_a_document_expires_when_it_is_told_to(run, run_json, sold, home):
    """After a time, for good, or at once."""
    document = run_json("document", "expire", sold.document_id, "--ttl", "7d")
    assert document["document_id"] == sold.document_id
    assert 7 * 86_400 - 60 < document["expires_at_s"] - time.time() <= 7 * 86_400
    shown = run("document", "expire", sold.document_id, "--never").out
    assert shown == f"{sold.document_id}: on offer for good\n"
    assert "on offer until 2" in run("document", "expire", sold.document_id, "--ttl", "0s").out
    assert run_json("store", "gc")["expired"] == [sold.document_id]
    with Market.open(home) as market:
        assert market.catalogue.get(sold.document_id).state == "expired"
    assert (
        "is expired; publish it again"
        in run("document", "expire", sold.document_id, "--never", code=1).err
    )
    assert "no document" in run("document", "expire", "kvd_unknown", "--never", code=1).err


@pytest.mark.parametrize("options", [[], ["--never", "--ttl", "1d"], ["--ttl", "soon"]])
def test_expire_needs_one_good_answer(run, sold, options):
    """A span or never; neither, both, or something else is a mistake in using it."""
    run("document", "expire", sold.document_id, *options, code=2)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("12h", 43_200), ("7d", 604_800), ("0s", 0)]
)
def test_spans_have_a_unit(text, seconds):
    """Seconds to weeks."""
    assert span_s(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1.5h", "7D", "1h30m", "9" * 12 + "w"])
def test_what_is_no_span_is_refused(text):
    """With an example of one."""
    with pytest.raises(argparse.ArgumentTypeError, match="7d"):
        span_s(text)


def test_repair_publishes_damaged_documents_again(run, run_json, sold, home, repairs):
    """On an engine that starts only when something has to be computed."""
    done = run_json("store", "repair")
    assert (done["chunks_verified"], done["repaired"], repairs) == (3, [], [])
    with Market.open(home) as market:
        damage(market, sold.chunk_keys[1])
    done = run_json(
        "store", "repair", "--model", "tiny", "--dtype", "float32", "--max-model-len", "4k"
    )
    assert (done["chunks_damaged"], done["repaired"]) == (1, [sold.document_id])
    assert repairs == [("tiny", 4_000, "float32")]
    report = run_json("store", "check")
    assert report["ok"]
    assert [file["name"] for file in report["quarantined"]] == [f"{sold.chunk_keys[1].hex()}.kv"]
    assert "in quarantine: " in run("store", "check").out
    assert "3 chunks verified, 0 damaged; 0 documents repaired" in run("store", "repair").out


@pytest.fixture
def damaged(sold, home):
    with Market.open(home) as market:
        damage(market, sold.chunk_keys[1])
    return sold


def test_without_a_model_nothing_can_be_computed(run, run_json, damaged, repairs):
    """Damage is reported, and marked; no engine is started."""
    failed = run_json("store", "repair", code=1)["failed"]
    assert failed == {damaged.document_id: "it has to be computed again: give --model"}
    assert repairs == []
    shown = run("store", "check", code=1).out
    assert "publish the damaged documents again, with `kvmarket store repair`" in shown
    assert "no document" in run("store", "repair", "kvd_unknown", code=1).err


def test_repair_says_why_an_engine_cannot_do_it(run, damaged, repairs, monkeypatch):
    """Another document's model, or one that does not start."""
    monkeypatch.setattr(store_commands, "namespace_of", lambda *_: bytes(32))
    shown = run("store", "repair", damaged.document_id, "--model", "tiny", code=1).out
    assert "failed: it was published with another model, dtype or adapter than tiny" in shown

    def fail(*_):
        raise PublishFailedError("the engine for tiny did not start: out of memory")

    monkeypatch.setattr(engine, "open_engine", fail)
    assert (
        "failed: the engine for tiny did not start"
        in run("store", "repair", "--model", "tiny", code=1).out
    )


def test_a_quick_check_reads_no_chunks(run_json, sold, home):
    """Damage is found by reading; the catalogue knows what was found before."""
    with Market.open(home) as market:
        damage(market, sold.chunk_keys[1])
    report = run_json("store", "check", "--quick")
    assert (report["ok"], report["chunks_verified"], report["documents_damaged"]) == (True, 0, [])
    with Market.open(home) as market:
        market.catalogue.report_damage(sold.chunk_keys[1])
    assert run_json("store", "check", "--quick")["documents_damaged"] == [sold.document_id]
