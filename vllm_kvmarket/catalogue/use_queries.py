"""Statements on the uses of listings, what eviction makes of them, and audits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import astuple, replace
from math import inf, isnan

from vllm_kvmarket.catalogue.eviction_policy import Candidate, recompute_tokens, reused
from vllm_kvmarket.catalogue.listing import NEEDED, Audit, Usage, Use
from vllm_kvmarket.catalogue.queries import rows
from vllm_kvmarket.core.database import Connection

# What is known of a document's uses: when it was published, and a row of listing_use.
_COLUMNS = "created_at_s, uses, tokens_reused, earned_nano, score, last_used_s, first_used_s"
# How often, tokens, earnings, score, and the times of the last use and the first.
_Known = tuple[int, int, int, float, float, float]


def note_uses(db: Connection, uses: Iterable[Use]) -> None:
    """Add uses to what is known of their documents; those of unknown documents are ignored."""
    by_document: dict[str, list[Use]] = defaultdict(list)
    for use in uses:
        by_document[use.document_id].append(use)
    for document_id, fresh in by_document.items():
        found = _known_of(db, document_id)
        if found is None:
            continue
        token_count, (count, tokens, earned_nano, score, at_s, first_s) = found
        whole = recompute_tokens(token_count)
        for use in fresh:
            count, tokens, earned_nano = (
                count + 1,
                tokens + use.tokens,
                earned_nano + use.earned_nano,
            )
            share = min(1.0, recompute_tokens(use.tokens) / whole)
            score, at_s = reused(score, at_s, share, use.at_s)
        _write(db, document_id, (count, tokens, earned_nano, score, at_s, first_s))


def remember_uses(db: Connection, document_id: str) -> None:
    """Keep what is known of a document that goes, for the day when it is published again."""
    if (found := _known_of(db, document_id)) is not None:
        _write(db, document_id, found[1])


def _known_of(db: Connection, document_id: str) -> tuple[int, _Known] | None:
    """A document's tokens, and what is known of its uses; None for no document."""
    statement = (
        f"SELECT token_count, {_COLUMNS} FROM listing LEFT JOIN listing_use USING (document_id) "  # noqa: S608  # ours
        "WHERE document_id = ?"
    )
    for token_count, created_at_s, *known in rows(db, statement, (document_id,)):
        return token_count, _usage(created_at_s, known)
    return None


def _write(db: Connection, document_id: str, usage: _Known) -> None:
    db.execute(
        "INSERT INTO listing_use (document_id, uses, tokens_reused, earned_nano, "
        "score, last_used_s, first_used_s) VALUES (?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (document_id) DO UPDATE SET uses = excluded.uses, "
        "tokens_reused = excluded.tokens_reused, earned_nano = excluded.earned_nano, "
        "score = excluded.score, last_used_s = excluded.last_used_s, "
        "first_used_s = excluded.first_used_s",
        (document_id, *usage),
    )


def _usage(created_at_s: float, known: list[int | float | None]) -> _Known:
    """Complete a row of listing_use: publishing counts as a reuse of the whole document.

    Or what was published last would be the first to go.
    """
    uses, tokens, earned_nano, score, last_used_s, first_used_s = known
    if last_used_s is None:
        return 0, 0, 0, 1.0, created_at_s, created_at_s
    score, at_s = float(score or 0.0), last_used_s
    if created_at_s > at_s:
        score, at_s = reused(score, at_s, 1.0, created_at_s)
    first_s = min(at_s, created_at_s if first_used_s is None else first_used_s)
    return int(uses or 0), int(tokens or 0), int(earned_nano or 0), score, at_s, first_s


def usage_of(db: Connection, document_id: str) -> Usage | None:
    """Return what is known of a document's uses, None for no document."""
    found = _known_of(db, document_id)
    return None if found is None else Usage(*found[1][:-1])


def candidates(db: Connection) -> list[Candidate]:
    """Return every document on offer as the eviction policies see it.

    The bytes of a chunk are estimated: its tokens at what the document of its namespace that wrote
    most wrote for a token. Which go first depends on their ratio only.
    """
    held: dict[str, list[tuple[bytes, int]]] = defaultdict(list)
    holders: Counter[bytes] = Counter()
    fixed: set[bytes] = set()
    # All chunks but a document's last have the same length: theirs need not be looked up.
    statement = (
        "SELECT document_id, state, key, CASE WHEN token_count < (position + 1) * chunk_tokens "  # noqa: S608  # only question marks are put in
        "THEN token_count - position * chunk_tokens ELSE chunk_tokens END "
        "FROM listing JOIN listing_chunk USING (document_id), catalogue "
        f"WHERE state IN ({', '.join('?' * len(NEEDED))})"
    )
    for document_id, state, key, tokens in db.execute(statement, NEEDED):
        if state == "publishing":
            fixed.add(key)
        else:
            held[document_id].append((key, tokens))
            holders[key] += 1
    rates = _bytes_per_token(db)
    statement = (
        f"SELECT document_id, namespace, token_count, pinned, paid_for, {_COLUMNS} "  # noqa: S608  # ours
        "FROM listing LEFT JOIN listing_use USING (document_id) "
        "WHERE state IN ('live', 'damaged') ORDER BY document_id"
    )
    made = []
    for document_id, namespace, token_count, pinned, paid_for, created_at_s, *known in rows(
        db, statement
    ):
        uses, _, earned_nano, score, last_used_s, first_used_s = _usage(created_at_s, known)
        rate = rates.get(namespace, 0.0)
        chunks = [(key, tokens) for key, tokens in held[document_id] if key not in fixed]
        made.append(
            Candidate(
                document_id=document_id,
                bytes=round(rate * sum(tokens for key, tokens in chunks if holders[key] == 1)),
                tokens=token_count,
                score=score,
                last_used_s=last_used_s,
                first_used_s=first_used_s,
                earned_nano=earned_nano,
                uses=uses,
                pinned=bool(pinned),
                paid_for=bool(paid_for),
                shared=tuple(
                    (key, round(rate * tokens)) for key, tokens in chunks if holders[key] > 1
                ),
            )
        )
    return made


def _bytes_per_token(db: Connection) -> dict[bytes, float]:
    statement = (
        "SELECT namespace, token_count, stored_bytes FROM (SELECT namespace, token_count, "
        "stored_bytes, row_number() OVER (PARTITION BY namespace "
        "ORDER BY stored_bytes DESC, document_id) AS place FROM listing) AS line WHERE place = 1"
    )
    return {
        namespace: stored_bytes / token_count
        for namespace, token_count, stored_bytes in rows(db, statement)
    }


def record_audit(db: Connection, audit: Audit) -> None:
    """Keep an audit's result."""
    worst = inf if isnan(audit.worst_difference) else audit.worst_difference
    db.execute(
        "INSERT INTO audit (document_id, at_s, engine, chunks, result, worst_difference, detail) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        # SQLite has no NaN, which is as different as values can be.
        astuple(replace(audit, worst_difference=worst)),
    )


def audits_of(db: Connection, document_id: str) -> list[Audit]:
    """Return a document's audits, newest first."""
    statement = (
        "SELECT document_id, at_s, engine, chunks, result, worst_difference, detail FROM audit "
        "WHERE document_id = ? ORDER BY at_s DESC, id DESC"
    )
    return [Audit(*row) for row in rows(db, statement, (document_id,))]
