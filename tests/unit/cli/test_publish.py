"""`document publish`, on an engine that is none, and `demo`."""

import io
import json
import sys
import types
from dataclasses import replace

import pytest

from vllm_kvmarket.cli import demo
from vllm_kvmarket.core.errors import KVMarketError
from vllm_kvmarket.market.market import Market


def test_publish_lists_many_files_on_one_engine(run, run_json, home, tmp_path, fake_engine):
    """Title from heading or file name, price and royalty exact, the publisher's account made."""
    (tmp_path / "a.md").write_text("# The First Document #\n\n" + "words " * 100)
    (tmp_path / "b.txt").write_text("plain words " * 60)
    words = [
        "document",
        "publish",
        tmp_path / "a.md",
        tmp_path / "b.txt",
        "--model",
        "tiny",
        "--dtype",
    ]
    words += ["float32", "--max-model-len", "4k", "--publisher", "press", "--price", "0.1"]
    done = run(*words, "--royalty", "0.25", "--json")
    first, second = json.loads(done.out)["documents"]
    assert fake_engine == [("tiny", 4_000, "float32")]
    assert (first["title"], second["title"]) == ("The First Document", "b")
    assert {first["status"], second["status"]} == {"published"}
    assert first["own_cache_read_nano_per_mtok"] == 100_000_000
    assert first["own_royalty_ppm"] == 250_000
    assert (tmp_path / "a.md").read_text().encode() == bytes(tokens_of(home, first["document_id"]))
    accounts = {
        account["id"]: account["kind"] for account in run_json("account", "list")["accounts"]
    }
    assert accounts["press"] == "publisher"
    assert "an engine's process prints what it likes" in done.err


@pytest.mark.parametrize("earner", ["alice", "provider"])
def test_an_account_of_another_kind_may_publish(run_json, tmp_path, fake_engine, earner):
    """As it may over HTTP: a buyer earns royalties, and the provider has documents of its own."""
    run_json("account", "create", "alice")
    (tmp_path / "a.txt").write_text("words " * 100)
    words = ["document", "publish", tmp_path / "a.txt", "--model", "tiny", "--publisher", earner]
    (document,) = run_json(*words)["documents"]
    assert (document["status"], document["publisher"]) == ("published", earner)


def tokens_of(home, name):
    """A document's tokens, as the catalogue has them."""
    with Market.open(home) as market:
        return market.catalogue.tokens_of(name)


def test_publishing_again_lists_nothing_new(run, run_json, tmp_path, fake_engine):
    """A document that is listed already comes back as it is."""
    (tmp_path / "a.txt").write_text("words " * 100)
    words = ["document", "publish", tmp_path / "a.txt", "--model", "tiny"]
    (first,) = run_json(*words)["documents"]
    (again,) = run_json(*words, "--title", "another title")["documents"]
    assert (again["status"], again["title"]) == ("listed already", "a")
    assert again["document_id"] == first["document_id"]
    assert "a.txt: listed already as 'a', 600 tokens" in run(*words).err


def test_a_document_that_fails_does_not_stop_the_others(run, tmp_path, fake_engine):
    """Too short for a block, too long for the context: named, and exit code 1."""
    texts = {"short": "hi", "long": "words " * 999, "good": "words " * 100}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    words = ["document", "publish", *(tmp_path / name for name in texts), "--model", "tiny"]
    done = run(*words, "--json", code=1)
    documents = json.loads(done.out)["documents"]
    assert [document["status"] for document in documents] == ["failed", "failed", "published"]
    assert "fewer than one block" in documents[0]["error"]
    assert f"{tmp_path / 'long'}: failed: " in done.err
    assert "good" in run("document", "list").out


def test_publish_reads_standard_input(run_json, monkeypatch, fake_engine):
    """- is standard input; a byte order mark is not part of the document."""
    text = "\ufeffwords from a pipe " * 20
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    (document,) = run_json("document", "publish", "-", "--model", "tiny", "--title", "A pipe")[
        "documents"
    ]
    assert (document["file"], document["title"]) == ("standard input", "A pipe")
    assert document["token_count"] == len(text.encode()) - 3


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"\xff\xfe\x00", "not text in UTF-8"), (b" \n", "is empty")],
)
def test_a_file_without_text_is_found_before_an_engine_starts(
    run, tmp_path, fake_engine, content, message
):
    """One line names the file; no engine was started for it."""
    file = tmp_path / "document"
    if content is not None:
        file.write_bytes(content)
    done = run("document", "publish", file, "--model", "tiny", code=1)
    assert message in done.err
    assert str(file) in done.err
    assert fake_engine == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module", name="vllm"), "vLLM is not installed here; pip install"),
        (RuntimeError("no\nmemory"), "the engine for tiny did not start: RuntimeError: no memory"),
        (KVMarketError("as it is"), "kvmarket: as it is"),
    ],
)
def test_an_engine_that_does_not_start_is_one_line(run, tmp_path, monkeypatch, error, message):
    """For any error of vLLM's, the user gets one line with what to do."""

    def open_llm(*_, **__):
        raise error

    fake = types.ModuleType("vllm_kvmarket.connector.offline_engine")
    fake.open_llm = open_llm
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    (tmp_path / "a").write_text("words")
    done = run("document", "publish", tmp_path / "a", "--model", "tiny", code=1)
    assert message in done.err
    assert done.err.count("\n") == 1


def test_demo_is_dispatched_with_its_options(run, monkeypatch, tmp_path):
    """`kvmarket demo` runs with the given options, and its result is the exit code."""
    seen = []
    command = replace(demo.demo, run=lambda args: seen.append(args) or 1)
    monkeypatch.setattr(demo, "demo", command)
    run("demo", "--model", "m", "--output", tmp_path, "--max-model-len", "512", code=1)
    assert (seen[0].model, seen[0].output, seen[0].max_model_len) == ("m", str(tmp_path), 512)
    assert (seen[0].home, seen[0].json) == (None, False)
