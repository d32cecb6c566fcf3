"""Requests that wait until the database has said what it knows of them.

Only where documents are beyond the prefix tree in memory; see View.match_later.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_kvmarket.catalogue import Catalogue, Match
from vllm_kvmarket.connector import request_params as wishes

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class Lookup:
    """A request's match that is under way, and what is needed to go on with the request."""

    wish: wishes.Wish
    namespace: bytes
    future: Future[Match | None]

    @property
    def is_operators(self) -> bool:
        """Whether this is the operator's work, and no purchase."""
        return isinstance(self.wish, wishes.RequestParams) and self.wish.is_operators

    def match(self) -> tuple[Match | None, bool]:
        """What was found, and whether the database could be asked. The future must be done."""
        if self.future.exception() is not None:
            return None, False
        return self.future.result(), True


class Lookups:
    """Every lookup of one engine that is under way; used by the scheduler's thread only."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._under_way: dict[str, Lookup] = {}

    def begin(
        self,
        request: Request,
        wish: wishes.Wish,
        namespace: bytes,
        match: Match | None,
    ) -> bool:
        """Start to look a request up if the database may know better than `match`; whether it
        does. Mutates.
        """
        tokens = request.prompt_token_ids
        assert tokens is not None
        if (
            not self._catalogue.is_beyond_memory
            or (match is not None and match.is_final(len(tokens)))
            # Nothing is reused for these, and vLLM does not let them wait either.
            or request.skip_reading_prefix_cache
            or (isinstance(wish, wishes.RequestParams) and wish.audit is not None)
        ):
            return False
        future = self._catalogue.match_later(namespace, tokens)
        self._under_way[request.request_id] = Lookup(wish, namespace, future)
        return True

    def of(self, request_id: str) -> Lookup | None:
        """A request's lookup, also one that is done, until it is ended."""
        return self._under_way.get(request_id)

    def end(self, request_id: str) -> None:
        """Forget a request's lookup; mutates."""
        lookup = self._under_way.pop(request_id, None)
        if lookup is not None:
            lookup.future.cancel()
