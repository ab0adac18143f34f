"""Held-out images in an order of chance, as many of them as the time allows."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from eps_compact.forking import Answers, Forking, answer_all
from eps_train.evaluate import BATCH
from eps_train.images import ImageSet, Part
from eps_train.networks import Normalize

SEED = 0  # of the order
PROBE = 16  # images that the first, timed passes take
HELD = 1 << 30  # bytes of raw pixels that are held at most


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """Answers to the same images of the whole network, and by block of the one without it."""

    whole: Answers
    without: dict[str, Answers]
    samples: int


def ordered(part: Part) -> Part:
    """The part in an order of chance, always the same: its first images stand for all of it."""
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(part), generator=generator)
    return part[order[: max(1, HELD // math.prod(part[order[:1]].images.shape[1:]))]]


def leave_one_out(
    forking: Forking, normalize: Normalize, heldout: Part, *, seconds: float
) -> LeaveOneOut | None:
    """Leave every block out in turn, on as many of the held-out images as `seconds` allow.

    The number of images does not depend on what is found. They are taken in portions, each as
    large as the pace of the one before lets fit. None where not even the first fits.

    Args:
        forking: the network.
        normalize: on the network's device.
        heldout: images in an order of chance.
    """
    deadline = time.perf_counter() + seconds
    device = normalize.mean.device
    found: dict[str | None, Answers] = {block: Answers() for block in (*forking.blocks, None)}
    done, size = 0, min(PROBE, len(heldout))
    if pass_seconds(forking, normalize, heldout) * forking.passes > seconds:
        return None
    while size:
        began = time.perf_counter()
        portion = pixels(heldout, range(done, done + size), device)
        for block, answers in answer_all(forking, normalize, portion).items():
            found[block].extend(answers)
        done += size
        pace = (time.perf_counter() - began) / size
        fitting = int(0.9 * (deadline - time.perf_counter()) / pace)
        size = max(0, min(fitting, 4 * size, 2 * BATCH, len(heldout) - done))
    whole = found.pop(None)
    return LeaveOneOut(whole, {b: a for b, a in found.items() if b is not None}, done)


def pass_seconds(forking: Forking, normalize: Normalize, heldout: Part) -> float:
    """Seconds that the whole network takes for the first `PROBE` images, once it is warm."""
    probe = range(min(PROBE, len(heldout)))
    images = pixels(heldout, probe, normalize.mean.device).images
    taken = []
    for _ in range(2):
        began = time.perf_counter()
        forking.whole(normalize(images)).cpu()  # waits for the device
        taken.append(time.perf_counter() - began)
    return min(taken)


def pixels(part: Part, which: range, device: torch.device) -> ImageSet:
    """Some images of a part, held on the device."""
    portion = part[torch.arange(which.start, which.stop)]
    return ImageSet(portion.images, portion.labels).to(device)
