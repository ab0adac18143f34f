"""Functions in several processes that form a group, as torchrun would start them, and commands."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
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
    _serve()
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


def start(main: Callable[[], object], *args: object, cwd: Path, stderr: Path) -> BaseProcess:
    """Start a console script in a process of its own, without the seconds that imports take.

    Args:
        main: a function that a module has at its top; a test may wrap the script's.
        stderr: file or named pipe that receives both standard streams.
    """
    _serve()
    process = _context.Process(target=_command, args=(main, [*map(str, args)], cwd, stderr))
    process.start()
    return process


def _command(main: Callable[[], object], args: list[str], cwd: Path, stderr: Path) -> None:
    # The streams of before may be files with a position, which a pipe has not.
    sys.stdout = sys.stderr = stderr.open("w", buffering=1)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv[:] = ["command", *args]
    main()


def _serve() -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


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
