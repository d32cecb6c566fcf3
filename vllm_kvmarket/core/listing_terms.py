"""The terms on which a publisher puts a document on offer.

One value carries them from a command, a page or the API through the engine into the catalogue, a
bundle and the bucket. A new field needs a column in catalogue/schema.py, and nothing in between.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from vllm_kvmarket.core.pricing import Price, Share

MAX_TITLE_CHARACTERS = 4096
MAX_PUBLISHER_CHARACTERS = 128
YEAR_9999_S = 253_402_300_799

Form = Literal["text", "chat"]


class ListingTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A price or royalty that is None follows the tariff; without `expires_at_s`, no end."""

    title: Annotated[str, msgspec.Meta(max_length=MAX_TITLE_CHARACTERS)] = ""
    # The account that earns the royalty.
    publisher: Annotated[str, msgspec.Meta(max_length=MAX_PUBLISHER_CHARACTERS)] = "publisher"
    # How the text became tokens: as it is, or as the first message of a chat.
    rendered_as: Form = "text"
    cache_read_nano_per_mtok: Price | None = None
    royalty_ppm: Share | None = None
    expires_at_s: Annotated[float, msgspec.Meta(ge=0, le=YEAR_9999_S)] | None = None
