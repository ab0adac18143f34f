"""From `compact.pt` to a bundle with a verdict: the work behind `eps-deploy`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from eps_compact.certificate import BOUND as FOLDING_LIMIT
from eps_deploy import contents, latency, parity, report
from eps_deploy.accuracy import Drop, accuracy_drop, correct
from eps_deploy.bundle_writer import BundleWriter
from eps_deploy.engines.base import Engine, Images
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export import Deployed, export_onnx
from eps_deploy.report_markdown import render
from eps_deploy.sources import Sources, find_sources
from eps_train import graph
from eps_train.cost import cost
from eps_train.data import load_again
from eps_train.devices import cpu_threads
from eps_train.errors import ConfigError

ONNX_LIMIT = 1e-4  # relative to the largest logit: float32 sums in another order
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `eps-deploy` was asked for.

    Attributes:
        model: the compact network.
        checkpoint, baseline: where they are; None: where they are expected.
        data_root: as `--data-root`.
        output: folder of the bundle.
        max_accuracy_drop: percentage points.
        min_speedup: ratio that the speed-up's interval must reach.
        latency_budget: seconds for all latency measurements together.
        force: replace a bundle at `output`.
    """

    model: Path
    checkpoint: Path | None = None
    baseline: Path | None = None
    data_root: Path | None = None
    output: Path = Path("bundle")
    max_accuracy_drop: float = 0.5
    min_speedup: float = 1.0
    latency_budget: float = 20.0
    force: bool = False

    def __post_init__(self) -> None:
        for name in ("max_accuracy_drop", "min_speedup", "latency_budget"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value}: give a number of at least 0"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Networks:
    """Each takes uint8 images; `baseline` is the trained one or the ε-network's full depth."""

    gated: Deployed
    compact: Deployed
    baseline: Deployed


@dataclass(frozen=True, kw_only=True, slots=True)
class _TestPart:
    images: Images
    labels: npt.NDArray[np.int64]


def deploy(options: Options, say: Say) -> dict[str, Any]:
    """Write the bundle and return its report; `say` is told what is going on, a line a step.

    Raises EpsError, with nothing written, when something that was given cannot be used.
    """
    writer = BundleWriter(options.output, force=options.force)
    sources = find_sources(options.model, options.checkpoint, options.baseline)
    say(f"baseline: {sources.baseline_path or 'none trained; full depth, for latency only'}")
    test = load_again(sources.compact.data, options.data_root).test
    part = _TestPart(images=test.images.numpy(), labels=test.labels.numpy())
    networks = _build(sources)
    with writer:
        with _timed(say, "exported model.onnx and baseline.onnx"):
            _export(sources, networks, writer.folder)
        with _engine(writer.folder, "model.onnx") as engine:
            with _engine(writer.folder, "baseline.onnx") as baseline:
                found = _measure(options, sources, networks, part, engine, baseline, say)
            _write_samples(writer.folder, sources, networks, part)
            report.write_json(writer.folder / "report.json", found)
            (writer.folder / "report.md").write_text(render(found), encoding="utf-8")
            writer.commit(contents.manifest_fields(sources, engine, precision="fp32"))
    return found


def _build(sources: Sources) -> _Networks:
    identity = sources.compact.data
    if sources.baseline is None:
        whole = sources.checkpoint.build_gated()
        baseline: nn.Module = graph.drop_taps(graph.drop_gates(whole))
    else:
        baseline = graph.drop_taps(sources.baseline.build_gated())
        identity = sources.baseline.data
    return _Networks(
        gated=Deployed(sources.compact.gated(sources.checkpoint), sources.compact.data),
        compact=Deployed(sources.compact.build(), sources.compact.data),
        baseline=Deployed(baseline, identity),
    )


def _export(sources: Sources, networks: _Networks, folder: Path) -> None:
    identity = sources.compact.data
    export_onnx(
        networks.compact.network, identity, folder / "model.onnx", source=sources.compact.digest
    )
    origin = sources.baseline or sources.checkpoint
    export_onnx(
        networks.baseline.network, origin.data, folder / "baseline.onnx", source=origin.digest
    )


def _engine(folder: Path, name: str) -> OrtEngine:
    return OrtEngine((folder / name).read_bytes(), name=name)


def _measure(
    options: Options,
    sources: Sources,
    networks: _Networks,
    part: _TestPart,
    engine: Engine,
    baseline: Engine,
    say: Say,
) -> dict[str, Any]:
    with _timed(say, "compared the logits of every stage"), cpu_threads(1):
        stages = _parity(sources, networks, part, engine, baseline)
    with _timed(say, f"measured the accuracy on {len(part.labels)} test images"):
        accuracies, drop = _accuracy(options, sources, networks, part, engine)
    with _timed(say, "measured the latency"):
        timings = _latency(options, part, engine, baseline)
    checks = [report.parity_check(stage) for stage in stages]
    if drop is not None:
        checks.append(report.accuracy_check(drop))
    checks.append(report.speedup_check(timings[0], options.min_speedup))
    return {
        "schema": report.SCHEMA,
        "passed": report.verdict(checks),
        "lossless": sources.compact.certificate.get("lossless", True),
        "checks": [report.check_entry(check) for check in checks],
        **_size(sources, networks),
        "accuracy": accuracies,
        "parity": [report.parity_entry(stage) for stage in stages],
        "latency": [report.latency_entry(timing) for timing in timings],
        "latency_baseline": "trained plain network" if drop else "full depth of the ε-network",
        "environment": report.environment(engine),
        "not_run": [] if drop else [_NO_BASELINE],
    }


_NO_BASELINE = {
    "what": "accuracy against a trained baseline",
    "why": (
        "no baseline.pt beside the checkpoint: train one with eps-train --with-baseline,"
        " or name one with --baseline"
    ),
}


def _parity(
    sources: Sources, networks: _Networks, part: _TestPart, engine: Engine, baseline: Engine
) -> list[parity.Parity]:
    picked = parity.pick_samples(len(part.labels))
    images = part.images[picked]
    compact = parity.passes(networks.compact.infer, images)
    folding = FOLDING_LIMIT if sources.compact.folded else 0.0
    chain = (
        ("gated-compact", parity.passes(networks.gated.infer, images), compact, folding),
        ("compact-onnx", compact, parity.passes(engine.infer, images), ONNX_LIMIT),
        (
            "baseline-onnx",
            parity.passes(networks.baseline.infer, images),
            parity.passes(baseline.infer, images),
            ONNX_LIMIT,
        ),
    )
    return [
        parity.compare(stage, reference, candidate, picked.tolist(), limit)
        for stage, reference, candidate, limit in chain
    ]


def _accuracy(
    options: Options, sources: Sources, networks: _Networks, part: _TestPart, engine: Engine
) -> tuple[dict[str, Any], Drop | None]:
    by_engine = correct(engine.infer, part.images, part.labels)
    found = {
        "baseline": None,
        "compact": float(correct(networks.compact.infer, part.images, part.labels).mean()),
        "engine": float(by_engine.mean()),
        "samples": len(part.labels),
        "drop": None,
    }
    if sources.baseline is None:
        return found, None
    by_baseline = correct(networks.baseline.infer, part.images, part.labels)
    drop = accuracy_drop(by_baseline, by_engine, options.max_accuracy_drop)
    entry = report.drop_entry(drop)
    return {**found, "baseline": float(by_baseline.mean()), "drop": entry}, drop


def _latency(
    options: Options, part: _TestPart, engine: Engine, baseline: Engine
) -> list[latency.Latency]:
    budget = options.latency_budget / len(latency.BATCHES)
    timings = []
    for batch in latency.BATCHES:
        images = part.images[parity.pick_samples(len(part.labels), batch)]
        timings.append(latency.measure(baseline, engine, images, budget=budget))
    return timings


def _size(sources: Sources, networks: _Networks) -> dict[str, Any]:
    shape = sources.compact.data.input_shape
    baseline = cost(networks.baseline.network, shape)
    compact = cost(networks.compact.network, shape)
    blocks = sources.compact.network.all_blocks()
    removed = sources.compact.network.removed
    return {
        "parameters": {"baseline": baseline.parameters, "compact": compact.parameters},
        "flops": {"baseline": baseline.flops, "compact": compact.flops},
        "blocks": {
            "baseline": len(blocks),
            "compact": len(blocks) - len(removed),
            "removed": [block for block in blocks if block in removed],
        },
    }


def _write_samples(folder: Path, sources: Sources, networks: _Networks, part: _TestPart) -> None:
    picked = np.unique(parity.pick_samples(len(part.labels), max(parity.BATCHES)))
    images = part.images[picked]
    logits = networks.compact.infer(images)
    contents.write_samples(folder / "samples.npz", images, part.labels[picked], picked, logits)
    contents.write_examples(
        folder / "examples", part.images, part.labels, sources.compact.data.classes
    )


@contextmanager
def _timed(say: Say, what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    say(f"{what} ({time.perf_counter() - began:.1f} s)")
