"""Books for one group of batches: what was looked up, and what changed on top of it.

Both databases work alike: under the write lock, look up all that the group names in a few
statements, let the rules work in memory, write what changed in a few statements.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from vllm_kvmarket.ledger.model import Account, Transfer
from vllm_kvmarket.ledger.rules import ENDS

MOST_REMEMBERED = 50_000


class Wanted(msgspec.Struct, frozen=True):
    """Ids that a group names. The accounts of the pending transfers are wanted as well."""

    transfer_ids: list[str]
    pending_ids: list[str]
    account_ids: list[str]

    def without_new(self) -> Wanted:
        """The same, but no transfers that the group is to make."""
        return Wanted(self.pending_ids, self.pending_ids, self.account_ids)


class Found(msgspec.Struct, frozen=True):
    """What the database has of it, and its time.

    A pending transfer has its due time while it is open, and its resolutions afterwards.
    """

    accounts: list[Account]
    transfers: list[Transfer]
    dues: dict[str, float]
    resolutions: list[Transfer]
    now_s: float = 0.0


class GroupBooks:
    """Books in memory; `changed_accounts`, `new_transfers` and `changed_dues` are to be written."""

    def __init__(self, found: Found) -> None:
        self._accounts = {account.id: account for account in found.accounts}
        self._transfers = {transfer.id: transfer for transfer in found.transfers}
        self._dues: dict[str, float | None] = {**found.dues}
        # An expired hold may have a late settlement as well, which is what counts then.
        ends = sorted(found.resolutions, key=lambda each: each.kind == "late")
        self._resolutions = {each.pending_id: each for each in ends}
        self.changed_accounts: dict[str, Account] = {}
        self.changed_dues: dict[str, float | None] = {}
        self.new_transfers: list[Transfer] = []
        # What the batch under way replaced: accounts (and as they had changed before it), due
        # times, resolutions. Reading goes straight to the books, which is most of the work.
        self._old_accounts: list[tuple[str, Account, Account | None]] = []
        self._old_dues: list[tuple[str, float | None, bool]] = []
        self._old_resolutions: list[tuple[str, Transfer | None]] = []
        self._first_new = 0

    @property
    def accounts(self) -> Iterable[Account]:
        """Every account that the group names, as the group leaves it."""
        return self._accounts.values()

    def account(self, account_id: str) -> Account | None:
        return self._accounts.get(account_id)

    def transfer(self, transfer_id: str) -> Transfer | None:
        return self._transfers.get(transfer_id)

    def due_at_s(self, pending_id: str) -> float | None:
        return self._dues.get(pending_id)

    def resolution(self, pending_id: str) -> Transfer | None:
        return self._resolutions.get(pending_id)

    def put_account(self, account: Account) -> None:
        id = account.id
        self._old_accounts.append((id, self._accounts[id], self.changed_accounts.get(id)))
        self._accounts[id] = self.changed_accounts[id] = account

    def put_transfer(self, transfer: Transfer) -> None:
        self._transfers[transfer.id] = transfer
        self.new_transfers.append(transfer)
        if transfer.kind in ENDS:
            held = transfer.pending_id
            self._old_resolutions.append((held, self._resolutions.get(held)))
            self._resolutions[held] = transfer

    def put_due_at_s(self, pending_id: str, due_at_s: float | None) -> None:
        changed = pending_id in self.changed_dues
        self._old_dues.append((pending_id, self._dues.get(pending_id), changed))
        self._dues[pending_id] = self.changed_dues[pending_id] = due_at_s

    def begin(self) -> None:
        self._old_accounts, self._old_dues, self._old_resolutions = [], [], []
        self._first_new = len(self.new_transfers)

    def undo(self) -> None:
        for id, account, changed in reversed(self._old_accounts):
            self._accounts[id] = account
            if changed is None:
                self.changed_accounts.pop(id, None)
            else:
                self.changed_accounts[id] = changed
        for id, due_at_s, was_changed in reversed(self._old_dues):
            self._dues[id] = due_at_s
            if was_changed:
                self.changed_dues[id] = due_at_s
            else:
                del self.changed_dues[id]
        for id, resolution in reversed(self._old_resolutions):
            if resolution is None:
                del self._resolutions[id]
            else:
                self._resolutions[id] = resolution
        for transfer in self.new_transfers[self._first_new :]:
            del self._transfers[transfer.id]
        del self.new_transfers[self._first_new :]


class Memory:
    """Accounts after the last group, and open holds with their transfers.

    It is true as long as no other connection writes; the caller calls `forget` when one did.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._held: dict[str, Transfer] = {}
        self._dues: dict[str, float] = {}

    def forget(self) -> None:
        """Forget everything; mutates."""
        self._accounts.clear()
        self._held.clear()
        self._dues.clear()

    def divide(self, wanted: Wanted) -> tuple[Found, Wanted]:
        """Return what is known of it, and what must be looked up."""
        accounts = self._accounts
        held = [self._held[id] for id in wanted.pending_ids if id in self._held]
        known_ids = {transfer.id for transfer in held}
        account_ids = {*wanted.account_ids, *(each.debit for each in held)}
        account_ids.update(each.credit for each in held)
        found = Found(
            [accounts[id] for id in account_ids if id in accounts],
            held,
            {id: self._dues[id] for id in known_ids},
            [],
        )
        left = Wanted(
            [id for id in wanted.transfer_ids if id not in known_ids],
            [id for id in wanted.pending_ids if id not in known_ids],
            [id for id in account_ids if id not in accounts],
        )
        return found, left

    def learn(self, books: GroupBooks) -> None:
        """Remember what a committed group changed; mutates."""
        if len(self._held) > MOST_REMEMBERED or len(self._accounts) > MOST_REMEMBERED:
            self.forget()
        self._accounts.update(books.changed_accounts)
        for transfer in books.new_transfers:
            if transfer.kind == "pending":
                self._held[transfer.id] = transfer
        for pending_id, due_at_s in books.changed_dues.items():
            if due_at_s is None:
                self._held.pop(pending_id, None)
                self._dues.pop(pending_id, None)
            elif pending_id in self._held:
                self._dues[pending_id] = due_at_s
