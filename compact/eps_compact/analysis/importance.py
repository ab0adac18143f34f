"""Block importance: what every live block costs, and what the network loses without it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from eps_compact.evidence import BlockEvidence
from eps_compact.exporting import FromPixels
from eps_compact.folding import fold
from eps_core import cli
from eps_core.cli import Log, missing_package
from eps_core.errors import ConfigError
from eps_core.stats import Interval, difference_of_medians, paired_difference, paired_mean
from eps_core.timing import Runs, interleave, wall_clock
from eps_train.data.dataset import DataIdentity
from eps_train.data.images import ImageSet, Part
from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate
from eps_train.gating.rewriting import branch_nodes, branch_parameters
from eps_train.models.cifar import Normalize
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import BATCH, logits
from eps_train.training.forward import cpu_threads

if TYPE_CHECKING:
    from rich.table import Table

CPU = torch.device("cpu")

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


def live_network(checkpoint: Checkpoint) -> fx.GraphModule:
    """Build a checkpoint's network without its dead blocks, in evaluation mode, other gates open.

    A network without gates gets open ones at all its residual additions, so that its blocks can be
    measured and removed too. Nothing is shared with `checkpoint`.
    """
    network = checkpoint.network
    removed = {*network.removed, *checkpoint.dead}
    spec = replace(
        network,
        gated=tuple(b for b in network.gated or network.all_blocks() if b not in removed),
        removed=(*network.removed, *checkpoint.dead),
    )
    state = checkpoint.state
    if not network.gated:
        fresh = EpsilonGate().state_dict()
        gates = [n for n, m in spec.skeleton().named_modules() if isinstance(m, EpsilonGate)]
        state = {f"{gate}.{name}": fresh[name] for gate in gates for name in fresh} | state
    return spec.build(state).eval()


def branch_costs(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> list[BranchCost]:
    """Return every gated block's cost, in the order of computation, from a run on the meta device.

    Args:
        model: a network with gates.
        input_shape: `[C, H, W]` of an image.
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


# -- Evaluation samples, and what a network predicts for them

SEED = 0  # of the evaluation samples
WORST_LOSS = 1e4  # stands for a loss that is not finite


def evaluation_samples(part: Part, count: int, device: torch.device = CPU) -> ImageSet:
    """Return up to `count` images of a part in random order, held on `device`; always the same."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(SEED))
    chosen = part[order[:count]]
    return ImageSet(chosen.images, chosen.labels).to(device)


class Predictions:
    """How one network does on labelled images, one entry an image, batch by batch."""

    def __init__(self) -> None:
        self._correct: list[Tensor] = []
        self._loss: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits `[n, classes]` and labels int64 `[n]`, both on one device."""
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        self._loss.append(loss.nan_to_num(nan=WORST_LOSS, posinf=WORST_LOSS).clamp(max=WORST_LOSS))
        self._correct.append(logits.argmax(dim=1) == labels)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the label is the top-1 prediction, `[N]`."""
        return torch.cat(self._correct).cpu().numpy()

    @property
    def loss(self) -> npt.NDArray[np.float64]:
        """Cross-entropy, `[N]`, at most `WORST_LOSS`."""
        return torch.cat(self._loss).double().cpu().numpy()

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def mean_loss(self) -> float:
        return float(self.loss.mean())


def predict(model: nn.Module, normalize: nn.Module, part: Part) -> Predictions:
    """Run a network on a part of a data set; both on one device."""
    found = Predictions()
    for batch in part.batches(BATCH):
        found.add(logits(model, normalize, batch.images), batch.labels)
    return found


def accuracy_drop(before: Predictions, after: Predictions) -> Interval:
    """Points of accuracy lost, on the same images, with Tango's 95 % interval."""
    only_before = int((before.correct & ~after.correct).sum())
    only_after = int((after.correct & ~before.correct).sum())
    share = paired_difference(only_before, only_after, len(before.correct))
    return Interval(100 * share.value, 100 * share.low, 100 * share.high)


# -- Leave-one-out: the network without each of its blocks in turn


def leave_one_out(
    model: fx.GraphModule, normalize: nn.Module, images: ImageSet
) -> dict[str | None, Predictions]:
    """Return predictions without each gated block, and under None those of the whole network.

    All three arguments are on one device.
    """
    blocks = rewriting.gate_nodes(model).values()
    found: dict[str | None, Predictions] = {block: Predictions() for block in (*blocks, None)}
    for batch in images.batches(BATCH):
        for block, said in leave_one_out_logits(model, normalize(batch.images)):
            found[block].add(said, batch.labels)
    return found


@torch.no_grad()
def leave_one_out_logits(
    model: fx.GraphModule, images: Tensor
) -> Iterator[tuple[str | None, Tensor]]:
    """Yield each gated block with the logits without it, and last None with those of the whole.

    What precedes a block is computed once for all blocks after it, so that N blocks cost about
    N / 2 passes. Logits equal those of the network that `rewriting.remove_blocks` makes.

    Args:
        images: normalised float32 `[N, C, H, W]`, on the network's device.

    Yields:
        Logits float32 `[N, classes]`.
    """
    interpreter = fx.Interpreter(model)
    last_uses = interpreter.user_to_last_uses
    gates = rewriting.gate_nodes(model)
    nodes = list(model.graph.nodes)

    def run(rest: Iterable[fx.Node], values: dict[fx.Node, Any]) -> Iterator[Any]:
        """Compute nodes in order, dropping each value after its last use; yield every result."""
        for node in rest:
            interpreter.env = values
            values[node] = images if node.op == "placeholder" else interpreter.run_node(node)
            for used in last_uses.get(node, ()):
                values.pop(used, None)
            yield values[node]

    values: dict[fx.Node, Any] = {}
    whole = run(nodes, values)
    for place, node in enumerate(nodes):
        if node in gates:
            shortcut, _ = node.all_input_nodes
            kept = {n: value for n, value in values.items() if n not in last_uses.get(node, ())}
            # Copies, because in-place operations would alter what the next block starts from; one
            # call for all, so that views of one tensor stay views of one tensor.
            without = dict(zip(kept, copy.deepcopy(list(kept.values())), strict=True))
            without[node] = values[shortcut].clone()
            *_, result = run(nodes[place + 1 :], without)
            yield gates[node], result.float()
        result = next(whole)
    yield None, result.float()


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

    name: str

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
        """As in :class:`Timer`."""
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
    """Time calls that return when their work is done, in turns; `SECONDS_EACH` for each of them.

    Returns each call's milliseconds, `[blocks, runs]`.
    """
    return interleave([wall_clock(call) for call in calls], budget=SECONDS_EACH * len(calls)).times


def block_times(costs: Iterable[BranchCost], measure: Measure) -> dict[str, Interval]:
    """Return the milliseconds that each block takes, by name, with 95 % intervals.

    Each kind of block is timed once: the whole network against the one without all blocks of that
    kind, divided by their number.

    Args:
        costs: of all blocks of the network that `measure` was loaded with.
    """
    kinds: dict[str, list[str]] = {}
    for cost in costs:
        kinds.setdefault(cost.kind, []).append(cost.block)
    whole, *less = measure([(), *kinds.values()])
    found: dict[str, Interval] = {}
    for blocks, runs in zip(kinds.values(), less, strict=True):
        joint = difference_of_medians(whole, runs)
        count = len(blocks)
        each = Interval(joint.value / count, joint.low / count, joint.high / count)
        found |= dict.fromkeys(blocks, each)
    return found


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
        report: receives one line that says why torch is used instead.

    Raises:
        ConfigError: the named runtime is not installed; the line names the extra.
    """
    if name == "torch":
        return TorchTimer(identity)
    wanted = name or PREFERRED
    try:
        entry = next(iter(entry_points(group=GROUP, name=wanted)), None)
        if entry is None:
            raise ConfigError(
                f"--timer {wanted}: this installation of eps-resnet does not offer it; install it"
                " again, or give --timer torch"
            )
        try:
            timer: Callable[[DataIdentity], Timer] = entry.load()
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--timer {wanted}: {missing_package(error)}, or give --timer torch"
            ) from error
        return timer(identity)
    except ConfigError as error:
        if name is not None:
            raise
        report(f"times are torch's: {error}")
        return TorchTimer(identity)


# -- Importance: cost, time and leave-one-out of every live block

ROWS = 40  # blocks that the table shows
_GATE_FIELDS = ("epsilon", "steps", "closed_steps", "peak")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockImportance:
    """One live block.

    Attributes:
        block: its name.
        parameters, flops, activation_bytes: of its branch, for one image; see `BranchCost`.
        ms: its share of a call, with its 95 % interval.
        drop: points of accuracy that the network loses without it, with Tango's 95 % interval.
        loss: rise of the mean cross-entropy without it, with its 95 % interval.
        epsilon, steps, closed_steps, peak: its gate's record of the last epoch, as in `GateRecord`;
            None for a block that was trained without a gate.
        ratio: largest response on held-out images in units of epsilon; None if not measured.
    """

    block: str
    parameters: int
    flops: int
    activation_bytes: int
    ms: Interval
    drop: Interval
    loss: Interval
    epsilon: float | None
    steps: int | None
    closed_steps: int | None
    peak: float | None
    ratio: float | None

    @property
    def closed(self) -> float | None:
        """Share of the last epoch's steps with a closed gate; None if it was held open."""
        if not self.epsilon or not self.steps or self.closed_steps is None:
            return None
        return self.closed_steps / self.steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """Importance of every live block.

    Attributes:
        entries: in the order of computation.
        accuracy, loss: of the network with all of them, on the same images (0..1; cross-entropy).
        samples: held-out images that each block was left out on.
        available: held-out images in all.
        timer: name of the timer.
        seconds: of all the work, once the timer was ready.
    """

    entries: tuple[BlockImportance, ...]
    accuracy: float
    loss: float
    samples: int
    available: int
    timer: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return found


def measure_importance(
    checkpoint: Checkpoint,
    validation: Part,
    *,
    samples: int,
    live: Iterable[BlockEvidence] = (),
    device: torch.device = CPU,
    timer: Timer | None = None,
    report: Log = lambda line: None,
) -> Importance:
    """Measure what every live block of a checkpoint's network costs and contributes.

    Args:
        checkpoint: gated, or plain: then all of its residual blocks are measured.
        validation: its validation part.
        samples: images of it to leave blocks out on; see :func:`evaluation_samples`.
        live: their responses, from `evidence.block_evidence`, for `ratio`.
        device: where to compute.
        timer: measures the times; a `TorchTimer` by default.
        report: receives progress, a line at a time.

    Raises:
        ConfigError: no block is left.
        FileFormatError: the checkpoint's tensors are not those of its network.
        GraphError: `timer` cannot run the network.
    """
    timer = timer or TorchTimer(checkpoint.data)
    model = live_network(checkpoint)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    costs = branch_costs(model, checkpoint.data.input_shape)
    if not costs:
        raise ConfigError("every block is dead: there is none left to measure")
    images = evaluation_samples(validation, samples, device)
    kinds = len({cost.kind for cost in costs})
    report(f"importance: timing {len(costs)} blocks of {kinds} kinds ({timer.name})")
    measure = timer.load(model, images.images[:1])
    began = time.perf_counter()
    times = block_times(costs, measure)
    report(
        f"importance: leaving out each of {len(costs)} blocks on {len(images):,} held-out images"
    )
    predictions = leave_one_out(model, Normalize.of(checkpoint.data).to(device), images)
    whole = predictions.pop(None)
    records = {record.block: record for record in checkpoint.gates}
    ratios = {block.block: block.ratio for block in live}
    entries = []
    for cost in costs:
        record, without = records.get(cost.block), predictions[cost.block]
        entries.append(
            BlockImportance(
                block=cost.block,
                parameters=cost.parameters,
                flops=cost.flops,
                activation_bytes=cost.activation_bytes,
                ms=times[cost.block],
                drop=accuracy_drop(whole, without),
                loss=paired_mean(without.loss - whole.loss),
                ratio=ratios.get(cost.block),
                **{name: getattr(record, name, None) for name in _GATE_FIELDS},
            )
        )
    return Importance(
        entries=tuple(entries),
        accuracy=whole.accuracy,
        loss=whole.mean_loss,
        samples=len(images),
        available=len(validation),
        timer=timer.name,
        seconds=time.perf_counter() - began,
    )


def table(found: Importance) -> Table:
    """Return a table in the order of computation; of many blocks, the `ROWS` least important."""
    entries, which = found.entries, ""
    if len(entries) > ROWS:
        entries = tuple(sorted(entries, key=lambda entry: entry.loss.value)[:ROWS])
        which = f" the {ROWS} least important of {len(found.entries)} blocks,"
    title = (
        f"Block importance:{which} left out one at a time on {found.samples:,} of"
        f" {found.available:,} held-out images (accuracy {found.accuracy:.2%}); times:"
        f" {found.timer}"
    )
    columns = (
        *("block", "parameters", "FLOPs", "memory", "ms"),
        *("largest |F|", "closed", "points lost", "loss"),
    )
    rows = [
        (
            entry.block,
            f"{entry.parameters:,}",
            scaled(entry.flops),
            scaled(entry.activation_bytes) + "B",
            f"{entry.ms.value:.4f} ±{(entry.ms.high - entry.ms.low) / 2:.4f}",
            f"{entry.ratio:.2f} ε" if entry.ratio is not None else "–",
            f"{entry.closed:.0%}" if entry.closed is not None else "–",
            points(entry.drop),
            f"{entry.loss.value:+.4f}",
        )
        for entry in entries
    ]
    return cli.table(title, columns, rows)


def points(drop: Interval) -> str:
    """Format a drop in points with its interval."""
    return f"{drop.value:+.1f} ({drop.low:+.1f}..{drop.high:+.1f})"


def scaled(number: float) -> str:
    """Format a large number with three digits and an SI prefix: 1.23 M."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {prefix}"
    return f"{number:g} "
