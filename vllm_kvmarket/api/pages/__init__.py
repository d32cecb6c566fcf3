"""Pages that people look at, under /kvmarket. No scripts, and nothing from other hosts."""

from vllm_kvmarket.api.pages.router import build_pages

__all__ = ["build_pages"]
