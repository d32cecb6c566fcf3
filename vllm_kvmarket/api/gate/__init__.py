"""The gate in front of every generating route: who pays, and what a client may ask for."""

from vllm_kvmarket.api.gate.middleware import Gate, install
from vllm_kvmarket.api.gate.routes import ROUTES, Kind, kind_of

__all__ = ["ROUTES", "Gate", "Kind", "install", "kind_of"]
