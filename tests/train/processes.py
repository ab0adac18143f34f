"""Running a function in several processes that form a group, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from eps_core.errors import EpsError
from eps_train.training import distributed, forward

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds

# One server imports what takes long, once; the processes are its forks.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "tests.train.processes",  # with it `tests` is found, which pytest keeps off the path
        "pytest",
        "sklearn.datasets",
        "eps_train.training.run",
        "torch._dynamo",
        "torch.distributed.optim",
    ]
)


def run(
    function: Callable[..., Any], *arguments: Any, size: int = 2, device: str = "cpu"
) -> list[Any]:
    """`function(group, *arguments)` in `size` processes; what each returns, or raises.

    The function has to be one that a module has at its top.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    ends, processes = [], []
    for rank in range(size):
        ours, theirs = _context.Pipe()
        arguments_of_one = (theirs, function, arguments, rank, size, port, device)
        processes.append(_context.Process(target=_main, args=arguments_of_one))
        processes[-1].start()
        theirs.close()
        ends.append(ours)
    try:
        answers = [
            pickle.loads(end.recv_bytes()) if end.poll(PATIENCE) else AssertionError("hangs")
            for end in ends
        ]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    for answer in answers:
        assert not isinstance(answer, AssertionError), answer
    return answers


def _main(
    end: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    size: int,
    port: int,
    device: str,
) -> None:
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        with distributed.joined(forward.choose(device)) as group:
            # By value: torch would have shared the memory of tensors with a process that ends.
            end.send_bytes(pickle.dumps(function(group, *arguments)))
    except Exception as error:
        known = isinstance(error, EpsError)
        end.send_bytes(pickle.dumps(error if known else AssertionError(traceback.format_exc())))
