"""kvmarket: a market for KV caches inside vLLM."""
