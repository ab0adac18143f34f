"""Timers for tests: one whose times are known, one that is not installed, and how to offer them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from eps_core.timing import Runs
from eps_train.gating import costs
from eps_train.gating.costs import GROUP, Measure, plain


class LayerTimer:
    """A millisecond for each convolution, and as much again for one of more than 8 channels."""

    name = "a millisecond a convolution"

    def __init__(self, identity: object = None) -> None:
        self.calls: list[Sequence[Collection[str]]] = []

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        assert image.dtype == torch.uint8

        def measure(without: Sequence[Collection[str]]) -> list[Runs]:
            self.calls.append(without)
            return [np.full((4, 3), self._time(plain(model, blocks))) for blocks in without]

        return measure

    def _time(self, network: nn.Module) -> float:
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        return sum(1.0 + (m.out_channels > 8) for m in convolutions)


class NotInstalled(EntryPoint):
    def load(self) -> object:
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")


LAYERS = EntryPoint("ort", f"{__name__}:{LayerTimer.__name__}", GROUP)
NO_ORT = NotInstalled("ort", "nowhere:Timer", GROUP)


@contextmanager
def timed_by(*timers: EntryPoint) -> Iterator[None]:
    """Offer only these timers in place of the installed ones."""
    found = EntryPoints(timers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "entry_points", lambda **names: found.select(**names))
        yield
