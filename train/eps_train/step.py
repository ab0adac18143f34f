"""One training step, in the precision, and over the processes, that the configuration asks for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from eps_train import graph
from eps_train.config import TrainingConfig
from eps_train.devices import wide_float
from eps_train.distributed import Group
from eps_train.forward import Forward, TrainedNetwork, drop_batch_counts, synchronise_batchnorm
from eps_train.images import ImageSet
from eps_train.network import NetworkSpec
from eps_train.networks import Normalize, SideHead
from eps_train.precision import Precision, memory_format


def build(
    spec: NetworkSpec, config: TrainingConfig, group: Group, device: torch.device, *, classes: int
) -> TrainedNetwork:
    """The network that `spec` names, freshly initialised, with its side head, on the device."""
    model = spec.build()
    taps = graph.taps(model)
    side_head = SideHead(taps[0].channels, classes) if config.side_weight and taps else None
    network = TrainedNetwork(model, side_head)
    if config.sync_batchnorm:
        synchronise_batchnorm(network, group, device)
    drop_batch_counts(network)
    if config.gate_scope == "global":
        for gate in graph.gates(model).values():
            gate.process_group = group.world
    order = memory_format(config.precision, device)
    network.to(device, memory_format=order)  # type: ignore[call-overload]
    return network


class TrainingStep:
    """What turns a batch of raw images into a step of the optimizer.

    Attributes:
        precision: of the forward and backward pass.
        optimizer: what takes the step.
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
        self.optimizer = optimizer
        self._forward, self._normalize = Forward(network, config, group, device), normalize
        self._side_weight = config.side_weight
        self._order = memory_format(config.precision, device)
        self._result = wide_float(device)

    def __call__(self, batch: ImageSet) -> Tensor:
        """Take one step; returns (loss, correct answers) of this process, `[2]`, on the device."""
        images = self._normalize(batch.images).contiguous(memory_format=self._order)
        with self.precision.autocast():
            logits, side = self._forward(images)
        loss = F.cross_entropy(logits.float(), batch.labels)
        if side is not None:
            loss = loss + self._side_weight * F.cross_entropy(side.float(), batch.labels)
        self.optimizer.zero_grad()
        self.precision.step(loss, self.optimizer)
        correct = (logits.detach().argmax(dim=1) == batch.labels).sum()
        return torch.stack([loss.detach().to(self._result), correct.to(self._result)])

    def renew(self, model: fx.GraphModule) -> None:
        """Go on with `model`, which is the network so far without some of its blocks."""
        self._forward.renew(model)


def parameters_of(network: TrainedNetwork) -> list[tuple[str, nn.Parameter]]:
    """Everything that is trained, by the names that checkpoints use."""
    named = list(network.model.named_parameters())
    if network.side_head is not None:
        named += [(f"side_head.{n}", p) for n, p in network.side_head.named_parameters()]
    return named
