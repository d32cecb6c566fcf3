"""The market: the one facade over catalogue, ledger and store.

The same class serves publishers and researchers beside an offline engine, the command line, and the
scheduler half of the connector inside the engine.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import msgspec

from vllm_kvmarket.auth.operator_tokens import Credentials
from vllm_kvmarket.auth.sealed_secret import SealedSecret, secrets_key
from vllm_kvmarket.auth.shared_keys import SharedKeys
from vllm_kvmarket.auth.signing_keys import SigningKeys, TrustedKeys
from vllm_kvmarket.catalogue import INDEX_FOLDER, Audit, Catalogue, Listing, Match, Use
from vllm_kvmarket.core.config import MarketConfig, load, to_mapping
from vllm_kvmarket.core.document_chunks import DocumentChunks
from vllm_kvmarket.core.errors import (
    ChunkDamagedError,
    ChunkMissingError,
    ConfigError,
    LedgerUnavailableError,
    NotFoundError,
    StoreFullError,
)
from vllm_kvmarket.core.model_identity import keeps_states
from vllm_kvmarket.core.stored_share import StoredShare
from vllm_kvmarket.ledger import Account, Ledger, Receipt, Transfer
from vllm_kvmarket.market import engine_operations
from vllm_kvmarket.market.bucket_identity import BucketIdentity
from vllm_kvmarket.market.engine_operations import CONNECTOR, POLL_S
from vllm_kvmarket.market.eviction import make_room
from vllm_kvmarket.market.garbage_collection import release_refuted
from vllm_kvmarket.market.publishers import ensure_account, limits_of
from vllm_kvmarket.market.purchase import Item, Purchase
from vllm_kvmarket.market.quote import (
    NO_LIMIT,
    Budget,
    Quote,
    affordable_part,
    quote_of,
    sold_part,
)
from vllm_kvmarket.store.chunk_format import Share
from vllm_kvmarket.store.tiers import store_of

DATABASE_FILE = "market.sqlite"
OUTBOX_FOLDER = "outbox"


def _credentials(config: MarketConfig, home: Path) -> Credentials:
    """Open the operator's secret: in the database where it has a key for it, else in the home."""
    if config.database_url is not None:
        key = secrets_key(config.secrets_key_file)
        if key is not None:
            return Credentials(SealedSecret(config.database_url, key))
    return Credentials.of_home(home)


class Market:
    """One market home: open it, publish, buy, look at the money, close it.

    Several markets on one home, in one process or several, see the same listings and accounts.
    """

    def __init__(self, config: MarketConfig) -> None:
        self.config = config
        self.home = Path(config.home).expanduser()
        # What all rooms open: the path of a SQLite file, or PostgreSQL's URL.
        self.database = config.database_url or self.home / DATABASE_FILE
        with contextlib.ExitStack() as opened:
            self.credentials = _credentials(config, self.home)
            opened.callback(self.credentials.close)
            shared = None if config.database_url is None else SharedKeys(config.database_url)
            if shared is not None:
                opened.callback(shared.close)
            self.signing_keys = SigningKeys(self.home, shared)
            self.trusted_keys = TrustedKeys(self.home, shared)
            self.ledger = Ledger.open(
                config.ledger_url or self.database,
                outbox=self.home / OUTBOX_FOLDER,
                reservation_patience_s=config.reservation_patience_s,
            )
            opened.callback(self.ledger.close)
            self.catalogue = Catalogue.open(
                self.database,
                chunk_tokens=config.chunk_tokens,
                index_folder=Path(config.index_folder or self.home / INDEX_FOLDER).expanduser(),
                tariff=config.tariff,
            )
            opened.callback(self.catalogue.close)
            self.store = store_of(msgspec.structs.replace(config, home=str(self.home)))
            opened.callback(self.store.close)
            self.identity = BucketIdentity(self.store, self.catalogue)
            self.identity.check_configuration()
            self._opened = opened.pop_all()
        # Catalogue writes wait for the disk; one thread keeps them off the scheduler and in order.
        self._clerk = ThreadPoolExecutor(1, thread_name_prefix="kvmarket-clerk")
        self._uses: deque[Use] = deque()

    @classmethod
    def open(
        cls,
        home: str | Path | None = None,
        config: MarketConfig | Mapping[str, Any] | str | Path | None = None,
    ) -> Self:
        """Open the market at `home` (else the config's home), making it where there is none.

        Raises ConfigError for a bad configuration.
        """
        chosen = load(config)
        if home is not None:
            chosen = msgspec.structs.replace(chosen, home=str(home))
        return cls(chosen)

    def close(self) -> None:
        """Finish what is under way and release the database."""
        if self._uses:
            self.flush_uses()
        self._clerk.shutdown(wait=True)
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What an operator does with an offline engine, a vllm.LLM that was started on this market

    publish = engine_operations.publish
    republish = engine_operations.republish
    wait_for_listing = engine_operations.wait_for_listing
    preload = engine_operations.preload
    pin = engine_operations.pin
    unpin = engine_operations.unpin
    audit = engine_operations.audit

    # Settings for an engine and its requests

    def transfer_config(self, **overrides: Any) -> dict[str, Any]:
        """The `kv_transfer_config` of an engine on this market: LLM(kv_transfer_config=...).

        `overrides` are keys of the market's configuration, or `kv_load_failure_policy`. Raises
        ConfigError for unknown keys and for the policy "fail".
        """
        policy = overrides.pop("kv_load_failure_policy", "recompute")
        if policy != "recompute":
            raise ConfigError(
                f"kv_load_failure_policy {policy!r} would fail a request for a damaged chunk; "
                'leave it out, or say "recompute"'
            )
        merged = load({**to_mapping(self.config), "home": str(self.home), **overrides})
        return {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": to_mapping(merged),
        }

    def params(self, account: str | None = None) -> dict[str, Any]:
        """What a request that buys on `account` carries: SamplingParams(extra_args=...).

        An engine that trusts its requests takes them at any time. Over HTTP the same object's
        `kv_transfer_params` goes into the body: its token lets anyone buy on the account for a
        minute.
        """
        wish: dict[str, Any] = {}
        if account is not None:
            wish = self.credentials.sign_params({"account": account})
        return {"kv_transfer_params": {CONNECTOR: wish}}

    # Taking off the market

    def delist(self, document_id: str) -> None:
        """Take a document off the market at once; `kvmarket store gc` frees its space.

        Raises NotFoundError.
        """
        self.catalogue.delist(document_id)

    # Money

    def create_account(self, account: str, kind: str = "buyer") -> Account:
        """Open an account; an existing one of the same kind is returned. Raises LedgerError."""
        return self.ledger.create_account(account, kind)

    def deposit(self, account: str, amount_nano: int, transfer_id: str) -> Transfer:
        """Bring money in from the outside world, once for a transfer id: the payment's, at a bank.

        Raises LedgerError. When the outcome is unknown, repeat it with the same id.
        """
        try:
            return self.ledger.deposit(account, amount_nano, transfer_id)
        except LedgerUnavailableError as error:
            raise LedgerUnavailableError(
                f"{error}; repeat the deposit with the id {transfer_id!r}, so that it is made once"
            ) from error

    def receipts(self, account: str | None = None, limit: int | None = None) -> list[Receipt]:
        """Receipts, newest first, of one buyer or of all."""
        return self.ledger.receipts(account=account, limit=limit)

    def receipt(self, receipt_id: str, timeout_s: float = 5.0) -> Receipt:
        """A receipt by its id. An engine answers a moment before the ledger's commit, so one that
        is not there yet is waited for. Raises NotFoundError.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.ledger.receipt(receipt_id)
            except NotFoundError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)

    def match(
        self, namespace: bytes, token_ids: Sequence[int], *, named: bool = False
    ) -> Match | None:
        """The longest published prefix that is sold; see sold_part.

        It may wait for a database on another machine.
        """
        found = self.catalogue.match_anywhere(namespace, token_ids)
        return self.sold_part(found, named=named) if found is not None else None

    def quote(
        self,
        namespace: bytes,
        token_ids: Sequence[int],
        *,
        most: int | None = None,
        named: bool = False,
        budget: Budget = NO_LIMIT,
    ) -> Quote:
        """Price the reuse of what is published of a prompt, of at most `most` tokens of it.

        `named`: the tokens are those of a document that the buyer has named, and wants whole.
        Without it, only what the engine sells under the buyer's `budget` is priced. May wait for
        the database, as `match`.
        """
        if most is not None and keeps_states(namespace):
            token_ids = token_ids[:most]
        match = self.match(namespace, token_ids, named=named)
        if match is not None and not named:
            match = self.affordable_part(match, budget, most)
        return self.quote_match(match, most)

    # For the scheduler half: nothing here waits for disk or database

    def quote_match(self, match: Match | None, most: int | None = None) -> Quote:
        """Price a match that is sold; see quote_of."""
        return quote_of(match, self.config.tariff, most)

    def sold_part(self, match: Match, *, named: bool = False) -> Match | None:
        """The part of a match that is sold, with the listings that are paid; None for nothing.

        A buyer who has `named` the document wants all of it, also what is short.
        """
        return sold_part(match, self.config.tariff, 1 if named else self.config.min_reuse_tokens)

    def affordable_part(
        self, match: Match, budget: Budget, most: int | None = None
    ) -> Match | None:
        """The part of a match that a buyer can pay; see quote.affordable_part."""
        return affordable_part(match, self.config.tariff, budget, most)

    def is_worth_loading(self, match: Match) -> bool:
        """Whether loading a match saves more than it costs."""
        return match.token_count >= self.config.min_reuse_tokens

    def reserve(
        self,
        item: Item,
        *,
        key: str,
        account: str,
        shared: bool = False,
        may_go_ahead: bool = False,
    ) -> Purchase:
        """Start to reserve the most that `item` can cost; `key` makes the ledger's ids.

        `shared`: other requests may reserve under the same key at the same time. `may_go_ahead`:
        where the account's last known funds cover it amply, it counts as reserved at once.
        """
        return Purchase(
            self.ledger,
            item,
            key=key,
            account=account,
            timeout_s=self.config.reservation_timeout_s,
            shared=shared,
            may_go_ahead=may_go_ahead,
        )

    def begin_listing(
        self, listing: Listing, document: DocumentChunks, needed_bytes: int = 0
    ) -> Future[Listing]:
        """Note that a document is being published, and make room for the bytes that it needs.

        The future raises what Catalogue.begin raises, and LedgerError when its publisher has no
        account and gets none: nothing goes on offer whose royalty has nowhere to go.
        """
        return self._clerk.submit(self._begin_listing, listing, document, needed_bytes)

    def _begin_listing(
        self, listing: Listing, document: DocumentChunks, needed_bytes: int
    ) -> Listing:
        self.store.disk.check_reserve(listing.document_id)
        self.identity.confirm()
        release_refuted(self, document.keys)
        publisher = listing.terms.publisher
        ensure_account(self.ledger, publisher)
        limits = limits_of(self.config, publisher)
        begun = self.catalogue.begin(listing, document, limits, needed_bytes)
        if begun.state == "publishing" and needed_bytes:
            free = make_room(self, needed_bytes, {listing.document_id})
            if free < needed_bytes and self.config.object_store_quota_bytes is not None:
                reason = (
                    f"no space for {needed_bytes} bytes in the object store, of whose quota {free} "
                    "are free; raise object_store_quota_bytes, or delist documents"
                )
                self.catalogue.fail(listing.document_id, reason)
                raise StoreFullError(reason)
        return begun

    def commit_listing(
        self,
        document_id: str,
        stored_bytes: int,
        stored_keys: Sequence[bytes],
        shares: Sequence[StoredShare] = (),
    ) -> Future[None]:
        """Put a document on offer: every chunk of it is durable, `stored_keys` seen just now.

        `shares` describe what is stored of them.
        """
        commit = self._commit_listing
        return self._clerk.submit(commit, document_id, stored_bytes, stored_keys, shares)

    def _commit_listing(
        self,
        document_id: str,
        stored_bytes: int,
        stored_keys: Sequence[bytes],
        shares: Sequence[StoredShare],
    ) -> None:
        self.catalogue.shares.note(shares)
        self.catalogue.heal(*stored_keys)
        if self.catalogue.get(document_id).state == "publishing":
            self.catalogue.commit(document_id, stored_bytes)

    def fail_listing(
        self, document_id: str, reason: str, shares: Sequence[StoredShare] = ()
    ) -> Future[None]:
        """Note that publishing ended without a listing; `shares` describe what it has stored."""
        return self._clerk.submit(self._fail_listing, document_id, reason, shares)

    def _fail_listing(self, document_id: str, reason: str, shares: Sequence[StoredShare]) -> None:
        self.catalogue.shares.note(shares)
        self.catalogue.fail(document_id, reason)

    def report_damage(self, key: bytes) -> Future[None]:
        """A stored chunk could not be loaded: if it cannot be read here either, it is not sold
        until it is stored again.
        """
        return self._clerk.submit(self._report_damage, key)

    def _report_damage(self, key: bytes) -> None:
        # Whoever reported it may have bad memory, or it was stored again since. And without the
        # object store that was added meanwhile, this process knows of its disk only.
        if self.catalogue.store_record.is_current():
            self.identity.confirm()
            try:
                self.verify(key)
            except (ChunkDamagedError, ChunkMissingError):
                self.catalogue.report_damage(key)

    def verify(self, key: bytes) -> None:
        """Check every byte of every share of a chunk. Raises as Tiers.verify."""
        stored = self.catalogue.shares.of([key])
        self.store.verify(key, [Share(each.rank, each.world_size, each.layout) for each in stored])

    def note_use(self, use: Use) -> None:
        """Remember a reuse for the eviction policy; written with others, soon."""
        self._uses.append(use)

    def flush_uses(self) -> Future[None]:
        """Write the uses noted since the last time."""
        uses = [self._uses.popleft() for _ in range(len(self._uses))]
        return self._clerk.submit(self.catalogue.note_uses, uses)

    def record_audit(self, audit: Audit, refuted: Sequence[bytes] = ()) -> Future[None]:
        """Keep an audit's result with its listing; chunks that are `refuted` are sold no more, and
        the next publication replaces them.
        """
        return self._clerk.submit(self._record_audit, audit, refuted)

    def _record_audit(self, audit: Audit, refuted: Sequence[bytes]) -> None:
        # First: who sees the audit must not buy what it refutes.
        if refuted:
            self.catalogue.refute(refuted)
        self.catalogue.record_audit(audit)
