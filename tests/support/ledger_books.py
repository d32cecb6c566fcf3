"""Shared by the ledger's tests: books in memory, a funded ledger, batches, a receipt."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from vllm_kvmarket.ledger import Account, Ledger, Receipt, Transfer, pending
from vllm_kvmarket.ledger.integrity import problems
from vllm_kvmarket.ledger.ledger import storage_of
from vllm_kvmarket.ledger.rules import ENDS, apply
from vllm_kvmarket.ledger.storage import Batch, Everything, NumberedReceipt, apply_group, wanted
from vllm_kvmarket.ledger.working_set import Found, GroupBooks

NANO = 1_000_000_000
FOREVER = float("inf")


class MemoryBooks:
    """The smallest books that the rules can work on."""

    def __init__(self, *accounts: Account) -> None:
        self.accounts = {account.id: account for account in accounts}
        self.transfers: dict[str, Transfer] = {}
        self.dues: dict[str, float | None] = {}

    def account(self, account_id):
        return self.accounts.get(account_id)

    def transfer(self, transfer_id):
        return self.transfers.get(transfer_id)

    def due_at_s(self, pending_id):
        return self.dues.get(pending_id)

    def resolution(self, pending_id):
        named = [each for each in self.transfers.values() if each.pending_id == pending_id]
        return next((each for each in named[::-1] if each.kind in ENDS), None)

    def put_account(self, account):
        assert account.id in self.accounts
        self.accounts[account.id] = account

    def put_transfer(self, transfer):
        assert transfer.id not in self.transfers, "transfers never change"
        self.transfers[transfer.id] = transfer

    def put_due_at_s(self, pending_id, due_at_s):
        self.dues[pending_id] = due_at_s

    def begin(self):
        self.before = dict(self.accounts), dict(self.transfers), dict(self.dues)

    def undo(self):
        self.accounts, self.transfers, self.dues = self.before

    # What the state machine asks of every kind of books

    def apply(self, operations, now_s, *, linked=True):
        return apply(self, operations, now_s, linked=linked)

    def open_holds(self):
        return {id: due_at_s for id, due_at_s in self.dues.items() if due_at_s is not None}

    def problems(self, receipts=()):
        accounts, transfers = list(self.accounts.values()), list(self.transfers.values())
        numbered = [NumberedReceipt(number, each) for number, each in enumerate(receipts, 1)]
        return problems(Everything(accounts, transfers, numbered, self.open_holds()))

    def close(self):
        pass


class SimulatedDatabase:
    """The part that outlives a crash: books to which a group is added whole or not at all."""

    def __init__(self, chance):
        self.books = MemoryBooks(
            Account("world", "world", may_go_negative=True),
            Account("provider", "provider"),
            Account("suspense", "suspense"),
            Account("pat", "publisher"),
            Account("alice", "buyer"),
        )
        self.receipts = {}
        self.chance = chance
        self.faults = 0.0
        self.ends = {}

    def apply(self, group, now_s=0.0):
        """What a group would change, its answers and its receipts; changes nothing."""
        looked_for = wanted(group)
        transfers = [self.books.transfer(id) for id in looked_for.transfer_ids]
        ends = [self.ends.get(id) for id in looked_for.pending_ids]
        books = GroupBooks(
            Found(
                list(self.books.accounts.values()),
                [each for each in transfers if each],
                self.books.open_holds(),
                [each for each in ends if each],
            )
        )
        return books, *apply_group(books, group, now_s)

    def keep(self, changed, receipts):
        """Make a group's changes durable."""
        for account in changed.changed_accounts.values():
            self.books.put_account(account)
        for transfer in changed.new_transfers:
            self.books.put_transfer(transfer)
            if transfer.kind in ENDS:
                self.ends[transfer.pending_id] = transfer
        self.books.dues |= changed.changed_dues
        self.receipts |= {each.receipt.id: each.receipt for each in receipts}


class StoredBooks:
    """The same, in a database."""

    def __init__(self, place: Path | str, *accounts: Account) -> None:
        self.storage = storage_of(place)
        for account in accounts:
            self.storage.open_account(account)

    def apply(self, operations, now_s, *, linked=True):
        return self.storage.write([batch(operations, now_s, linked=linked)])[0]

    @property
    def accounts(self):
        return {account.id: account for account in self.storage.accounts()}

    @property
    def transfers(self):
        return {transfer.id: transfer for transfer in self.storage.everything().transfers}

    def resolution(self, pending_id):
        named = [each for each in self.transfers.values() if each.pending_id == pending_id]
        return next((each for each in named[::-1] if each.kind in ENDS), None)

    def open_holds(self):
        return self.storage.everything().dues

    def problems(self):
        return problems(self.storage.everything())

    def close(self):
        self.storage.close()


def batch(operations, now_s=0.0, *, linked=True, receipt=None, give_up_at_s=FOREVER):
    return Batch(tuple(operations), linked, receipt, Future(), now_s, give_up_at_s)


@contextmanager
def funded_ledger(place, **options):
    """A ledger in which alice has NANO to spend."""
    with Ledger.open(place, **options) as ledger:
        ledger.create_account("alice", "buyer")
        ledger.create_account("pat", "publisher")
        ledger.deposit("alice", NANO, "d1")
        yield ledger


def hold(id, amount, timeout_s=900):
    return pending(
        id=id,
        debit="alice",
        credit="provider",
        amount_nano=amount,
        timeout_s=timeout_s,
        code="hold",
    )


ZEROS = dict.fromkeys(
    (
        "tokens_matched",
        "tokens_reused",
        "tokens_loaded",
        "tokens_from_paged_cache",
        "tokens_failed",
        "tokens_computed",
        "tokens_output",
        "input_nano_per_mtok",
        "cache_read_nano_per_mtok",
        "royalty_ppm",
        "royalty_nano",
        "recompute_nano",
    ),
    0,
)


def receipt(id, charge, *transfers, royalty=0):
    return Receipt(
        id=id,
        request_id="r",
        account="alice",
        document_id="kvd_x",
        title="",
        publisher="pat",
        charge_nano=charge,
        reservation_id="h",
        transfer_ids=transfers,
        created_at_s=1.0,
        model="m",
        namespace="00",
        **{**ZEROS, "royalty_nano": royalty},
    )


fresh_number = itertools.count().__next__
