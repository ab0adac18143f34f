"""Exponential moving average of a network's weights, which is validated and saved in their place.

Gates, responses and the optimizer always see the trained weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.optim.swa_utils import get_ema_multi_avg_fn

from eps_train.training.distributed import running_statistics


class AveragedWeights:
    """The moving average of the parameters, and of the running statistics of norms, of a network.

    :class:`torch.optim.swa_utils.AveragedModel` would copy the network with its gates, and could
    not follow the removal of blocks; its update of a list of tensors is used here.

    Args:
        model: the network, whose tensors are the first average.
        decay: share of the average that each step keeps.

    Attributes:
        tensors: the average, by the names of the network's state dict.
    """

    def __init__(self, model: fx.GraphModule, decay: float) -> None:
        self._average = get_ema_multi_avg_fn(decay)
        self._trained = _weights(model)
        self.tensors = {name: tensor.clone() for name, tensor in self._trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the tensors of a step; does not wait for the device."""
        self._average(list(self.tensors.values()), list(self._trained.values()), 0)

    def follow(self, model: fx.GraphModule) -> None:
        """Continue with `model`, the network so far, perhaps without some of its blocks."""
        self._trained = _weights(model)
        self.tensors = {name: self.tensors[name] for name in self._trained}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the network for a block; its own tensors come back bit for bit."""
        trained = self.trained()
        _copy(self.tensors, self._trained)
        try:
            yield
        finally:
            _copy(trained, self._trained)

    def trained(self) -> dict[str, Tensor]:
        """The tensors of the network that are averaged, as the last step left them; copies."""
        return {name: tensor.clone() for name, tensor in self._trained.items()}

    def restart(self) -> None:
        """Begin again from the tensors of the network, which were loaded."""
        _copy(self._trained, self.tensors)

    def load(self, trained: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`trained` and `tensors`."""
        _copy(trained, self._trained)
        _copy(average, self.tensors)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _weights(model: fx.GraphModule) -> dict[str, Tensor]:
    """Parameters and running statistics in floating point, detached, by name."""
    statistics = {id(buffer) for buffer in running_statistics(model)}
    buffers = {name: buffer for name, buffer in model.named_buffers() if id(buffer) in statistics}
    tensors = dict(model.named_parameters()) | buffers
    saved = model.state_dict().keys()
    return {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if name in saved and tensor.is_floating_point()
    }
