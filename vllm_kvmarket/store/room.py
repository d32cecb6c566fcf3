"""Making room for a file within the quota: what may go, and in which order."""

from __future__ import annotations

from pathlib import Path

from vllm_kvmarket.core.errors import StoreFullError
from vllm_kvmarket.store.quarantine import Quarantine
from vllm_kvmarket.store.quota import Held, Quota
from vllm_kvmarket.store.recency import LeastRecentlyUsed


class Room:
    """Quarantined files go first; then a cache's oldest chunks (`oldest`), and nothing else."""

    def __init__(
        self, quota: Quota, quarantine: Quarantine, oldest: LeastRecentlyUsed | None
    ) -> None:
        self._quota = quota
        self._quarantine = quarantine
        self._oldest = oldest

    def make(self, held: Held, path: Path, size: int) -> None:
        """Free what a file needs within the quota. Raises StoreFullError, OSError."""
        quota, limit = self._quota, self._quota.quota_bytes
        if limit is None:
            return
        if size <= limit:
            self.give_up(held, quota.missing(held, size))
            if quota.missing(held, size) > 0:
                # Somebody who died may have left the number too high.
                quota.recount_if_due(held)
                self.give_up(held, quota.missing(held, size))
        if quota.missing(held, size) > 0:
            raise StoreFullError(
                f"{path.name}: no room for its {size} bytes, as {held.used} bytes of the quota of "
                f"{limit} are used in {path.parent.parent}; raise disk_quota_bytes, or delist "
                "documents and run `kvmarket store gc`"
            )

    def give_up(self, held: Held, missing: int) -> None:
        """Delete what may go, if that helps. Raises OSError."""
        if missing <= 0:
            return
        before = held.used
        quarantined = sum(entry.bytes for entry in self._quarantine.entries())
        if quarantined >= missing or self._oldest is not None:
            self._quarantine.give_up(held, missing)
        if self._oldest is not None:
            self._oldest.give_up(held, missing - (before - held.used))
