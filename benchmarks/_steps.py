"""Training step benchmark: time and memory of a step with gates against one without.

The steps are those of `eps-train --recipe cifar10-110`, auxiliary head and optimizer included, on
random pixels and with all gates open (every gate decides, none closes). The learning rate is 0, so
that all steps are equal.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _rounds import Options, Plan, in_turns, ratio, seconds_of
from torch import Tensor

from eps_core.preprocessing import Preprocessing
from eps_train.config import TrainingConfig
from eps_train.data.dataset import Data, split
from eps_train.data.images import ImageSet, RawDataset
from eps_train.recipes import cifar
from eps_train.training import step
from eps_train.training.step import GraphedStep, TrainingStep, set_lr
from eps_train.training.trainer import Trainer

LIMIT = 1.04  # of a step with gates over one without
OPEN = 1e-30  # an epsilon below the response of every branch
_GPU_STEPS = 10  # timed together, so that the device synchronization is not part of each step
_WARM_UP = 5  # the last of them is a replay, with a CUDA graph


def gate(options: Options) -> Plan:
    """Time of a step with open gates over the time of one without gates, and images per second."""
    sides = {side: _Stepper(_trainer(side, options), options) for side in ("with", "without")}
    if options.cuda_graph:
        for side in ("with", "without"):
            stepper = _Stepper(_trainer(side, options), options, graph=True)
            sides[f"graph {side}"] = stepper
    steps = _GPU_STEPS if options.device.type == "cuda" else 1
    for _ in range(_WARM_UP):
        once = sum(seconds_of(stepper, options.device) for stepper in sides.values())

    def timed(stepper: Callable[[], object]) -> Callable[[], float]:
        def block() -> None:
            for _ in range(steps):
                stepper()

        return lambda: seconds_of(block, options.device) / steps

    def measure() -> dict[str, Any]:
        times = in_turns({n: timed(s) for n, s in sides.items()}, rounds=options.rounds)
        seconds = {side: statistics.median(found) for side, found in times.items()}
        found = {
            **_what(options),
            "milliseconds": {side: 1e3 * value for side, value in seconds.items()},
            "images_per_second": {n: options.batch_size / value for n, value in seconds.items()},
            **ratio(times["with"], times["without"]),
            "limit": LIMIT,
        }
        if options.cuda_graph:
            found["graph"] = ratio(times["graph with"], times["graph without"])
            found["graph_over_eager"] = ratio(times["graph with"], times["with"])
        return found

    return Plan(once * steps * options.rounds, measure)


def memory(options: Options) -> Plan:
    """Memory of a step with open gates over that of one without gates."""

    def measure() -> dict[str, Any]:
        kind = _gpu_peak if options.device.type == "cuda" else _saved_bytes
        found = {side: kind(side, options) for side in ("with", "without")}
        return {
            **_what(options),
            "measured": " ".join((kind.__doc__ or "").split()),
            "bytes": found,
            "ratio": found["with"] / found["without"],
        }

    return Plan(20.0, measure)


class _Stepper:
    """Repeats one training step."""

    def __init__(self, trainer: Trainer, options: Options, *, graph: bool = False) -> None:
        self._trainer, self._precision = trainer, trainer.training_step.precision
        self._step: TrainingStep | GraphedStep = trainer.training_step
        if graph:
            self._step = GraphedStep(trainer.training_step, options.device, required=True)
        self._batch = next(iter(trainer.batches.epoch(0, first=0)))
        assert len(self._batch) == options.batch_size
        trainer.model.train()
        set_lr(trainer.optimizer, 0.0)
        for gate in trainer.pruner.gates.values():
            gate.set_epsilon(OPEN)

    def __call__(self) -> None:
        with self._precision.training():
            self._step(self._batch)

    @property
    def kept(self) -> set[int]:
        """Where the parameters lie, which are no cost of the step."""
        tensors = self._trainer.network.state_dict().values()
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _saved_bytes(side: str, options: Options) -> int:
    """Bytes that the forward pass of one step keeps for the backward pass, each tensor once,
    parameters left out."""
    stepper = _Stepper(_trainer(side, options), options)
    parameters = stepper.kept
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        stepper()
    return sum(storages.values())


def _gpu_peak(side: str, options: Options) -> int:
    """Most bytes that torch had allocated on the GPU at once in a step, network and optimizer
    included."""
    gc.collect()  # frees the memory of the other side
    before = torch.cuda.memory_allocated(options.device)
    stepper = _Stepper(_trainer(side, options), options)
    for _ in range(_WARM_UP):
        stepper()
    torch.cuda.reset_peak_memory_stats(options.device)
    stepper()
    return torch.cuda.max_memory_allocated(options.device) - before


def _what(options: Options) -> dict[str, Any]:
    return {
        "model": f"cifar:{options.depth}x16",
        "image": [3, 32, 32],
        "batch_size": options.batch_size,
        "precision": options.precision,
        "compile": options.compile,
        "memory_format": "contiguous" if options.contiguous else "channels_last",
    }


def _trainer(side: str, options: Options) -> Trainer:
    config = replace(
        cifar("cifar10-110", dataset="cifar10", depth=110),
        model=f"cifar:{options.depth}x16",
        batch_size=options.batch_size,
        precision=options.precision,
        compile=options.compile,
    )
    order = torch.contiguous_format if options.contiguous else torch.channels_last
    with mock.patch.object(step, "MEMORY_FORMAT", order):
        return Trainer(
            config if side == "with" else config.baseline(),
            random_images(config, options.batch_size),
            best_path=Path("unused"),
            last_path=Path("unused"),
            device=options.device,
            cuda_graph="off",
        )


def random_images(config: TrainingConfig, train: int) -> Data:
    """Random pixels in the shape of CIFAR-10: `train` images to train on, 20 more to validate."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> ImageSet:
        pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return ImageSet(pixels, torch.arange(count) % 10)

    source = RawDataset(
        train=some(train),
        validation=some(10),
        test=some(10),
        classes=tuple("0123456789"),
        preprocessing=Preprocessing(resize=(32, 32), crop=(32, 32), color="rgb"),
    )
    return split(source, name="random pixels", normalization=config.normalization)
