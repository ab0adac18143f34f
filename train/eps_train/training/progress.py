"""What a run says while it goes: one line an epoch, the block map, and `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor, nn

from eps_core.errors import FileFormatError, naming
from eps_core.files import replace_file
from eps_train.config import TrainingConfig
from eps_train.data.images import Part
from eps_train.gating.gate import EpsilonGate, response
from eps_train.gating.pruning_state import watch_branches
from eps_train.gating.rewriting import stage_name
from eps_train.schedule import LearningRateSchedule
from eps_train.training.checkpoint import GateRecord
from eps_train.training.evaluate import logits
from eps_train.training.guards import EpochMetrics, lost_stages
from eps_train.training.plots import Metrics

LEGEND = "█ alive  ▒ flickering  ░ closed all epoch  · dead"
_OBITUARY = 60  # columns that the names of the blocks that died may take
RECENT = 5  # epochs that the time left is judged by: an epoch gets shorter when blocks leave


def block_map(records: Iterable[GateRecord], width: int | None = None) -> str:
    """The network as a strip of one character a block, a space between stages; see `LEGEND`.

    Where that is more than `width` characters, each stands for several neighbours in a stage, and
    shows the one that is most alive: a stretch is dead when all of it is.
    """
    stages = [
        "".join(map(_symbol, members))
        for _, members in groupby(records, key=lambda record: stage_name(record.block))
    ]
    share = 1
    while width is not None and share < max(map(len, stages), default=0):
        if len(stages) - 1 + sum(-(-len(stage) // share) for stage in stages) <= width:
            break
        share += 1
    return " ".join(_merged(stage, share) for stage in stages)


def _symbol(record: GateRecord) -> str:
    if record.death is not None:
        return "·"
    if not record.closed_steps:
        return "█"
    return "░" if record.closed_steps == record.steps else "▒"


def _merged(stage: str, share: int) -> str:
    pieces = (stage[at : at + share] for at in range(0, len(stage), share))
    return "".join(min(piece, key="█▒░·".index) for piece in pieces)


class MetricsLog:
    """`metrics.jsonl`: one JSON object an epoch, appended and flushed; a resumed run drops the
    epochs that it is about to repeat."""

    def __init__(self, path: Path, *, epochs_done: int, parameters: int) -> None:
        """Open the log of a network that has so many `parameters` with all its blocks."""
        self.path, self._parameters = path, parameters
        kept = _lines_up_to(path, epochs_done) if epochs_done else []
        replace_file(path, "".join(kept).encode())

    def append(self, report: EpochMetrics) -> dict[str, Any]:
        """Add an epoch; returns its line as :meth:`read` gives it."""
        line = _metrics(report, self._parameters)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def read(self) -> list[dict[str, Any]]:
        """All epochs so far, those of the run before a resume included."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def _lines_up_to(path: Path, epoch: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace")  # what is no UTF-8 is no JSON either
    for line in text.splitlines(keepends=True):
        try:
            if json.loads(line)["epoch"] <= epoch:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            if line.endswith("\n"):  # only the line being written at a kill may be cut short
                raise FileFormatError(
                    f"{path}: not a metrics log; move it away and resume again"
                ) from None
    return kept


def _metrics(report: EpochMetrics, parameters: int) -> dict[str, Any]:
    return {
        "epoch": report.epoch,
        "rate": report.rate,
        "epsilon": report.epsilon,
        "loss": report.loss,
        "train_accuracy": report.train_accuracy,
        "validation": report.validation.to_dict(),
        "discarded": report.discarded,
        "dead": sum(gate.death is not None for gate in report.gates),
        "died": list(report.died),
        "parameters": {"total": parameters, "kept": report.parameters},
        "best": report.best,
        "seconds": report.seconds,
        "images_per_second": report.images / report.seconds,
        "gates": {
            gate.block: {"steps": gate.steps, "closed": gate.closed_steps, "peak": gate.peak}
            for gate in report.gates
            if gate.death is None
        },
    }


class EpochPrinter:
    """A live display on a terminal, plain lines elsewhere; deaths are told on both."""

    def __init__(
        self,
        console: Console,
        title: str,
        *,
        epochs: int,
        epochs_done: int,
        parameters: int,
        position: Callable[[], float],
        compiles: bool = False,
    ) -> None:
        """Begin to tell of a run.

        Args:
            console: where to.
            title: what is trained.
            epochs, epochs_done: of the run, and how many of them a resumed run has behind it.
            parameters: of the network with all its blocks.
            position: where the run is, in epochs: 2.5 is in the middle of the third.
            compiles: whether the first epoch takes longer than the others, and tells nothing of
                them.
        """
        self._console, self._epochs, self._parameters = console, epochs, parameters
        self._map = ""
        self._epsilon: float | None = None
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._passed_over = epochs_done + 1 if compiles else 0
        self._live = _Live(console, title, epochs, position)
        console.print(f"{title}: {epochs - epochs_done} epochs to train")

    def __enter__(self) -> EpochPrinter:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, report: EpochMetrics) -> None:
        if report.epoch != self._passed_over:
            self._seconds.append(report.seconds)
        line = self._line(report)
        # To the width of the console, under the line it belongs to.
        shown = block_map(report.gates, self._console.width - 2)
        changed, self._map = shown != self._map, shown
        if report.died or not self._console.is_terminal:
            self._console.print(line, markup=False)
            if shown and changed:
                self._console.print(f"  {shown}", markup=False)
            if report.died:
                self._console.print(f"  {_obituary(report.died)}", markup=False)
        self._live.show(line, shown)

    def _line(self, report: EpochMetrics) -> str:
        """An epoch in about 80 characters."""
        parts = [
            f"epoch {report.epoch:>{len(str(self._epochs))}}/{self._epochs}",
            f"loss {report.loss:.3f}",
            f"val {report.validation.accuracy:.2%}",
            f"rate {report.rate:g}",
        ]
        if report.gates and report.epsilon != self._epsilon:
            parts.append(f"ε {report.epsilon:.3g}")
            self._epsilon = report.epsilon
        parts.append(f"{report.images / report.seconds:,.0f} img/s")
        if report.parameters != self._parameters:
            parts.append(f"params {report.parameters / self._parameters:.0%}")
        if (left := self._epochs - report.epoch) and self._seconds:
            parts.append(f"{_clock(left * median(self._seconds))} left")
        return "  ".join(parts)


class _Live(Progress):
    """On a terminal: a bar that moves with every step, the last epoch's line, the block map."""

    def __init__(
        self, console: Console, title: str, epochs: int, position: Callable[[], float]
    ) -> None:
        self._position, self._below = position, ("", "")  # read by the very first rendering
        super().__init__(
            TextColumn(title),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.1f}%"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self.add_task(title, total=epochs)

    def show(self, line: str, shown: str) -> None:
        self._below = (line, f"  {shown}" if shown else "")

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.task_ids:
            self.update(task, completed=self._position())
        yield from super().get_renderables()
        yield from (text for text in self._below if text)


def _obituary(died: Sequence[str]) -> str:
    """The blocks that died, as many names as fit into a line."""
    text = f"died: {', '.join(died)}"
    if cell_len(text) <= _OBITUARY:
        return text
    named = list(died)
    while len(named) > 1 and cell_len(f"{', '.join(named)} and {len(died)} more") > _OBITUARY:
        named.pop()
    return f"died: {', '.join(named)} and {len(died) - len(named)} more"


def _clock(seconds: float) -> str:
    """``4:05``, ``3:04:05``, and from two days on ``12 days``."""
    whole = round(seconds)
    if whole >= 48 * 3600:
        return f"{whole / 86400:.0f} days"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


# -- Early warnings: what a run's plan, or its first deaths, say about how it will end
#
# Each is one line that says what, why and what helps. A false alarm would be worse than none: each
# speaks only where the numbers leave little doubt, and the tests hold the recipes against them.

# What is left of a closed branch's weights at the end of the run, from which on deaths cannot be
# hoped for. Measured on digits: at 0.84 none of 15 blocks died (depth 32), at 0.46 none of 9, at
# 0.30 three of 9 (depth 20), at 0.01 six of 15. So a run just below the line may yet lose none, but
# one above it has no such prospect.
LASTING = 0.5
WANTED = 0.05  # what the remedy aims at
STRONGEST = 0.01  # weight decay that it names at most; 0.005 did well on digits and harm elsewhere
# The share of the guesser's cross-entropy below which a network has learned something. A share of
# the accuracy, the measure of `guards.refuse_collapse`, is reached late or never where classes are
# many. At a half, a run on digits was warned of whose blocks died one by one and that ended well.
LEARNED = 0.75
SILENT = 1e-3  # share of epsilon below which a branch that responds so at first starts at zero
IMAGES = 32  # looked at for such branches; any would do


def before_training(config: TrainingConfig, *, steps: int) -> str | None:
    """Why few blocks or none can die in a run of `steps` steps an epoch; None if they can."""
    if config.plain:
        return None
    acting = len(_acting(config))
    if acting < config.patience:
        return (
            f"no block can die: epsilon acts in {acting} epochs, and a gate has to be closed"
            f" through {config.patience}; give more --epochs"
        )
    if config.target_parameters is not None:
        return None  # an epsilon that is led reaches for blocks that do not shrink
    left = math.exp(-decay(config, steps=steps))
    if left <= LASTING:
        return None
    remedies = ["--target-parameters"]
    if left < 0.999:
        factor = math.log(WANTED) / math.log(left)
        if config.weight_decay * factor <= STRONGEST:
            remedies.insert(0, f"--weight-decay {config.weight_decay * factor:.2g}")
        remedies.insert(0, f"--epochs {math.ceil(config.epochs * factor)}")
    return (
        f"few blocks or none will die: weight decay leaves {left:.0%} of a closed branch after"
        f" {acting * steps:,} steps, so only those that respond below epsilon anyhow can; give"
        f" {' or '.join(remedies)}"
    )


def unreachable(
    config: TrainingConfig, sizes: Mapping[str, int], whole: int, stages: Mapping[str, str]
) -> list[str]:
    """What no run of this network can reach.

    Args:
        config: of the run.
        sizes: parameters that leave with each block (`rewriting.branch_parameters`).
        whole: parameters of the whole network.
        stages: the stage of each block (`rewriting.stages`).
    """
    found = []
    free = [block for block, size in sizes.items() if not size]
    if free and len(free) == len(sizes):
        found.append("no block of this network frees a parameter when it goes")
    elif free:
        found.append(
            f"{len(free)} of {len(sizes)} blocks free no parameter when they go, the first"
            f" {free[0]}"
        )
    if config.target_parameters is not None:
        kept: dict[str, int] = {}
        for block, size in sizes.items():
            kept[stages[block]] = min(size, kept.get(stages[block], size))
        least = (whole - sum(sizes.values()) + sum(kept.values())) / whole
        if least > config.target_parameters:
            found.append(
                f"--target-parameters {config.target_parameters:g} cannot be reached: every stage"
                f" keeps a block, and that leaves {least:.0%} of the parameters"
            )
    return found


def _acting(config: TrainingConfig) -> range:
    """The 0-based epochs in which a fixed epsilon acts."""
    return range(config.epsilon_warmup, round(config.freeze_gates_at * config.epochs))


def decay(config: TrainingConfig, *, steps: int) -> float:
    """Exponent by which weight decay shrinks a closed branch over the run, without restarts.

    The sum of `rate * weight_decay / (1 - momentum)` over all steps on which epsilon acts
    (paper.md, "Tried on small data"). Restarts only add to it.
    """
    schedule = LearningRateSchedule(
        epochs=config.epochs,
        lr_schedule=config.lr_schedule,
        lr_restart=config.lr_restart,
        final_decay=config.final_decay,
    )
    lr_schedule = sum(schedule.rate(epoch) for epoch in _acting(config))
    return lr_schedule * steps * config.weight_decay / (1 - config.momentum)


def zero_branches(
    model: nn.Module,
    normalize: nn.Module,
    gates: Mapping[str, EpsilonGate],
    images: Part,
    *,
    epsilon: float,
) -> str | None:
    """Which branches start at zero, so that an `epsilon` that acts at once closes them for good.

    Libraries start the last norm of a branch at weight 0 (timm's ResNets), or scale the branch by
    1e-6 (ConvNeXt): such a branch learns while its gate is open, but a gate that is closed at once
    lets no gradient in. A few of `images` pass in evaluation mode, which leaves no trace.
    """
    if not gates or not epsilon:
        return None
    with watch_branches(gates, response) as peaks:
        logits(model, normalize, next(iter(images.batches(IMAGES))).images)
    silent = [block for block, seen in peaks.items() if max(map(float, seen)) < SILENT * epsilon]
    if not silent:
        return None
    return (
        f"{len(silent)} of {len(gates)} branches start at zero ({silent[0]}, ...), and an epsilon"
        " that acts from the first epoch shuts them before they can learn; give --epsilon-warmup,"
        " so that they train first"
    )


class PruneLog:
    """Says when blocks die too early, or all of a stage; each of it once in a run."""

    def __init__(
        self,
        config: TrainingConfig,
        labels: Tensor,
        stages: Mapping[str, str],
        *,
        before: Metrics = (),
        records: Iterable[GateRecord] = (),
    ) -> None:
        """Begin to watch a run.

        Args:
            config: its configuration.
            labels: of the validation part, int64 `[N]`.
            stages: the stage of each block (`rewriting.stages`).
            before: the lines of `metrics.jsonl` that a resumed run has behind it.
            records: of all gates, where it resumes: what they tell was told.
        """
        self._led = config.target_parameters is not None
        self._guess = _entropy(labels)
        losses = [min(line["validation"]["loss"], line["loss"]) for line in before]
        self._loss = min(losses, default=math.inf)
        self._died_before = any(line["died"] for line in before)
        self._stages = stages
        self._lost = set(lost_stages(records, stages))

    def observe(self, report: EpochMetrics) -> list[str]:
        """The warnings that an epoch gives cause for."""
        # Validation alone would be a false witness: at a high rate it swings by tens of points.
        self._loss = min(self._loss, report.validation.loss, report.loss)
        warnings = []
        if report.died and not self._died_before and self._loss > self._guess * LEARNED:
            warnings.append(
                f"blocks died in epoch {report.epoch}, before the network has learned much: the"
                f" best loss so far is {self._loss:.2f}, where guessing gives {self._guess:.2f};"
                f" {self._remedy}"
            )
        self._died_before = self._died_before or bool(report.died)
        for stage in lost_stages(report.gates, self._stages):
            if stage not in self._lost:
                self._lost.add(stage)
                warnings.append(
                    f"every block of {stage} has died by epoch {report.epoch}, at"
                    f" a validation accuracy of {report.validation.accuracy:.1%}: only shortcuts"
                    f" are left there; if that is too much, {self._remedy}"
                )
        return warnings

    @property
    def _remedy(self) -> str:
        first = "raise --target-parameters" if self._led else "lower --epsilon"
        return f"{first}, or let it act later with --epsilon-warmup"


def _entropy(labels: Tensor) -> float:
    """Cross-entropy of one who knows how frequent the classes are, and nothing else."""
    shares = labels.bincount().double() / len(labels)
    return math.fsum(-share * math.log(share) for share in shares.tolist() if share)
