"""Operator tokens, API keys, signing keys, and the log of administrators' changes."""
