"""What the fork server of tests.support.forked imports, once for all processes of vLLM."""

from multiprocessing import forkserver

import vllm_kvmarket.api.server
import vllm_kvmarket.connector.connector
import vllm_kvmarket.plugin  # noqa: F401
from tests.support.forked import replace_spawn

replace_spawn()
# Forks reach this server by its address, and must not start another one.
forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined, method-assign]
