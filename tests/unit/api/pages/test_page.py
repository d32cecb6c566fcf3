"""What forms send, decoded."""

from __future__ import annotations

from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvmarket.api.pages import page

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)


@given(st.dictionaries(TEXTS, TEXTS, max_size=page.MOST_FIELDS), st.integers(3, 40))
def test_a_form_is_decoded_in_pieces_as_it_was_encoded(fields, size):
    """No piece ends inside an escape."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(page, "PIECE_BYTES", size)
        assert page._fields(urlencode(fields).encode()) == fields


@pytest.mark.parametrize(
    "body",
    [
        b"a=1&a=2",
        b"a=%ff",
        "a=ä".encode(),
        b"&".join(b"f%d=" % number for number in range(page.MOST_FIELDS + 1)),
    ],
    ids=["twice", "no UTF-8", "not encoded", "too many"],
)
def test_what_no_form_of_ours_sends_is_refused(body):
    """A field that is there twice would mean two things."""
    with pytest.raises(ValueError, match=r"form|decode"):
        page._fields(body)
