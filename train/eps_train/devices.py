"""Which device a process trains on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eps_train import launcher
from eps_train.errors import ConfigError

_CHOICES = "auto, cpu, cuda, cuda:N or mps"


def choose(name: str) -> torch.device:
    """The device that `--device` names; `auto` is a CUDA device if there is one.

    Under torchrun `cuda` is the device of the process's number on its machine. Raises ConfigError
    for one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; write {_CHOICES}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        return _cuda(device)
    if device.type == "mps":
        return _mps()
    raise ConfigError(f"--device {name}: not supported; write {_CHOICES}")


def _cuda(device: torch.device) -> torch.device:
    present = torch.cuda.device_count()
    if not launcher.launched():
        if (device.index or 0) >= present:
            raise ConfigError(
                f"--device {device}: torch sees {present} CUDA devices here; use --device cpu"
            )
        return device
    if device.index is not None:
        raise ConfigError(
            f"--device {device}: torchrun gives each process a device of its own; write cuda"
        )
    index = int(os.environ["LOCAL_RANK"])
    if index >= present:
        raise ConfigError(
            f"--device cuda: torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, and torch"
            f" sees {present} CUDA devices here; start as many as there are, or use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _mps() -> torch.device:
    if not torch.backends.mps.is_available():
        raise ConfigError("--device mps: torch sees no Apple GPU here; use --device cpu")
    if launcher.launched():
        raise ConfigError("--device mps: one process alone can use it; leave torchrun out")
    return torch.device("mps")


def wide_float(device: torch.device) -> torch.dtype:
    """The type in which a long sum is kept: float64, but for Apple GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Have torch use so many threads on the CPU in this block; 0 leaves their number as it is.

    Sums depend on it. More than one make small networks no faster, and on a busy machine they
    wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
