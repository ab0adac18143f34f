"""torchvision's Python part, where its compiled part cannot be loaded.

A torchvision that was built for another torch (the CUDA wheel beside a torch without CUDA, say)
cannot be imported: it describes two operators that its library would have brought. Its networks
need none of them, so the tests declare these two and go on.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_DECLARED: list[torch.library.Library] = []  # a declaration lasts as long as its library


def make_importable() -> None:
    """See to it that `import torchvision` works in this process, if it is installed at all."""
    found = importlib.util.find_spec("torchvision") if "torchvision" not in sys.modules else None
    if found is None or _DECLARED or _loads(Path(found.origin or "").parent):
        return
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)


def _loads(folder: Path) -> bool:
    for path in folder.glob("_C*"):
        try:
            torch.ops.load_library(path)
        except OSError:
            return False
        return True
    return False
