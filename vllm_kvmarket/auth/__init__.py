"""Who may do what: operator tokens, API keys, and the keys that sign."""
