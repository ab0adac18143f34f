"""Deploy a compact network: export, build, check, measure, and write the bundle with its report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from eps_compact import Compaction
from eps_compact.certificate import BOUND as FOLDING_LIMIT
from eps_core.checks import Check, Parity, compare_logits
from eps_core.cli import Log, refuse_missing
from eps_core.errors import ConfigError, DataError
from eps_deploy import triton
from eps_deploy.bench import latency
from eps_deploy.bench.accuracy import (
    AGREEMENT_LIMITS,
    PARITY_LIMITS,
    Answers,
    Infer,
    answers,
    passes,
)
from eps_deploy.bench.latency import ExampleImage, LatencyResult, Workload
from eps_deploy.engines.base import Images, Logits
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.export.mixed_precision import Repair, Trial, repair, units
from eps_deploy.export.quantize import check_count, pick
from eps_deploy.export.types import float16_peak
from eps_deploy.pipeline import builder, write
from eps_deploy.pipeline.builder import Models, Networks, Variants
from eps_deploy.pipeline.inputs import Inputs, find_inputs, traced_baseline
from eps_deploy.pipeline.options import Options
from eps_deploy.pipeline.write import BundleWriter
from eps_deploy.precision import PRECISIONS
from eps_deploy.report import report
from eps_deploy.report.render import render_html, render_markdown
from eps_train.data.dataset import DataIdentity, load_again
from eps_train.data.inputs import Batch, pixels
from eps_train.training.forward import cpu_threads

HEADROOM_IMAGES = 512  # of the test images, at most
_NO_BASELINE_FILE = (
    "no baseline.pt beside the checkpoint: train one with eps-train --with-baseline, or name one"
    " with --baseline"
)
_OF_FILES = ("checkpoint", "data_root")  # options that `deploy` has no use for


@dataclass(frozen=True, kw_only=True, slots=True)
class TestSet:
    """All test images, uint8 `[N, C, H, W]`, and their labels, int64 `[N]`."""

    __test__ = False  # for pytest

    images: Images
    labels: npt.NDArray[np.int64]

    def spread(self, count: int) -> npt.NDArray[np.int64]:
        """Indices of `count` images spread over the whole set, repeated if there are fewer."""
        return np.linspace(0, len(self.labels) - 1, count).round().astype(np.int64)


# -- Deployment from memory: the bundle of a notebook, without files before it


def deploy(
    compaction: Compaction,
    heldout: Iterable[Batch],
    *,
    engine: Literal["ort", "trt"] = "ort",
    output: str | Path = "bundle",
    precision: str = "fp32",
    calibration: Iterable[Batch] | None = None,
    baseline: nn.Module | None = None,
    log: Log = lambda line: None,
    **options: Any,
) -> dict[str, Any]:
    """Write a bundle of a compact network and return its report, as `eps-deploy` does.

    Args:
        compaction: from `eps_compact.compact_pruner`.
        heldout: batches of inputs, normalised as in training, and labels, for the accuracy and the
            comparison of logits; data that the training did not see.
        engine: ONNX Runtime or TensorRT.
        output: folder to write.
        precision: `fp32`, `tf32`, `fp16`, `bf16`, `int8` or `int8-fp16`; TensorRT computes
            what is not quantised in fp16.
        calibration: for int8: batches of training images, normalised as in training, in random
            order; the first `calibration_samples` images are taken.
        baseline: the network that was trained without pruning, whose accuracy and latency are
            compared with; any module that torch.fx can trace. By default the latency is compared
            with the full depth, and no accuracy is.
        log: receives a line for each step.
        options: others of `eps-deploy`, by their names in Python: `max_accuracy_drop=1.0`,
            `time_budget=10.0`, `max_batch=8`, `repair=True`, `name="flowers"`, `force=True`.

    Raises:
        ConfigError: an option cannot be used.
        DataError: `heldout` or `calibration` is empty or not normalised as the pruner was told, or
            `heldout` has no labels.
        GraphError: `baseline` cannot be traced.
    """
    chosen = _options(engine, Path(output), precision, options)
    identity = compaction.artifact.data
    if chosen.precision.quantized != (calibration is not None):
        raise ConfigError(
            f"deploy(precision={precision!r}): give calibration=, batches of training images"
            if chosen.precision.quantized
            else f"deploy(calibration=): only applies to int8, not to precision={precision!r}"
        )
    found = pixels(heldout, identity)
    if isinstance(found, torch.Tensor):
        raise DataError("heldout: has no labels; yield (images, labels)")
    writer = BundleWriter(chosen.output, force=chosen.force)
    builder.require(chosen)
    inputs = Inputs(
        compact=compaction.artifact,
        checkpoint=compaction.checkpoint,
        baseline=None if baseline is None else traced_baseline(baseline, identity),
    )
    _refuse_without_baseline(chosen, inputs)
    images = None
    if calibration is not None:
        images = _calibration_images(calibration, identity, chosen.calibration_samples)
    test = TestSet(images=found.images.numpy(), labels=found.labels.numpy())
    return _make_bundle(chosen, writer, inputs, test, images, log)


def _options(
    engine: Literal["ort", "trt"], output: Path, precision: str, options: dict[str, Any]
) -> Options:
    if precision == "int8" and engine == "trt":
        precision = "int8-fp16"
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: give {', '.join(PRECISIONS)}")
    for name in _OF_FILES:
        if name in options:
            raise ConfigError(f"deploy({name}=): only applies to eps-deploy, which reads files")
    building = {field.name for field in fields(BuildOptions)} & options.keys()
    try:
        return Options(
            model=Path("compact.pt"),
            engine=engine,
            output=output,
            precision=PRECISIONS[precision],
            plan=BuildOptions(**{name: options.pop(name) for name in building}),
            command="eps_deploy.deploy()",
            **options,
        )
    except TypeError as error:
        raise ConfigError(f"deploy(): {error}") from None


def _calibration_images(batches: Iterable[Batch], identity: DataIdentity, samples: int) -> Images:
    """The first images of some batches, uint8 `[N, C, H, W]`. Raises DataError for too few."""
    check_count(samples, f"calibration_samples={samples}")
    taken: list[torch.Tensor] = []
    for batch in batches:
        taken.append(batch if isinstance(batch, torch.Tensor) else batch[0])
        if sum(map(len, taken)) >= samples:
            break
    found = pixels(taken, identity, name="calibration")
    assert isinstance(found, torch.Tensor)
    check_count(len(found), f"calibration: {len(found)} images")
    images: Images = found[:samples].numpy()
    return images


# -- Deployment from files: `eps-deploy`


def deploy_files(options: Options, log: Log) -> dict[str, Any]:
    """Write the bundle and return its report; `log` receives a line for each step.

    Raises EpsError, with nothing written, when an input or option cannot be used.
    """
    return _make_bundle(options, *_read(options, log), log)


def dry_run(options: Options) -> list[str]:
    """The steps that `deploy_files` would do; raises as it would before any work is done."""
    lines: list[str] = []
    _, inputs, test, _ = _read(options, lines.append)
    builder.build_networks(inputs)
    lines.append(f"would export model.onnx and baseline.onnx in {options.precision.name}")
    if options.precision.quantized:
        lines.append(f"would calibrate int8 on {options.calibration_samples} training images")
    if options.engine == "trt":
        plans = "no plan (--defer-build)" if options.defer_build else "two plans"
        lines.append(f"would build {plans}")
    batches = ", ".join(map(str, options.batches))
    lines.append(f"would compare the logits of every stage at batches {batches}")
    lines.append(f"would measure the accuracy on {len(test.labels)} test images")
    why = builder.why_no_latency(options)
    lines.append(
        f"would measure no latency: {why}"
        if why
        else f"would measure the latency for up to {options.time_budget:g} s a batch size"
    )
    lines.append(f"would write {options.output}")
    return lines


def _read(options: Options, log: Log) -> tuple[BundleWriter, Inputs, TestSet, Images | None]:
    """The place of the bundle, and all that it is made from; with images to calibrate int8 on."""
    refuse_missing(options.model, options.checkpoint, options.baseline)
    writer = BundleWriter(options.output, force=options.force)
    builder.require(options)
    inputs = find_inputs(options.model, options.checkpoint, options.baseline)
    log(f"baseline: {inputs.baseline_path or 'none trained; full depth, for latency only'}")
    _refuse_without_baseline(options, inputs)
    data = load_again(inputs.compact.data, options.data_root)
    test = TestSet(images=data.test.images.numpy(), labels=data.test.labels.numpy())
    quantized = options.precision.quantized
    return writer, inputs, test, pick(data, options.calibration_samples) if quantized else None


def _refuse_without_baseline(options: Options, inputs: Inputs) -> None:
    """Raise ConfigError for an option that compares accuracies, where there is no baseline."""
    for option, given in (
        ("--repair", options.repair),
        ("--max-class-drop", options.max_class_drop is not None),
    ):
        if given and inputs.baseline is None:
            raise ConfigError(
                f"{option}: there is no trained baseline whose accuracy could be missed; name one"
                f" with --baseline, or leave {option} out"
            )


# -- The steps


def _make_bundle(
    options: Options,
    writer: BundleWriter,
    inputs: Inputs,
    test: TestSet,
    calibration: Images | None,
    log: Log,
) -> dict[str, Any]:
    """Write the bundle and return its report; `calibration` are uint8 `[N, C, H, W]`."""
    with writer:
        networks = builder.build_networks(inputs)
        deployment = Deployment(
            options=options, inputs=inputs, networks=networks, test=test, log=log
        )
        with _timed(log, "exported model.onnx and baseline.onnx"):
            models = builder.export(options, inputs, networks, calibration)
        repairs: Repair | None = None
        if options.repair:
            with _timed(log, "looked for blocks to keep in higher precision"):
                models, repairs = deployment.repair(models, calibration)
        with builder.opened(options, networks, models, log) as variants:
            found, timings = deployment.measure(models, variants, repairs)
        deployment.write(writer.folder, models, variants, found, timings)
        writer.commit(write.manifest_fields(options, inputs, variants))
    return found


@contextmanager
def _timed(log: Log, what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    log(f"{what} ({time.perf_counter() - began:.1f} s)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What every step of a deployment works on."""

    options: Options
    inputs: Inputs
    networks: Networks
    test: TestSet
    log: Log

    def repair(self, models: Models, calibration: Images | None) -> tuple[Models, Repair]:
        """`--repair`: keep blocks in higher precision until the accuracy check passes.

        Each trial is judged on the whole test set, as in `accuracy`, but without a TensorRT plan,
        which takes minutes to build. `models` are returned unchanged when nothing helps.
        """
        options, inputs, networks = self.options, self.inputs, self.networks

        def export(kept: tuple[str, ...]) -> bytes:
            return builder.export_compact(options, inputs, networks, calibration, kept)

        def attempt(kept: tuple[str, ...]) -> Trial:
            with ExitStack() as stack:
                variant = builder.open_variant(options, networks.compact, export(kept), stack)
                forms = [variant.reference, *([variant.engine.infer] if variant.engine else [])]
                worst = min((self._answers(infer).correct for infer in forms), key=np.sum)
            check, drop = report.accuracy_check(baseline, worst, options.max_accuracy_drop)
            self.log(f"  drop {drop.points:+.2f} points with {len(kept)} kept in higher precision")
            return Trial(passed=bool(check.passed), value=drop.points)

        baseline = self._answers(networks.baseline.infer).correct
        found = repair(units(models.compact, inputs.blocks()), attempt)
        if not found.kept:
            return models, found
        return replace(models, compact=export(found.kept), kept=found.kept), found

    def measure(
        self, models: Models, variants: Variants, repairs: Repair | None
    ) -> tuple[dict[str, Any], list[LatencyResult]]:
        """Run every check and measurement: the report, and the latency samples behind it."""
        options, inputs, test, log = self.options, self.inputs, self.test, self.log
        not_run = builder.not_run(options)
        if inputs.baseline is None:
            in_memory = "eps_deploy.deploy() was given no baseline="
            why = _NO_BASELINE_FILE if inputs.compact.digest else in_memory
            not_run.append({"what": "accuracy against a trained baseline", "why": why})
        with _timed(log, "compared the logits of every stage"), cpu_threads(1):
            chain = self.parity_chain(variants)
            checks = [check for check in map(report.parity_check, chain) if check is not None]
        with (
            _timed(log, f"measured the accuracy on {len(test.labels)} test images"),
            builder.on_gpu(options.device, self.networks.compact, self.networks.baseline),
        ):
            accuracy, by_class, accuracy_checks = self.accuracy(variants)
            checks += accuracy_checks
        if options.precision.float == "float16":
            with _timed(log, "measured the headroom of float16"):
                images = test.images[np.unique(test.spread(HEADROOM_IMAGES))]
                peak = float16_peak(models.compact, images, options.max_batch)
                checks.append(report.headroom_check(peak, len(images)))
        if options.defer_build:
            with _timed(log, "tried NVIDIA's parser and builder without a GPU"):
                tried = builder.rehearse(options, models)
            checks += [tried] if tried else []
            not_run += [] if tried else [builder.NO_REHEARSAL]
        timings: list[LatencyResult] = []
        if no_latency := builder.why_no_latency(options):
            not_run.append({"what": "latency", "why": no_latency})
        else:
            timings = self.latency(variants)
            checks.append(report.speedup_check(timings[0], options.min_speedup))

        network, certificate = inputs.compact.network, inputs.compact.certificate
        live = [entry["block"] for entry in certificate.get("removed_live", [])]
        return {
            "schema": report.SCHEMA,
            "passed": report.verdict(checks, deferred=variants.compact.engine is None),
            "lossless": certificate.get("lossless", True),
            "engine": options.engine,
            "precision": write.precision_entry(options, models, variants, repairs),
            "goals": {
                "max_accuracy_drop": options.max_accuracy_drop,
                "max_class_drop": options.max_class_drop,
                "min_speedup": options.min_speedup,
            },
            "checks": [report.check_entry(check) for check in checks],
            **builder.size(inputs, self.networks),
            "blocks": report.blocks_entry(network.all_blocks(), network.removed, live),
            "accuracy": accuracy,
            "answers": by_class,
            "parity": [report.parity_entry(stage) for stage in chain],
            "latency": [report.latency_entry(timing) for timing in timings],
            "latency_baseline": (
                "trained plain network" if inputs.baseline else "full depth of the ε-network"
            ),
            "environment": report.environment(variants.describe(options)),
            "resumed": [],  # a key of schema 2: no step is taken from an earlier run
            "command": options.command,
            "not_run": not_run,
        }, timings

    def parity_chain(self, variants: Variants) -> list[Parity]:
        """Compare each form of each network with the form that it was made from.

        The images are one more than the largest batch, so that most batch sizes have a ragged last
        batch.
        """
        options = self.options
        picked = self.test.spread(options.max_batch + 1)
        images, indices = self.test.images[picked], picked.tolist()
        limit = PARITY_LIMITS[options.precision.name]

        def run(infer: Infer) -> list[Logits]:
            return passes(infer, images, options.batches)

        def compare(
            stage: str, before: list[Logits], after: list[Logits], limit: float = limit
        ) -> Parity:
            return compare_logits(
                stage, before, after, batches=options.batches, limit=limit, indices=indices
            )

        chain = []
        for name, variant in (("compact", variants.compact), ("baseline", variants.baseline)):
            in_torch, reference = run(variant.torch.infer), run(variant.reference)
            if name == "compact":
                folding = FOLDING_LIMIT if self.inputs.compact.folded else 0.0
                gated = run(self.networks.gated.infer)
                chain.append(compare("gated-compact", gated, in_torch, folding))
            chain.append(compare(f"{name}-onnx", in_torch, reference))
            if variant.engine is not None and not variant.same:
                stage = "onnx-engine" if name == "compact" else f"{name}-engine"
                chain.append(compare(stage, reference, run(variant.engine.infer)))
        return chain

    def accuracy(self, variants: Variants) -> tuple[dict[str, Any], dict[str, Any], list[Check]]:
        """Accuracy of each form of the compact network, and what it lost against the baseline.

        Returns the entries `accuracy` and `answers` of `report.json`, and their checks.
        """
        compact, options = variants.compact, self.options
        by_form = {
            "compact": self._answers(compact.torch.infer),
            "onnx": self._answers(compact.reference),
        }
        if compact.same:
            by_form["engine"] = by_form["onnx"]
        elif compact.engine is not None:
            by_form["engine"] = self._answers(compact.engine.infer)
        # A CPU may compute int8 and float16 with another arithmetic than the file's and a GPU's:
        # both must be accurate enough.
        shipped = [form for form in ("engine", "onnx") if form in by_form]
        judged = min(shipped, key=lambda form: by_form[form].correct.sum())
        in_torch = by_form["compact"].classes
        agreement = min(float((by_form[form].classes == in_torch).mean()) for form in shipped)
        share = {form: float(found.correct.mean()) for form, found in by_form.items()}
        samples = len(self.test.labels)
        found: dict[str, Any] = {
            "baseline": None,
            **{form: share.get(form) for form in ("compact", "onnx", "engine")},
            "samples": samples,
            "judged": judged,
            "agreement": agreement,
            "drop": None,
        }
        limit = AGREEMENT_LIMITS[options.precision.name]
        checks = [report.agreement_check(agreement, limit, samples)]
        baseline = None
        if self.inputs.baseline is not None:
            baseline = self._answers(variants.baseline.torch.infer)
            check, drop = report.accuracy_check(
                baseline.correct, by_form[judged].correct, options.max_accuracy_drop
            )
            found["baseline"] = float(baseline.correct.mean())
            found["drop"] = msgspec.to_builtins(drop)
            checks.append(check)
        names = self.inputs.compact.data.classes
        answered = report.answers_entry(self.test.labels, names, baseline, by_form[judged])
        if options.max_class_drop is not None:
            checks.append(report.class_check(answered, options.max_class_drop))
        return found, msgspec.to_builtins(answered), checks

    def _answers(self, infer: Infer) -> Answers:
        return answers(infer, self.test.images, self.test.labels, self.options.max_batch)

    def latency(self, variants: Variants) -> list[LatencyResult]:
        """Latency of both engines, interleaved, at batch 1 and 16 or the largest that they take."""
        options, test, data = self.options, self.test, self.inputs.compact.data
        example = ExampleImage(
            content=write.png(test.images[0]),
            preprocessing=data.preprocessing,
            labels=data.classes,
        )
        timings = []
        for batch in sorted({min(size, options.max_batch) for size in latency.BATCHES}):
            self.log(f"measuring the latency at batch {batch}")
            images = test.images[test.spread(batch)]
            workloads = [
                Workload(engine=variant.engine, images=images, example=example)
                for variant in (variants.baseline, variants.compact)
                if variant.engine is not None
            ]
            timings.append(latency.measure(workloads, budget=options.time_budget, gpu=options.gpu))
        return timings

    def write(
        self,
        folder: Path,
        models: Models,
        variants: Variants,
        found: Mapping[str, Any],
        timings: Sequence[LatencyResult],
    ) -> None:
        """Write everything in the bundle but its manifest."""
        options, data, test = self.options, self.inputs.compact.data, self.test
        picked = np.unique(test.spread(options.max_batch + 1))
        images = test.images[picked]
        np.savez(
            folder / "samples.npz",
            images=images,
            labels=test.labels[picked],
            indices=picked,
            logits=self.networks.compact.infer(images),
        )
        write.write_examples(folder / "examples", test.images, test.labels, data.classes)
        gallery = write.write_gallery(folder, test.images, found["answers"]["changed"] or ())
        if timings:
            latency.save_samples(folder / "latency.npz", timings)
        report.write_json(folder / "report.json", dict(found))
        files = {
            "model.onnx": models.compact,
            "baseline.onnx": models.baseline,
            **(variants.plan.files() if variants.plan else {}),
            "report.md": render_markdown(found).encode(),
            "report.html": render_html(found, gallery).encode(),
        }
        if self.inputs.compact.digest:  # made from files
            files["reproduce.sh"] = write.reproduce_script(options, self.inputs, found).encode()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        served = write.served(options, data, variants)
        triton.write_repository(folder, served, images, name=options.name)  # links to the models
