"""The command `eps-bench`: latency of model files, measured side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.table import Table

from eps_core import cli as console
from eps_core.cli import milliseconds

if TYPE_CHECKING:
    from eps_deploy.bench.latency import Attempt, LatencyResult, ModelFile
    from eps_deploy.engines.ort import Provider

_FILE = click.Path(path_type=Path)
_TITLES = {
    "call": "whole calls, images in memory",
    "device": "the GPU's own time",
    "end_to_end": "from an image's bytes to a label",
}
_PERCENTILES = ("p50", "p90", "p95", "p99")


def _number(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Refuse nan, which neither bound of a click.FloatRange does."""
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
    help="Images in a call; repeatable.  [default: 1 and 16]",
)
@click.option(
    "--time-budget",
    type=click.FloatRange(min=0, max=86_400),
    default=20.0,
    show_default=True,
    callback=_number,
    metavar="SECONDS",
    help="Maximum time for each batch size.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1, max=1024),
    default=1,
    show_default=True,
    metavar="N",
    help="CPU threads.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Execution provider of .onnx and .pt files; a plan always runs on TensorRT.",
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
@click.option("-o", "--output", type=_FILE, metavar="FILE", help="Write all results as JSON.")
@click.option("--force", is_flag=True, help="Overwrite the file of -o.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def cli(
    files: tuple[Path, ...],
    batches: tuple[int, ...],
    time_budget: float,
    threads: int,
    provider: Provider,
    slo_ms: float | None,
    allow_mismatch: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> int:
    """Measure the latency of each FILE: a bundle, a .onnx, a .plan with its .plan.json, or a .pt.

    The first FILE is the reference. The others are timed in turns with it, in this process, and
    reported as faster or slower if the whole interval of the ratio is 3 % or more away from 1.
    Files that differ in more than the network (images, classes, precision, runtime, provider,
    threads) are refused unless --allow-mismatch is given. The exit status is 3 if no batch size
    meets the limit of --slo-ms.
    """
    if slo_ms is not None and batches:
        raise click.UsageError("--slo-ms and --batch: the first chooses the batch size itself.")
    if output is not None:
        console.refuse_missing(*(path for path in files if not path.is_dir()))
        console.refuse_existing([output], force)
    from eps_core.machine import machine
    from eps_deploy.bench.latency import differences, require_match
    from eps_deploy.bench.model_files import open_model_file

    log = console.log()
    with ExitStack() as stack:
        opened: list[ModelFile] = []
        for path in files:
            opened.append(open_model_file(path, provider=provider, threads=threads))
            stack.push(opened[-1].engine)
        if not allow_mismatch:
            require_match(opened)
        unlike = differences(opened)
        for line in _about(opened, unlike):
            log.print(line)
        if slo_ms is None:
            found, details = _compare(opened, unlike, batches, time_budget)
            passed = True
        else:
            found = details = _sweep(opened, slo_ms, time_budget)
            passed = all(sweep["best"] for sweep in found["sweeps"])
        head = {
            "schema": 1,
            "passed": passed,
            "files": [{"file": f.name, **f.facts, "remark": f.remark} for f in opened],
            "unlike": unlike,
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
    files: list[ModelFile], unlike: dict[str, list[str]], asked: tuple[int, ...], budget: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the summary, and the same with every run."""
    from eps_deploy.bench.latency import choose_batches, measure

    log = console.log()
    gpu = next((file.gpu for file in files if file.gpu is not None), None)
    results = []
    for batch in choose_batches(files, asked):
        found = measure([file.workload(batch) for file in files], budget=budget, gpu=gpu)
        results.append(found)
        for table in _tables(files, unlike, found):
            log.print(table)
        warm = "" if found.warm else " The warm-up did not become flat in its time."
        p99 = "" if found.p99_reliable else " Fewer than 200 runs: p99 (*) is unreliable."
        log.print(f"{found.blocks} blocks of {found.runs} runs of each file, in turns.{warm}{p99}")
        log.print(found.noise)
    names = [file.name for file in files]
    summary, details = (
        {"batches": [result.to_dict(names, samples=samples) for result in results]}
        for samples in (False, True)
    )
    return summary, details


def _sweep(files: list[ModelFile], limit: float, budget: float) -> dict[str, Any]:
    """Return the summary: for each file the best batch size, and all that were tried."""
    from eps_deploy.bench.latency import best, sweep_batches

    log = console.log()
    sweeps = []
    for file in files:
        attempts = sweep_batches(
            file, limit, budget=budget, report=lambda each: log.print(_attempt_line(each))
        )
        chosen = best(attempts)
        log.print(_chosen_line(file.name, chosen, limit))
        sweeps.append(
            {
                "file": file.name,
                "best": chosen and asdict(chosen),
                "tried": [asdict(each) for each in attempts],
            }
        )
    return {"slo_ms": limit, "sweeps": sweeps}


def main() -> NoReturn:
    console.run(cli)


# -- Lines and tables


def _about(files: Sequence[ModelFile], unlike: dict[str, list[str]]) -> Iterator[str]:
    """What all files have in common, in what they differ, and remarks on single files."""
    facts = files[0].facts
    common = {name: value for name, value in facts.items() if name not in unlike and value}
    yield ", ".join(f"{name} {value}" for name, value in common.items())
    if unlike:
        yield f"MISMATCH in {', '.join(unlike)}: the ratios compare more than the networks"
    for file in files:
        if file.remark:
            yield file.remark


def _tables(
    files: Sequence[ModelFile], unlike: dict[str, list[str]], found: LatencyResult
) -> Iterator[Table]:
    """A table for each way of timing."""
    columns = ["file", *unlike, *(f"{p} ms" for p in _PERCENTILES), "images/s"]
    if len(files) > 1:
        columns += ["speed-up (95 % interval)", "verdict"]
    for way, times in found.times.items():
        rows = []
        for index, (file, each) in enumerate(zip(files, times, strict=True)):
            values = [milliseconds(each.ms[name]) for name in _PERCENTILES]
            if not found.p99_reliable:
                values[-1] += "*"
            ratio = "reference" if each.speedup is None else str(each.speedup)
            row = [file.name, *(facts[index] for facts in unlike.values()), *values]
            rows.append([*row, f"{each.rate:,.0f}", ratio, each.verdict or ""][: len(columns)])
        yield console.table(f"Batch {found.batch}: {_TITLES[way]}", columns, rows)


def _attempt_line(attempt: Attempt) -> str:
    if attempt.ms is None:
        return f"batch {attempt.batch}: {attempt.failure}"
    word = "within" if attempt.passed else "above"
    p50, p99 = (milliseconds(attempt.ms[name]) for name in ("p50", "p99"))
    note = "" if attempt.p99_reliable else f" ({attempt.runs} runs: p99 is unreliable)"
    return (
        f"batch {attempt.batch}: p50 {p50} ms, p99 {p99} ms ({word} the limit),"
        f" {attempt.rate:,.0f} images/s{note}"
    )


def _chosen_line(name: str, chosen: Attempt | None, limit: float) -> str:
    if chosen is None or chosen.ms is None:
        return f"{name}: no batch size keeps p99 within {limit:g} ms"
    return (
        f"{name}: batch {chosen.batch} gives most throughput within {limit:g} ms:"
        f" {chosen.rate:,.0f} images/s at p99 {milliseconds(chosen.ms['p99'])} ms"
    )
