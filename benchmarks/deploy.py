"""Deployment benchmark: speed-up of the pruned network, other runtimes, and export time.

Sections:

    pruned    the unpruned network over the pruned one on ONNX Runtime, beside the FLOPs of both
    runtimes  the pruned network in eps-deploy's ONNX file, in torch, torch.compile, OpenVINO, and
              as torch.onnx.export writes it; interleaved with a matrix product
    export    seconds of eps-deploy's ONNX export, and of torch's own on the smaller network
    engines   with --device: TensorRT, ONNX Runtime, torch and torch.compile on a CPU or a GPU, each
              with the unpruned network over the pruned one; host memory to host memory

Each side is warmed up, then all are interleaved in blocks. Times are wall time; on one thread also
processor time, which other programs of a busy machine disturb far less. The networks are untrained
and their dead blocks chosen, which does not affect the time. The last line printed is one JSON
object.

    python benchmarks/deploy.py [--sections pruned,runtimes] [--threads 1,2] [--seconds S]
    python benchmarks/deploy.py --device cuda [--precision fp16] [--batches 1,8,32,128]
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _engines
import _runtimes
import click
import numpy as np
import torch
from _pruned import Pair, pair
from _rounds import machine, say

from eps_core.errors import ConfigError
from eps_core.machine import MachineMonitor
from eps_core.stats import ratio_of_medians
from eps_core.timing import Clock, Runs, interleave, wall_clock
from eps_deploy.bench.latency import noise, spread, verdict
from eps_deploy.engines.base import Images
from eps_deploy.export.export import export_onnx
from eps_deploy.precision import PRECISIONS, Precision
from eps_train.training import forward

BATCHES = (1, 16)
DEPTH, DEAD = 110, 43
DEEPER = 752
WITHIN = {1: 0.25, 16: 0.15}  # of the FLOPs' ratio
CPU = torch.device("cpu")

Times = dict[str, Runs]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Machine and duration of the measurement."""

    folder: Path
    seconds: float
    threads: tuple[int, ...]
    device: torch.device
    precision: Precision
    batches: tuple[int, ...]
    engines: tuple[str, ...]


def pruned(networks: Pair, setting: Setting) -> list[dict[str, Any]]:
    """Unpruned over pruned: latency and FLOPs, on one thread."""
    torch.set_num_threads(1)
    paths = _export(networks, setting.folder)
    promised = networks.flops["full"] / networks.flops["compact"]
    found = []
    for batch in BATCHES:
        images = _images(batch)
        calls = {side: _runtimes.ours(path, images, 1) for side, path in paths.items()}
        row: dict[str, Any] = {"batch": batch, "flops_ratio": promised, "within": WITHIN[batch]}
        for clock, times in _both(calls, setting, row).items():
            ratio = ratio_of_medians(times["full"], times["compact"])
            row[clock] = {
                "milliseconds": _medians(times),
                "ratio": ratio.value,
                "interval": [ratio.low, ratio.high],
                "over_flops_ratio": ratio.value / promised,
                "passed": _judged(row, clock, abs(ratio.value / promised - 1) <= WITHIN[batch]),
            }
        say(json.dumps(row))
        found.append(row)
    return found


def runtimes(networks: Pair, setting: Setting) -> list[dict[str, Any]]:
    """The pruned network in every runtime, with the same number of threads."""
    path = _export(networks, setting.folder)["compact"]
    plain = setting.folder / "plain.onnx"
    _runtimes.write_plain(networks.compact, _images(2), plain)
    in_torch = networks.compact.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = []
    for threads in setting.threads:
        torch.set_num_threads(threads)
        for batch in BATCHES:
            images = _images(batch)
            say(f"compiling for batch {batch} on {threads} threads")
            made = {
                "ours": _runtimes.ours(path, images, threads),
                "plain": _runtimes.plain(plain, images, threads),
                "eager": _runtimes.eager(in_torch, images),
                "compile": _runtimes.compiled(in_torch, images),
                "openvino": _runtimes.openvino(path, images, threads),
            }
            product, product_flops = _runtimes.gemm()
            calls = {side: call for side, call in made.items() if call is not None}
            flops = dict.fromkeys(calls, batch * networks.flops["compact"])
            row: dict[str, Any] = {"threads": threads, "batch": batch}
            both = _both({**calls, "gemm": product}, setting, row, processor=threads == 1)
            for clock, times in both.items():
                beside = _beside_ours(times, {**flops, "gemm": product_flops})
                row[clock] = {**beside, "ours_is": _judged(row, clock, beside["ours_is"])}
            say(json.dumps(row))
            found.append(row)
    return found


def _beside_ours(times: Times, flops: Mapping[str, int]) -> dict[str, Any]:
    medians = _medians(times)
    sides: dict[str, dict[str, Any]] = {}
    verdicts: dict[str, str] = {}
    for side, ms in medians.items():
        sides[side] = {"milliseconds": ms, "gflops_per_second": flops[side] / ms / 1e6}
        if side not in ("ours", "gemm"):
            ratio = ratio_of_medians(times[side], times["ours"])
            sides[side] |= {"over_ours": ratio.value, "interval": [ratio.low, ratio.high]}
            verdicts[side] = verdict(ratio)
    # An interval above 1 means that eps-deploy's file is faster than that side, below 1 slower.
    return {
        "sides": sides,
        "best_other": min(verdicts, key=lambda side: medians[side]),
        "ours_is": verdicts,
    }


def export(networks: Pair, setting: Setting) -> list[dict[str, Any]]:
    """Seconds to write and check the unpruned network's ONNX file."""
    torch.set_num_threads(1)
    found = []
    for depth in (DEPTH, DEEPER):
        whole = networks if depth == DEPTH else pair(depth, 0)
        path = setting.folder / f"{depth}.onnx"
        row: dict[str, Any] = {
            "depth": depth,
            "seconds": _seconds(
                lambda whole=whole, path=path: export_onnx(whole.full.network, whole.identity, path)  # type: ignore[misc]
            ),
            "bytes": path.stat().st_size,
        }
        if depth == DEPTH:
            theirs = setting.folder / "theirs.onnx"
            row["torch_seconds"] = _seconds(
                lambda theirs=theirs: _runtimes.write_plain(networks.full, _images(2), theirs)  # type: ignore[misc]
            )
        say(json.dumps(row))
        found.append(row)
    return found


def engines(networks: Pair, setting: Setting) -> list[dict[str, Any]]:
    """Unpruned over pruned in every engine of the device, one row for each engine and batch."""
    torch.set_num_threads(1)
    paths = _export(networks, setting.folder, setting.precision)
    both = {"full": networks.full, "compact": networks.compact}
    found = []
    for name in setting.engines:
        row: dict[str, Any] = {"engine": name}
        try:
            with ExitStack() as stack:
                opened = {
                    side: stack.enter_context(
                        _engines.opened(
                            name,
                            network,
                            paths[side],
                            device=setting.device,
                            precision=setting.precision,
                            max_batch=max(setting.batches),
                        )
                    )
                    for side, network in both.items()
                }
                for batch in setting.batches:
                    row = {"engine": name, "batch": batch}
                    found.append(_in_one_engine(opened, setting, row))
                    say(json.dumps(row))
        except _engines.Unavailable as reason:
            found.append({**row, "not_run": str(reason)})
            say(json.dumps(found[-1]))
    return found


def _in_one_engine(
    opened: Mapping[str, _engines.Infer], setting: Setting, row: dict[str, Any]
) -> dict[str, Any]:
    images = _images(row["batch"])
    calls = {side: partial(infer, images) for side, infer in opened.items()}
    for call in calls.values():  # torch.compile compiles, and records a graph in its third run
        for _ in range(3):
            call()
    times = _both(calls, setting, row, processor=False)["wall"]
    ratio = ratio_of_medians(times["full"], times["compact"])
    medians = _medians(times)
    row |= {
        "milliseconds": medians,
        "images_per_second": {side: 1e3 * row["batch"] / ms for side, ms in medians.items()},
        "ratio": ratio.value,
        "interval": [ratio.low, ratio.high],
    }
    return row


SECTIONS: dict[str, Callable[[Pair, Setting], list[dict[str, Any]]]] = {
    "pruned": pruned,
    "runtimes": runtimes,
    "export": export,
    "engines": engines,
}
_WITHOUT_DEVICE = ("pruned", "runtimes", "export")


def _both(
    calls: Mapping[str, Callable[[], object]],
    setting: Setting,
    row: dict[str, Any],
    *,
    processor: bool = True,
) -> dict[str, Times]:
    """Wall and processor times; adds the other activity of the machine to `row`."""
    clocks: dict[str, Clock] = {"wall": time.perf_counter}
    if processor:
        clocks["processor"] = time.process_time
    found = {}
    with MachineMonitor() as monitor:
        monitor.poll()
        for name, clock in clocks.items():
            timings = interleave(
                [wall_clock(call, clock) for call in calls.values()],
                budget=setting.seconds,
                between=monitor.poll,
            )
            found[name] = dict(zip(calls, timings.times, strict=True))
            row[f"{name}_runs"] = list(timings.times[0].shape)
        conditions = monitor.conditions()
    row["starved"] = conditions.starved
    row["noise"] = noise(conditions, max(spread(blocks) for blocks in found["wall"].values()))
    return found


def _judged(row: Mapping[str, Any], clock: str, found: Any) -> Any:
    """`found`, or None for wall times of a process that had to wait for a core."""
    return None if clock == "wall" and row["starved"] else found


def _medians(times: Times) -> dict[str, float]:
    return {side: float(np.median(samples)) for side, samples in times.items()}


def _export(
    networks: Pair, folder: Path, precision: Precision = PRECISIONS["fp32"]
) -> dict[str, Path]:
    paths = {side: folder / f"{side}.onnx" for side in ("full", "compact")}
    for side, network in (("full", networks.full), ("compact", networks.compact)):
        export_onnx(network.network, networks.identity, paths[side], precision=precision)
    return paths


def _images(batch: int) -> Images:
    chance = np.random.default_rng(0)
    return chance.integers(0, 256, size=(batch, 3, 32, 32), dtype=np.uint8)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _names(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    known = SECTIONS if option.name == "sections" else _engines.ENGINES
    if value is None:
        return None
    names = tuple(value.split(","))
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{unknown[0]}: the {option.name} are {', '.join(known)}")
    return names


def _sizes(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in value.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"{value}: give numbers from 1 on, with commas: 1,8,32")
    return sizes


@click.command()
@click.option("--sections", callback=_names, help="Which to run.  [default: all but engines]")
@click.option("--device", help="engines: cpu or cuda; selects that section by default.")
@click.option(
    "--precision",
    type=click.Choice(("fp32", "fp16")),
    help="engines: of all of them.  [default: fp16 on cuda, fp32 on cpu]",
)
@click.option(
    "--batches", default="1,8,32,128", show_default=True, callback=_sizes, help="engines: sizes."
)
@click.option(
    "--engines",
    default=",".join(_engines.ENGINES),
    show_default=True,
    callback=_names,
    help="engines: which.",
)
@click.option(
    "--depth", type=click.IntRange(8), default=DEPTH, show_default=True, help="engines: layers."
)
@click.option("--threads", default="1,2", show_default=True, help="runtimes: of each side.")
@click.option("--seconds", default=20.0, show_default=True, help="For each batch and clock.")
def main(
    sections: tuple[str, ...] | None,
    device: str | None,
    precision: str | None,
    batches: tuple[int, ...],
    engines: tuple[str, ...],
    depth: int,
    threads: str,
    seconds: float,
) -> None:
    """Measure the pruned network against the unpruned one, other runtimes, and the export."""
    if sections is None:
        sections = _WITHOUT_DEVICE if device is None else ("engines",)
    if depth != DEPTH and sections != ("engines",):
        raise click.UsageError("--depth only applies to --sections engines")
    try:
        target = forward.choose(device or "cpu")
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    if precision is None:
        precision = "fp16" if target.type == "cuda" else "fp32"
    conditions = machine(target)
    dead = DEAD if depth == DEPTH else (depth - 2) // 2 * DEAD // 54
    networks = pair(depth, dead)
    versions = _runtimes.versions()
    not_run = [
        {"what": name, "why": "not among --sections"} for name in SECTIONS if name not in sections
    ]
    if versions["openvino"] is None and "runtimes" in sections:
        why = "it is not installed: pip install openvino"
        not_run.append({"what": "openvino", "why": why})
        say(f"openvino: not run: {why}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        counts = tuple(int(count) for count in threads.split(","))
        setting = Setting(
            folder=Path(name),
            seconds=seconds,
            threads=counts,
            device=target,
            precision=PRECISIONS[precision],
            batches=batches,
            engines=engines,
        )
        for section in sections:
            results[section] = SECTIONS[section](networks, setting)
    result = {
        "machine": {**conditions, "threads": None},  # each section sets its own number of threads
        "versions": versions,
        "network": {"model": f"cifar:{depth}x16", "image": [3, 32, 32], "dead": dead},
        "precision": precision,
        "flops": networks.flops,
        **results,
        "not_run": not_run,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
