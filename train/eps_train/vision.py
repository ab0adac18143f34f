"""torchvision, also where its compiled part cannot be loaded.

A torchvision that was built for another torch (a CUDA build beside a torch without CUDA, which is
what a package index may serve together) fails on import: it describes two operators that its
library would have brought. Its networks and readers need neither, so they are declared here.
"""

from __future__ import annotations

import sys
from importlib import import_module

import torch

_SIGN = "operator torchvision::"
_declared: list[torch.library.Library] = []  # a declaration lasts as long as its library


def import_torchvision() -> None:
    """Have `import torchvision` work in this process from here on.

    Raises what the import raises when that is something else: not installed, or broken.
    """
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if _declared or _SIGN not in str(error):
            raise
        _declare_operators()
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        import_module("torchvision")


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
