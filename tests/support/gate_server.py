"""Fixtures, as a plugin of pytest: a server behind the gate, accounts, documents."""

from __future__ import annotations

import pytest
from openai import OpenAI

from tests.support.serving import DOCUMENT, TEXT, serving
from vllm_kvmarket.market import document_tokens


@pytest.fixture(scope="session")
def server(tiny, tmp_path_factory):
    home = tmp_path_factory.mktemp("gate") / "home"
    arguments = ["--enable-scale-out", "--generation-config", "vllm"]
    with serving(tiny(1), home, *arguments) as running:
        yield running


@pytest.fixture(scope="session")
def alice(server):
    return server.key("alice")


@pytest.fixture(scope="session")
def bob(server):
    return server.key("bob")


@pytest.fixture(scope="session")
def poor(server):
    return server.key("poor", funds_nano=0)


@pytest.fixture(scope="session")
def document(server):
    """A document of tokens, published as text."""
    return server.publish(DOCUMENT, "tokens")


@pytest.fixture(scope="session")
def tokenizer(tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny(1))


@pytest.fixture(scope="session")
def chat(server, tokenizer):
    """A text, published as chat: its id and its tokens."""

    class Llm:
        def get_tokenizer(self):
            return tokenizer

    tokens = document_tokens.render(Llm(), TEXT, "chat")
    return server.publish(tokens, "harbour", "chat"), tokens


@pytest.fixture(scope="session")
def documents(document, chat):
    """Both."""
    return document, chat


@pytest.fixture
def client(server, alice):
    with OpenAI(base_url=f"{server.base}/v1", api_key=alice, max_retries=0) as opened:
        yield opened
