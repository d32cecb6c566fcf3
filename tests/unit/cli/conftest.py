"""A market without a model: documents that are listed directly, and an engine that is none."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.purchases import reserve
from vllm_kvmarket import cli
from vllm_kvmarket.catalogue import Listing
from vllm_kvmarket.cli import engine
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.listing_terms import ListingTerms
from vllm_kvmarket.core.model_identity import ROOT, pack_tokens
from vllm_kvmarket.core.pricing import NANO
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.market.purchase import Usage
from vllm_kvmarket.store import ChunkLayout, LayerLayout

NAMESPACE = bytes(range(32))
LAYOUT = ChunkLayout("012/test-tokens", "uint8", 16, (LayerLayout("layer", (1, 16, 4), 64),))


def list_document(market, tokens, publisher="publisher", **fields):
    """Store and list a document as the connector would, without a model."""
    width = market.config.chunk_tokens
    document = DocumentChunks.of(NAMESPACE, tokens, width)
    keys, name = document.keys, document.document_id
    terms = ListingTerms(**{"title": "a title", "publisher": publisher, **fields})
    if market.catalogue.begin(Listing.of(document, terms), document).state != "live":
        stored = 0
        for number, key in enumerate(keys):
            part = tokens[number * width : (number + 1) * width]
            pages = np.full(LAYOUT.page_count(len(part)) * 64, number, dtype=np.uint8)
            stored += market.store.put(
                key=key,
                parent=keys[number - 1] if number else ROOT,
                namespace=NAMESPACE,
                tokens=pack_tokens(part),
                layout=LAYOUT,
                layers=[[pages]],
            )
        market.catalogue.commit(name, stored)
    return market.catalogue.get(name)


class FakeEngine:
    """As much of a vllm.LLM on a market as publishing asks for: a byte is a token."""

    def __init__(self, market):
        self.market = market
        model = SimpleNamespace(max_model_len=2000, is_attention_free=False)
        facts = SimpleNamespace(cache_config=SimpleNamespace(block_size=16), model_config=model)
        self.llm_engine = SimpleNamespace(vllm_config=facts, engine_core=SimpleNamespace())

    def get_tokenizer(self):
        return lambda text: {"input_ids": list(text.encode())}

    def get_default_sampling_params(self):
        return SimpleNamespace()

    def generate(self, prompts, sampling, use_tqdm):
        os.write(1, b"an engine's process prints what it likes\n")
        wish = sampling.extra_args["kv_transfer_params"]["kvmarket"]["publish"]["terms"]
        listing = list_document(self.market, prompts[0]["prompt_token_ids"], **wish)
        answer = {"kvmarket": {"document_id": listing.document_id}}
        return [SimpleNamespace(kv_transfer_params=answer)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMARKET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def run(home, capfd):
    def run(*argv, code=0):
        got = cli.main([str(word) for word in argv])
        out, err = capfd.readouterr()
        assert got == code, err
        return SimpleNamespace(out=out, err=err)

    return run


@pytest.fixture
def run_json(run):
    return lambda *argv, code=0: json.loads(run(*argv, "--json", code=code).out)


@pytest.fixture(name="list_document")
def list_document_fixture():
    return list_document


@pytest.fixture
def sold(home):
    """A market with one document of 600 tokens, which alice reused once."""
    tokens = list(range(600))
    with Market.open(home) as market:
        market.create_account("publisher", "publisher")
        market.create_account("alice")
        market.deposit("alice", NANO, "d1")
        listing = list_document(market, tokens, title="The Licence")
        match = market.match(NAMESPACE, tokens)
        purchase = reserve(
            market, key="p1", request_id="r1", account="alice", match=match, model="tiny"
        )
        purchase._reservation.result()
        assert purchase.state().value == "reserved"
        purchase.settle(Usage(600, 600, 600, 0, 0, 10, 5))
    return listing


@pytest.fixture
def fake_engine(monkeypatch):
    opened = []

    def open_engine(model, market, max_model_len, dtype):
        opened.append((model, max_model_len, dtype))
        return FakeEngine(market)

    monkeypatch.setattr(engine, "open_engine", open_engine)
    return opened


@pytest.fixture
def program():
    """The installed program, as a user has it on PATH."""
    return Path(sys.executable).with_name("kvmarket")
