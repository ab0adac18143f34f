"""Data-parallel training over the processes that torchrun starts, and requests to stop.

Every process computes its share of each batch and has the same weights. The process of rank 0 is
the leader: it alone validates, decides which block is dead, writes and prints; the others receive
its result, or end when it fails. A single process is a group of its own, in which nothing is sent.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from eps_core import cli
from eps_core.errors import ConfigError, EpsError, PeerError, TrainingError
from eps_train.gating.gate import EpsilonGate

T = TypeVar("T")

# The leader may validate or download for long; torchrun notices a process that died.
_TIMEOUT = timedelta(hours=6)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Join the processes that torchrun started, for the length of a block; without it, this one.

    Raises TrainingError when contact to the others is lost in the block.
    """
    if not cli.launched():
        yield Group()
        return
    if not dist.is_available():
        raise ConfigError("torchrun: this build of torch has no torch.distributed")
    on_gpu = device.type == "cuda"
    group = Group()
    try:
        _join(device if on_gpu else None)
        group = Group(dist.group.WORLD)
        yield group
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        raise TrainingError(
            f"process {cli.rank()} lost contact with another process of this run, which says"
            " why, unless it was killed; --resume goes on from the last epoch that was saved"
        ) from error
    finally:
        # With gloo, a group that is still held somewhere aborts the process at its exit.
        group.world = None
        # After a failure NCCL may wait for ever for the others; the end of the process ends it too.
        failing = sys.exc_info()[0] is not None
        if dist.is_initialized() and not (on_gpu and failing):
            dist.destroy_process_group()


def _join(gpu: torch.device | None) -> None:
    """Initialise the process group; with a GPU, tensors on the CPU can be sent as well."""
    store, rank, size = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    if cli.on_one_machine():
        # On one machine torchrun has one store for all its restarts, which still holds the
        # addresses of processes that are gone. On several, each has a count of its own.
        store = PrefixStore(f"eps-train-{cli.restarts()}", store)
    dist.init_process_group(
        "gloo" if gpu is None else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
        device_id=gpu,
    )


class Group:
    """The processes of a run: `rank` of `size`, of which 0 is the leader.

    `world` is torch's group of all processes; None where this one is alone.
    """

    def __init__(self, world: dist.ProcessGroup | None = None) -> None:
        self.world = world
        self.rank = 0 if world is None else dist.get_rank()
        self.size = 1 if world is None else dist.get_world_size()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def _object_device(self) -> torch.device | None:
        """Where objects are sent from: the CPU, so that no GPU is kept waiting.

        The group of a user's loop may have NCCL alone; then torch chooses.
        """
        return torch.device("cpu") if "cpu" in dist.get_backend_config(self.world) else None

    # -- what the leader does for all

    def lead(self, work: Callable[[], T]) -> T:
        """Run `work` on the leader; every process returns its result, which must be picklable.

        When it fails, its error is raised on the leader, and PeerError on the others.
        """
        if self.world is None:
            return work()
        outcome: list[Any] = [None, False]
        try:
            if self.leads:
                outcome = [work(), True]
        finally:
            dist.broadcast_object_list(outcome, src=0, device=self._object_device)
        if not outcome[1]:
            raise PeerError(f"process {self.rank} ends because process 0 failed")
        result: T = outcome[0]
        return result

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` on every process, on the leader before the others: it may leave files."""
        result: list[T] = []
        self.lead(lambda: result.append(work()))
        return result[0] if result else work()

    @contextmanager
    def led(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Enter a context on the leader alone, before any process goes on."""
        with ExitStack() as stack:
            self.lead(lambda: stack.enter_context(context))
            yield

    def fail(self, error: EpsError) -> NoReturn:
        """Raise an error that all processes have found: itself on the leader, else PeerError."""
        if self.leads:
            raise error
        raise PeerError(f"process {self.rank} ends with process 0: {error}")

    # -- collectives

    def add(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the processes, in place."""
        if self.world is not None:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum of `tensor` over the processes, in place."""
        if self.world is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def post_largest(self, number: int) -> Callable[[], int]:
        """Start to find the largest `number` of all processes; calling the result waits for it."""
        if self.world is None:
            return lambda: number
        value = torch.tensor(number)
        work = dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True)

        def wait() -> int:
            work.wait()
            return int(value)

        return wait

    def gather(self, value: T) -> list[T]:
        """Collect the picklable `value` of each process, in the order of their ranks."""
        if self.world is None:
            return [value]
        values: list[Any] = [None] * self.size
        for rank in range(self.size):
            holder = [value]
            dist.broadcast_object_list(holder, src=rank, device=self._object_device)
            values[rank] = holder[0]
        return values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Copy the leader's values of these tensors to every process."""
        if self.world is not None:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def part(self, count: int) -> slice:
        """This process's contiguous share of the `count` images of a batch.

        Raises ConfigError when the processes cannot share them evenly, two or more for each.
        """
        share, rest = divmod(count, self.size)
        if rest or share < 2:
            self.fail(
                ConfigError(
                    f"--batch-size: {self.size} processes cannot share {count} images (a batch, or"
                    " all for training where they are fewer) evenly, two or more each; take a"
                    f" multiple of {self.size} from {2 * self.size} up"
                )
            )
        return slice(self.rank * share, (self.rank + 1) * share)


ALONE = Group()  # this process, whatever torchrun has started


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Buffers of batch norm and similar layers; those of the gates differ between processes."""
    gates = (inner for inner in module.modules() if isinstance(inner, EpsilonGate))
    own = {id(buffer) for gate in gates for buffer in gate.buffers()}
    return [buffer for buffer in module.buffers() if id(buffer) not in own]


class StopRequest:
    """A request by SIGINT or SIGTERM to stop after the current step, the same in all processes.

    As a context it notes the first signal; a second one acts as usual. Under torchrun a second one
    is noted too, because torchrun passes on a Ctrl-C that the terminal has already sent to all; it
    kills a process that takes more than 30 s to end. Only the main thread may enter it, as the
    signal module demands. `signal` is the one received, 0: none; once a call returned true, by any
    process of the group.
    """

    def __init__(self, group: Group = ALONE) -> None:
        self.signal = 0
        self._group = group
        self._answer: Callable[[], int] = lambda: 0
        self._agreed = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether to stop now; every process has to ask, and equally often.

        The question of one step is answered at the next: the signals are sent while the processes
        compute, so that no process waits for it.
        """
        if self._group.world is None:
            return self.signal > 0
        if not self._agreed:
            if asked := self._answer():
                self.signal, self._agreed = asked, True
            else:
                self._answer = self._group.post_largest(self.signal)
        return self._agreed

    def wait(self) -> bool:
        """The answer for all signals so far, at a point where processes may wait for each other."""
        return self() or self()

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if not cli.launched():
            self.__exit__()
