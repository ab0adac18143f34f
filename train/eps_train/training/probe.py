"""Trial steps before a run: how long a step takes, and the largest batch that fits in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from eps_core.errors import ConfigError
from eps_train.config import TrainingConfig
from eps_train.data.batches import Batches
from eps_train.data.dataset import Data, Outline
from eps_train.data.images import ImageSet
from eps_train.gating import rewriting
from eps_train.gating.nested import SubNetworks, smallest_size
from eps_train.models.resnets import Normalize
from eps_train.models.spec import NetworkSpec
from eps_train.training.distributed import ALONE
from eps_train.training.forward import cpu_threads
from eps_train.training.step import WARM_UP, GraphedStep, TrainingStep, build, use_cuda_graph

TRIAL_FLOPS = 4e9  # of the forward pass of a trial step on a CPU
TIMED = {"cpu": 1, "cuda": 10}  # steps
LEAST_STEPS = 64  # per epoch; with fewer, larger batches, a recipe's learning rates mean little
FREE_SHARE = 0.9  # of the free memory of a GPU that a trial step may take


def step_seconds(
    config: TrainingConfig, spec: NetworkSpec, data: Outline, device: torch.device, *, flops: int
) -> float:
    """Seconds of a step of the whole network, from a few steps on noise, without a teacher.

    On a CPU these are of fewer images, and their processor time is scaled up: that of an idle
    machine, whatever else runs now. `flops` are those of the network for one image. Raises
    ConfigError when `device` does not support the precision of the run, or is too slow to try.
    """
    images = config.batch_size
    if device.type == "cpu":
        images = min(images, max(2, int(TRIAL_FLOPS / flops)))
        if images * flops > 3 * TRIAL_FLOPS:
            raise ConfigError(f"{flops / 1e9:.1f} GFLOPs an image are too many to try on a CPU")
    trial = replace(config, compile=False, accumulate=1)
    batch = ImageSet(
        torch.randint(0, 256, (images, *data.shape), dtype=torch.uint8).to(device),
        torch.randint(0, data.classes, (images,)).to(device),
    )
    with cpu_threads(config.cpu_threads), _trial_step(trial, spec, data, device) as step:
        for _ in range(WARM_UP + 1 if device.type == "cuda" else 1):
            loss = step(batch)[0]
        float(loss)  # waits for a GPU
        on_cpu = device.type == "cpu"
        clock = time.process_time if on_cpu else time.perf_counter
        started, count = clock(), TIMED.get(device.type, 1)
        for _ in range(count):
            loss = step(batch)[0]
        float(loss)
        seconds = (clock() - started) / (torch.get_num_threads() if on_cpu else 1)
        return seconds / count * config.batch_size / images


def largest_batch(
    config: TrainingConfig, spec: NetworkSpec, data: Data, device: torch.device
) -> int:
    """The largest power of two that a step has memory for, with `LEAST_STEPS` steps in an epoch.

    On other devices than CUDA, whose memory is shared with everything else, it is the batch size of
    the configuration. Raises ConfigError when no batch fits.
    """
    if device.type != "cuda":
        return config.batch_size
    size = 1 << (max(2, len(data.train) // LEAST_STEPS).bit_length() - 1)
    with _margin(device):
        while size >= 2 * config.accumulate:
            if _fits(replace(config, batch_size=size), spec, data, device):
                return size
            torch.cuda.empty_cache()
            size //= 2
    raise ConfigError(
        f"--batch-size auto: not even {2 * size} images fit in the memory of {device}; give a"
        " larger --accumulate, or --precision bf16"
    )


def _fits(config: TrainingConfig, spec: NetworkSpec, data: Data, device: torch.device) -> bool:
    """Whether two steps, the second of which has all state of the optimizer, find memory."""
    try:
        batches = Batches(data, config, device)  # which holds its images on the device too
        batch = next(iter(batches.epoch(0, first=0)))
        with _trial_step(config, spec, data.identity.outline, device) as step:
            step(batch)
            float(step(batch)[0])  # waits for the GPU
    except torch.OutOfMemoryError:
        return False
    return True


@contextmanager
def _margin(device: torch.device) -> Iterator[None]:
    """Let this process take only part of the free memory, for a block."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(FREE_SHARE * (free + own) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


@contextmanager
def _trial_step(
    config: TrainingConfig, spec: NetworkSpec, data: Outline, device: torch.device
) -> Iterator[TrainingStep | GraphedStep]:
    """The training step of a run, without a teacher, within its precision."""
    network = build(spec, config, ALONE, device, classes=data.classes)
    network.train()
    channels = data.shape[0]
    normalize = Normalize([127.5] * channels, [64.0] * channels).to(device)
    step = TrainingStep(network, normalize, config, ALONE, device)
    if config.nested:
        stages = rewriting.stages(network.model, data.shape)
        step.sub_networks = SubNetworks(
            network.model, tuple(stages), smallest=min(smallest_size(stages), len(stages) - 1)
        )
    with step.precision.training():
        yield GraphedStep(step, device) if use_cuda_graph("auto", config, ALONE, device) else step
