"""The market's configuration: one frozen object, the same keys in JSON, TOML and Python."""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import parse_qs, urlsplit

import msgspec

from vllm_kvmarket.core.errors import ConfigError
from vllm_kvmarket.core.pricing import Tariff

# Names of obstore's options whose value lets its reader in; `..._key_id` and `..._file` do not.
_SECRET_OPTION = re.compile(r"(?i)secret|password|token$|_key(_base64)?$")

HOME_VARIABLE = "KVMARKET_HOME"
MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 16, 4096
MOST_CHUNKS_BETWEEN_STATES = 1 << 16


def default_home() -> str:
    """Return $KVMARKET_HOME, else `kvmarket` in the user's XDG data directory."""
    chosen = os.environ.get(HOME_VARIABLE)
    if chosen:
        return chosen
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return str(Path(data).expanduser() / "kvmarket")


class MarketConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that an operator can set; `describe` lists the meanings."""

    home: Annotated[
        str,
        msgspec.Meta(
            min_length=1,
            description="folder of the market's database and chunks; "
            "$KVMARKET_HOME, else `kvmarket` in the user's data directory",
        ),
    ] = msgspec.field(default_factory=default_home)
    chunk_tokens: Annotated[
        int,
        msgspec.Meta(
            ge=MIN_CHUNK_TOKENS,
            le=MAX_CHUNK_TOKENS,
            description="tokens of a chunk; a power of two, and a multiple of the block size",
        ),
    ] = 256
    state_every_tokens: Annotated[
        Annotated[int, msgspec.Meta(ge=MIN_CHUNK_TOKENS)] | None,
        msgspec.Meta(
            description="where in a document the state of a model with recurrent layers is stored: "
            "after each so many tokens, a multiple of `chunk_tokens`, and at the end; "
            "null: at the end only. Engines share documents where this is the same"
        ),
    ] = None
    tariff: Annotated[Tariff, msgspec.Meta(description="prices")] = Tariff()
    without_account: Annotated[
        Literal["recompute", "free"],
        msgspec.Meta(
            description="what a request that names no account gets: everything computed, "
            "or reuse without a charge"
        ),
    ] = "recompute"
    anonymous: Annotated[
        Literal["allow", "refuse"],
        msgspec.Meta(
            description="HTTP requests without a key: answered with everything computed, "
            "or refused (401)"
        ),
    ] = "allow"
    unfunded: Annotated[
        Literal["recompute", "refuse"],
        msgspec.Meta(
            description="HTTP requests of an account that cannot pay for what they match: "
            "computed, or refused (402)"
        ),
    ] = "recompute"
    max_body_bytes: Annotated[
        int,
        msgspec.Meta(
            ge=1024,
            description="largest body of an HTTP request, in bytes; images need more, and large "
            "bodies slow other requests down",
        ),
    ] = 4 << 20
    trusted_proxies: Annotated[
        list[str],
        msgspec.Meta(
            description="networks of proxies, for example `10.0.0.0/8`, whose X-Forwarded-For "
            "names the sender of a request; wrong keys and anonymous requests are counted by sender"
        ),
    ] = []
    metrics_money: Annotated[
        bool,
        msgspec.Meta(
            description="whether /metrics shows balances, charges and royalties to everyone; "
            "an admin's key always sees them"
        ),
    ] = False
    trust_requests: Annotated[
        bool | None,
        msgspec.Meta(
            description="whether a request may name an account, publish and preload without a "
            "token; null: yes in the offline API, no under `vllm serve`"
        ),
    ] = None
    model_settings: Annotated[
        str | None,
        msgspec.Meta(
            description="leave it out: kvmarket's own digest of the settings that decide the "
            "values of the KV cache, overwritten at each start of an engine"
        ),
    ] = None
    self_test: Annotated[
        Literal["once", "always"],
        msgspec.Meta(
            description="when an engine tests whether reuse gives the same answers as computing: "
            "once for a model, a device, these settings and versions, or at each start"
        ),
    ] = "once"
    min_reuse_tokens: Annotated[
        int, msgspec.Meta(ge=1, description="a match shorter than this is neither sold nor loaded")
    ] = 64
    database_url: Annotated[
        str | None,
        msgspec.Meta(
            description="where listings, uses, audits and the ledger are stored: "
            "`postgresql://user@host/name` for one market on several machines, which needs an "
            "object store; the password is in the file that PGPASSFILE names; null: in the home"
        ),
    ] = None
    secrets_key_file: Annotated[
        str | None,
        msgspec.Meta(
            description="with `database_url`: file with 64 hexadecimal digits, the key under "
            "which the operator's secret is in the database; null: the environment's "
            "KVMARKET_SECRETS_KEY. Without a key each home has a secret of its own"
        ),
    ] = None
    ledger_url: Annotated[
        str | None,
        msgspec.Meta(
            description="another place for accounts and transfers, as `database_url`, which "
            "several markets may share; null: where the listings are"
        ),
    ] = None
    reservation_timeout_s: Annotated[
        int,
        msgspec.Meta(ge=1, le=86_400, description="a reservation older than this expires"),
    ] = 900
    reservation_patience_s: Annotated[
        float,
        msgspec.Meta(
            ge=0.05,
            le=60,
            description="longest wait of a request for its reservation, in seconds; then its "
            "tokens are computed instead of sold",
        ),
    ] = 1.0
    io_threads: Annotated[
        int,
        msgspec.Meta(ge=1, le=64, description="threads of a worker for loading and storing"),
    ] = 2
    codec: Annotated[
        Literal["raw", "zstd-exponent"],
        msgspec.Meta(
            description="how chunks are stored: `raw` loads fastest from memory and fast disks; "
            "`zstd-exponent`, lossless, needs a third less space in bfloat16, for slow disks"
        ),
    ] = "raw"
    host_cache_bytes: Annotated[
        int,
        msgspec.Meta(
            ge=0, description="bytes of host memory that each worker uses for its most used chunks"
        ),
    ] = 1 << 30
    disk_quota_bytes: Annotated[
        Annotated[int, msgspec.Meta(ge=0)] | None,
        msgspec.Meta(description="largest size of the chunks folder, in bytes; null: no limit"),
    ] = None
    disk_reserve_bytes: Annotated[
        int,
        msgspec.Meta(
            ge=0,
            description="bytes of the home's device that stay free of chunks and new documents: "
            "the ledger must always be able to book a sale",
        ),
    ] = 1 << 28
    publisher_max_documents: Annotated[
        Annotated[int, msgspec.Meta(ge=1)] | None,
        msgspec.Meta(
            description="most documents of a publisher that are on offer or being published; "
            "null: no limit"
        ),
    ] = 10_000
    publisher_max_bytes: Annotated[
        Annotated[int, msgspec.Meta(ge=0)] | None,
        msgspec.Meta(description="most bytes of a publisher's documents; null: no limit"),
    ] = 1 << 38
    publisher_max_queued: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            description="most documents of a publisher that wait to be published, in "
            "each API server process",
        ),
    ] = 16
    quarantine_bytes: Annotated[
        int,
        msgspec.Meta(ge=0, description="most bytes of damaged chunks that are kept for inspection"),
    ] = 1 << 30
    eviction: Annotated[
        Literal["value", "lru"],
        msgspec.Meta(
            description="which documents are evicted first at the quota: those of least value "
            "(recompute cost x recent reuse, per byte), or the least recently used"
        ),
    ] = "value"
    pin_budget: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=0.9,
            description="largest part of the paged cache for pinned documents",
        ),
    ] = 0.5
    object_store_url: Annotated[
        str | None,
        msgspec.Meta(
            description="an object store for all chunks, with the disk as a bounded cache: "
            "`s3://bucket/prefix`, `gs://`, `az://`, `file:///`; null: the disk alone"
        ),
    ] = None
    object_store_options: Annotated[
        dict[str, str],
        msgspec.Meta(
            description="options of the object store by obstore's names, for example `endpoint`, "
            "`region`, `allow_http`; give credentials by the environment"
        ),
    ] = msgspec.field(default_factory=dict)
    object_store_quota_bytes: Annotated[
        Annotated[int, msgspec.Meta(ge=0)] | None,
        msgspec.Meta(
            description="most bytes of documents in the object store; beyond, documents are "
            "evicted; null: no limit"
        ),
    ] = None
    object_store_timeout_s: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=300,
            description="longest wait of a load for the object store, or for a disk that has "
            "stalled; then its tokens are computed instead",
        ),
    ] = 10.0
    retention_s: Annotated[
        Annotated[int, msgspec.Meta(ge=0)] | None,
        msgspec.Meta(
            description="seconds after which the tokens of a document that was delisted, expired "
            "or failed are removed from database and disk; null: they are kept. "
            "docs/DEPLOYMENT.md says what remains"
        ),
    ] = None
    refresh_interval_s: Annotated[
        float,
        msgspec.Meta(
            gt=0, le=60, description="how often an engine looks for other processes' listings"
        ),
    ] = 0.25
    index_folder: Annotated[
        str | None,
        msgspec.Meta(
            description="where this machine keeps its index of what is on offer, which is made "
            "again when it is lost; on a local disk; null: in the home"
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.chunk_tokens & (self.chunk_tokens - 1):
            raise ConfigError(f"chunk_tokens: expected a power of two, not {self.chunk_tokens}")
        between, rest = divmod(self.state_every_tokens or 0, self.chunk_tokens)
        if rest or between >= MOST_CHUNKS_BETWEEN_STATES:
            raise ConfigError(
                f"state_every_tokens: expected a multiple of chunk_tokens, {self.chunk_tokens}, "
                f"below {MOST_CHUNKS_BETWEEN_STATES * self.chunk_tokens}, not "
                f"{self.state_every_tokens}"
            )
        for network in self.trusted_proxies:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                raise ConfigError(
                    f"trusted_proxies: expected addresses or networks, not {network!r}"
                ) from None
        for key, url in (("database_url", self.database_url), ("ledger_url", self.ledger_url)):
            if url is not None and _has_password(url):
                # vLLM logs its configuration, and `ps` shows it.
                raise ConfigError(
                    f"{key}: a password in it would be logged; leave it out, and put it into the "
                    "file that the environment's PGPASSFILE names (default: ~/.pgpass)"
                )
        if self.database_url is not None:
            self._check_database()
        if secret := next(filter(_SECRET_OPTION.search, self.object_store_options), None):
            raise ConfigError(
                f"object_store_options: {secret!r} in it would be logged; leave it out, and give "
                "credentials by the environment, for example AWS_SECRET_ACCESS_KEY"
            )

    def _check_database(self) -> None:
        if self.object_store_url is None:
            raise ConfigError(
                "database_url: machines that share listings must share their chunks; set "
                "object_store_url too, or give ledger_url alone"
            )


def _has_password(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return True  # in doubt, it is not shown
    given = parts.password is not None or "password" in parse_qs(parts.query)
    # libpq also takes "host=... password=..." instead of a URL.
    return given or re.search(r"\bpassword\s*=", url) is not None


def load(source: MarketConfig | Mapping[str, Any] | str | Path | None = None) -> MarketConfig:
    """Read a configuration: a mapping, a JSON object, or the path of a .json or .toml file.

    None gives the defaults. A MarketConfig is checked too, as its constructor checks no types.
    Raises ConfigError, in one line that names the key.
    """
    mapping = to_mapping(source) if isinstance(source, MarketConfig) else _read(source)
    try:
        return msgspec.convert(mapping, MarketConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), mapping)) from None


def _read(source: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any]:
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return source
    text = str(source)
    if isinstance(source, str) and text.lstrip().startswith(("{", "[")):
        return _parse_json(text, "the configuration")
    path = Path(text).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"cannot read the configuration {text!r} ({reason}); "
            "give a JSON object, or the path of a .json or .toml file"
        ) from None
    if path.suffix == ".toml":
        try:
            return tomllib.loads(content)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return _parse_json(content, str(path))


def _parse_json(text: str, where: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{where} must be a JSON object, not {_shown(parsed)}")
    return parsed


def _explain(message: str, mapping: Mapping[str, Any]) -> str:
    """Rewrite msgspec's message: the key first, then the expected and the given value."""
    place = re.search(r" - at `(?:key in )?\$\.?([^`]*)`$", message)
    # A value inside an object is shown as the whole object.
    inside = re.sub(r"\[[^\]]*\]$", "", place.group(1)) if place else ""
    text = message[: place.start()] if place else message
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", text)
    if unknown:
        return _explain_unknown(f"{inside}.{unknown.group(1)}" if inside else unknown.group(1))
    kinds = {key: kind for key, kind, *_ in describe()}
    limit = re.search(r" ([<>]=? \S+)$", text)
    if "of length" in text:
        expected = "a text that is not empty"
    elif limit:
        expected = f"{kinds[inside].removesuffix(' or null')} {limit.group(1)}"
    else:
        expected = kinds.get(inside, "an object")
    given = _shown(_value(mapping, inside))
    return f"{inside or 'configuration'}: expected {expected}, not {given}"


def _explain_unknown(key: str) -> str:
    known = [name for name, *_ in describe()]
    near = difflib.get_close_matches(key, known, 1)
    # A key of the tariff that is written beside it is near to no full name.
    near = near or [name for name in known if name.rpartition(".")[2] == key]
    near = near or difflib.get_close_matches(key, {name.partition(".")[0] for name in known}, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown configuration key {key!r}; {hint}"


def _value(mapping: Any, key: str) -> Any:
    for part in filter(None, key.split(".")):
        mapping = mapping[part]
    return mapping


def _shown(value: Any) -> str:
    """Show a value as JSON has it, in one line of bounded length."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_mapping(config: MarketConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON values; `load` gives an equal object back."""
    mapping: dict[str, Any] = msgspec.to_builtins(config)
    return mapping


def describe() -> list[tuple[str, str, str, str]]:
    """List every key with its type, default (JSON, "" for a computed one) and meaning."""
    return list(_describe(MarketConfig, ""))


def _describe(struct: type[msgspec.Struct], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for field in msgspec.structs.fields(struct):
        annotated, *metas = get_args(field.type)
        if isinstance(annotated, type) and issubclass(annotated, msgspec.Struct):
            yield from _describe(annotated, f"{prefix}{field.name}.")
            continue
        meaning = " ".join(meta.description for meta in metas if meta.description)
        default = "" if field.default is msgspec.NODEFAULT else json.dumps(field.default)
        yield f"{prefix}{field.name}", _kind(annotated), default, meaning


_KINDS = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
    NoneType: "null",
}


def _kind(annotated: Any) -> str:
    """Name a field's type in the words of JSON."""
    origin, inner = get_origin(annotated), get_args(annotated)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_kind(option) for option in inner)
    return _KINDS[origin or annotated]
