"""What is on offer, for all of a machine's processes: kept in step with database and clock."""

from __future__ import annotations

import hashlib
import logging
import struct
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import msgspec

from vllm_kvmarket.catalogue import integrity, queries
from vllm_kvmarket.catalogue.chunk_tokens import ChunkTokens
from vllm_kvmarket.catalogue.connections import Connections
from vllm_kvmarket.catalogue.first_offers import (
    CHUNKS,
    DOCUMENTS,
    REVISION,
    Asked,
    FirstOffers,
    Owned,
    Record,
    TokensOf,
    ended_by,
    fact,
    find,
    last_state,
    set_fact,
    walk,
    whole_document,
)
from vllm_kvmarket.catalogue.index_file import DamagedError, IndexFile, IndexUnavailableError
from vllm_kvmarket.catalogue.listing import ON_OFFER, Listing, Match, MatchedChunk, Segment
from vllm_kvmarket.core.database import Connection
from vllm_kvmarket.core.errors import CatalogueError
from vllm_kvmarket.core.model_identity import ROOT, keeps_states
from vllm_kvmarket.core.pricing import Tariff

# A file of another format has another name.
_FORMAT = 1
# Larger than every place in the order of first offers.
_BEHIND_ALL = 2**48
# Listings that are taken over in one step.
_AT_ONCE = 200
# How long one refresh may take, which others wait for; the thread that watches does the rest.
_AT_MOST_S = 0.5
_SAID_EVERY_S = 10.0
# Others may publish while the index is checked, and then it is checked again, so often.
_MOST_CHECKS = 20

# What is said of a file whose rows are not what was written.
UNREADABLE = (DamagedError, msgspec.DecodeError, struct.error, AssertionError)

logger = logging.getLogger(__name__)


class Index:
    """The index over what is on offer, as of the last refresh; thread-safe.

    Every process writes it, one at a time: what another has taken over is there already. Until it
    is as new as the database was when this process opened it, nothing matches. `overdue` means that
    a listing has ended and the database may not know yet. A listing that `tariff` makes dearer than
    computing comes last in the order of first offers: it must not stand before one that can be
    sold. So each tariff has its own index.
    """

    def __init__(
        self, db: Connections, folder: Path | None, identity: str, chunk_tokens: int, tariff: Tariff
    ) -> None:
        self.overdue = True
        self._db = db
        self._chunk_tokens = chunk_tokens
        self._tariff = tariff
        self._own_folder = tempfile.TemporaryDirectory() if folder is None else None
        parent = Path(self._own_folder.name) if self._own_folder else folder
        assert parent is not None
        prices = (tariff.input_nano_per_mtok, tariff.cache_read_nano_per_mtok)
        told = repr((_FORMAT, identity, chunk_tokens, prices)).encode()
        self._folder = parent / hashlib.sha256(told).hexdigest()[:32]
        self._file = IndexFile(self._folder)
        self._tokens = ChunkTokens(db)
        self._refreshing = threading.Lock()
        self._seen: int | None = None
        self._is_current = False
        self._is_damaged = False
        self._said_at_s = time.monotonic()
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads that read tokens, and let go of the file."""
        self._tokens.close()
        with self._refreshing:
            self._file.close()
        if self._own_folder is not None:
            self._own_folder.cleanup()

    # Matching

    def match(self, namespace: bytes, token_ids: Sequence[int]) -> Match | None:
        """Find the longest prefix on offer, without waiting for a database on another machine."""
        return self._match(namespace, token_ids, self._tokens.at_hand)[0]

    def match_later(self, namespace: bytes, token_ids: Sequence[int]) -> Future[Match | None]:
        """Find the longest prefix on offer; the future is done unless a chunk's tokens are read on
        another machine, and raises CatalogueError when they cannot be.
        """
        found, is_certain = self._match(namespace, token_ids, self._tokens.at_hand)
        if not is_certain:
            return self._tokens.later(
                lambda: self._match(namespace, token_ids, self._tokens.read)[0]
            )
        done: Future[Match | None] = Future()
        done.set_result(found)
        return done

    def match_anywhere(self, namespace: bytes, token_ids: Sequence[int]) -> Match | None:
        """Find what `match_later` does, and wait for it; `match` while the database is away."""
        try:
            return self.match_later(namespace, token_ids).result()
        except CatalogueError:
            return self.match(namespace, token_ids)

    def _match(
        self, namespace: bytes, token_ids: Sequence[int], tokens_of: TokensOf
    ) -> tuple[Match | None, bool]:
        """The match, and whether it is certain that there is no longer one."""
        if not self._is_current:
            return None, True
        asked = Asked(namespace, self._chunk_tokens, token_ids)
        try:
            with self._file.reading() as rows:
                owned = walk(rows, asked, tokens_of)
                end, last = (owned[-1].end, owned[-1].record) if owned else (0, None)
                if keeps_states(namespace):
                    end, last = last_state(rows, asked, owned)
                    owned = [
                        one._replace(end=min(one.end, end)) for one in owned if one.start < end
                    ]
                whole = whole_document(rows, asked.digest(end), end) if end else None
        except UNREADABLE as error:
            self._note_damage(error)
            return None, True
        except IndexUnavailableError:
            return None, True
        if last is None:
            return None, asked.unread is None
        return self._match_of(owned, last, whole, time.time()), asked.unread is None

    def _match_of(
        self, owned: list[Owned], having: Record, whole: Record | None, now_s: float
    ) -> Match | None:
        segments: list[Segment] = []
        for each in owned:
            listing, _ = each.record.decode()
            if listing.is_over(now_s):
                # It is taken out within a moment, and what it owned goes to others.
                whole, having = None, owned[len(segments) - 1].record
                break
            segments.append(Segment(listing, each.start, each.end))
        if not segments or (len(segments) < len(owned) and keeps_states(listing.namespace)):
            return None
        last = segments[-1]
        width = self._chunk_tokens
        listing, known = having.decode()
        keys, count = listing.chunk_keys, listing.token_count
        chunks = tuple(
            MatchedChunk(
                key=keys[start // width],
                parent=keys[start // width - 1] if start else ROOT,
                token_count=min(width, count - start),
                matched=min(width, last.end - start),
                known=known[start // width] if known else b"",
            )
            for start in range(0, last.end, width)
        )
        document = whole.decode()[0] if whole is not None else None
        if document is not None and document.is_over(now_s):
            document = None
        return Match(tuple(segments), last.end, chunks, document)

    def listing(self, document_id: str) -> Listing | None:
        """Return a document's listing, None when it cannot be matched."""
        if not self._is_current:
            return None
        try:
            with self._file.reading() as rows:
                record = find(rows, document_id)
                return record.decode()[0] if record is not None else None
        except UNREADABLE as error:
            self._note_damage(error)
        except IndexUnavailableError:
            pass
        return None

    def is_pinned(self, document_id: str) -> bool:
        """Say whether a document can be matched and is pinned."""
        listing = self.listing(document_id)
        return listing is not None and listing.pinned

    @property
    def documents(self) -> int:
        """How many documents can be matched."""
        with self._file.reading() as rows:
            return fact(rows, DOCUMENTS)

    @property
    def chunks(self) -> int:
        """How many different chunks can be matched."""
        with self._file.reading() as rows:
            return fact(rows, CHUNKS)

    def _note_damage(self, error: Exception) -> None:
        if not self._is_damaged:
            logger.warning("kvmarket: the index cannot be read and is made again: %r", error)
        self._is_damaged = True

    # Keeping up

    def refresh(self) -> None:
        """Bring the index up to date. See Catalogue.refresh."""
        with self._refreshing:
            try:
                self._take_over_changes()
            except UNREADABLE as error:
                self._note_damage(error)
                self._take_over_changes()

    def _take_over_changes(self) -> None:
        if self._is_damaged:
            self._file.discard()
        self._reopen_if_lost()
        now_s = time.time()
        self._drop_ended(now_s)
        with self._file.reading() as rows:
            known = fact(rows, REVISION)
        with self._db.news(self._seen) as news:
            if news is None:
                return
            seen, db = news
            if known > queries.revision(db):
                logger.warning("kvmarket: the index is newer than the database; it is made again")
                self._file.discard()
                self._reopen_if_lost()
            if self._take_over(db, now_s):
                self._seen, self._is_current = seen, True

    def _reopen_if_lost(self) -> None:
        if self._file.is_lost:
            old, self._file = self._file, IndexFile(self._folder)
            self._seen, self._is_current, self._is_damaged = None, False, False
            old.close()

    def _take_over(self, db: Connection, now_s: float) -> bool:
        """Take over the database's changes, some at a time and not for long; whether all are."""
        newest, until_s = queries.revision(db), time.monotonic() + _AT_MOST_S
        while True:
            with self._file.reading() as rows:
                since = fact(rows, REVISION)
            if since >= newest:
                return True
            if time.monotonic() > until_s:
                return False
            changes = queries.read_changes(db, since, now_s, _AT_ONCE)
            reached = changes[-1].revision if len(changes) == _AT_ONCE else newest
            with self._file.writing() as rows:
                # Another process may have been quicker.
                if fact(rows, REVISION) == since:
                    offers = FirstOffers(rows, self._chunk_tokens, self._tokens.reader(db))
                    for change in changes:
                        self._apply(offers, change, now_s)
                    set_fact(rows, REVISION, reached)
            self._say(reached, newest)

    def _say(self, reached: int, newest: int) -> None:
        if reached == newest:
            self._said_at_s = time.monotonic()
        elif time.monotonic() > self._said_at_s + _SAID_EVERY_S:
            self._said_at_s = time.monotonic()
            logger.info("kvmarket: index at change %d of %d", reached, newest)

    def _apply(self, offers: FirstOffers, change: queries.Change, now_s: float) -> None:
        listing = change.listing
        if change.chunks and change.place is not None:
            is_dear = self._tariff.terms(listing.terms).is_dearer_than_computing
            place = change.place + (_BEHIND_ALL if is_dear else 0)
            offers.put(listing, place, change.chunks, change.known)
        else:
            offers.remove(listing.document_id)
            self.overdue |= listing.state in ON_OFFER and listing.is_over(now_s)

    def _drop_ended(self, now_s: float) -> None:
        """Stop matching what has ended by now, whatever the database says."""
        with self._file.reading() as rows:
            if not ended_by(rows, now_s):
                return
        with self._file.writing() as rows:
            FirstOffers(rows, self._chunk_tokens, lambda _: None).remove_ended(now_s)
        self.overdue = True

    def check_integrity(self) -> list[str]:
        """Compare listings, chunks and index; returns what is wrong, nothing when all is well."""
        with self._refreshing:
            for _ in range(_MOST_CHECKS):
                if (found := self._problems()) is not None:
                    return found
            return ["the index is newer than the database"]

    def _problems(self) -> list[str] | None:
        """What is wrong; None when another process has taken over what came since."""
        with self._db.snapshot() as db:
            now_s = time.time()
            try:
                self._drop_ended(now_s)
                while not self._take_over(db, now_s):
                    pass
                with self._file.reading() as rows:
                    if fact(rows, REVISION) > queries.revision(db):
                        return None
                    tokens_of = self._tokens.reader(db)
                    return integrity.problems(db, rows, self._chunk_tokens, now_s, tokens_of)
            except UNREADABLE as error:
                self._note_damage(error)
                return [f"the index cannot be read and is made again: {error!r}"]
