"""Texts that a document may have."""

from __future__ import annotations

import pytest

from vllm_kvmarket import NotPublishableError
from vllm_kvmarket.market import document_tokens


@pytest.mark.parametrize("text", [[1, 2, 3], b"bytes", 7])
def test_a_text_that_is_none_is_refused_with_what_to_pass(text):
    """Tokens go into token_ids; nothing of the engine is asked."""
    with pytest.raises(NotPublishableError, match=r"pass text as a str, or tokens as token_ids"):
        document_tokens.render(None, text, "text")
