"""Shared by tests, benchmarks and tools: small fakes, servers, engines, documents."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository's folder; a child process finds this package there, by PYTHONPATH."""
