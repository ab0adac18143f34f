"""The command `eps-doctor`: what this machine can do, and what helps where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from eps_train import console

if TYPE_CHECKING:
    from eps_deploy import nvidia
    from eps_deploy.doctor.examine import Findings

_GIB = 2**30


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def cli(as_json: bool) -> int:
    """Say what this machine can do: driver, GPUs, torch, ONNX Runtime, TensorRT, disk.

    Each part is tried, not looked up: a provider of ONNX Runtime that is listed but does not load
    is said not to work. Exit code 0 whatever is found.
    """
    from eps_deploy.doctor.examine import examine

    found = examine()
    if as_json:
        console.emit_json(found.to_dict())
    else:
        for line in lines(found):
            click.echo(line)
    return 0


def lines(found: Findings) -> list[str]:
    """What was found, in words."""
    system = found.system
    memory = f", {system['memory'] / _GIB:.1f} GiB of memory" if system["memory"] else ""
    told = [
        f"eps-resnet {system['eps_resnet']}, Python {system['python']}, {system['system']}"
        f" {system['processor']}, CPUs: {system['cpus']}{memory},"
        f" {system['disk_free'] / _GIB:.1f} GiB free on this disk"
    ]
    told += [
        f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability},"
        f" {_free(gpu)}, driver {gpu.driver}"
        for gpu in found.gpus
    ]
    told += ["", *_columns([(p.name, "works" if p.works else "no", p.found) for p in found.parts])]
    able = [
        (item.name, "no: " + ", ".join(item.missing) if item.missing else "yes")
        for item in found.abilities
    ]
    told += ["", "What can be done here:", *_columns(able)]
    remedies = [(part.name, part.remedy) for part in found.parts if part.remedy]
    if remedies:
        told += ["", "What is missing, and what helps:"]
        told += [f"  {name}: {remedy}" for name, remedy in remedies]
    return told


def _free(gpu: nvidia.Gpu) -> str:
    if gpu.memory is None or gpu.free is None:
        return "no memory of its own"
    return f"{gpu.free:,} of {gpu.memory:,} MiB free"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines; every column but the last is as wide as its longest entry."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]) - 1)]
    return [
        "  " + "  ".join((*(t.ljust(w) for t, w in zip(row, widths, strict=False)), row[-1]))
        for row in rows
    ]


def main() -> NoReturn:
    console.run(cli)
