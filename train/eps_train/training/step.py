"""Training step: network, optimizer, teacher, averaged weights, and the step as a CUDA graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from eps_core.errors import ConfigError, TrainingError
from eps_train.config import TrainingConfig
from eps_train.data.dataset import DataIdentity
from eps_train.data.images import ImageSet
from eps_train.gating import rewriting
from eps_train.gating.nested import SubNetworks
from eps_train.models.resnets import Normalize, SideHead
from eps_train.models.spec import NetworkSpec
from eps_train.schedule import initial_lr
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.distributed import Group, running_statistics
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


def _optimizer(
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


# -- Distillation: training on the logits of another network (Hinton et al., 2015, 1503.02531)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `T² KL(softmax(teacher / T) || softmax(student / T))`, the mean over the images.

    The factor `T²` keeps the size of the gradient independent of the temperature.

    Args:
        student, teacher: logits `[N, classes]`, any floating-point type; the teacher's get no
            gradient.
        temperature: T, above 0.
    """
    target = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    found = F.log_softmax(student.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)


class Teacher:
    """A trained network that gives logits for the images that a student is trained on.

    It runs in evaluation mode, with its dead blocks shut. `digest` is that of its checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.digest = checkpoint.digest
        self._model = checkpoint.build_gated().eval().requires_grad_(False).to(device)
        self._normalize = Normalize.of(checkpoint.data).to(device)

    @classmethod
    def load(cls, path: Path, data: DataIdentity, device: torch.device) -> Teacher:
        """Read a checkpoint. Raises ConfigError unless it was trained on images as in `data`."""
        checkpoint = Checkpoint.load(path)
        theirs = checkpoint.data
        if theirs.classes != data.classes:
            some = [
                f"{len(c)}: {', '.join(c[:3])}{', ...' * (len(c) > 3)}"
                for c in (theirs.classes, data.classes)
            ]
            raise ConfigError(
                f"--teacher {path}: knows other classes ({some[0]}) than the data ({some[1]});"
                " give one that was trained on this data set"
            )
        if theirs.input_shape != data.input_shape:
            sizes = ["x".join(map(str, shape)) for shape in (theirs.input_shape, data.input_shape)]
            raise ConfigError(
                f"--teacher {path}: takes images of {sizes[0]}, not {sizes[1]}; train one with the"
                " same --image-size"
            )
        if (fit := theirs.preprocessing.fit) != data.preprocessing.fit:
            raise ConfigError(
                f"--teacher {path}: was trained on images with --fit {fit}, not"
                f" {data.preprocessing.fit}; train one with the same --fit"
            )
        return cls(checkpoint, device)

    @property
    def state(self) -> dict[str, Tensor]:
        """All tensors of its network."""
        return dict(self._model.state_dict())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return logits `[N, classes]` for raw images uint8 `[N, C, H, W]`."""
        logits: Tensor = self._model(self._normalize(images))
        return logits


# -- Averaged weights: validated and saved in place of the trained ones, which gates, responses and
# the optimizer always see


class AveragedWeights:
    """The moving average of the parameters, and of the running statistics of norms, of a network.

    :class:`torch.optim.swa_utils.AveragedModel` would copy the network with its gates, and could
    not follow the removal of blocks; its update of a list of tensors is used here.

    `tensors` has the average by the names of the network's state dict; it begins with the tensors
    of `model`, and each step keeps the share `decay` of it.
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


# -- The step


class TrainingStep:
    """Turns a batch of raw images into a step of the optimizer.

    Labels are classes int64 `[N]`, or mixed ones float32 `[N, classes]`, which sum to 1. With
    `accumulate`, the gradients of the parts of a batch are added: each part is a forward pass of
    its own, for which batch norms compute their statistics, gates decide and record, and a
    sub-network is drawn.

    With a teacher, the loss is `(1 - w) cross-entropy + w distillation`, on the same augmented
    images. With `sub_networks`, one of them is trained in the same step, on the logits of the whole
    network. Averaged weights are updated at the end of the step.
    """

    def __init__(
        self,
        network: TrainedNetwork,
        normalize: Normalize,
        config: TrainingConfig,
        group: Group,
        device: torch.device,
        *,
        teacher: Teacher | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        self.optimizer = _optimizer(network, config, device)
        self.averaged = AveragedWeights(network.model, config.ema) if config.ema else None
        self._class_weights = class_weights
        self._accumulate = config.accumulate
        self._label_smoothing, self._clip = config.label_smoothing, config.clip_grad_norm
        self.teacher = teacher
        self._distillation = (config.distillation_weight, config.temperature)
        self.precision = TrainingPrecision(config.precision, device)
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
        if self.averaged is not None:
            self.averaged.update()
        return torch.stack(found).sum(dim=0)

    def rewrap(self) -> None:
        """Continue after blocks were removed from the network, or the teacher changed."""
        self._forward.rewrap()
        if self.averaged is not None:
            self.averaged.follow(self._network.model)

    def _add_gradients(self, batch: ImageSet, share: float) -> Tensor:
        """Add the gradients of a part of a batch, which is `share` of it; returns its result."""
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
    """Whether the steps of a run become a CUDA graph; `auto`: where it is possible.

    Raises ConfigError for `on` where it is not possible.
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

    After a change of the teacher of `step`, call :meth:`rewrap`. When the capture fails, `required`
    has it raise, rather than warn and continue without. `captures` counts the graphs made so far.
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

    def __call__(self, batch: ImageSet) -> Tensor:
        """Take one step, as :class:`TrainingStep`; the result is valid until the next call.

        Raises TrainingError when the capture fails and is required.
        """
        held = self._hold(batch)
        if self._replay is None and not self._failed and not self._warm_up:
            self._capture(held)
        if self._replay is not None:
            self._replay()
        else:
            self._warm_up = max(0, self._warm_up - 1)
            self._eagerly(held)
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
            # torch's random numbers would otherwise raise: they are left as in a capture.
            index = self._device.index
            generators = torch.cuda.default_generators
            generator = generators[torch.cuda.current_device() if index is None else index]
            generator.graphsafe_set_state(generator.clone_state())
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
