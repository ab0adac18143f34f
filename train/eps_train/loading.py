"""Worker processes that read from disk while the device computes."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eps_train import memory
from eps_train.errors import DataError, reader_death

Request = TypeVar("Request")
Answer = TypeVar("Answer")

MOST_WORKERS = 16
_AHEAD = 2  # answers that each worker may be ahead of who asked
_BESIDES = 2  # answers in use or on the way, however many workers there are


def worker_count() -> int:
    """One worker a core, shared out among the processes of a `torchrun`; none on one core."""
    affinity = getattr(os, "sched_getaffinity", None)  # what a container may use; Linux has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    workers = cores // memory.local_processes()
    return min(workers, MOST_WORKERS) if workers > 1 else 0


def fitting_answer(wanted: int, smallest: int) -> int:
    """Bytes of an answer, `wanted` at most, of which all workers find room in shared memory.

    It is not below `smallest`, for which :func:`load` may have to take fewer workers.
    """
    room = memory.shared()
    if room is None:
        return wanted
    share = room // memory.local_processes() // (_AHEAD * worker_count() + _BESIDES)
    return max(smallest, min(wanted, share))


def _fitting_workers(wanted: int, answer_bytes: int) -> int:
    """How many workers find room for their answers in shared memory, `wanted` at most."""
    room = memory.shared()
    if room is None or not answer_bytes:
        return wanted
    answers = room // memory.local_processes() // answer_bytes
    return max(0, min(wanted, (answers - _BESIDES) // _AHEAD))


def load(
    read: Callable[[Request], Answer],
    requests: Iterable[Request],
    *,
    pin: bool = False,
    workers: int | None = None,
    answer_bytes: int = 0,
) -> Iterator[Answer]:
    """Answer requests in worker processes, in order, some ahead of time.

    The workers live until the last answer, or until this iterator is dropped.

    Args:
        read: from a request to an answer, tensors perhaps among it, by that request alone; it is
            sent to the workers, so it must be picklable.
        requests: what to read.
        pin: hand the tensors over in pinned memory, from where a GPU fetches them by itself.
        workers: processes; 0 reads in this one; None: :func:`worker_count`.
        answer_bytes: of the tensors in an answer; where shared memory is short (64 MB in a
            container, if nothing is said), fewer workers are started, or none.

    Raises:
        DataError: what `read` raised, or that a worker died, or that shared memory ran out.
    """
    wanted = worker_count() if workers is None else workers
    count = _fitting_workers(wanted, answer_bytes)
    loader: DataLoader[Any] = DataLoader(
        _Reading(read, shared=count > 0),
        batch_size=None,
        sampler=map(_sent, requests),
        num_workers=count,
        prefetch_factor=_AHEAD if count else None,
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
            if (death := reader_death(error)) is None:
                raise
            raise DataError(death) from None
        if isinstance(answer, _Refusal):
            raise DataError(answer)
        yield answer


class _Refusal(str):
    """The message of a DataError: raised in a worker, it would arrive with a stack trace in it."""


class _Reading(Dataset[Any], Generic[Request, Answer]):
    def __init__(self, read: Callable[[Request], Answer], *, shared: bool) -> None:
        self._read, self._shared = read, shared

    def __getitem__(self, request: Request) -> Answer | _Refusal:
        try:
            answer = self._read(_received(request))
            if self._shared:
                _share(answer)
        except DataError as error:
            return _Refusal(error)
        return answer


def _sent(request: Any) -> Any:
    """A request without tensors, which would be sent by way of shared memory, as arrays instead."""
    if isinstance(request, tuple):
        return tuple(item.numpy() if isinstance(item, Tensor) else item for item in request)
    return request


def _received(request: Any) -> Any:
    """Inverse of :func:`_sent`."""
    if isinstance(request, tuple):
        return tuple(
            torch.from_numpy(item) if isinstance(item, np.ndarray) else item for item in request
        )
    return request


def _share(answer: Any) -> None:
    """Move the tensors of an answer into shared memory.

    torch would do so in a thread behind the worker, where it prints what went wrong and drops the
    answer, for which the main process then waits for ever. Raises DataError.
    """
    try:
        for item in answer:
            if isinstance(item, Tensor):
                item.share_memory_()
    except RuntimeError as error:
        raise DataError(
            "shared memory is full of images that were read ahead"
            f" ({str(error).splitlines()[0]}); in a container, give it more (--shm-size 8g)"
        ) from None


def _as_it_is(answer: Any) -> Any:
    return answer


def _prepare_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process, and Pillow's remarks on odd files unsaid."""
    # It reaches every process of a terminal, but the main one still wants to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")
