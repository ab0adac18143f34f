"""Worker processes that read from disk while the device computes."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eps_train.errors import DataError

Request = TypeVar("Request")
Answer = tuple[Tensor, ...]

MOST_WORKERS = 16


def worker_count() -> int:
    """One worker a core, shared out among the processes of a `torchrun`; none on one core."""
    affinity = getattr(os, "sched_getaffinity", None)  # what a container may use; Linux has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    workers = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(workers, MOST_WORKERS) if workers > 1 else 0


def load(
    read: Callable[[Request], Answer],
    requests: Iterable[Request],
    *,
    pin: bool = False,
    workers: int | None = None,
) -> Iterator[Answer]:
    """Answer requests in worker processes, in order, some ahead of time.

    The workers live until the last answer, or until this iterator is dropped.

    Args:
        read: from a request to tensors, by that request alone; it is sent to the workers, so it
            must be picklable.
        requests: what to read.
        pin: hand the tensors over in pinned memory, from where a GPU fetches them by itself.
        workers: processes; 0 reads in this one; None: :func:`worker_count`.

    Raises:
        DataError: what `read` raised, or that a worker died.
    """
    loader: DataLoader[Any] = DataLoader(
        _Reading(read),
        batch_size=None,
        sampler=requests,
        num_workers=worker_count() if workers is None else workers,
        pin_memory=pin,
        collate_fn=_as_it_is,
        worker_init_fn=_prepare_worker,
        # Its own, else every start would draw from the generator that networks draw from.
        generator=torch.Generator(),
    )
    answers = iter(loader)
    while True:
        try:
            answer = next(answers)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a process that reads the images has died ({str(error).splitlines()[0]});"
                " in a container, give it more shared memory (--shm-size 8g)"
            ) from None
        if isinstance(answer, str):
            raise DataError(answer)
        yield answer


class _Reading(Dataset[Any], Generic[Request]):
    def __init__(self, read: Callable[[Request], Answer]) -> None:
        self._read = read

    def __getitem__(self, request: Request) -> Answer | str:
        try:
            return self._read(request)
        except DataError as error:  # raised in a worker, it would arrive with a stack trace in it
            return str(error)


def _as_it_is(answer: Any) -> Any:
    return answer


def _prepare_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process, and Pillow's remarks on odd files unsaid."""
    # It reaches every process of a terminal, but the main one still wants to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")
