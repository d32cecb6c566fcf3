"""Requests that reuse a published document: a buyer's, and the operator's preloading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from vllm_kvmarket.catalogue import Match
from vllm_kvmarket.connector.purchases import prompt_number
from vllm_kvmarket.connector.request_params import (
    WHY_DECLINED,
    Declined,
    Refusal,
    RequestParams,
)
from vllm_kvmarket.connector.request_state import Ended, Engine, Lookup, Reuse, is_answered
from vllm_kvmarket.market.purchase import Purchase, PurchaseState
from vllm_kvmarket.market.quote import Budget

if TYPE_CHECKING:
    from vllm.v1.request import Request


# For a request that must be reserved: what the gate answers with, by the reason of a decline.
_REFUSALS: dict[str, tuple[str, int]] = {
    "no_account": ("account_missing", 402),
    "unknown_account": ("account_unknown", 402),
    "no_funds": ("insufficient_funds", 402),
    "max_price": ("price_above_limit", 402),
    "not_on_offer": ("document_not_on_offer", 404),
    "other_tokens": ("document_mismatch", 409),
    "ledger_busy": ("ledger_unavailable", 503),
    "ledger_unavailable": ("ledger_unavailable", 503),
    "catalogue_unavailable": ("catalogue_unavailable", 503),
    "weights_changed": ("document_not_on_offer", 404),
}

WEIGHTS_CHANGED = "the model's weights were changed while the request waited"


class ReuseRequest:
    """A request that buys what it matches, or is computed in full and says why.

    Customers pay to skip computation, so vLLM's own cache must not give it away: only a request
    that may reuse what it matches has the hashes under which that cache holds published blocks. A
    request that must be reserved is not even computed: it ends with a Refusal.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        params: RequestParams | Declined,
        match: Match | None,
    ) -> None:
        self._engine = engine
        self._request = request
        self._must_reserve = params.must_reserve
        self.reuse = Reuse(request, match, grain=engine.facts.grain)
        self.purchase: Purchase | None = None
        self.declined = ""

    @classmethod
    def arrived(
        cls, engine: Engine, request: Request, params: RequestParams | Declined, match: Match | None
    ) -> Self:
        """Start to reserve the price, or decline; mutates vLLM's request."""
        self = cls(engine, request, params, match)
        computes_all = request.skip_reading_prefix_cache
        if self._must_reserve:
            # vLLM computes at once, and without asking, what does not read its cache.
            request.skip_reading_prefix_cache = False
        if isinstance(params, Declined):
            self.decline(params.message, params.reason)
        elif computes_all and (self._must_reserve or match is not None):
            self.decline("prompt_logprobs and the like compute every token", "other_tokens")
        else:
            self._buy(params)
        return self

    def _buy(self, params: RequestParams) -> None:
        match, market = self.reuse.match, self._engine.market
        if match is None:
            if self._must_reserve:
                name = params.document or "beginning with this prompt"
                self.decline(f"there is no document {name} on offer", "not_on_offer")
        elif params.account is None:
            if self._must_reserve or market.config.without_account == "recompute":
                self.decline("the request names no account", "no_account")
            else:
                share(self._engine, self.reuse)
        elif (wanted := self._affordable(params, match)) is None:
            self.decline(WHY_DECLINED["max_price"], "max_price")
        else:
            self.purchase, shared, countable = self._engine.purchases.join(
                self._request,
                params.account,
                wanted,
                params.purchase_key,
                may_go_ahead=not self._must_reserve,
            )
            self.reuse = Reuse(self._request, shared, countable, self._engine.facts.grain)
            share(self._engine, self.reuse)

    def _affordable(self, params: RequestParams, match: Match) -> Match | None:
        """The part of the match that the request buys; None: it is too dear.

        A document that is named is bought whole.
        """
        limit_nano = params.limit_nano(prompt_number(self._request.request_id) or 0)
        budget = Budget(params.max_cache_read_nano_per_mtok, limit_nano)
        most = self._request.num_prompt_tokens - 1
        market = self._engine.market
        wanted = market.affordable_part(match, budget, most)
        if params.document is not None:
            return wanted if wanted is match else None
        # Who cannot pay for a dear addition still buys what was there before.
        funds_nano = market.ledger.known_available_nano(params.account or "")
        if wanted is None or funds_nano is None:
            return wanted
        return market.affordable_part(wanted, Budget(max_price_nano=funds_nano), most) or wanted

    def decline(self, message: str, reason: str) -> None:
        """Compute the request in full, or end it where it must be reserved; mutates.

        `reason` is one of metric_definitions.DECLINED.
        """
        self.declined = message
        if self.reuse.match is not None:
            self._engine.metrics.declined(reason)
        if self._must_reserve:
            code, status = _REFUSALS.get(reason, ("request_refused", 409))
            refusal = Refusal(code, message, status)
            self._engine.refusals[self._request.request_id] = refusal
        else:
            self._engine.hashes.unshare(self._request)

    def weights_changed(self) -> None:
        """Load nothing any more; decline if nothing was reused yet. Mutates."""
        self.reuse.limit = 0
        if self.reuse.match is not None and not self.reuse.has_begun and not self.declined:
            self.decline(WEIGHTS_CHANGED, "weights_changed")

    def ready(self) -> Lookup:
        """Wait for the reservation; a refused one declines. Mutates."""
        if self.purchase is not None and not self.declined:
            self._engine.idle_time.wait_for(self.purchase)
            state = self.purchase.state()
            if state is PurchaseState.RESERVING:
                return Lookup.PENDING
            if state is PurchaseState.REFUSED:
                self.decline(self.purchase.refusal, self.purchase.refusal_reason)
                # vLLM has looked into its cache by the hashes of a buyer, and has to look again.
                return Lookup.PENDING
        if self.declined:
            # A request that must be reserved is ended at the end of this step.
            return Lookup.PENDING if self._must_reserve else Lookup.MISS
        return self.reuse.lookup()

    def finished(self, block_ids: Sequence[Sequence[int]]) -> Ended:
        """Settle what was reused for an answer, or release the reservation. Mutates."""
        charge = None
        if self.purchase is not None:
            usage = self.reuse.usage() if is_answered(self._request) else None
            charge = self._engine.purchases.leave(self._request, usage)
        self._engine.metrics.used(self.reuse.usage(), declined=bool(self.declined))
        answer = self.reuse.answer(self.declined, charge)
        pin(self._engine, self.reuse, block_ids, answer)
        return Ended(answer)


class PreloadRequest:
    """The operator's: brings a document into the paged cache, free of charge.

    Also an operator's request that could not do what it asked for, and says why.
    """

    def __init__(
        self, engine: Engine, request: Request, match: Match | None, declined: str = ""
    ) -> None:
        self._engine = engine
        self.reuse = Reuse(request, match, grain=engine.facts.grain)
        self.declined = declined
        share(engine, self.reuse)

    def weights_changed(self) -> None:
        """Load nothing any more. Mutates."""
        self.reuse.limit = 0
        if not self.reuse.has_begun:
            self._engine.hashes.unshare(self.reuse.request)

    def ready(self) -> Lookup:
        """There is nothing to wait for."""
        return self.reuse.lookup()

    def finished(self, block_ids: Sequence[Sequence[int]]) -> Ended:
        """Pin the document if it is to be pinned. Mutates."""
        answer = self.reuse.answer(self.declined)
        if self._engine.facts.has_states:
            # vLLM keeps nothing of it in its cache.
            answer["not_pinned"] = "of a model with recurrent state nothing is kept to be pinned"
        else:
            pin(self._engine, self.reuse, block_ids, answer)
        return Ended(answer)


def share(engine: Engine, reuse: Reuse) -> None:
    """Let a request and all others that reuse its match have one copy; mutates vLLM's request."""
    if (match := reuse.match) is not None:
        keys = [chunk.key for chunk in match.chunks]
        engine.hashes.share(reuse.request, match.listing.namespace, keys, match.token_count)


def pin(
    engine: Engine, reuse: Reuse, block_ids: Sequence[Sequence[int]], answer: dict[str, Any]
) -> None:
    """Pin the blocks of a document that is to be pinned and was reused whole; mutates."""
    listing = reuse.match.whole if reuse.match else None
    if listing is None or not listing.pinned:
        return
    # The last token of a prompt is computed, also of one that is just the document.
    if 0 < reuse.reused >= listing.token_count - engine.facts.grain:
        if len(block_ids) == 1:
            reason = engine.pins.pin(listing.document_id, listing.token_count, block_ids[0])
        else:
            reason = "this model keeps several kinds of KV cache, which cannot be pinned yet"
        if reason:
            answer["not_pinned"] = reason
        else:
            block_tokens = engine.facts.block_tokens
            answer["pinned_tokens"] = listing.token_count // block_tokens * block_tokens
            engine.metrics.pinned(engine.pins.block_count)
