"""Tables about a run: what would be trained, and what came out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from eps_train import console, graph, outlook
from eps_train.branches import branch_parameters
from eps_train.checkpoint import Checkpoint
from eps_train.config import TrainingConfig
from eps_train.cost import cost
from eps_train.data import Outline
from eps_train.loop import network_spec
from eps_train.schedule import Steps


def summarize(best: Checkpoint, path: Path, seconds: float) -> dict[str, Any]:
    """A finished run as plain data: what was trained, kept, reached, and where it is."""
    shape = best.data.input_shape
    blocks = len(best.network.all_blocks())
    whole = cost(best.build_gated(), shape)
    kept = cost(replace(best.network, removed=best.dead).build(best.state), shape)
    return {
        "path": str(path),
        "model": "plain" if not best.gates else "ε-ResNet",
        "blocks": {"total": blocks, "kept": blocks - len(best.dead)},
        "parameters": {"total": whole.parameters, "kept": kept.parameters},
        "flops": {"total": whole.flops, "kept": kept.flops},
        "epoch": best.metrics["epoch"],
        "validation": best.metrics["validation"],
        "test": best.metrics["test"],
        "seconds": seconds,
    }


def show(summaries: list[dict[str, Any]]) -> None:
    """Print finished runs as one table."""
    rows = [
        (
            summary["model"],
            f"{summary['blocks']['kept']}/{summary['blocks']['total']}",
            f"{summary['parameters']['kept']:,} ({_share(summary['parameters']):.0%})",
            f"{_share(summary['flops']):.0%}",
            f"{summary['validation']['accuracy']:.2%}",
            f"{summary['test']['accuracy']:.2%} of {summary['test']['samples']}",
            f"{summary['seconds']:.0f} s",
            summary["path"],
        )
        for summary in summaries
    ]
    columns = ("network", "blocks", "parameters", "FLOPs", "validation", "test", "time", "written")
    log = console.log()
    table = console.table("Trained", columns, rows)
    unbounded = log.options.update(width=10_000)
    if (
        log.measure(table, options=unbounded).maximum > log.width
    ):  # a column a run instead, with whole words
        first, *others = zip(columns, *rows, strict=True)
        table = console.table("Trained", first, others)
    log.print(table)


def _share(cost: dict[str, int]) -> float:
    return cost["kept"] / cost["total"]


def show_plan(chosen: TrainingConfig, data: Outline) -> None:
    """Print what a run would train; the network is built without memory for its tensors."""
    spec = network_spec(chosen, data)
    total = cost(spec.skeleton(), data.shape)
    steps = max(1, data.train // chosen.batch_size)
    rows = [
        ("data", f"{chosen.dataset}: {data.train:,} training images of {_size(data.shape)}"),
        ("model", f"{chosen.model}, {len(spec.all_blocks())} blocks"),
        ("parameters", f"{total.parameters:,}"),
        ("FLOPs an image", f"{total.flops:,}"),
        ("epochs", f"{chosen.epochs} of {steps} steps of {chosen.batch_size} images"),
        ("rate", _steps(chosen.rates)),
        ("after a loss", _steps(chosen.restart) if chosen.restart else "no restart"),
        ("last descent", f"{_steps(chosen.descent)} of the run"),
        ("epsilon", _epsilon(chosen)),
    ]
    log = console.log()
    log.print(console.table(f"Recipe {chosen.recipe} (dry run)", ("", ""), rows))
    if chosen.plain:
        return
    skeleton = spec.skeleton()
    for line in graph.told(graph.ungated(skeleton)):
        log.print(f"not gated: {line}")
    stages = graph.stages(skeleton, data.shape)
    sizes = branch_parameters(skeleton)
    warnings = outlook.unreachable(chosen, sizes, total.parameters, stages)
    for warning in [outlook.before_training(chosen, steps=steps), *warnings]:
        if warning:
            log.print(f"warning: {warning}")


def _epsilon(chosen: TrainingConfig) -> str:
    if chosen.plain:
        return "none: plain network"
    start = f" from epoch {chosen.epsilon_from + 1} on" if chosen.epsilon_from else ""
    if chosen.epsilon is None:
        return f"led to keep {chosen.target_parameters:.0%} of the parameters{start}"
    return f"{chosen.epsilon:g}{start}"


def _size(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


def _steps(steps: Steps) -> str:
    return ", ".join(f"{value:g} from {start:g}" for start, value in steps)
