"""The market: its facade over catalogue, ledger and store, and what keeps its store in order."""
