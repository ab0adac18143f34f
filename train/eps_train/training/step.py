"""One training step, in the precision, and over the processes, that the configuration asks for."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from eps_core.errors import ConfigError, TrainingError
from eps_train.config import TrainingConfig
from eps_train.data.images import ImageSet
from eps_train.gating import rewriting
from eps_train.models.cifar import Normalize, SideHead
from eps_train.models.spec import NetworkSpec
from eps_train.training.distributed import Group
from eps_train.training.forward import (
    Forward,
    Precision,
    TrainedNetwork,
    drop_batch_counts,
    memory_format,
    synchronise_batchnorm,
    wide_float,
)


def build(
    spec: NetworkSpec, config: TrainingConfig, group: Group, device: torch.device, *, classes: int
) -> TrainedNetwork:
    """The network that `spec` names, freshly initialised, with its side head, on the device."""
    model = spec.build()
    taps = rewriting.taps(model)
    side_head = SideHead(taps[0].channels, classes) if config.aux_loss_weight and taps else None
    network = TrainedNetwork(model, side_head)
    if config.sync_batchnorm:
        synchronise_batchnorm(network, group, device)
    drop_batch_counts(network)
    if config.gate_scope == "global":
        for gate in rewriting.gates(model).values():
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
        self._side_weight = config.aux_loss_weight
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


# -- A training step as one CUDA graph: the host launches one graph instead of a thousand kernels

WARM_UP = 3  # steps before the capture: cuDNN chooses its kernels in them, and buffers are made


def graphed(choice: str, config: TrainingConfig, group: Group, device: torch.device) -> bool:
    """Whether the steps of a run become a CUDA graph.

    Args:
        choice: `on`, `off`, or `auto`: where it is possible.

    Raises:
        ConfigError: `on`, where it is not possible.
    """
    reason = obstacle(config, group, device)
    if choice == "on" and reason is not None:
        raise ConfigError(f"--cuda-graph on: {reason}; leave it out")
    return choice != "off" and reason is None


def obstacle(config: TrainingConfig, group: Group, device: torch.device) -> str | None:
    """Why the steps of a run cannot become a CUDA graph, in some words; None if they can."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if group.world is not None:
        return "not with several processes"
    if config.compile:
        return "not with --compile"
    if config.precision == "fp16":
        return "not with the loss scale of --precision fp16"
    return None


class GraphedStep:
    """A :class:`TrainingStep`, called in the same way, that is replayed from a CUDA graph.

    Batches are copied into buffers of its own, and the learning rate becomes a tensor. The first
    `WARM_UP` steps, and those after the network lost a block, run as they are; then one is
    captured. All of them are steps of the training, and give the weights that the plain step gives.
    On other devices than CUDA there is nothing to capture, and every step runs as it is, from the
    same buffers.

    What depends on the host is frozen by the capture: a network must not draw from Python's random
    numbers, or look at a tensor's value, in its forward pass (torch.fx froze that already).

    Args:
        step: what to capture.
        required: raise when the capture fails, rather than to warn and go on without.

    Attributes:
        captures: graphs made so far.
    """

    def __init__(self, step: TrainingStep, device: torch.device, *, required: bool = False) -> None:
        self._step, self._device, self._required = step, device, required
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for group in step.optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
        self._batch: ImageSet | None = None
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None
        self._warm_up = WARM_UP
        self._refused = False
        self.captures = 0

    @property
    def precision(self) -> Precision:
        return self._step.precision

    def __call__(self, batch: ImageSet) -> Tensor:
        """Take one step, as :class:`TrainingStep`; the result is valid until the next call.

        Raises:
            TrainingError: the capture fails, and is required.
        """
        held = self._hold(batch)
        if self._replay is None and not self._refused and not self._warm_up:
            self._capture(held)
        if self._replay is None:
            self._warm_up = max(0, self._warm_up - 1)
            self._eagerly(held)
        else:
            self._replay()
        assert self._result is not None
        return self._result

    def renew(self, model: fx.GraphModule) -> None:
        """Go on with `model`; the graph of the one before goes, and the memory that it holds."""
        self._replay = self._result = None
        self._step.optimizer.zero_grad()  # the gradients are part of that memory
        self._warm_up = WARM_UP
        self._step.renew(model)

    def _hold(self, batch: ImageSet) -> ImageSet:
        """The batch in the buffers that the graph reads. All batches of a run have one shape."""
        if self._batch is None:
            self._batch = ImageSet(torch.empty_like(batch.images), torch.empty_like(batch.labels))
        assert batch.images.shape == self._batch.images.shape
        self._batch.images.copy_(batch.images, non_blocking=True)
        self._batch.labels.copy_(batch.labels, non_blocking=True)
        return self._batch

    def _take(self, batch: ImageSet) -> None:
        self._result = self._step(batch)

    def _eagerly(self, batch: ImageSet) -> None:
        if self._stream is None:
            self._take(batch)
            return
        # On the stream of the capture: what is set up once for each stream is there then.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._take(batch)
        current.wait_stream(self._stream)

    def _capture(self, batch: ImageSet) -> None:
        """Record a step on `batch`, without taking it."""
        if self._stream is None:
            self._replay = lambda: self._take(batch)
        else:
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on to read images into page-locked memory.
                with torch.cuda.graph(
                    graph, stream=self._stream, capture_error_mode="thread_local"
                ):
                    self._take(batch)
            except RuntimeError as error:
                self._give_up(error)
                return
            self._replay = graph.replay
        self.captures += 1

    def _give_up(self, error: RuntimeError) -> None:
        reason = str(error).strip().partition("\n")[0]
        if self._required:
            raise TrainingError(
                f"--cuda-graph on: a step of this network cannot be captured ({reason});"
                " leave it out"
            ) from error
        self._refused = True
        warnings.warn(f"no CUDA graph: a step cannot be captured ({reason})", stacklevel=2)
