"""The ledger: what every block costs, what it does, and what the network would be without it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

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
from eps_core.cli import missing_package
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

# -- What each residual branch costs: what would leave the network with that block alone


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchCost:
    """One block's branch, for one float32 image.

    Attributes:
        block: its name.
        parameters: learned parameters that leave the network with this block alone.
        flops: as `eps_train.models.spec` counts them: the difference that removal makes.
        activation_bytes: of all tensors that the branch's steps make.
        kind: equal for blocks of the same layers on the same shapes, which cost the same time.
    """

    block: str
    parameters: int
    flops: int
    activation_bytes: int
    kind: str


def live_network(checkpoint: Checkpoint) -> fx.GraphModule:
    """The checkpoint's network without its dead blocks, in evaluation mode, every other gate live.

    A plain network gets open gates at all its residual additions, so that its blocks can be
    weighed and taken out too. Nothing is shared with `checkpoint`.
    """
    network = checkpoint.network
    gone = set(network.removed).union(checkpoint.dead)
    blocks = network.gated or network.all_blocks()
    spec = replace(
        network,
        gated=tuple(block for block in blocks if block not in gone),
        removed=(*network.removed, *checkpoint.dead),
    )
    state = checkpoint.state
    if not network.gated:
        fresh = EpsilonGate().state_dict()
        gates = [n for n, m in spec.skeleton().named_modules() if isinstance(m, EpsilonGate)]
        state = {f"{gate}.{name}": fresh[name] for gate in gates for name in fresh} | state
    return spec.build(state).eval()


def branch_costs(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> list[BranchCost]:
    """Every gated block's cost, in the order of computation; nothing is computed.

    Args:
        model: a network with gates.
        input_shape: `[C, H, W]` of an image.
    """
    skeleton = copy.deepcopy(model).to("meta").eval()
    shapes = _Shapes(skeleton)
    with torch.no_grad(), shapes.counter:
        shapes.run(torch.empty((1, *input_shape), device="meta"))
    parameters = branch_parameters(model)
    found = []
    for node, block in rewriting.gate_nodes(skeleton).items():
        branch = branch_nodes(node)
        found.append(
            BranchCost(
                block=block,
                parameters=parameters[block],
                flops=sum(shapes.flops[member] for member in branch),
                activation_bytes=sum(shapes.bytes[member] for member in branch),
                kind="; ".join(
                    f"{shapes.layer(member)}@{shapes.shape[member]}"
                    for member in [*branch, *node.all_input_nodes]
                ),
            )
        )
    return found


class _Shapes(fx.Interpreter):
    """Runs a network on the meta device and notes every node's FLOPs, bytes and shapes."""

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
        # Tuples of tensors are taken apart by a node of their own, which is counted instead. What
        # hands its input on (an identity, a step in place) takes no memory.
        same = any(result is self.env.get(node) for node in n.all_input_nodes)
        tensors = [result] if isinstance(result, Tensor) else []
        self.bytes[n] = 0 if same else sum(tensor.nbytes for tensor in tensors)
        self.shape[n] = ",".join("x".join(map(str, tensor.shape)) for tensor in tensors)
        return result

    def layer(self, node: fx.Node) -> str:
        """What the node computes, as far as time depends on it."""
        if node.op == "call_module":
            return repr(self.submodules[str(node.target)])
        return getattr(node.target, "__name__", str(node.target))


# -- Leave-one-out: what a network says without each of its blocks, the rest computed once

WORST = 1e4  # what the loss of an answer that is not a number counts as


class Forking:
    """Runs a gated network, and at each gate goes through the rest once more without that block.

    What lies before a block is computed once for all blocks behind it, so that leaving out each of
    N blocks costs about N / 2 passes instead of N.

    Attributes:
        blocks: the gated blocks, in the order of computation.
        passes: about how many full passes one call costs.
    """

    def __init__(self, model: fx.GraphModule) -> None:
        self._run = fx.Interpreter(model)
        self._nodes = list(model.graph.nodes)
        self._gates = rewriting.gate_nodes(model)
        self.blocks = tuple(self._gates.values())
        rests = sum(
            len(self._nodes) - place
            for place, node in enumerate(self._nodes)
            if node in self._gates
        )
        self.passes = 1 + rests / len(self._nodes)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Iterator[tuple[str | None, Tensor]]:
        """Yield each block with the logits without it, and last None with those of the whole.

        Args:
            images: normalised float32 `[N, C, H, W]`, on the network's device.

        Logits are float32 `[N, classes]`, and equal those of the network that
        `rewriting.remove_blocks` makes.
        """
        values: dict[fx.Node, Any] = {}
        for place, node in enumerate(self._nodes):
            if node in self._gates:
                yield self._gates[node], self._without(values, place)
            answer = self._step(values, node, images)
        yield None, answer.float()

    @torch.no_grad()
    def whole(self, images: Tensor) -> Tensor:
        """Logits of the whole network for `images` as :meth:`__call__` takes them."""
        values: dict[fx.Node, Any] = {}
        for node in self._nodes:
            answer = self._step(values, node, images)
        return answer.float()  # type: ignore[no-any-return]

    def _without(self, values: dict[fx.Node, Any], place: int) -> Tensor:
        gate = self._nodes[place]
        shortcut, _ = gate.all_input_nodes
        unneeded = self._run.user_to_last_uses.get(gate, ())
        left = {node: value for node, value in values.items() if node not in unneeded}
        # Copies: a step that works in place would alter what the next block's turn starts from. One
        # call for all, so that views of one tensor stay views of one tensor.
        forked = dict(zip(left, copy.deepcopy(list(left.values())), strict=True))
        forked[gate] = values[shortcut].clone()
        for node in self._nodes[place + 1 :]:
            answer = self._step(forked, node, None)
        return answer.float()  # type: ignore[no-any-return]

    def _step(self, values: dict[fx.Node, Any], node: fx.Node, images: Tensor | None) -> Any:
        """Compute one node, and forget the values that it was the last to need.

        Returns the node's value; that of the last node is the network's answer.
        """
        self._run.env = values
        values[node] = images if node.op == "placeholder" else self._run.run_node(node)
        for used in self._run.user_to_last_uses.get(node, ()):
            values.pop(used, None)  # a fork has less to forget
        return values[node]


class Answers:
    """What one network makes of a growing number of labelled images, one entry an image.

    Attributes:
        correct: whether the label is the top answer, bool `[N]`.
        loss: cross-entropy, float64 `[N]`, at most `WORST`.
    """

    def __init__(self) -> None:
        self._correct: list[Tensor] = []
        self._loss: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take note of logits `[n, classes]` and labels int64 `[n]`, both on one device."""
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        self._loss.append(loss.nan_to_num(nan=WORST, posinf=WORST).clamp(max=WORST))
        self._correct.append(logits.argmax(dim=1) == labels)

    def extend(self, other: Answers) -> None:
        """Take over the answers to further images."""
        self._loss += other._loss
        self._correct += other._correct

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = torch.cat(self._correct).cpu().numpy()
        return found

    @property
    def loss(self) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = torch.cat(self._loss).double().cpu().numpy()
        return found

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def mean_loss(self) -> float:
        return float(self.loss.mean())


def answer_all(
    forking: Forking, normalize: nn.Module, images: ImageSet
) -> dict[str | None, Answers]:
    """Answers without each block, and under None those of the whole network.

    `images` lie on the network's device.
    """
    found: dict[str | None, Answers] = {block: Answers() for block in (*forking.blocks, None)}
    for batch in images.batches(BATCH):
        for block, said in forking(normalize(batch.images)):
            found[block].add(said, batch.labels)
    return found


def answer(model: nn.Module, normalize: nn.Module, part: Part) -> Answers:
    """Answers of one network to a part that lies on its device, or on disk."""
    found = Answers()
    for batch in part.batches(BATCH):
        found.add(logits(model, normalize, batch.images), batch.labels)
    return found


# -- Held-out images in an order of chance, as many of them as the time allows

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


# -- Times of several networks against each other: interleaved, one image a call
#
# What is timed is what ships: folded, behind its normalisation, without gates and taps.


class Timer(Protocol):
    """Times a network against what is left of it without some of its blocks.

    Attributes:
        name: what it runs them with, as a report says it.
    """

    name: str

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        """Make all ready that does not depend on which blocks are to be left out.

        Args:
            model: a network with gates at all blocks that may be left out.
            image: one raw image, uint8 `[1, C, H, W]`, on the network's device.

        Raises:
            GraphError: what runs them cannot run this network.
        """


class Measure(Protocol):
    """Times the networks that are left of one network without some of its blocks."""

    def __call__(self, without: Sequence[Collection[str]], seconds: float) -> list[Runs]:
        """Milliseconds of every run, `[blocks, runs]` for each network; see `eps_core.timing`.

        Args:
            without: of each network, the blocks that it lacks.
            seconds: to spend; a few runs are made in any case.
        """


class TorchTimer:
    """Times networks as PyTorch runs them: eager, channels-last, one thread, one image a call.

    Args:
        identity: the data that the networks were trained on.
    """

    name = f"torch {torch.__version__} eager, one thread, batch 1"

    def __init__(self, identity: DataIdentity) -> None:
        self._identity = identity

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        """As `Timer` has it."""
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
        def measure(without: Sequence[Collection[str]], seconds: float) -> list[Runs]:
            networks = [
                FromPixels(plain(folded, blocks), self._identity).to(image.device)
                for blocks in without
            ]
            with cpu_threads(1):
                calls = [wall_clock(partial(call, network)) for network in networks]
                return interleave(calls, budget=seconds).times

        return measure


def block_times(
    costs: Iterable[BranchCost], measure: Measure, seconds: float
) -> dict[str, Interval]:
    """Milliseconds that each block takes, by name, with 95 % intervals.

    Blocks of one kind (the same layers on the same shapes) take the same time. Each kind is timed
    once: the whole network against the one without any block of that kind, divided by their number.

    Args:
        costs: of all blocks of the network that `measure` was loaded with.
        seconds: to spend.
    """
    kinds: dict[str, list[str]] = {}
    for cost in costs:
        kinds.setdefault(cost.kind, []).append(cost.block)
    if not kinds:
        return {}
    whole, *less = measure([(), *kinds.values()], seconds)
    found: dict[str, Interval] = {}
    for blocks, runs in zip(kinds.values(), less, strict=True):
        joint = difference_of_medians(whole, runs)
        count = len(blocks)
        each = Interval(joint.value / count, joint.low / count, joint.high / count)
        found |= dict.fromkeys(blocks, each)
    return found


def plain(model: fx.GraphModule, without: Iterable[str] = ()) -> fx.GraphModule:
    """The network as it would ship, without these blocks; it shares its tensors with `model`."""
    return rewriting.drop_taps(rewriting.drop_gates(rewriting.remove_blocks(model, without))).eval()


SECONDS = 60.0
TIMING_SHARE = 0.25  # of the seconds
ROWS = 40  # blocks that the table shows
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One live block.

    Attributes:
        block: its name.
        parameters, flops, activation_bytes: of its branch, for one image; see `BranchCost`.
        ms: what it takes of a call, with its 95 % interval.
        drop: points of accuracy that the network loses without it, with Tango's 95 % interval.
        loss: rise of the mean cross-entropy without it, with its 95 % interval.
        epsilon, steps, closed_steps, peak: its gate's record of the last epoch, as `GateRecord`
            has it; None for a block that was trained without a gate.
        ratio: largest response on held-out images in units of epsilon; None where not measured.
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
        """Share of the last epoch's steps on which the gate was closed; None: it was not judged."""
        if not self.epsilon or not self.steps or self.closed_steps is None:
            return None
        return self.closed_steps / self.steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """What every live block costs and is worth.

    Attributes:
        entries: in the order of computation.
        accuracy, loss: of the network with all of them, on the same images (0..1; cross-entropy).
        samples: held-out images that each block was left out on.
        available: held-out images that there are.
        timer: what the times were measured with.
        seconds: what all of it took, once the timer was ready.
    """

    entries: tuple[Entry, ...]
    accuracy: float
    loss: float
    samples: int
    available: int
    timer: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        return {**asdict(self), "entries": [asdict(entry) for entry in self.entries]}


def measure_importance(
    checkpoint: Checkpoint,
    validation: Part,
    *,
    live: Iterable[BlockEvidence] = (),
    seconds: float = SECONDS,
    device: torch.device = CPU,
    timer: Timer | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Importance:
    """Weigh every live block of a checkpoint's network, within `seconds`.

    Args:
        checkpoint: gated, or plain: then all of its residual blocks are weighed.
        validation: its validation part.
        live: responses as `evidence.liveness` measured them, for `ratio`.
        seconds: a quarter goes into the times, the rest into leaving blocks out, on as many
            held-out images, drawn at random, as fit. What `timer` takes to make ready is on top.
        device: where to compute.
        timer: measures the times; `timing.TorchTimer` if not given.
        report: told what is being done, a line at a time.

    Raises:
        ConfigError: no block is left, or `seconds` is too little for even a few images.
        FileFormatError: the checkpoint's tensors are not those of its network.
        GraphError: `timer` cannot run the network.
    """
    timer = timer or TorchTimer(checkpoint.data)
    model = live_network(checkpoint)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    costs = branch_costs(model, checkpoint.data.input_shape)
    if not costs:
        raise ConfigError("every block is dead: there is none left for a ledger to weigh")
    normalize = Normalize.of(checkpoint.data).to(device)
    heldout = ordered(validation)
    kinds = len({cost.kind for cost in costs})
    report(f"ledger: timing {len(costs)} blocks of {kinds} kinds ({timer.name})")
    measure = timer.load(model, pixels(heldout, range(1), device).images)
    began = time.perf_counter()
    times = block_times(costs, measure, seconds * TIMING_SHARE)
    left = seconds - (time.perf_counter() - began)
    report(f"ledger: leaving out each of {len(costs)} blocks, for {max(left, 0):.0f} s at most")
    answers = leave_one_out(Forking(model), normalize, heldout, seconds=left)
    if answers is None:
        raise ConfigError(
            f"the ledger's {seconds:g} seconds are too few to leave out each of {len(costs)} blocks"
            " even on the first images; give it more"
        )
    ratios = {block.block: block.ratio for block in live}
    return Importance(
        entries=tuple(_entry(checkpoint, cost, times, answers, ratios) for cost in costs),
        accuracy=answers.whole.accuracy,
        loss=answers.whole.mean_loss,
        samples=answers.samples,
        available=len(validation),
        timer=timer.name,
        seconds=time.perf_counter() - began,
    )


def accuracy_drop(before: Answers, after: Answers) -> Interval:
    """Points of accuracy lost, on the same images, with Tango's 95 % interval."""
    only_before = int((before.correct & ~after.correct).sum())
    only_after = int((after.correct & ~before.correct).sum())
    share = paired_difference(only_before, only_after, len(before.correct))
    return Interval(100 * share.value, 100 * share.low, 100 * share.high)


def _entry(
    checkpoint: Checkpoint,
    cost: BranchCost,
    times: Mapping[str, Interval],
    answers: LeaveOneOut,
    ratios: Mapping[str, float | None],
) -> Entry:
    record = next((gate for gate in checkpoint.gates if gate.block == cost.block), None)
    without = answers.without[cost.block]
    return Entry(
        block=cost.block,
        parameters=cost.parameters,
        flops=cost.flops,
        activation_bytes=cost.activation_bytes,
        ms=times[cost.block],
        drop=accuracy_drop(answers.whole, without),
        loss=paired_mean(without.loss - answers.whole.loss),
        epsilon=None if record is None else record.epsilon,
        steps=None if record is None else record.steps,
        closed_steps=None if record is None else record.closed_steps,
        peak=None if record is None else record.peak,
        ratio=ratios.get(cost.block),
    )


def table(found: Importance) -> Table:
    """The ledger for people: in the order of computation, or of many blocks the least missed."""
    entries = found.entries
    which = ""
    if len(entries) > ROWS:
        entries = tuple(sorted(entries, key=lambda entry: entry.loss.value)[:ROWS])
        which = f" the {ROWS} least missed of {len(found.entries)} blocks,"
    title = (
        f"Ledger:{which} left out one at a time on {found.samples:,} of {found.available:,}"
        f" held-out images (accuracy {found.accuracy:.2%}); times: {found.timer}"
    )
    columns = (
        *("block", "parameters", "FLOPs", "memory", "ms"),
        *("largest |F|", "closed", "points lost", "loss"),
    )
    return cli.table(title, columns, [_row(entry) for entry in entries])


def _row(entry: Entry) -> tuple[str, ...]:
    return (
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


def points(drop: Interval) -> str:
    return f"{drop.value:+.1f} ({drop.low:+.1f}..{drop.high:+.1f})"


def scaled(number: float) -> str:
    """A large number with three digits and a prefix: 1.23 M."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {prefix}"
    return f"{number:g} "


# -- Which runtime times the blocks: what other packages offer, and torch where there is nothing
#    else
#
# Networks are served by the engines of `eps_deploy`, so their times are those that count. It may
# import this package and not the other way round; what it offers is found by entry point.

GROUP = "eps_resnet.block_timers"  # entry points: callables from a DataIdentity to a Timer
PREFERRED = "ort"


def make_timer(
    name: str | None, identity: DataIdentity, report: Callable[[str], None] = lambda line: None
) -> Timer:
    """The timer of `--timer`; where that was not given, ONNX Runtime's if it is installed.

    Args:
        name: `ort`, `torch`, or None.
        identity: the data that the networks were trained on.
        report: told, in one line, why torch has to do.

    Raises:
        ConfigError: what was asked for is not installed; the line names the extra.
    """
    if name == "torch":
        return TorchTimer(identity)
    try:
        return _offered(name or PREFERRED)(identity)
    except ConfigError as error:
        if name is not None:
            raise
        report(f"times are torch's: {error}")
        return TorchTimer(identity)


def _offered(name: str) -> Callable[[DataIdentity], Timer]:
    found = next(iter(entry_points(group=GROUP, name=name)), None)
    if found is None:
        raise ConfigError(
            f"--timer {name}: this installation of eps-resnet does not offer it; install it again,"
            " or give --timer torch"
        )
    try:
        timer: Callable[[DataIdentity], Timer] = found.load()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--timer {name}: {missing_package(error)}, or give --timer torch"
        ) from error
    return timer
