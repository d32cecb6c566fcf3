"""Bodies of requests and answers: amounts are integers in nano-units, times seconds of the
epoch.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, Self, TypeVar, get_args, get_origin

import msgspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    create_model,
    model_validator,
)

from vllm_kvmarket.auth.api_keys import Scope
from vllm_kvmarket.auth.operator_tokens import ACCOUNT_PATTERN
from vllm_kvmarket.catalogue import ListingState
from vllm_kvmarket.core.listing_terms import Form
from vllm_kvmarket.core.pricing import INT64_MAX, PPM
from vllm_kvmarket.ledger import Receipt, Transfer
from vllm_kvmarket.ledger.statements import Statement

MAX_TITLE = 512
MAX_TTL_S = 10 * 366 * 86_400
WHOLE_ACCOUNT = f"^{ACCOUNT_PATTERN}$"
DOCUMENT_PATTERN = r"^kvd_[0-9A-Za-z_-]{1,128}$"
# No line breaks or other control characters: titles stand in tables and logs.
_PLAIN = r"^[^\x00-\x1f\x7f]*$"

Title = Annotated[str, StringConstraints(strict=True, max_length=MAX_TITLE, pattern=_PLAIN)]
AccountId = Annotated[str, StringConstraints(strict=True, pattern=WHOLE_ACCOUNT)]
DocumentId = Annotated[str, StringConstraints(strict=True, pattern=DOCUMENT_PATTERN)]
Text = Annotated[str, StringConstraints(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
Nano = Annotated[int, Field(strict=True, ge=0, le=INT64_MAX)]
Ppm = Annotated[int, Field(strict=True, ge=0, le=PPM)]
Ttl = Annotated[float, Field(strict=True, gt=0, le=MAX_TTL_S, allow_inf_nan=False)]
Sort = Literal["age", "reuse", "price"]


class Body(BaseModel):
    """A client's body. Unknown fields are refused, so a misspelt field is not ignored."""

    model_config = ConfigDict(extra="forbid")


class ErrorInfo(BaseModel):
    """An error in OpenAI's shape; `code` is a word for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorInfo


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """A page of a list; `next_cursor` is the next one's `after`, null on the last page."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    next_cursor: str | None

    @classmethod
    def of(cls, data: list[Item], next_cursor: str | None = None) -> Self:
        """A page with these items."""
        return cls(data=data, has_more=next_cursor is not None, next_cursor=next_cursor)


class Message(Body):
    """A chat message of text."""

    role: Annotated[str, StringConstraints(strict=True, pattern=r"^[a-z_]{1,32}$")]
    content: Text


Messages = Annotated[list[Message], Field(min_length=1, max_length=1000)]


def _one_of(*fields: str) -> ConfigDict:
    """OpenAPI's description of what _check_one checks: exactly one field is not null."""
    each: list[Any] = [
        {"required": [field], "properties": {field: {"not": {"type": "null"}}}} for field in fields
    ]
    return ConfigDict(extra="forbid", json_schema_extra={"oneOf": each})


def _check_one(given: dict[str, Any], what: str) -> None:
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"{what}: give one of {', '.join(given)}")


class NewDocument(Body):
    """A document to publish: one of `text`, `messages` and `token_ids`.

    `text` is rendered `as` plain text or as the first message of a chat; messages are a chat's
    beginning. `publisher` is for admins; others publish on their own account.
    """

    model_config = _one_of("text", "messages", "token_ids")

    title: Title = ""
    text: Text | None = None
    messages: Messages | None = None
    token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    as_: Annotated[Form | None, Field(alias="as")] = None
    publisher: AccountId | None = None
    cache_read_nano_per_mtok: Nano | None = None
    royalty_ppm: Ppm | None = None
    ttl_s: Ttl | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {"text": self.text, "messages": self.messages, "token_ids": self.token_ids}
        _check_one(given, "the document")
        if self.messages is not None and self.as_ == "text":
            raise ValueError("messages are published as chat; leave `as` out")
        return self


class DocumentChange(Body):
    """New terms. A field that is left out stays; null means the tariff's price, or no end.

    Running requests are charged at the terms that held when they came.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})

    cache_read_nano_per_mtok: Nano | None = None
    ttl_s: Ttl | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"nothing to change: give {', '.join(type(self).model_fields)}")
        return self


class Prices(BaseModel):
    """Per million tokens, in nano-units; the royalty is a share of cache_read in millionths."""

    currency: str
    input_nano_per_mtok: int
    cache_read_nano_per_mtok: int
    royalty_ppm: int


class Reuse(BaseModel):
    """The reuse of a document so far; `earned_nano` is the provider's part of the revenue."""

    count: int
    tokens_saved: int
    earned_nano: int
    last_used_at: float | None


class AuditState(BaseModel):
    """The last comparison of stored chunks with computed ones."""

    result: Literal["exact", "close", "different", "unread"]
    at: float
    chunks: int
    worst_difference: float


class Document(BaseModel):
    """A published document.

    Reusing it as a whole costs `charge_nano`, computing it `recompute_nano`. After
    `break_even_reuses` its buyers have saved more than computing it once costs. After
    `paid_back_after_reuses` its publisher has earned what storing it costs. Null: never.
    """

    id: str
    object: Literal["kvmarket.document"] = "kvmarket.document"
    title: str
    publisher: str
    state: ListingState
    reason: str
    rendered_as: Form
    created_at: float
    expires_at: float | None
    pinned: bool
    tokens: int
    chunks: int
    stored_bytes: int
    namespace: str
    prices: Prices
    charge_nano: int
    recompute_nano: int
    write_nano: int
    reuse: Reuse
    break_even_reuses: int | None
    paid_back_after_reuses: int | None
    audit: AuditState | None


class Deleted(BaseModel):
    """A document that is off the market."""

    id: str
    object: Literal["kvmarket.document.deleted"] = "kvmarket.document.deleted"
    deleted: Literal[True] = True


class Preloaded(BaseModel):
    """A document that is in the paged cache of the engine that was asked.

    `loaded_tokens` of its tokens were not there before. A document that is pinned stays there with
    its `pinned_tokens`, or `not_pinned` says why not.
    """

    id: str
    object: Literal["kvmarket.document.preloaded"] = "kvmarket.document.preloaded"
    reused_tokens: int
    loaded_tokens: int
    pinned_tokens: int
    not_pinned: str | None


class QuoteWish(Body):
    """A prompt to price: one of `prompt`, `messages`, `token_ids` and `document`."""

    model_config = _one_of("prompt", "messages", "token_ids", "document")

    prompt: Text | None = None
    messages: Messages | None = None
    token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    document: DocumentId | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_one(self.model_dump(), "the quote")
        return self


class QuoteLine(BaseModel):
    """The price of tokens `start` to `end`, which this document was the first to offer."""

    document: str
    title: str
    publisher: str
    start: int
    end: int
    cache_read_nano_per_mtok: int
    charge_nano: int


class Quote(BaseModel):
    """What a prompt would cost, of the tokens that go in.

    `with_reuse_nano` = `charge_nano` for the matched tokens + the input price of the others. No
    reservation: prices hold until they are changed. `affordable` is null without a key. `declined`
    says why nothing would be reused now, whatever matches; null otherwise.
    """

    object: Literal["kvmarket.quote"] = "kvmarket.quote"
    prompt_tokens: int
    matched_tokens: int
    document: str | None
    title: str | None
    publisher: str | None
    prices: Prices
    lines: list[QuoteLine]
    charge_nano: int
    with_reuse_nano: int
    without_reuse_nano: int
    saving_nano: int
    affordable: bool | None
    declined: str | None = None


class NewAccount(Body):
    """An account to open."""

    id: AccountId
    kind: Literal["buyer", "publisher"] = "buyer"


class AccountModel(BaseModel):
    """An account; available = balance - what reservations hold.

    `debt_nano` is owed for sales that were booked after the funds were spent.
    """

    id: str
    object: Literal["kvmarket.account"] = "kvmarket.account"
    kind: str
    currency: str
    balance_nano: int
    reserved_nano: int
    available_nano: int
    debt_nano: int


class Me(AccountModel):
    """The caller's account, and the scopes of its key."""

    scopes: list[Scope]


class Limits(Body):
    """The limits of a key; null or no network means no limit.

    With `consents`, the key's requests buy reuse without asking for it, up to the price
    `max_cache_read_nano_per_mtok` (null: the provider's own tariff).
    """

    expires_at_s: Annotated[float, Field(ge=0)] | None = None
    day_budget_nano: Nano | None = None
    total_budget_nano: Nano | None = None
    consents: bool = True
    max_cache_read_nano_per_mtok: Nano | None = None
    networks: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=64)] = []


class NewKey(Body):
    """The scopes of a key on its account, and its limits; the label is for people."""

    scopes: Annotated[list[Scope], Field(min_length=1, max_length=4)]
    label: Annotated[str, StringConstraints(strict=True, max_length=128, pattern=_PLAIN)] = ""
    limits: Limits = Limits()


class Key(BaseModel):
    """A new key; its `secret` is in no later answer."""

    id: str
    object: Literal["kvmarket.key"] = "kvmarket.key"
    account: str
    scopes: list[Scope]
    label: str
    secret: str


class KeyFacts(BaseModel):
    """A key without its secret; `last_used_at` may be half a minute old."""

    id: str
    object: Literal["kvmarket.key"] = "kvmarket.key"
    account: str
    scopes: list[Scope]
    label: str
    limits: Limits
    created_at: float
    revoked_at: float | None
    last_used_at: float | None
    spent_today_nano: int
    spent_nano: int


class NewDeposit(Body):
    """Money that came in; a repeated `transfer_id` books nothing again."""

    amount_nano: Annotated[int, Field(strict=True, ge=1, le=INT64_MAX)]
    transfer_id: AccountId


def model_of(struct: type[msgspec.Struct], name: str, **more: Any) -> type[BaseModel]:
    """A model with the fields of one of our structs, so that a field has one definition.

    `more` are further fields as pydantic's create_model takes them; None leaves a field out.
    """
    fields: dict[str, Any] = {
        field.name: (_model_type(field.type), ...) for field in msgspec.structs.fields(struct)
    }
    fields = {key: value for key, value in {**fields, **more}.items() if value is not None}
    return create_model(name, __doc__=struct.__doc__, **fields)


def _model_type(kind: Any) -> Any:
    """The type of a struct's field, with models in the place of structs in a list."""
    inner = get_args(kind)[:1]
    if get_origin(kind) in (list, tuple) and issubclass(inner[0], msgspec.Struct):
        return list.__class_getitem__(model_of(inner[0], f"{inner[0].__name__}Model"))
    return kind


def page_of(item: type[BaseModel]) -> type[BaseModel]:
    """The model of a page of such items."""
    return Page[item]  # type: ignore[valid-type]


_SIGNED = {"object": (Literal["kvmarket.receipt"], "kvmarket.receipt")}
ReceiptModel = model_of(Receipt, "ReceiptModel", **_SIGNED)
# With its signed form: a JWS; see `kvmarket receipt verify` and /jwks.
SignedReceiptModel = model_of(
    Receipt, "SignedReceiptModel", **_SIGNED, signed=(dict[str, Any] | None, ...)
)
StatementModel = model_of(
    Statement, "StatementModel", object=(Literal["kvmarket.statement"], "kvmarket.statement")
)
TransferModel = model_of(
    Transfer,
    "TransferModel",
    object=(Literal["kvmarket.transfer"], "kvmarket.transfer"),
    timeout_s=None,
    created_at_s=None,
    created_at=(float, ...),
)
