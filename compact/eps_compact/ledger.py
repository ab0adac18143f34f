"""The ledger: what every block costs, what it does, and what the network would be without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from eps_compact.branch_costs import BranchCost, branch_costs, live_network
from eps_compact.forking import Answers, Forking
from eps_compact.heldout import LeaveOneOut, leave_one_out, ordered, pixels
from eps_compact.intervals import Interval, paired_difference, paired_mean
from eps_compact.liveness import Liveness
from eps_compact.timing import Timer, TorchTimer, block_times
from eps_train import console
from eps_train.checkpoint import Checkpoint
from eps_train.errors import ConfigError
from eps_train.images import Part
from eps_train.networks import Normalize

if TYPE_CHECKING:
    from rich.table import Table

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
class Ledger:
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


def ledger(
    checkpoint: Checkpoint,
    validation: Part,
    *,
    live: Iterable[Liveness] = (),
    seconds: float = SECONDS,
    device: torch.device = CPU,
    timer: Timer | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Ledger:
    """Weigh every live block of a checkpoint's network, within `seconds`.

    Args:
        checkpoint: gated, or plain: then all of its residual blocks are weighed.
        validation: its validation part.
        live: responses as `liveness.liveness` measured them, for `ratio`.
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
    return Ledger(
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


def table(found: Ledger) -> Table:
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
    return console.table(title, columns, [_row(entry) for entry in entries])


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
