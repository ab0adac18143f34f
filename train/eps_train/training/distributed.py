"""Several processes that train one network together, as torchrun starts them.

Every process computes its share of each batch and has the same weights. The one of rank 0 leads: it
alone validates, decides which block is dead, writes, prints and draws; the others get its result,
or learn that it failed, and end too. One process is a group of its own, in which nothing is sent.
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
from eps_core.cli import launched
from eps_core.errors import ConfigError, EpsError, PeerError, TrainingError
from eps_train.gating.gate import EpsilonGate

T = TypeVar("T")

# The leader may validate or download for long; a process that died is torchrun's to notice.
_PATIENCE = timedelta(hours=6)
_CPU = torch.device("cpu")


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The processes that torchrun started, or this one alone, for the length of a block.

    Raises TrainingError when contact to the others is lost in it.
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
        if dist.is_initialized() and not (on_gpu and _failing()):
            dist.destroy_process_group()


def _join(gpu: torch.device | None) -> None:
    """Meet the other processes; tensors on the CPU can be sent beside those on a GPU."""
    store, rank, size = next(iter(rendezvous("env://", timeout=_PATIENCE)))
    if cli.on_one_machine():
        # On one machine torchrun has one store for all its restarts, in which the addresses of
        # processes that are gone still stand. On several, each has a count of its own.
        store = PrefixStore(f"eps-train-{cli.restarts()}", store)
    dist.init_process_group(
        "gloo" if gpu is None else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=size,
        timeout=_PATIENCE,
        device_id=gpu,
    )


class Group:
    """The processes of a run; `rank` of `size`, of which 0 leads.

    Attributes:
        world: torch's group of all processes; None where this one is alone.
    """

    def __init__(self, world: dist.ProcessGroup | None = None) -> None:
        self.world = world
        self.rank = 0 if world is None else dist.get_rank()
        self.size = 1 if world is None else dist.get_world_size()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # -- what one does for all -------------------------------------------------------------------

    def lead(self, work: Callable[[], T]) -> T:
        """Have the leader do `work`; every process gets its result, which must be picklable.

        When it fails, its error ends the leader, and PeerError the others.
        """
        if self.world is None:
            return work()
        outcome: list[Any] = [None, False]
        if not self.leads:
            dist.broadcast_object_list(outcome, src=0, device=_CPU)
            if not outcome[1]:
                raise PeerError(f"process {self.rank} ends because process 0 failed")
            result: T = outcome[0]
            return result
        try:
            outcome = [work(), True]
        finally:
            dist.broadcast_object_list(outcome, src=0, device=_CPU)
        led: T = outcome[0]
        return led

    def first(self, work: Callable[[], T]) -> T:
        """Have every process do `work`, the leader before the others: it may leave files there."""
        if self.world is None:
            return work()
        if not self.leads:
            self.lead(_nothing)
            return work()
        result: list[T] = []
        self.lead(lambda: result.append(work()))
        return result[0]

    @contextmanager
    def led(self, context: AbstractContextManager[object]) -> Iterator[None]:
        """A context that the leader alone enters, before any process goes on."""
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(context)

            self.lead(enter)
            yield

    # -- what all do together --------------------------------------------------------------------

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the processes, in its place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum of `tensor` over the processes, in its place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.world is not None:
            dist.all_reduce(tensor, operation)
        return tensor

    def post_largest(self, number: int) -> Callable[[], int]:
        """Start to find the largest `number` of all processes; the call of the result waits."""
        if self.world is None:
            return lambda: number
        value = torch.tensor(number)
        work = dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True)

        def wait() -> int:
            work.wait()
            return int(value)

        return wait

    def gather(self, value: T) -> list[T]:
        """`value`, picklable, of each process in the order of their ranks."""
        if self.world is None:
            return [value]
        # By way of the CPU: the objects are few and small, and a GPU is not kept waiting.
        values: list[Any] = [None] * self.size
        for rank in range(self.size):
            holder = [value]
            dist.broadcast_object_list(holder, src=rank, device=_CPU)
            values[rank] = holder[0]
        return values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the leader's values of these tensors."""
        if self.world is not None:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def fail(self, error: EpsError) -> NoReturn:
        """Raise an error that all processes have found: once, for the user, on the leader."""
        if self.leads:
            raise error
        raise PeerError(f"process {self.rank} ends with process 0: {error}")

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
    """The buffers of batch norm and its like; those of the gates are each process's own."""
    gates = (inner for inner in module.modules() if isinstance(inner, EpsilonGate))
    own = {id(buffer) for gate in gates for buffer in gate.buffers()}
    return [buffer for buffer in module.buffers() if id(buffer) not in own]


def _nothing() -> None:
    return None


def _failing() -> bool:
    return sys.exc_info()[0] is not None


# -- Ctrl-C and SIGTERM as a request: finish the step, save, go


class StopRequest:
    """While active, the first SIGINT or SIGTERM is noted; a second one acts as it always does.

    Under torchrun that one is noted too: it hands on a Ctrl-C that the terminal has already sent to
    all. A process that takes more than 30 s to go it kills.

    Only the main thread may enter it, as the signal module demands.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if not launched():
            self.__exit__()


class AgreedStop:
    """A request that reaches any process of a group, answered by all of them at the same step.

    The question of one step is answered with the next: what the processes have to say travels
    while they compute, so that nobody waits for it. Then `request.signal` is set in all of them.
    """

    def __init__(self, request: StopRequest, group: Group) -> None:
        self._request, self._group = request, group
        self._answer: Callable[[], int] | None = None
        self._agreed = False

    def __call__(self) -> bool:
        """Whether to stop now; every process has to ask, and equally often."""
        if self._group.world is None:
            return self._request()
        if self._agreed:
            return True
        asked = 0 if self._answer is None else self._answer()
        if asked:
            self._request.signal, self._agreed = asked, True
        else:
            self._answer = self._group.post_largest(self._request.signal or 0)
        return self._agreed

    def at_last(self) -> bool:
        """The same, at a point where the processes may wait for each other."""
        return self() or self()
