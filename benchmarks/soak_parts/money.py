"""Whether every answer was charged once, for what it reused, and nothing else was."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from typing import Any

from benchmarks.soak_parts.plan import BLOCK_TOKENS, Asked, Story
from benchmarks.soak_parts.server import Soaked
from vllm_kvmarket.core.errors import KVMarketError
from vllm_kvmarket.core.pricing import MTOK, PPM
from vllm_kvmarket.ledger import PROVIDER, Receipt, Transfer
from vllm_kvmarket.market.market import Market
from vllm_kvmarket.proofs import TransparencyLog, signed_receipt, verify, verify_checkpoint

HOLDS_END_WITHIN_S = 45.0
PROVEN = 40


def wait_for_holds(market: Market, story: Story) -> None:
    """Wait until nothing is reserved any more; what stays is a problem."""
    deadline = time.monotonic() + HOLDS_END_WITHIN_S
    while time.monotonic() < deadline:
        held = {a.id: a.debits_pending for a in market.ledger.accounts() if a.debits_pending}
        if not held:
            return
        time.sleep(0.2)
    story.fail(f"still reserved {HOLDS_END_WITHIN_S:.0f} s after the last request: {held}")


def audit(server: Soaked, story: Story) -> dict[str, Any]:
    """Hold requests, receipts, transfers and balances against each other; the report's part."""
    market = server.market
    receipts = market.ledger.receipts()
    transfers = market.ledger.transfers()
    by_request: dict[str, list[Receipt]] = defaultdict(list)
    for receipt in receipts:
        by_request[receipt.request_id].append(receipt)
    asked = {each.receipt_request_id: each for each in story.asked}
    for receipt in receipts:
        check_receipt(receipt, asked.get(receipt.request_id), story)
    for each in story.asked:
        check_request(each, by_request[each.receipt_request_id], story)
    for problem in market.ledger.check_integrity():
        story.fail(f"ledger: {problem}")
    totals = _check_sums(market, receipts, transfers, story)
    proven = _check_proofs(market, receipts, story)
    return {
        "receipts": len(receipts),
        "transfers": len(transfers),
        **totals,
        **proven,
        "answers_charged": sum(1 for each in story.asked if by_request[each.receipt_request_id]),
        "left_and_charged": sum(
            1
            for each in story.asked
            if each.outcome == "left" and by_request[each.receipt_request_id]
        ),
    }


def check_receipt(receipt: Receipt, asked: Asked | None, story: Story) -> None:
    """A receipt is of a request that was sent; its lines are the sale, at prices on offer."""
    what = f"receipt {receipt.id} of {receipt.request_id}"
    if asked is None:
        story.fail(f"{what}: nobody asked that")
        return
    if asked.account != receipt.account:
        story.fail(f"{what}: {receipt.account} pays for {asked.account}")
    if asked.account in (None, "dave") or asked.reuse == "never":
        story.fail(f"{what}: {asked.account}, reuse {asked.reuse}, must not be charged")
    _check_lines(receipt, what, story)
    if asked.max_price_nano is not None and receipt.charge_nano > asked.max_price_nano:
        story.fail(f"{what}: charged {receipt.charge_nano}, at most {asked.max_price_nano} allowed")
    # The rest the account's own requests had left in the paged cache.
    if asked.prompt and receipt.tokens_reused + receipt.tokens_computed > len(asked.prompt):
        story.fail(f"{what}: more reused and computed tokens than the prompt's {len(asked.prompt)}")


def _check_lines(receipt: Receipt, what: str, story: Story) -> None:
    """The lines follow each other and add up to the receipt; each was on offer at its price."""
    covered = 0
    for line in receipt.lines:
        price, tokens = line.cache_read_nano_per_mtok, line.end - line.start
        if price not in story.prices.get(line.document_id, set()):
            story.fail(f"{what}: {line.document_id} was never offered at {price}")
        if line.charge_nano != tokens * price // MTOK:
            story.fail(f"{what}: {line.charge_nano} is not {tokens} x {price}")
        if line.royalty_nano != line.charge_nano * line.royalty_ppm // PPM:
            story.fail(f"{what}: the royalty {line.royalty_nano} is not its share")
        if line.start != covered:
            story.fail(f"{what}: a line begins at {line.start}, the one before ends at {covered}")
        covered = line.end
    if covered != receipt.tokens_reused:
        story.fail(f"{what}: its lines end at {covered}, reused are {receipt.tokens_reused}")
    for name in ("charge_nano", "royalty_nano"):
        total = sum(getattr(line, name) for line in receipt.lines)
        if getattr(receipt, name) != total:
            story.fail(f"{what}: {name} {getattr(receipt, name)}, its lines say {total}")


def check_request(asked: Asked, found: list[Receipt], story: Story) -> None:
    """A request has the receipt that its answer names, and one at most."""
    what = f"request {asked.id} ({asked.shape}, {asked.outcome})"
    # What was on offer may have changed between a request and its retry: then that is another sale.
    sales = {(receipt.document_id, receipt.tokens_matched) for receipt in found}
    most = len(sales) if asked.shape == "sent twice" else 1
    if len(found) > most:
        story.fail(f"{what}: charged {len(found)} times")
    if asked.outcome == "refused" and found:
        story.fail(f"{what}: was refused, and charged")
    if asked.outcome == "left":
        _check_left(asked, found, story)
    if asked.outcome != "answered":
        return
    charged_by = _check_stream if asked.streamed else _check_answer
    charged = charged_by(asked, found, what, story)
    _check_usage(asked, charged, sum(receipt.tokens_failed for receipt in found), story)


def _check_stream(asked: Asked, found: list[Receipt], what: str, story: Story) -> int:
    """Compare the stream's last event with its receipts; returns how many tokens were charged."""
    named = {each["id"] for each in asked.receipts}
    booked = {receipt.id for receipt in found}
    if named and named != booked:
        story.fail(f"{what}: the stream names {named}, the ledger of {booked}")
    # The event waits for the ledger's commit for a moment only.
    story.counts["streams without their receipt"] += bool(booked and not named)
    return sum(receipt.tokens_reused for receipt in found)


def _check_answer(asked: Asked, found: list[Receipt], what: str, story: Story) -> int:
    """Compare an answer's charge with its receipt; returns how many tokens were charged."""
    charge, receipt_id = asked.sold.get("charge_nano", 0), asked.sold.get("receipt_id")
    receipt = next((each for each in found if each.id == receipt_id), None)
    if receipt_id is None and charge:
        story.fail(f"{what}: says {charge}, and names no receipt")
    if receipt_id is not None and receipt is None:
        story.fail(f"{what}: its receipt {receipt_id} is not in the ledger")
    if receipt_id is None and found and asked.shape != "sent twice":
        story.fail(f"{what}: says that it was not charged, and was")
    # The answer to a retry names the receipt of the first one, which has paid.
    retried = asked.shape == "sent twice" and charge == 0
    if receipt is not None and receipt.charge_nano != charge and not retried:
        story.fail(f"{what}: says {charge}, charged {receipt.charge_nano}")
    return receipt.tokens_reused if receipt is not None else 0


def _check_left(asked: Asked, found: list[Receipt], story: Story) -> None:
    """A client that leaves before a whole answer pays nothing, unless the answer was complete."""
    for receipt in found:
        if not asked.streamed and receipt.tokens_output < asked.max_tokens:
            story.fail(
                f"request {asked.id} ({asked.shape}): charged, though its client left after "
                f"{receipt.tokens_output} of {asked.max_tokens} tokens"
            )


def _check_usage(asked: Asked, charged: int, failed: int, story: Story) -> None:
    """The usage's cached tokens are those that were charged, where any were.

    Beside them only whole blocks of what the same account asked before may have been cached, also
    where it wants no reuse.
    """
    if asked.shape in ("several choices", "sent twice") or asked.cached is None:
        return
    what = f"request {asked.id} ({asked.shape})"
    if charged == asked.cached:
        story.counts["usage: as charged" if charged else "usage: nothing reused"] += 1
    elif asked.cached < charged:
        story.fail(f"{what}: {charged} tokens charged, its usage says {asked.cached}")
    elif failed:
        story.fail(f"{what}: {charged} charged, {failed} failed, its usage says {asked.cached}")
    elif asked.account is None:
        story.fail(f"{what}: {asked.cached} tokens had for nothing")
    elif asked.cached % BLOCK_TOKENS:
        story.fail(f"{what}: {asked.cached} tokens reused, {charged} charged")
    else:
        story.counts["usage: blocks of an account's own"] += 1


def _check_sums(
    market: Market, receipts: list[Receipt], transfers: list[Transfer], story: Story
) -> dict[str, int]:
    """Charges = income + royalties; each account paid and earned what its receipts say."""
    pending = {each.id: each for each in transfers if each.kind == "pending"}
    posts = [each for each in transfers if each.kind in ("post", "late")]
    ended: dict[str, int] = defaultdict(int)
    for each in transfers:
        ended[each.pending_id] += each.kind in ("post", "void", "expire")
    for held in pending:
        if ended[held] != 1:
            story.fail(f"hold {held} was ended {ended[held]} times")
    charges = sum(receipt.charge_nano for receipt in receipts)
    royalties = sum(receipt.royalty_nano for receipt in receipts)
    writes = [post for post in posts if pending[post.pending_id].code == "publish"]
    written = sum(post.amount_nano for post in writes)
    for account in market.ledger.accounts():
        spent = sum(r.charge_nano for r in receipts if r.account == account.id)
        spent += sum(post.amount_nano for post in writes if post.debit == account.id)
        if account.kind in ("buyer", "publisher") and account.debits_posted != spent:
            story.fail(f"{account.id} paid {account.debits_posted}, its receipts say {spent}")
        lines = [line for receipt in receipts for line in receipt.lines]
        earned = sum(line.royalty_nano for line in lines if line.publisher == account.id)
        deposits = sum(
            t.amount_nano for t in transfers if t.credit == account.id and t.code == "deposit"
        )
        if account.kind == "publisher" and account.credits_posted != earned + deposits:
            story.fail(f"{account.id} earned {account.credits_posted}, receipts say {earned}")
    provider = market.ledger.account(PROVIDER)
    if provider.balance_nano != charges + written - royalties:
        story.fail(f"income {provider.balance_nano} is not {charges} + {written} - {royalties}")
    totals = market.ledger.totals()
    for currency, (debits, credits) in totals.items():
        if debits != credits:
            story.fail(f"debits {debits} differ from credits {credits} in {currency}")
    stored: dict[str, int] = defaultdict(int)
    for post in writes:
        stored[pending[post.pending_id].user_data] += 1
    for document, times in stored.items():
        if times > story.accepted[document]:
            story.fail(
                f"{document}: storing charged {times} times, asked {story.accepted[document]}"
            )
    expired = sum(1 for each in transfers if each.kind == "expire")
    return {
        "charges_nano": charges,
        "royalties_nano": royalties,
        "publishing_nano": written,
        "income_nano": provider.balance_nano,
        "debits_nano": sum(debits for debits, _ in totals.values()),
        "credits_nano": sum(credits for _, credits in totals.values()),
        "publishings_charged": len(writes),
        "holds": len(pending),
        "holds_expired": expired,
        "holds_renewed": sum(1 for each in transfers if each.kind == "renew"),
    }


def _check_proofs(market: Market, receipts: list[Receipt], story: Story) -> dict[str, int]:
    """Checkpoints that were signed on the way lead to the log of now; receipts' proofs hold."""
    log = TransparencyLog.of(market)
    keys = market.signing_keys.public_keys()
    rng = random.Random(0)
    proven = consistent = 0
    try:
        size = log.checkpoint().size
        for note in story.checkpoints:
            old = verify_checkpoint(note, keys)
            log.prove_consistency(old.size, size).verify(keys)
            consistent += 1
        for receipt in rng.sample(receipts, min(PROVEN, len(receipts))):
            verify(signed_receipt(market, receipt.id).jws, keys)
            for transfer in receipt.transfer_ids:
                log.prove(transfer).verify(keys)
                proven += 1
    except KVMarketError as error:
        story.fail(f"log: {error}")
    return {"transfers_proven": proven, "checkpoints_consistent": consistent, "log_size": size}
