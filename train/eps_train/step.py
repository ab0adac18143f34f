"""One training step, in the precision, and over the processes, that the configuration asks for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eps_train import graph
from eps_train.config import TrainingConfig
from eps_train.devices import wide_float
from eps_train.distributed import Group
from eps_train.forward import Forward, TrainedNetwork, synchronise_batchnorm
from eps_train.images import ImageSet
from eps_train.network import NetworkSpec
from eps_train.networks import Normalize, SideHead
from eps_train.precision import Precision


def build(
    spec: NetworkSpec, config: TrainingConfig, group: Group, device: torch.device, *, classes: int
) -> TrainedNetwork:
    """The network that `spec` names, freshly initialised, with its side head, on the device.

    Convolutions are in channels-last: a quarter faster on the CPUs tried.
    """
    model = spec.build()
    taps = graph.taps(model)
    side_head = SideHead(taps[0].channels, classes) if config.side_weight and taps else None
    network = TrainedNetwork(model, side_head)
    if config.sync_batchnorm:
        synchronise_batchnorm(network, group, device)
    if config.gate_scope == "global":
        for gate in graph.gates(model).values():
            gate.process_group = group.world
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


class TrainingStep:
    """What turns a batch of raw images into a step of the optimizer.

    Attributes:
        precision: of the forward and backward pass.
        forward: how the network is called; renewed when the network's structure changes.
    """

    def __init__(
        self,
        network: TrainedNetwork,
        normalize: Normalize,
        optimizer: torch.optim.SGD,
        config: TrainingConfig,
        group: Group,
        device: torch.device,
    ) -> None:
        self.precision = Precision(config.precision, device)
        self.forward = Forward(network, config, group, device)
        self._normalize, self._optimizer = normalize, optimizer
        self._side_weight = config.side_weight
        self._result = wide_float(device)

    def __call__(self, batch: ImageSet) -> Tensor:
        """Take one step; returns (loss, correct answers) of this process, `[2]`, on the device."""
        images = self._normalize(batch.images).contiguous(memory_format=torch.channels_last)
        with self.precision.autocast():
            logits, side = self.forward(images)
        loss = F.cross_entropy(logits.float(), batch.labels)
        if side is not None:
            loss = loss + self._side_weight * F.cross_entropy(side.float(), batch.labels)
        self._optimizer.zero_grad()
        self.precision.step(loss, self._optimizer)
        correct = (logits.detach().argmax(dim=1) == batch.labels).sum()
        return torch.stack([loss.detach().to(self._result), correct.to(self._result)])


def parameters_of(network: TrainedNetwork) -> list[tuple[str, nn.Parameter]]:
    """Everything that is trained, by the names that checkpoints use."""
    named = list(network.model.named_parameters())
    if network.side_head is not None:
        named += [(f"side_head.{n}", p) for n, p in network.side_head.named_parameters()]
    return named
