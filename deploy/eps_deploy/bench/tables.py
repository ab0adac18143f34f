"""What `eps-bench` says to people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from eps_deploy.bench.run import DEVICE, END_TO_END, WHOLE, Bench, Times
from eps_deploy.bench.slo import Tried
from eps_deploy.bench.subject import Subject, differences
from eps_train import console

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
