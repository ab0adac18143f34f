"""Training benchmark: gates, input path, and whole runs, each against what it replaces.

Sections, each with both sides interleaved after a warm-up:

    gate     time of a step with open gates over one without, `cifar10-110`; with --cuda-graph also
             of both as CUDA graphs, and of graph over eager
    memory   memory of the same steps
    inputs   images per second: eps-train, and a torchvision DataLoader with the same augmentation
    removal  whole digits runs: live removal of dead blocks, and the baseline
    timm     an epoch of eps-train, and of timm's training script

The last line printed is one JSON object.

    python benchmarks/training.py [--device cuda] [--sections gate,memory]
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from _inputs import inputs
from _removal import removal
from _rounds import NotRun, Options, Plan, machine, say
from _steps import gate, memory
from _timm import timm

from eps_core.errors import ConfigError
from eps_train.config import choices
from eps_train.training import forward

SECTIONS: dict[str, Callable[[Options], Plan]] = {
    "gate": gate,
    "memory": memory,
    "inputs": inputs,
    "removal": removal,
    "timm": timm,
}


_EXISTING = click.Path(exists=True, path_type=Path)


def _sections(context: click.Context, option: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    if unknown := [name for name in names if name not in SECTIONS]:
        raise click.BadParameter(f"{unknown[0]}: the sections are {', '.join(SECTIONS)}")
    return names


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--sections", default=",".join(SECTIONS), callback=_sections, help="Which to run.")
@click.option("--depth", default=110, show_default=True, help="gate, memory: of the network.")
@click.option("--batch-size", default=128, show_default=True, help="gate, memory: images a step.")
@click.option("--rounds", default=60, show_default=True, help="gate: rounds of both sides.")
@click.option(
    "--precision",
    type=click.Choice(choices("precision")),
    default="fp32",
    show_default=True,
    help="gate, memory: as eps-train --precision.",
)
@click.option("--compile", is_flag=True, help="gate, memory: as eps-train --compile.")
@click.option("--cuda-graph", is_flag=True, help="gate: CUDA graphs too (on a CPU, their buffers).")
@click.option("--contiguous", is_flag=True, help="gate, memory: NCHW in place of channels-last.")
@click.option("--seeds", default="0,1,2", show_default=True, help="removal: one run each.")
@click.option("--timm-checkout", type=_EXISTING, help="timm: its repository, with train.py.")
@click.option("--timm-python", type=_EXISTING, help="timm: python of its own environment.")
@click.option("--timm-note", help="timm: about that checkout, kept with its figures.")
@click.option("--timm-model", default="resnet18", show_default=True, help="timm: for both sides.")
def main(
    device: str,
    sections: tuple[str, ...],
    seeds: str,
    timm_checkout: Path | None,
    timm_python: Path | None,
    **chosen: Any,
) -> None:
    """Measure what training costs, side by side."""
    try:
        target = forward.choose(device)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    options = Options(
        device=target,
        seeds=tuple(map(int, seeds.split(","))),
        timm_checkout=timm_checkout and timm_checkout.absolute(),
        timm_python=timm_python and timm_python.absolute(),  # not resolved: may be a symlink
        **chosen,
    )
    before = machine(options.device)
    plans: dict[str, Plan] = {}
    not_run: list[dict[str, str]] = []
    for name in SECTIONS:
        if name not in sections:
            not_run.append({"what": name, "why": "not among --sections"})
            continue
        try:
            plans[name] = SECTIONS[name](options)
        except NotRun as reason:
            not_run.append({"what": name, "why": str(reason)})
            say(f"{name}: not run: {reason}")
    minutes = {name: plan.seconds / 60 for name, plan in plans.items()}
    each = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    say(f"about {sum(minutes.values()):.0f} minutes from here ({each})")
    results = {}
    for name, plan in plans.items():
        results[name] = plan.measure()
        say(f"{name}: {json.dumps(results[name])}")
    print(json.dumps({"machine": before, **results, "not_run": not_run}))


if __name__ == "__main__":
    main()
