"""What keeps a market's store in order: garbage collection, room for documents, checks, repair.

Everything here may run in any process of a market, while engines publish, load and serve.
"""

from vllm_kvmarket.keeping.checks import CheckReport, Progress, RepairReport, check, repair
from vllm_kvmarket.keeping.garbage import GcReport, collect_garbage
from vllm_kvmarket.keeping.room import make_room, set_time_to_live

__all__ = [
    "CheckReport",
    "GcReport",
    "Progress",
    "RepairReport",
    "check",
    "collect_garbage",
    "make_room",
    "repair",
    "set_time_to_live",
]
