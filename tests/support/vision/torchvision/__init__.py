"""torchvision's Python code beside a CPU build of torch, for which its operators are not built.

vLLM's classes of models that see import torchvision, and call nothing of it for text. With the
folder above and the real torchvision on PYTHONPATH (`make test-long`, `make bench-models`) such a
model runs here, text only.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch

if torch.version.cuda is None:
    # The import registers more for these two, which fails where no operator has the name.
    _names = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _names.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

_here = Path(__file__).resolve().parents[1]
_real = PathFinder.find_spec(__name__, [each for each in sys.path if Path(each).resolve() != _here])
if _real is None or _real.loader is None or not _real.submodule_search_locations:
    raise ModuleNotFoundError("torchvision is not on PYTHONPATH: `make .cache/torchvision`")
__spec__ = _real
__path__ = list(_real.submodule_search_locations)
_real.loader.exec_module(sys.modules[__name__])
