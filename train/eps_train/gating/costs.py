"""Block costs: what removing a block saves, counted or measured.

Parameters and FLOPs are counted on the meta device. Times are measured by a :class:`Timer`, which
times networks as they ship: each kind of block once, on one image a call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from eps_core.cli import Log, missing_package
from eps_core.errors import ConfigError
from eps_core.machine import MachineMonitor
from eps_core.stats import Interval, median, ratio_of_medians
from eps_core.timing import Runs, interleave, wall_clock
from eps_train.data.dataset import DataIdentity
from eps_train.gating import rewriting
from eps_train.gating.folding import fold
from eps_train.gating.rewriting import branch_nodes, branch_parameters
from eps_train.gating.targets import BlockCosts, Currency
from eps_train.models.resnets import FromPixels
from eps_train.models.spec import cost, count_parameters
from eps_train.training.forward import cpu_threads

# -- The cost of each residual branch: what removing that block alone saves


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchCost:
    """Cost of one block's branch, for one float32 image.

    Attributes:
        block: its name.
        parameters: learned parameters that the removal of this block alone saves.
        flops: as `eps_train.models.spec` counts them: what the removal saves.
        activation_bytes: size of all tensors that the branch computes.
        kind: equal for blocks of the same layers on the same shapes, which take the same time.
    """

    block: str
    parameters: int
    flops: int
    activation_bytes: int
    kind: str


def branch_costs(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> list[BranchCost]:
    """Return every gated block's cost, in the order of computation, from a run on the meta device.

    `input_shape` is that of an image, `[C, H, W]`.
    """
    skeleton = copy.deepcopy(model).to("meta").eval()
    shapes = _ShapeRecorder(skeleton)
    with torch.no_grad(), shapes.counter:
        shapes.run(torch.empty((1, *input_shape), device="meta"))
    parameters = branch_parameters(model)
    costs = []
    for node, block in rewriting.gate_nodes(skeleton).items():
        branch = branch_nodes(node)
        layers = [*branch, *node.all_input_nodes]
        costs.append(
            BranchCost(
                block=block,
                parameters=parameters[block],
                flops=sum(shapes.flops[member] for member in branch),
                activation_bytes=sum(shapes.bytes[member] for member in branch),
                kind="; ".join(f"{shapes.layer(n)}@{shapes.shape[n]}" for n in layers),
            )
        )
    return costs


class _ShapeRecorder(fx.Interpreter):
    """Records every node's FLOPs, bytes and shapes."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.counter = FlopCounterMode(display=False)
        self.flops: dict[fx.Node, int] = {}
        self.bytes: dict[fx.Node, int] = {}
        self.shape: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> object:
        before = self.counter.get_total_flops()
        result: object = super().run_node(n)
        self.flops[n] = self.counter.get_total_flops() - before
        # Tuples of tensors are unpacked by nodes of their own, which are counted instead. A step
        # that returns its input (an identity, an in-place operation) takes no memory.
        same = any(result is self.env.get(node) for node in n.all_input_nodes)
        tensors = [result] if isinstance(result, Tensor) else []
        self.bytes[n] = 0 if same else sum(tensor.nbytes for tensor in tensors)
        self.shape[n] = ",".join("x".join(map(str, tensor.shape)) for tensor in tensors)
        return result

    def layer(self, node: fx.Node) -> str:
        """What the node computes, as far as its time depends on it."""
        if node.op == "call_module":
            return repr(self.submodules[str(node.target)])
        return getattr(node.target, "__name__", str(node.target))


def count_costs(
    model: fx.GraphModule, input_shape: tuple[int, int, int], currency: Currency
) -> BlockCosts:
    """Count the parameters or the FLOPs of a network with gates and of its blocks.

    `input_shape` is that of an image, `[C, H, W]`.
    """
    if currency == "parameters":
        whole, blocks = count_parameters(model), branch_parameters(model)
    else:
        assert currency == "flops"
        whole = cost(model, input_shape).flops
        blocks = {found.block: found.flops for found in branch_costs(model, input_shape)}
    return BlockCosts(currency=currency, whole=whole, blocks=blocks)


# -- Timing: networks without some of their blocks, interleaved, one image a call
#
# What is timed is what ships: folded, behind its normalisation, without gates and taps.

SECONDS_EACH = 0.5  # of timing for each network
# Takes, of each network, the blocks that it lacks; returns each one's milliseconds, see Timings.
Measure = Callable[[Sequence[Collection[str]]], list[Runs]]


class Timer(Protocol):
    """Times a network against what is left of it without some of its blocks.

    Attributes:
        name: runtime and conditions, for reports.
    """

    @property
    def name(self) -> str: ...

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        """Prepare what does not depend on the blocks to be left out.

        Args:
            model: a network with gates at all blocks that may be left out.
            image: one raw image, uint8 `[1, C, H, W]`, on the network's device.

        Raises:
            GraphError: the runtime cannot run this network.
        """


class TorchTimer:
    """Times networks in PyTorch: eager, channels-last, one thread, one image a call.

    Args:
        identity: the data that the networks were trained on.
    """

    name = f"torch {torch.__version__} eager, one thread, batch 1"

    def __init__(self, identity: DataIdentity) -> None:
        self._identity = identity

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        if image.is_cuda:
            device = torch.cuda.get_device_name(image.device)
            self.name = f"torch {torch.__version__} eager on {device}, batch 1"
        folded, _ = fold(model)
        folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def call(network: nn.Module) -> None:
            network(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)

        @torch.no_grad()
        def measure(without: Sequence[Collection[str]]) -> list[Runs]:
            networks = [
                FromPixels(plain(folded, blocks), self._identity).to(image.device)
                for blocks in without
            ]
            with cpu_threads(1):
                return interleaved([partial(call, network) for network in networks])

        return measure


def interleaved(calls: Sequence[Callable[[], object]]) -> list[Runs]:
    """Time calls that return when their work is done, in turns; `SECONDS_EACH` for each of them."""
    return interleave([wall_clock(call) for call in calls], budget=SECONDS_EACH * len(calls)).times


def block_times(
    costs: Iterable[BranchCost], measure: Measure
) -> tuple[Interval, dict[str, Interval]]:
    """Return the milliseconds of a call, and those that each block takes, with 95 % intervals.

    Each kind of block is timed once: the network without all blocks of that kind, as a share of
    the whole network beside it. What is saved is divided by their number. `costs` are those of all
    blocks of the network that `measure` was loaded with.
    """
    kinds: dict[str, list[str]] = {}
    for found in costs:
        kinds.setdefault(found.kind, []).append(found.block)
    whole, *less = measure([(), *kinds.values()])
    call = median(whole)
    times: dict[str, Interval] = {}
    for blocks, runs in zip(kinds.values(), less, strict=True):
        left, unit = ratio_of_medians(runs, whole), call.value / len(blocks)
        each = Interval((1 - left.value) * unit, (1 - left.high) * unit, (1 - left.low) * unit)
        times |= dict.fromkeys(blocks, each)
    return call, times


def measure_latency(
    model: fx.GraphModule, image: Tensor, timer: Timer, measure: Measure | None = None
) -> BlockCosts:
    """Measure the latency of a network with gates and of its blocks.

    The network without any block is timed too, and the times of the blocks are scaled so that they
    add up to what it saves: alone, a block may save more or less than beside others. A block whose
    time is lost in the noise saves nothing.

    Args:
        model, image: as `Timer.load` takes them.
        measure: what it returned for them, where the caller has it; by default it is called.
    """
    measure = measure or timer.load(model, image)
    _, channels, height, width = image.shape
    whole, times = block_times(branch_costs(model, (channels, height, width)), measure)
    saved = {block: max(found.value, 0.0) for block, found in times.items()}
    together = max(1 - latency_share(measure, list(saved)).value, 0.0) * whole.value
    scale = together / max(sum(saved.values()), 1e-9)
    blocks = {block: scale * found for block, found in saved.items()}
    return BlockCosts(currency="latency", whole=whole.value, blocks=blocks, timer=timer.name)


def latency_share(measure: Measure, removed: Collection[str]) -> Interval:
    """Measure the time of a network without some blocks, as a share of the whole network's."""
    whole, less = measure([(), removed])
    return ratio_of_medians(less, whole)


def plain(model: fx.GraphModule, without: Iterable[str] = ()) -> fx.GraphModule:
    """Return the network as it ships, without these blocks; it shares its tensors with `model`."""
    return rewriting.drop_taps(rewriting.drop_gates(rewriting.remove_blocks(model, without))).eval()


# The engines of `eps_deploy` serve the networks, so their times count. That package imports this
# one and not the other way round: its timer is found by entry point.

GROUP = "eps_resnet.block_timers"  # entry points: callables from a DataIdentity to a Timer
PREFERRED = "ort"


def make_timer(name: str | None, identity: DataIdentity, report: Log = lambda line: None) -> Timer:
    """Return the timer of `--timer`; by default ONNX Runtime's if it is installed.

    Args:
        name: `ort`, `torch`, or None.
        identity: the data that the networks were trained on.
        report: receives a line that says why torch is used instead, and one, once, if the machine
            was too busy while networks were timed.

    Raises:
        ConfigError: the named runtime is not installed; the line names the extra.
    """
    return _WatchedTimer(_find_timer(name, identity, report), report)


def _find_timer(name: str | None, identity: DataIdentity, report: Log) -> Timer:
    if name == "torch":
        return TorchTimer(identity)
    wanted = name or PREFERRED
    entry = next(iter(entry_points(group=GROUP, name=wanted)), None)
    try:
        if entry is not None:
            timer: Callable[[DataIdentity], Timer] = entry.load()
            return timer(identity)
        problem = "this installation of eps-resnet does not offer it; install it again,"
    except ModuleNotFoundError as error:
        problem = f"{missing_package(error)},"
    problem = f"--timer {wanted}: {problem} or give --timer torch"
    if name is not None:
        raise ConfigError(problem)
    report(f"times are torch's: {problem}")
    return TorchTimer(identity)


class _WatchedTimer:
    """A timer that reports, once, a machine so busy that ratios of times are wrong."""

    def __init__(self, timer: Timer, report: Log) -> None:
        self._timer, self._report, self._reported = timer, report, False

    @property
    def name(self) -> str:
        return self._timer.name

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        measure = self._timer.load(model, image)

        def watched(without: Sequence[Collection[str]]) -> list[Runs]:
            with MachineMonitor() as machine:
                machine.poll()
                runs = measure(without)
                machine.poll()
                conditions = machine.conditions()
            if conditions.starved and not self._reported:
                self._reported = True
                why = "; ".join(conditions.disturbances())
                self._report(
                    f"warning: measured times may be wrong ({why}); measure on a quiet machine"
                )
            return runs

        return watched
