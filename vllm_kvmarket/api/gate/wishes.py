"""The request field `kvmarket`: what a client may ask of the market."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from vllm_kvmarket.api.gate.refusals import bad
from vllm_kvmarket.connector.request_params import Reason

FIELD = "kvmarket"


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`document` goes in front of the prompt. `reuse`: computed where it cannot be reused; refused
    then; or always computed. `max_price_nano` is the most that this request's reuse may cost,
    also when the engine reserves it.
    """

    document: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    reuse: Literal["prefer", "require", "never"] = "prefer"
    max_price_nano: Annotated[int, msgspec.Meta(ge=0)] | None = None

    @property
    def reason(self) -> Reason:
        """Why there is no reuse, when this wish is why."""
        return "never" if self.reuse == "never" else "max_price"

    @property
    def needs_quote(self) -> bool:
        """Whether the prompt must be matched before it may be let through."""
        return self.reuse == "require" or (
            self.reuse == "prefer" and self.max_price_nano is not None
        )


def read(value: Any) -> Wish:
    """The wish in a body's field. Raises Refusal."""
    if value is None:
        return Wish()
    try:
        wish = msgspec.convert(value, Wish)
    except msgspec.ValidationError as error:
        raise bad(f"{FIELD}: {error}", param=FIELD) from None
    if wish.document is not None and wish.reuse == "never":
        raise bad(
            'a document is reused: leave "reuse": "never" away, or send its text', param=FIELD
        )
    return wish
