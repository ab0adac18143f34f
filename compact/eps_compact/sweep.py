"""The sweep: block after block goes, always the one that is missed least for what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from eps_compact.branch_costs import BranchCost, branch_costs, live_network
from eps_compact.forking import Answers, Forking, answer, answer_all
from eps_compact.heldout import PROBE, ordered, pass_seconds, pixels
from eps_compact.intervals import Interval, median, ratio_of_medians
from eps_compact.ledger import CPU, accuracy_drop
from eps_compact.pareto import Goal, Point, Sweep, Weight, knee
from eps_compact.timing import Measure, Runs, Timer, TorchTimer, block_times
from eps_train import graph
from eps_train.checkpoint import Checkpoint
from eps_train.cost import Cost, cost
from eps_train.errors import ConfigError
from eps_train.images import Part
from eps_train.networks import Normalize

SECONDS = 120.0
TIMING_SHARE = 0.15  # of the seconds
CHOOSING_SHARE = 0.5
MEASURING_SHARE = 0.25
TIMED = 0.8  # of what is left for times; intervals take the rest
LEAST = 64  # images to choose on, before blocks go several at a time
BISECTIONS = 3  # networks at most that are tried within a step that leads beyond a goal
TOGETHER = 24  # networks that are timed, and held in memory, at once


def sweep(
    checkpoint: Checkpoint,
    validation: Part,
    *,
    goal: Goal | None = None,
    weight: Weight = "parameters",
    seconds: float = SECONDS,
    device: torch.device = CPU,
    timer: Timer | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Take the live blocks out one after another, within `seconds`.

    At each step every block that is left is left out in turn. The next to go is the one with the
    least rise in cross-entropy for what its removal saves; of those whose loss does not rise, the
    one that saves most. The validation part is divided: on one half, or as much of it as the time
    allows, blocks are chosen; on the other the accuracies are measured. No other image is looked
    at. Where time is short, several blocks go in one step; the step that leads beyond `goal` is
    then divided. A stage keeps its last block, as in training (`graph.removable`).

    Args:
        checkpoint: gated, or plain: then all of its residual blocks take part.
        validation: its validation part.
        goal: the network wanted; None: the curve is all that is asked for.
        weight: what a block saves: `parameters`, `flops`, or `ms`.
        seconds: to spend in all. What `timer` takes to make ready is on top.
        device: where to compute.
        timer: measures the times; `timing.TorchTimer` if not given.
        report: told what is being done, a line at a time.

    Raises:
        ConfigError: no block is left, or `seconds` is too little for even one step.
        FileFormatError: the checkpoint's tensors are not those of its network.
        GraphError: `timer` cannot run the network.
    """
    timer = timer or TorchTimer(checkpoint.data)
    model = live_network(checkpoint)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalize = Normalize.of(checkpoint.data).to(device)
    heldout, shape = ordered(validation), checkpoint.data.input_shape
    stages = graph.stages(model, shape)
    costs = _costs(model, shape, stages)
    report(f"sweep: making ready to time the networks ({timer.name})")
    measure = timer.load(model, pixels(heldout, range(1), device).images)
    began = time.perf_counter()
    saved = _saved(costs, weight, measure, seconds * TIMING_SHARE / 2)
    deadline = began + seconds * (1 - TIMING_SHARE)
    whole = cost(checkpoint.network.skeleton(), shape)
    walk = _Walk(
        normalize,
        shape,
        stages=stages,
        whole=whole,
        saved=saved,
        deadline=deadline,
        report=report,
    )
    walk.plan(model, heldout, seconds)
    steps, complete = walk.go(model)
    if goal is not None:
        walk.refine(steps, goal)
    report(f"sweep: timing {len(steps)} networks")
    left = seconds - (time.perf_counter() - began)
    found = _points(steps, measure, TIMED * left)
    return Sweep(
        points=found,
        knee=knee([(point.parameters, point.accuracy) for point in found]),
        weight=weight,
        chosen_on=walk.chosen_on,
        measured_on=walk.measured_on,
        complete=complete,
        timer=timer.name,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True, slots=True)
class _Stage:
    removed: tuple[str, ...]
    model: fx.GraphModule
    size: Cost
    parameters_share: float
    flops_share: float
    answers: Answers
    drop: Interval


class _Walk:
    """The steps of a sweep, paced so that they are done by the deadline."""

    def __init__(
        self,
        normalize: Normalize,
        shape: tuple[int, int, int],
        *,
        stages: Mapping[str, str],
        whole: Cost,
        saved: Mapping[str, float],
        deadline: float,
        report: Callable[[str], None],
    ) -> None:
        self._normalize, self._shape, self._whole = normalize, shape, whole
        self._saved, self._deadline, self._report = saved, deadline, report
        self._stages = stages

    def plan(self, model: fx.GraphModule, heldout: Part, seconds: float) -> None:
        """Decide on how many images to choose, and on how many to measure."""
        forking = Forking(model)
        blocks, available = len(forking.blocks), len(heldout)
        each = pass_seconds(forking, self._normalize, heldout) / min(PROBE, available)
        # One step takes `passes` passes, and the steps get shorter with the network: a third.
        step = each * forking.passes
        choosing = CHOOSING_SHARE * seconds
        self.chosen_on = min(available // 2, int(choosing / (step * blocks / 3)))
        self._at_once = 1
        if self.chosen_on < LEAST:
            self.chosen_on = min(available // 2, LEAST)
            self._at_once = math.ceil(self.chosen_on * step * blocks / 3 / choosing)
        if self.chosen_on * step > choosing:
            raise ConfigError(
                f"the sweep's {seconds:g} seconds are too few: a single step over {blocks} blocks"
                f" on {self.chosen_on} images takes about {self.chosen_on * step:.0f}; give it more"
            )
        fitting = int(MEASURING_SHARE * seconds / (each * (blocks / self._at_once / 2 + 1)))
        rest = available - self.chosen_on
        self.measured_on = min(rest, max(fitting, LEAST))
        device = self._normalize.mean.device
        self._choosing = pixels(heldout, range(self.chosen_on), device)
        self._measuring = pixels(
            heldout, range(self.chosen_on, self.chosen_on + self.measured_on), device
        )
        self._report(
            f"sweep: {blocks} blocks, chosen on {self.chosen_on:,} held-out images, accuracy"
            f" measured on {self.measured_on:,} others"
        )

    def go(self, model: fx.GraphModule) -> tuple[list[_Stage], bool]:
        """All stages, and whether the last has no block left that may go."""
        stages = [self._stage((), model)]
        while more := len(_removable(stages[-1].model, self._stages)):
            began = time.perf_counter()
            stages.append(self._step(stages[-1], stages[0]))
            taken = time.perf_counter() - began
            left = len(_removable(stages[-1].model, self._stages))
            next_step = taken * (left / more) ** 2
            if not self._pace(next_step, left):
                return stages, False
        return stages, True

    def refine(self, stages: list[_Stage], goal: Goal) -> None:
        """Bisect the step of several blocks that leads beyond `goal`, in place."""
        for _ in range(BISECTIONS):
            place = goal.step(stages)
            if place is None:
                return
            before, after = stages[place - 1], stages[place]
            group = after.removed[len(before.removed) :]
            if len(group) == 1:
                return
            gone = group[: len(group) // 2]
            self._report(f"sweep: dividing a step of {len(group)} blocks")
            model = graph.remove_blocks(before.model, gone)
            stages.insert(place, self._stage((*before.removed, *gone), model, stages[0]))

    def _pace(self, next_step: float, left: int) -> bool:
        """Settle how many blocks go at once from here; False when there is no time for a step."""
        remaining = self._deadline - time.perf_counter()
        if next_step > remaining:
            return not left
        # The rest one at a time takes a third of as many such steps.
        self._at_once = max(self._at_once, math.ceil(next_step * left / 3 / remaining))
        return True

    def _step(self, stage: _Stage, first: _Stage) -> _Stage:
        answers = answer_all(Forking(stage.model), self._normalize, self._choosing)
        whole = answers.pop(None).mean_loss
        rises = {block: found.mean_loss - whole for block, found in answers.items() if block}
        ranked = sorted(rises, key=lambda block: cheapness(rises[block], self._saved[block]))
        gone = graph.removable(ranked, rises, self._stages)[: self._at_once]
        removed = (*stage.removed, *gone)
        after = self._stage(removed, graph.remove_blocks(stage.model, gone), first)
        self._report(
            f"sweep: {len(after.removed)} out, last {gone[-1]}: accuracy"
            f" {after.answers.accuracy:.2%}, loss {after.answers.mean_loss:.3f}"
        )
        return after

    def _stage(
        self, removed: tuple[str, ...], model: fx.GraphModule, first: _Stage | None = None
    ) -> _Stage:
        answers = answer(model, self._normalize, self._measuring)
        size = cost(model, self._shape)
        return _Stage(
            removed=removed,
            model=model,
            size=size,
            parameters_share=size.parameters / self._whole.parameters,
            flops_share=size.flops / self._whole.flops,
            answers=answers,
            drop=accuracy_drop(answers if first is None else first.answers, answers),
        )


def _removable(model: fx.GraphModule, stages: Mapping[str, str]) -> list[str]:
    blocks = graph.gates(model)
    return graph.removable(blocks, blocks, stages)


def cheapness(rise: float, saved: float) -> tuple[float, float]:
    """Sorts blocks by how cheap it is to lose them, the next to go first.

    `rise` is that of the loss, `saved` what leaves with the block. A loss that does not rise ranks
    as one that stays: a gain below the noise is no reason to prefer a block that saves little.
    """
    return max(rise, 0.0) / max(saved, 1e-9), -saved


def _costs(
    model: fx.GraphModule, shape: tuple[int, int, int], stages: Mapping[str, str]
) -> list[BranchCost]:
    costs = branch_costs(model, shape)
    if not costs:
        raise ConfigError("every block is dead: there is none left for a sweep to take out")
    if not _removable(model, stages):
        raise ConfigError(
            "every block that is left is the last of its stage: there is none for a sweep to take"
            " out"
        )
    return costs


def _saved(
    costs: list[BranchCost], weight: Weight, measure: Measure, seconds: float
) -> dict[str, float]:
    if weight == "ms":
        times = block_times(costs, measure, seconds)
        return {block: interval.value for block, interval in times.items()}
    return {found.block: getattr(found, weight) for found in costs}


def _points(stages: list[_Stage], measure: Measure, seconds: float) -> tuple[Point, ...]:
    """The stages with their times, each measured beside the first one."""
    first, *rest = stages
    groups = [rest[at : at + TOGETHER] for at in range(0, len(rest), TOGETHER)] or [[]]
    found: list[Point] = []
    for group in groups:
        times = measure([stage.removed for stage in (first, *group)], seconds / len(groups))
        if not found:
            found.append(_point(first, times[0], times[0]))
        for stage, runs in zip(group, times[1:], strict=True):
            found.append(_point(stage, runs, times[0]))
    return tuple(found)


def _point(stage: _Stage, runs: list[Runs], first_runs: list[Runs]) -> Point:
    return Point(
        removed=stage.removed,
        parameters=stage.size.parameters,
        flops=stage.size.flops,
        parameters_share=stage.parameters_share,
        flops_share=stage.flops_share,
        accuracy=stage.answers.accuracy,
        loss=stage.answers.mean_loss,
        drop=stage.drop,
        ms=median(runs),
        speedup=ratio_of_medians(first_runs, runs),
    )
