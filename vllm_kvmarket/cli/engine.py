"""A vLLM engine for a command: quiet, with stdout only for the command's own result."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_kvmarket.core.errors import KVMarketError, PublishFailedError, VersionError

if TYPE_CHECKING:
    from vllm_kvmarket.market.market import Market

STDOUT, STDERR = 1, 2
# vLLM reads these while it is imported; a user's own settings stay.
QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}


@contextmanager
def engine_output() -> Iterator[None]:
    """Send the output of an engine and its processes to stderr, and only warnings of it.

    vLLM's processes write to the inherited descriptor, so the descriptor itself is moved.
    """
    added = {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(added)
    sys.stdout.flush()
    own = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(own, STDOUT)
        os.close(own)
        for name in added:
            del os.environ[name]


def open_engine(model: str, market: Market, max_model_len: int | None, dtype: str | None) -> Any:
    """Start an engine on the market; a vllm.LLM.

    Raises VersionError without vLLM, and PublishFailedError when the engine does not start.
    """
    try:
        from vllm_kvmarket.connector.offline_engine import open_llm

        return open_llm(model, market, max_model_len=max_model_len, dtype=dtype)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("vllm", "torch"):
            raise
        raise VersionError(
            "vLLM is not installed here; pip install 'vllm-kvmarket[cpu]' (or [gpu]), "
            "then see `kvmarket env`"
        ) from None
    except KVMarketError:
        raise
    except Exception as error:  # vLLM, torch and transformers may raise anything
        raise PublishFailedError(
            f"the engine for {model} did not start: {type(error).__name__}: {error}; "
            "VLLM_LOGGING_LEVEL=INFO shows more"
        ) from error
