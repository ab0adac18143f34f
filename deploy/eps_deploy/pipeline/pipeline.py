"""From `compact.pt` to a bundle with a verdict: the work behind `eps-deploy`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eps_core.checks import Check, Parity
from eps_core.cli import refuse_missing
from eps_core.errors import ConfigError
from eps_deploy import triton
from eps_deploy.bench.accuracy import Classes, Infer, accuracy_drop, classes
from eps_deploy.bench.latency import Latency, save_samples
from eps_deploy.engines.base import Images
from eps_deploy.engines.trt.plan import PLAN
from eps_deploy.export import half
from eps_deploy.export.mixed_precision import Repair, Trial, repair, units
from eps_deploy.export.quantize import pick
from eps_deploy.pipeline import build, evaluate, write
from eps_deploy.pipeline.build import Models, Networks, Stages, Variants, digest_of
from eps_deploy.pipeline.evaluate import TestPart
from eps_deploy.pipeline.inputs import Inputs, find_sources
from eps_deploy.pipeline.options import Options
from eps_deploy.pipeline.write import BundleWriter
from eps_deploy.report import report
from eps_deploy.report.render import render_html as render_html
from eps_deploy.report.render import render_markdown as render_markdown
from eps_train.data.dataset import load_again
from eps_train.training.forward import cpu_threads

# -- `--repair` in a deployment: keeping what a lower precision harms most in a higher one


def require(sources: Inputs) -> None:
    """Raise ConfigError when there is nothing that could miss its limit."""
    if sources.baseline is None:
        raise ConfigError(
            "--repair: there is no trained baseline whose accuracy could be missed; name one with"
            " --baseline, or leave --repair out"
        )


def repaired(
    options: Options,
    sources: Inputs,
    built: Networks,
    models: Models,
    calibration: Images | None,
    part: TestPart,
    stages: Stages,
    say: Callable[[str], None],
) -> tuple[Models, Repair]:
    """`models`, with blocks kept until the accuracy holds, and how they were found.

    Each trial is judged on the whole test part, as :func:`evaluate.accuracy` does, but for a plan,
    which would take minutes to build. When nothing helps, `models` stay as they are.
    """

    def named(infer: Infer) -> Classes:
        return classes(infer, part.images, options.max_batch)

    baseline = named(built.baseline.infer) == part.labels

    def attempt(kept: tuple[str, ...]) -> Trial:
        tried = build.export(options, sources, built, calibration, stages, kept)
        with ExitStack() as stack:
            forms = build.shipped(options, built.compact, tried.compact, stack)
            right = min((named(infer) == part.labels for infer in forms), key=np.sum)
        drop = accuracy_drop(baseline, right, options.max_accuracy_drop)
        say(f"  drop {drop.points.value:+.2f} points with {len(kept)} kept in higher precision")
        return Trial(passed=drop.passed, value=drop.points.value)

    found = repair(units(models.compact, sources.blocks()), attempt)
    if not found.kept:
        return models, found
    return build.export(options, sources, built, calibration, stages, found.kept), found


Say = Callable[[str], None]
HEADROOM_IMAGES = 512  # of the test part, at most


def deploy(options: Options, say: Say) -> dict[str, Any]:
    """Write the bundle and return its report; `say` is told what is going on, a line a step.

    Raises EpsError, with nothing written, when something that was given cannot be used.
    """
    writer = _writer(options)
    build.require(options)
    sources, part, calibration = _read(options, say)
    with writer:
        stages = Stages(writer.stages, resume=options.resume)
        with _kept(stages, writer.stages, say):
            job = _Job(options, sources, part, build.build_networks(sources), stages, say)
            models, repair = job.export(calibration)
            with build.opened(options, job.networks, models, stages, say) as sides:
                found = job.measure(models, sides, repair)
            job.write(writer.folder, models, sides, found)
            file = PLAN if PLAN in sides.files else "model.onnx"
            writer.commit(write.manifest_fields(options, sources, sides.describe(options), file))
        stages.clear()
    return found.report


@contextmanager
def _kept(stages: Stages, folder: Path, say: Say) -> Iterator[None]:
    """When the block fails, say what is left of the work done, and how to go on from it."""
    try:
        yield
    except BaseException:
        if stages.left():
            say(f"what was finished is kept in {folder.name}; --resume goes on from there")
        else:
            stages.clear()
        raise


def plan(options: Options) -> list[str]:
    """What `deploy` would do, a line a step; raises as it would before any work is done."""
    _writer(options)
    lines: list[str] = []
    build.require(options)
    sources, part, _ = _read(options, lines.append)
    build.build_networks(sources)
    name = options.precision.name
    lines.append(f"would export model.onnx and baseline.onnx in {name}")
    if options.precision.quantized:
        lines.append(f"would calibrate int8 on {options.calibration_samples} training images")
    if options.engine == "trt":
        lines.append(
            "would build no plan (--defer-build)"
            if options.defer_build
            else "would build two plans"
        )
    batches = ", ".join(map(str, options.batches))
    lines.append(f"would compare the logits of every stage at batches {batches}")
    lines.append(f"would measure the accuracy on {len(part.labels)} test images")
    why = build.why_no_times(options)
    lines.append(
        f"would measure no latency: {why}"
        if why
        else f"would measure the latency for up to {options.time_budget:g} s a batch size"
    )
    lines.append(f"would write {options.output}")
    return lines


def _writer(options: Options) -> BundleWriter:
    """Of the bundle, once all files that were named are there."""
    refuse_missing(options.model, options.checkpoint, options.baseline)
    return BundleWriter(options.output, force=options.force)


def _read(options: Options, say: Say) -> tuple[Inputs, TestPart, Images | None]:
    """The files, the test images, and for int8 the images to calibrate on."""
    sources = find_sources(options.model, options.checkpoint, options.baseline)
    say(f"baseline: {sources.baseline_path or 'none trained; full depth, for latency only'}")
    if options.repair:
        require(sources)
    data = load_again(sources.compact.data, options.data_root)
    part = TestPart(images=data.test.images.numpy(), labels=data.test.labels.numpy())
    quantized = options.precision.quantized
    return sources, part, pick(data, options.calibration_samples) if quantized else None


@dataclass(slots=True)
class _Found:
    """What was measured, and the report on it."""

    report: dict[str, Any]
    timings: list[Latency] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Job:
    """One deployment, from its networks to its bundle's content."""

    options: Options
    sources: Inputs
    part: TestPart
    networks: Networks
    stages: Stages
    say: Say

    def export(self, calibration: Images | None) -> tuple[Models, Repair | None]:
        """The ONNX files, and with `--repair` what was kept in higher precision."""
        options, sources, built, stages = self.options, self.sources, self.networks, self.stages
        with _timed(self.say, "exported model.onnx and baseline.onnx"):
            models = build.export(options, sources, built, calibration, stages)
        if not options.repair:
            return models, None
        with _timed(self.say, "looked for blocks to keep in higher precision"):
            return repaired(
                options, sources, built, models, calibration, self.part, stages, self.say
            )

    def measure(self, models: Models, sides: Variants, repair: Repair | None) -> _Found:
        options, sources = self.options, self.sources
        with _timed(self.say, "compared the logits of every stage"), cpu_threads(1):
            proven = self._once("parity", models, lambda: self._parity(sides))
        with _timed(self.say, f"measured the accuracy on {len(self.part.labels)} test images"):
            right = self._once("accuracy", models, lambda: self._accuracy(sides))
        not_run = [*build.not_run(options), *([] if sources.baseline else [_NO_BASELINE])]
        checks = [Check(**check) for check in (*proven["checks"], *right["checks"])]
        if options.precision.float == "float16":
            with _timed(self.say, "measured the headroom of float16"):
                checks.append(
                    Check(**self._once("headroom", models, lambda: self._headroom(models)))
                )
        if options.defer_build:
            with _timed(self.say, "tried NVIDIA's parser and builder without a GPU"):
                tried = build.rehearse(options, models.compact)
            checks += [tried] if tried else []
            not_run += [] if tried else [build.NO_REHEARSAL]
        timings: list[Latency] = []
        if why := build.why_no_times(options):
            not_run.append({"what": "latency", "why": why})
        else:
            picture = write.picture(self.part.images[0], sources.compact.data)
            timings = evaluate.timed(options, sides, self.part, picture, self.say)
            checks.append(report.speedup_check(timings[0], options.min_speedup))
        found = {
            "schema": report.SCHEMA,
            "passed": report.verdict(checks, deferred=sides.compact.engine is None),
            "lossless": sources.compact.certificate.get("lossless", True),
            "engine": options.engine,
            "precision": write.precision_entry(options, models, sides, repair),
            "goals": {
                "max_accuracy_drop": options.max_accuracy_drop,
                "min_speedup": options.min_speedup,
            },
            "checks": [report.check_entry(check) for check in checks],
            **build.size(sources, self.networks),
            "blocks": _blocks(sources),
            "accuracy": right["entry"],
            "parity": proven["entry"],
            "latency": [report.latency_entry(timing) for timing in timings],
            "latency_baseline": (
                "trained plain network" if sources.baseline else "full depth of the ε-network"
            ),
            "environment": report.environment(sides.describe(options)),
            "resumed": self.stages.resumed,
            "command": options.command,
            "not_run": not_run,
        }
        return _Found(found, timings)

    def _once(self, name: str, models: Models, make: Callable[[], Any]) -> Any:
        """A measurement that a killed run may have made already."""
        asked = (self.options.engine, self.options.precision.name, self.options.batches)
        key = {
            "models": models.digests(),
            "gated": self.sources.checkpoint.digest,
            "data": self.sources.compact.data.sha256,
            "asked": [*map(str, asked), self.options.provider, self.options.max_accuracy_drop],
            "environment": digest_of(report.environment({})),
        }
        return self.stages.data(name, key, make)

    def _parity(self, sides: Variants) -> dict[str, Any]:
        chain: list[Parity] = evaluate.chain(
            self.options, self.sources, self.networks.gated.infer, sides, self.part
        )
        checks = [check for stage in chain if (check := report.parity_check(stage)) is not None]
        return {
            "entry": [report.parity_entry(stage) for stage in chain],
            "checks": [asdict(check) for check in checks],
        }

    def _accuracy(self, sides: Variants) -> dict[str, Any]:
        options, built = self.options, self.networks
        with build.on_gpu(options.device, built.compact, built.baseline):
            entry, checks = evaluate.accuracy(options, self.sources, sides, self.part)
        return {"entry": entry, "checks": [asdict(check) for check in checks]}

    def _headroom(self, models: Models) -> dict[str, Any]:
        images = self.part.images[np.unique(self.part.spread(HEADROOM_IMAGES))]
        peak = half.peak(models.compact, images, self.options.max_batch)
        return asdict(report.headroom_check(peak, len(images)))

    def write(self, folder: Path, models: Models, sides: Variants, found: _Found) -> None:
        """All of the bundle but its manifest."""
        data = self.sources.compact.data
        for name, content in {**models.files(), **sides.files}.items():
            (folder / name).write_bytes(content)
        picked = np.unique(self.part.spread(self.options.max_batch + 1))
        images = self.part.images[picked]
        logits = self.networks.compact.infer(images)
        labels = self.part.labels
        write.write_samples(folder / "samples.npz", images, labels[picked], picked, logits)
        write.write_examples(folder / "examples", self.part.images, labels, data.classes)
        if found.timings:
            save_samples(folder / "latency.npz", found.timings)
        served = write.served(self.options, data, sides)
        triton.write_repository(folder, served, images, name=self.options.name)
        report.write_json(folder / "report.json", found.report)
        for name, text in (
            ("report.md", render_markdown(found.report)),
            ("report.html", render_html(found.report)),
            ("reproduce.sh", write.script(self.options, self.sources, found.report)),
        ):
            (folder / name).write_text(text, encoding="utf-8")


_NO_BASELINE = {
    "what": "accuracy against a trained baseline",
    "why": (
        "no baseline.pt beside the checkpoint: train one with eps-train --with-baseline,"
        " or name one with --baseline"
    ),
}


def _blocks(sources: Inputs) -> dict[str, Any]:
    network = sources.compact.network
    live = [entry["block"] for entry in sources.compact.certificate.get("removed_live", [])]
    return report.blocks_entry(network.all_blocks(), network.removed, live)


@contextmanager
def _timed(say: Say, what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    say(f"{what} ({time.perf_counter() - began:.1f} s)")
