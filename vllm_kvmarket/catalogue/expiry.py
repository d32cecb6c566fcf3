"""When listings end: asked four times a second, so that asking costs a comparison."""

from __future__ import annotations

import heapq


class Expiries:
    """The ends of listings that can be matched. Not synchronised."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        # Has ends that do not hold any more, too; `_ends` decides.
        self._line: list[tuple[float, str]] = []

    def note(self, document_id: str, expires_at_s: float | None) -> None:
        """Note when a listing ends, None for never; mutates."""
        if expires_at_s is None:
            self._ends.pop(document_id, None)
        elif self._ends.get(document_id) != expires_at_s:
            self._ends[document_id] = expires_at_s
            heapq.heappush(self._line, (expires_at_s, document_id))

    def take_due(self, now_s: float) -> list[str]:
        """Return the listings that have ended by now, each once; mutates."""
        due = []
        while self._line and self._line[0][0] <= now_s:
            end, document_id = heapq.heappop(self._line)
            if self._ends.get(document_id) == end:
                del self._ends[document_id]
                due.append(document_id)
        return due
