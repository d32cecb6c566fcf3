"""What the fork server of tests.support.forked imports, once for all processes of vLLM."""

import os
from multiprocessing import forkserver
from pathlib import Path

import vllm_kvmarket.api.server
import vllm_kvmarket.connector.connector
import vllm_kvmarket.plugin  # noqa: F401
from tests.support.forked import VERDICTS, replace_spawn
from vllm_kvmarket.core import verdicts

replace_spawn()
# Forks reach this server by its address, and must not start another one.
forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined, method-assign]

# Engines of tests start in new homes; one of a kind is tested for all.
_own_file = verdicts._file
verdicts._file = lambda home, engine: _own_file(Path(os.environ.get(VERDICTS) or home), engine)
