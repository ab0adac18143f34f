"""The command `eps-bench`: honest latency of any model file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.table import Table

from eps_core import cli as console
from eps_deploy.bench.latency import (
    DEVICE,
    END_TO_END,
    WHOLE,
    Bench,
    Subject,
    Times,
    Tried,
    differences,
)

if TYPE_CHECKING:
    from eps_deploy.bench.latency import Subject
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
    "--allow-mismatch", is_flag=True, help="Compare files that differ in more than the network."
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
    allow_mismatch: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> int:
    """Time each FILE: a bundle, a .onnx, a .plan with its .plan.json, or a .pt of ours.

    The first FILE is the reference; the others are timed in turns with it, in this process, and
    called faster or slower when the whole interval of the ratio lies 3 % or more from 1. Files that
    differ in more than the network (images, classes, precision, runtime, provider, threads) are
    refused unless --allow-mismatch is given. Exit status 3: no batch size keeps the limit of
    --slo-ms.
    """
    if slo_ms is not None and batches:
        raise click.UsageError("--slo-ms and --batch: the first chooses the batch size itself.")
    if output is not None:
        console.refuse_missing(*(path for path in files if not path.is_dir()))  # a bundle is one
        console.refuse_existing([output], force)
    from eps_deploy.bench.latency import differences, refuse_unlike
    from eps_deploy.bench.machine import machine
    from eps_deploy.bench.subjects import open_subject

    with ExitStack() as stack:
        subjects: list[Subject] = []
        for path in files:
            subjects.append(open_subject(path, provider=provider, threads=threads))
            stack.callback(subjects[-1].close)
        if not allow_mismatch:
            refuse_unlike(subjects)
        log = console.log()
        for line in about(subjects):
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
        from eps_core.files import replace_file

        replace_file(output, (json.dumps({**head, **details}, allow_nan=False) + "\n").encode())
        log.print(f"Written: {output}")
    if as_json:
        console.emit_json({**head, **found})
    return 0 if passed else console.CHECK_FAILED


def _compare(
    subjects: list[Subject], asked: tuple[int, ...], seconds: float
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The summary, the same with every run, and that nothing was missed."""
    from eps_deploy.bench.latency import choose_batches, compare

    log = console.log()
    names = [subject.name for subject in subjects]
    results = []
    for batch in choose_batches(subjects, asked):
        results.append(compare(subjects, batch, seconds=seconds))
        for table in of_batch(subjects, results[-1]):
            log.print(table)
        for line in remarks(results[-1]):
            log.print(line)
    summary, details = (
        {"batches": [result.to_dict(names, samples=samples) for result in results]}
        for samples in (False, True)
    )
    return summary, details, True


def _sweep(
    subjects: list[Subject], limit: float, seconds: float
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    from eps_deploy.bench.latency import best, sweep

    log = console.log()
    found, chosen = [], []
    for subject in subjects:
        tried = sweep(
            subject,
            limit,
            seconds=seconds,
            report=lambda each: log.print(tried_line(each)),
        )
        chosen.append(best(tried))
        log.print(chosen_line(subject.name, chosen[-1], limit))
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


# -- What `eps-bench` says to people

_TITLES = {
    WHOLE: "whole calls, images in memory",
    DEVICE: "the GPU's own time",
    END_TO_END: "from a picture's bytes to a label",
}
_PERCENTILES = ("p50", "p90", "p95", "p99")


def about(subjects: Sequence[Subject]) -> Iterator[str]:
    """What all have in common, what not, and what a reader must know of one."""
    unlike = differences(list(subjects))
    facts = subjects[0].facts.to_dict()
    common = {name: value for name, value in facts.items() if name not in unlike and value}
    yield ", ".join(f"{name} {value}" for name, value in common.items())
    if unlike:
        yield f"UNLIKE in {', '.join(unlike)}: the ratios tell of more than the networks"
    for subject in subjects:
        if subject.remark:
            yield subject.remark


def of_batch(subjects: Sequence[Subject], found: Bench) -> Iterator[Table]:
    """A table for each way of timing."""
    unlike = differences(list(subjects))
    for way in found.times[0]:
        rows = [
            (
                subject.name,
                *(values[index] for values in unlike.values()),
                *_cells(found.times[index][way], found.p99_reliable),
            )
            for index, subject in enumerate(subjects)
        ]
        columns = ["file", *unlike, *(f"{p} ms" for p in _PERCENTILES), "images/s"]
        compared = len(subjects) > 1
        table = console.table(
            f"Batch {found.batch}: {_TITLES[way]}",
            [*columns, "speed-up (95 % interval)", "verdict"] if compared else columns,
            rows if compared else [row[:-2] for row in rows],
        )
        yield table


def remarks(found: Bench) -> Iterator[str]:
    """How the times of a batch size came about."""
    warm = "" if found.warm else " The warm-up did not become flat in its time."
    p99 = "" if found.p99_reliable else " Fewer than 200 runs: p99 (*) is unreliable."
    yield f"{found.blocks} blocks of {found.runs} runs of each file, in turns.{warm}{p99}"
    yield found.noise


def tried_line(tried: Tried) -> str:
    if tried.ms is None or tried.rate is None:
        return f"batch {tried.batch}: {tried.failure}"
    word = "within" if tried.passed else "above"
    star = "" if tried.p99_reliable else f" ({tried.runs} runs: p99 is unreliable)"
    return (
        f"batch {tried.batch}: p50 {_ms(tried.ms['p50'])} ms, p99 {_ms(tried.ms['p99'])} ms"
        f" ({word} the limit), {tried.rate:,.0f} images/s{star}"
    )


def chosen_line(name: str, chosen: Tried | None, limit: float) -> str:
    if chosen is None:
        return f"{name}: no batch size keeps p99 within {limit:g} ms"
    assert chosen.ms is not None
    return (
        f"{name}: batch {chosen.batch} gives most throughput within {limit:g} ms:"
        f" {chosen.rate:,.0f} images/s at p99 {_ms(chosen.ms['p99'])} ms"
    )


def _cells(times: Times, p99_reliable: bool) -> tuple[str, ...]:
    values = [_ms(times.ms[name]) for name in _PERCENTILES]
    if not p99_reliable:
        values[-1] += "*"
    speedup = times.speedup
    ratio = (
        "reference"
        if speedup is None
        else f"{speedup.value:.2f} ({speedup.low:.2f} to {speedup.high:.2f})"
    )
    return (*values, f"{times.rate:,.0f}", ratio, times.verdict or "")


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1f}"
