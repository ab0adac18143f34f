"""The command `eps-bench`: honest latency of any model file."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from eps_train import console

if TYPE_CHECKING:
    from eps_deploy.bench.subject import Subject
    from eps_deploy.engines.ort import Provider

_FILE = click.Path(path_type=Path)


def _number(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Neither bound of a click.FloatRange refuses what is no number."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is not a number")
    return value


@click.command()
@click.argument("files", type=_FILE, nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Images in a call; may be given several times.  [default: 1 and 16]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, max=86_400),
    default=20.0,
    show_default=True,
    callback=_number,
    metavar="S",
    help="Time for each batch size, at most.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1, max=1024),
    default=1,
    show_default=True,
    metavar="N",
    help="Threads on the processor.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="What runs .onnx and .pt files; a plan runs on TensorRT in any case.",
)
@click.option(
    "--slo-ms",
    type=click.FloatRange(min=0, min_open=True),
    callback=_number,
    metavar="X",
    help="Find the batch size with most throughput whose 99th percentile is within X ms.",
)
@click.option(
    "--allow-unlike", is_flag=True, help="Compare files that differ in more than the network."
)
@click.option("-o", "--output", type=_FILE, metavar="FILE", help="Write all of it, as JSON.")
@click.option("--force", is_flag=True, help="Overwrite the file of -o.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def cli(
    files: tuple[Path, ...],
    batches: tuple[int, ...],
    seconds: float,
    threads: int,
    provider: Provider,
    slo_ms: float | None,
    allow_unlike: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> int:
    """Time each FILE: a bundle, a .onnx, a .plan with its .plan.json, or a .pt of ours.

    The first FILE is the reference; the others are timed in turns with it, in this process, and
    called faster or slower when the whole interval of the ratio lies 3 % or more from 1. Files that
    differ in more than the network (images, classes, precision, runtime, provider, threads) are
    refused unless --allow-unlike is given. Exit status 3: no batch size keeps the limit of
    --slo-ms.
    """
    if slo_ms is not None and batches:
        raise click.UsageError("--slo-ms and --batch: the first chooses the batch size itself.")
    if output is not None:
        console.refuse_missing(*(path for path in files if not path.is_dir()))  # a bundle is one
        console.refuse_existing([output], force)
    from eps_deploy.bench import tables
    from eps_deploy.bench.files import open_subject
    from eps_deploy.bench.subject import differences, refuse_unlike
    from eps_deploy.measuring.machine import machine

    with ExitStack() as stack:
        subjects: list[Subject] = []
        for path in files:
            subjects.append(open_subject(path, provider=provider, threads=threads))
            stack.callback(subjects[-1].close)
        if not allow_unlike:
            refuse_unlike(subjects)
        log = console.log()
        for line in tables.about(subjects):
            log.print(line)
        if slo_ms is None:
            found, details, passed = _compare(subjects, batches, seconds)
        else:
            found, details, passed = _sweep(subjects, slo_ms, seconds)
        head = {
            "schema": 1,
            "passed": passed,
            "files": [{"file": s.name, **s.facts.to_dict(), "remark": s.remark} for s in subjects],
            "unlike": differences(subjects),
            "machine": machine(),
        }
    if output is not None:
        from eps_train.atomic import replace_file

        replace_file(output, (json.dumps({**head, **details}, allow_nan=False) + "\n").encode())
        log.print(f"Written: {output}")
    if as_json:
        console.emit_json({**head, **found})
    return 0 if passed else console.CHECK_FAILED


def _compare(
    subjects: list[Subject], asked: tuple[int, ...], seconds: float
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The summary, the same with every run, and that nothing was missed."""
    from eps_deploy.bench import tables
    from eps_deploy.bench.run import choose_batches, compare

    log = console.log()
    names = [subject.name for subject in subjects]
    results = []
    for batch in choose_batches(subjects, asked):
        results.append(compare(subjects, batch, seconds=seconds))
        for table in tables.of_batch(subjects, results[-1]):
            log.print(table)
        for line in tables.remarks(results[-1]):
            log.print(line)
    summary, details = (
        {"batches": [result.to_dict(names, samples=samples) for result in results]}
        for samples in (False, True)
    )
    return summary, details, True


def _sweep(
    subjects: list[Subject], limit: float, seconds: float
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    from eps_deploy.bench import tables
    from eps_deploy.bench.slo import best, sweep

    log = console.log()
    found, chosen = [], []
    for subject in subjects:
        tried = sweep(
            subject,
            limit,
            seconds=seconds,
            report=lambda each: log.print(tables.tried_line(each)),
        )
        chosen.append(best(tried))
        log.print(tables.chosen_line(subject.name, chosen[-1], limit))
        found.append(
            {
                "file": subject.name,
                "best": chosen[-1] and chosen[-1].to_dict(),
                "tried": [each.to_dict() for each in tried],
            }
        )
    summary = {"slo_ms": limit, "sweeps": found}
    return summary, summary, all(chosen)


def main() -> NoReturn:
    console.run(cli)
