"""Training step: the network with its side head, optimizer, and the step as a CUDA graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eps_core.errors import ConfigError, TrainingError
from eps_train.config import TrainingConfig
from eps_train.data.images import ImageSet
from eps_train.gating import rewriting
from eps_train.gating.nested import SubNetworks
from eps_train.models.resnets import Normalize, SideHead
from eps_train.models.spec import NetworkSpec
from eps_train.schedule import initial_lr
from eps_train.training.averaging import AveragedWeights
from eps_train.training.distillation import Teacher, distillation_loss
from eps_train.training.distributed import Group
from eps_train.training.forward import (
    MEMORY_FORMAT,
    Forward,
    TrainedNetwork,
    TrainingPrecision,
    drop_batch_counts,
    synchronise_batchnorm,
    wide_float,
)


def build(
    spec: NetworkSpec, config: TrainingConfig, group: Group, device: torch.device, *, classes: int
) -> TrainedNetwork:
    """Build the network of `spec`, freshly initialised, with its side head, on the device."""
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
    network.to(device, memory_format=MEMORY_FORMAT)  # type: ignore[call-overload]
    return network


def make_optimizer(
    network: nn.Module, config: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """SGD or AdamW with weight decay on the weights of convolutions and linear layers only (paper).

    All other parameters (biases, scales of norms, a branch's scale without dimensions) are trained
    without decay.
    """
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    lr = initial_lr(config.lr_schedule)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=lr,
            betas=(config.momentum, 0.999),
            fused=True,
            capturable=device.type == "cuda",  # torch refuses to capture it otherwise
        )
    optimizer = torch.optim.SGD(
        groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )
    for parameter in parameters:
        # The fused kernel leaves its buffers unset when the very first step is one that the loss
        # scale of fp16 skips. From zero, the first step is the same.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters.

    It is rounded to float32, because :class:`GraphedStep` has to keep it in a tensor of that type:
    so both kinds of step give the same weights.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(lr, dtype=torch.float32).item()


class TrainingStep:
    """Turns a batch of raw images into a step of the optimizer.

    Labels are classes int64 `[N]`, or mixed ones float32 `[N, classes]`, which sum to 1. With
    `accumulate`, the gradients of the parts of a batch are added: each part is a forward pass of
    its own, for which batch norms compute their statistics, gates decide and record, and a
    sub-network is drawn.

    With a teacher, the loss is `(1 - w) cross-entropy + w distillation`, on the same augmented
    images. With sub-networks, one of them is trained in the same step, on the logits of the whole
    network. Averaged weights are updated at the end of the step.

    Attributes:
        sub_networks: those of the network; None: the whole network alone is trained.
        teacher: the network to distil from; None: the labels alone are learned.
        precision: of the forward and backward pass.
        optimizer: takes the step.
    """

    def __init__(
        self,
        network: TrainedNetwork,
        normalize: Normalize,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        group: Group,
        device: torch.device,
        teacher: Teacher | None = None,
        averaged: AveragedWeights | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        self._averaged, self._class_weights = averaged, class_weights
        self._accumulate = config.accumulate
        self._label_smoothing, self._clip = config.label_smoothing, config.clip_grad_norm
        self.teacher = teacher
        self._distillation = (config.distillation_weight, config.temperature)
        self.precision = TrainingPrecision(config.precision, device)
        self.optimizer = optimizer
        self._network, self._normalize = network, normalize
        self._forward = Forward(network, config, group, device)
        self._aux_loss_weight = config.aux_loss_weight
        self._result = wide_float(device)
        self.sub_networks: SubNetworks | None = None

    def __call__(self, batch: ImageSet) -> Tensor:
        """Take one step; returns (loss, correct answers) of this process, `[2]`, on the device.

        Of a mixed label, the class with the largest share is the correct answer.
        """
        self.optimizer.zero_grad()
        parts = batch.batches(math.ceil(len(batch) / self._accumulate))
        found = [self._add_gradients(part, len(part) / len(batch)) for part in parts]
        self.precision.step(self.optimizer, clip_norm=self._clip)
        if self._averaged is not None:
            self._averaged.update()
        return torch.stack(found).sum(dim=0)

    def rewrap(self) -> None:
        """Continue after blocks were removed from the network, or the teacher changed."""
        self._forward.rewrap()
        if self._averaged is not None:
            self._averaged.follow(self._network.model)

    def _add_gradients(self, batch: ImageSet, share: float) -> Tensor:
        """Add the gradients of a part of a batch; returns its part of the result of the step.

        Args:
            batch: the part.
            share: of the images of the whole batch.
        """
        images = self._normalize(batch.images).contiguous(memory_format=MEMORY_FORMAT)
        with self.precision.autocast():
            logits, side = self._forward(images)
            teacher = self.teacher if self._distillation[0] else None
            expected = None if teacher is None else teacher(batch.images)
            nested = None if self.sub_networks is None else self.sub_networks(images)
        loss = self._cross_entropy(logits, batch.labels)
        if expected is not None:
            weight, temperature = self._distillation
            distilled = distillation_loss(logits, expected, temperature)
            loss = (1 - weight) * loss + weight * distilled
        if side is not None:
            loss = loss + self._aux_loss_weight * self._cross_entropy(side, batch.labels)
        if nested is not None:
            loss = loss + distillation_loss(nested, logits, 1.0)
        loss = share * loss
        self.precision.backward(loss)
        mixed = batch.labels.is_floating_point()
        labels = batch.labels.argmax(dim=1) if mixed else batch.labels
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        return torch.stack([loss.detach().to(self._result), correct.to(self._result)])

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, smoothing = logits.float(), self._label_smoothing
        if (weight := self._class_weights) is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        # Per image, so that mixed labels and parts of a batch count alike: torch's mean of class
        # labels is one over their weights.
        total = F.cross_entropy(
            logits, labels, weight=weight, label_smoothing=smoothing, reduction="sum"
        )
        return total / len(labels)


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights of the classes, float32, inverse to their frequency in `labels`.

    Their mean over the images is 1. A class without an image counts as having one.
    """
    counts = labels.bincount(minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts.float())


# -- The step as one CUDA graph: the host launches one graph instead of a thousand kernels

WARM_UP = 3  # steps before the capture: cuDNN chooses its kernels in them, and buffers are made


def use_cuda_graph(choice: str, config: TrainingConfig, group: Group, device: torch.device) -> bool:
    """Whether the steps of a run become a CUDA graph.

    Args:
        choice: `on`, `off`, or `auto`: where it is possible.

    Raises:
        ConfigError: `on`, where it is not possible.
    """
    reason = cuda_graph_obstacle(config, group, device)
    if choice == "on" and reason is not None:
        raise ConfigError(f"--cuda-graph on: {reason}; leave it out")
    return choice != "off" and reason is None


def cuda_graph_obstacle(config: TrainingConfig, group: Group, device: torch.device) -> str | None:
    """Why the steps of a run cannot become a CUDA graph, in a few words; None if they can."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if group.world is not None:
        return "not with several processes"
    if config.compile:
        return "not with --compile"
    if config.nested:
        return "not with --nested, whose steps differ"
    if config.precision == "fp16":
        return "not with the loss scale of --precision fp16"
    return None


class GraphedStep:
    """A :class:`TrainingStep`, called in the same way, that is replayed from a CUDA graph.

    Batches and learning rates are copied into buffers of its own. The first `WARM_UP` steps, and
    those after the network lost a block, run eagerly; then one is captured. All of them are steps
    of the training, and give the weights that the plain step gives. On other devices than CUDA
    there is nothing to capture, and every step runs eagerly, from the same buffers.

    What depends on the host is frozen by the capture: in its forward pass a network must not draw
    from Python's random numbers, or read a tensor's value (torch.fx froze that already).

    Args:
        step: what to capture.
        required: raise when the capture fails, rather than to warn and continue without.

    Attributes:
        captures: graphs made so far.
    """

    def __init__(self, step: TrainingStep, device: torch.device, *, required: bool = False) -> None:
        self._step, self._device, self._required = step, device, required
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lr = torch.tensor(0.0, device=device)
        self._batch: ImageSet | None = None
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None
        self._warm_up = WARM_UP
        self._failed = False
        self.captures = 0

    @property
    def precision(self) -> TrainingPrecision:
        return self._step.precision

    @property
    def teacher(self) -> Teacher | None:
        return self._step.teacher

    @teacher.setter
    def teacher(self, teacher: Teacher) -> None:
        """Call :meth:`rewrap` too, so that the graph is captured anew."""
        self._step.teacher = teacher

    def __call__(self, batch: ImageSet) -> Tensor:
        """Take one step, as :class:`TrainingStep`; the result is valid until the next call.

        Raises:
            TrainingError: the capture fails, and is required.
        """
        held = self._hold(batch)
        if self._replay is None and not self._failed and not self._warm_up:
            self._capture(held)
        if self._replay is None:
            self._warm_up = max(0, self._warm_up - 1)
            self._eagerly(held)
        else:
            self._replay()
        assert self._result is not None
        return self._result

    def rewrap(self) -> None:
        """Continue after a removal; the previous graph is dropped with the memory that it holds."""
        self._replay = self._result = None
        self._step.optimizer.zero_grad()  # the gradients are part of that memory
        self._warm_up = WARM_UP
        self._step.rewrap()

    def _hold(self, batch: ImageSet) -> ImageSet:
        """Copy the batch and the learning rate into the buffers that the graph reads.

        All batches of a run have one shape.
        """
        for group in self._step.optimizer.param_groups:
            if group["lr"] is not self._lr:
                self._lr.fill_(group["lr"])
                group["lr"] = self._lr
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
        # On the stream of the capture, for what torch sets up once for each stream.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._take(batch)
        current.wait_stream(self._stream)

    def _capture(self, batch: ImageSet) -> None:
        """Record a step on `batch`, without taking it; on failure, raise or warn."""
        if self._stream is None:
            self._replay = lambda: self._take(batch)
            self.captures += 1
            return
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may continue to read images into page-locked memory.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._take(batch)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            if self._required:
                raise TrainingError(
                    f"--cuda-graph on: a step of this network cannot be captured ({reason});"
                    " leave it out"
                ) from error
            self._failed = True
            warnings.warn(f"no CUDA graph: a step cannot be captured ({reason})", stacklevel=2)
            return
        self._replay = graph.replay
        self.captures += 1
