"""Shared parts of the training benchmarks: interleaved rounds, ratios, machine facts."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESAMPLES = 1000  # seed of the bootstrap interval


class NotRun(Exception):
    """Raised with the reason why a section cannot run on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Command-line options."""

    device: torch.device
    depth: int
    batch_size: int
    rounds: int
    precision: str
    compile: bool
    cuda_graph: bool
    contiguous: bool
    seeds: tuple[int, ...]
    timm_checkout: Path | None
    timm_python: Path | None
    timm_note: str | None
    timm_model: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A section that is set up and warmed up: estimated seconds, and the function to run."""

    seconds: float
    measure: Callable[[], dict[str, Any]]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of `work`, including a device synchronization."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def in_turns(sides: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Return values of each side in each round; the first side rotates."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for index in range(rounds):
        start = index % len(sides)
        for side in (*list(sides)[start:], *list(sides)[:start]):
            found[side].append(sides[side]())
    return found


def ratio(top: list[float], bottom: list[float]) -> dict[str, Any]:
    """Median over the rounds of the ratio of two sides, its 95 % interval, and the quartiles.

    It uses each round's own ratio, not the ratio of the medians: both sides of a round were
    measured right after each other, while a shared machine may be twice as slow in the next round.
    """
    each = np.array(top) / np.array(bottom)
    picks = np.random.default_rng(0).integers(len(each), size=(RESAMPLES, len(each)))
    low, high = np.percentile(np.median(each[picks], axis=1), [2.5, 97.5])
    return {
        "ratio": float(np.median(each)),
        "interval": [float(low), float(high)],
        "quartiles": np.percentile(each, [25, 75]).tolist(),
        "rounds": len(each),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and software of the measurement."""
    on_gpu = device.type == "cuda"
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    except OSError:
        named = []
    return named[0].strip() if named else platform.processor() or platform.machine()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
