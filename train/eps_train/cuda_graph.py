"""A training step as one CUDA graph: the host launches one graph instead of a thousand kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, fx

from eps_train.config import TrainingConfig
from eps_train.distributed import Group
from eps_train.errors import ConfigError, TrainingError
from eps_train.images import ImageSet
from eps_train.precision import Precision
from eps_train.step import TrainingStep

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
