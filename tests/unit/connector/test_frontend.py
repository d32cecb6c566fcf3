"""Offline and over HTTP, one text and one chat are published under the same tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
transformers = pytest.importorskip("transformers")

from vllm_kvmarket.connector import frontend  # noqa: E402
from vllm_kvmarket.connector.weight_changes import NAMESPACE  # noqa: E402
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


class Engines:
    """What several engine cores say of their namespace, each time that they are asked."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def call_utility_all_async(self, method):
        assert method == NAMESPACE
        answer = self.answers.pop(0)
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


MINE = bytes(32).hex()


@pytest.mark.parametrize(
    ("answer", "reuses"),
    [
        ([MINE], True),
        ([MINE, MINE], True),
        ([MINE, None], False),
        ([None], False),
        # Other weights were loaded, and their files were digested.
        (["11" * 32], False),
        (RuntimeError("the engine has died"), False),
    ],
)
def test_reuse_is_promised_only_where_every_engine_has_said_so(over_http, answer, reuses):
    """Each engine tests itself."""
    over_http._engine.engine_core = Engines(answer)
    assert asyncio.run(over_http.reuses()) is reuses


def test_engines_are_asked_again_beside_quotes(over_http, monkeypatch):
    """A quote waits only while nothing good is known, and not for long."""
    monkeypatch.setattr(frontend, "PATIENCE_S", 0.02)
    monkeypatch.setattr(frontend, "KNOWN_S", 0.0)

    async def ask():
        engines = over_http._engine.engine_core = Engines(0.2, [MINE], 0.2, [None], [None])
        assert not await over_http.reuses()  # the self-test is running
        assert engines.answers == [[MINE], 0.2, [None], [None]]
        await over_http._asking
        assert await over_http.reuses()  # as of a moment ago
        await asyncio.sleep(0)
        assert engines.answers == [[None], [None]]
        assert await over_http.reuses()
        await over_http._asking
        assert not await over_http.reuses()

    asyncio.run(ask())


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
