"""The gate in front of every route: who pays, and what a client may ask for."""

from vllm_kvmarket.api.gate.middleware import Gate, install

__all__ = ["Gate", "install"]
