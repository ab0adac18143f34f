"""Block importance: what every live block costs, and what the network loses without it."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, fx, nn

from eps_compact.certificate import BlockEvidence
from eps_core import cli
from eps_core.cli import Log
from eps_core.errors import ConfigError
from eps_core.stats import Interval, paired_difference, paired_mean
from eps_train.data.images import ImageSet, Part
from eps_train.gating import rewriting
from eps_train.gating.costs import Timer, block_times, branch_costs
from eps_train.gating.gate import EpsilonGate
from eps_train.models.resnets import Normalize
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import BATCH, logits

CPU = torch.device("cpu")

# -- The networks that are measured


def live_network(checkpoint: Checkpoint, *, dead: bool = False) -> fx.GraphModule:
    """Build a checkpoint's network without its dead blocks, in evaluation mode, other gates open.

    A network without gates gets open ones at all its residual additions, so that its blocks can be
    measured and removed too. Nothing is shared with `checkpoint`. With `dead`, the dead blocks stay
    too, with open gates.
    """
    network = checkpoint.network
    removed = (*network.removed, *(() if dead else checkpoint.dead))
    spec = replace(
        network,
        gated=tuple(b for b in network.gated or network.all_blocks() if b not in removed),
        removed=removed,
    )
    state = checkpoint.state
    if not network.gated:
        fresh = EpsilonGate().state_dict()
        gates = [n for n, m in spec.skeleton().named_modules() if isinstance(m, EpsilonGate)]
        state = {f"{gate}.{name}": fresh[name] for gate in gates for name in fresh} | state
    return spec.build(state).eval()


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
    return points_lost(only_before, only_after, len(before.correct))


def points_lost(lost: int, won: int, total: int) -> Interval:
    """Points of accuracy lost by `total` images, of which `lost` got wrong and `won` right."""
    share = paired_difference(lost, won, total)
    return Interval(100 * share.value, 100 * share.low, 100 * share.high)


# -- Leave-one-out: the network without each of its blocks in turn


def leave_one_out(
    model: fx.GraphModule, normalize: nn.Module, images: ImageSet
) -> dict[str | None, Predictions]:
    """Return predictions without each gated block, and under None those of the whole network."""
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
    N / 2 passes. Logits, float32 `[N, classes]`, equal those of the network that
    `rewriting.remove_blocks` makes. Images are normalised float32 `[N, C, H, W]`.
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


# -- Importance: cost, time and leave-one-out of every live block

ROWS = 40  # blocks that the table shows
_GATE_FIELDS = ("epsilon", "steps", "closed_steps", "peak")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockImportance:
    """One live block.

    Attributes:
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
        return (self.closed_steps or 0) / self.steps if self.epsilon and self.steps else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """Importance of every live block.

    Attributes:
        entries: the blocks, in the order of computation.
        accuracy, loss: of the network with all of them, on the same images (0..1; cross-entropy).
        samples: held-out images that each block was left out on.
        available: held-out images in all.
        seconds: of all the work, once the timer was ready.
    """

    entries: tuple[BlockImportance, ...]
    accuracy: float
    loss: float
    samples: int
    available: int
    timer: str
    seconds: float


def measure_importance(
    checkpoint: Checkpoint,
    validation: Part,
    *,
    samples: int,
    timer: Timer,
    live: Iterable[BlockEvidence] = (),
    device: torch.device = CPU,
    report: Log = lambda line: None,
) -> Importance:
    """Measure what every live block of a checkpoint's network costs and contributes.

    Args:
        checkpoint: gated, or plain: then all of its residual blocks are measured.
        validation: its validation part.
        samples: images of it to leave blocks out on; see :func:`evaluation_samples`.
        live: the blocks' responses, for `ratio`.

    Raises:
        ConfigError: no block is left.
        FileFormatError: the checkpoint's tensors are not those of its network.
        GraphError: `timer` cannot run the network.
    """
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
    _, times = block_times(costs, measure)
    count = len(costs)
    report(f"importance: leaving out each of {count} blocks on {len(images):,} held-out images")
    predictions = leave_one_out(model, Normalize.of(checkpoint.data).to(device), images)
    whole = predictions.pop(None)
    records = {record.block: record for record in checkpoint.gates}
    ratios = {block.block: block.ratio for block in live}
    entries = tuple(
        BlockImportance(
            block=cost.block,
            parameters=cost.parameters,
            flops=cost.flops,
            activation_bytes=cost.activation_bytes,
            ms=times[cost.block],
            drop=accuracy_drop(whole, predictions[cost.block]),
            loss=paired_mean(predictions[cost.block].loss - whole.loss),
            ratio=ratios.get(cost.block),
            **{name: getattr(records.get(cost.block), name, None) for name in _GATE_FIELDS},
        )
        for cost in costs
    )
    return Importance(
        entries=entries,
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
    gate = ("largest |F|", "closed")
    columns = ("block", "parameters", "FLOPs", "memory", "ms", *gate, "points lost", "loss")
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
