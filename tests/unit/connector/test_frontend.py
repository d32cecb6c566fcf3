"""Offline and over HTTP, one text and one chat are published under the same tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
transformers = pytest.importorskip("transformers")

from vllm_kvmarket.connector import frontend  # noqa: E402
from vllm_kvmarket.core.errors import NotPublishableError  # noqa: E402
from vllm_kvmarket.market import document_tokens  # noqa: E402

MODEL = Path(__file__).parents[3] / ".cache" / "models" / "SmolLM2-135M-Instruct"
TEXTS = ["A licence.\n", "Call me Ishmael. Some years ago", "ends in a space ", "émigré 7", "x"]


@pytest.fixture(scope="module")
def tokenizer():
    if not MODEL.exists():
        pytest.skip("the model of `make bootstrap` is not there")
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def over_http(tokenizer, monkeypatch, tmp_path):
    """The API server's view of an engine, without an engine."""
    monkeypatch.setattr(frontend, "base_facts", lambda *_: None)
    monkeypatch.setattr(frontend, "namespace_digest", lambda _: bytes(32))
    model = SimpleNamespace(
        max_model_len=2048, get_vocab_size=lambda: 49_152, is_attention_free=False
    )
    config = SimpleNamespace(model_config=model, cache_config=SimpleNamespace(block_size=16))
    client = SimpleNamespace(vllm_config=config, get_tokenizer=lambda: tokenizer)
    return frontend.Frontend(client, SimpleNamespace(), tmp_path)


@pytest.mark.parametrize("text", TEXTS)
def test_offline_and_http_publish_the_same_tokens(tokenizer, over_http, text):
    """A text as it is, a text as chat, and the same chat given as messages."""
    llm = SimpleNamespace(get_tokenizer=lambda: tokenizer)
    assert over_http.document(text, None, "text") == document_tokens.render(llm, text, "text")
    chat = document_tokens.render(llm, text, "chat")
    assert over_http.document(text, None, "chat") == chat
    assert over_http.document(None, [{"role": "user", "content": text}], "chat") == chat
    assert chat


@pytest.mark.parametrize("question", ["What is this?", "\nwho", " a", "7"])
def test_a_chat_that_goes_on_begins_with_the_published_tokens(over_http, question):
    """Behind a text inside its message, and behind the model's answer in a new message."""
    text = "Call me Ishmael."
    published = over_http.document(text, None, "chat")
    asked = over_http.prompt(None, [{"role": "user", "content": text + question}])
    assert asked[: len(published)] == published
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "I will."}]
    published = over_http.document(None, messages, "chat")
    asked = over_http.prompt(None, [*messages, {"role": "user", "content": question}])
    assert asked[: len(published)] == published and len(published) > len(text.split())


def test_messages_without_text_are_refused(over_http):
    """There is nothing to publish."""
    with pytest.raises(NotPublishableError, match="empty"):
        over_http.document(None, [{"role": "user", "content": " "}], "chat")
