"""What is measured of a deployment: the chain of proof, the accuracy, the latency.

Each function gives plain data: an entry of `report.json` and the checks that follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eps_compact.certificate import BOUND as FOLDING_LIMIT
from eps_core.checks import Check, Parity, compare_logits
from eps_deploy.bench import accuracy as parity
from eps_deploy.bench import latency
from eps_deploy.bench.accuracy import (
    AGREEMENT_LIMITS,
    PARITY_LIMITS,
    Classes,
    Infer,
    accuracy_drop,
    classes,
)
from eps_deploy.bench.latency import ExampleImage, Latency, Workload
from eps_deploy.engines.base import Images, Logits
from eps_deploy.pipeline.build import Variant, Variants
from eps_deploy.pipeline.inputs import Inputs
from eps_deploy.pipeline.options import Options
from eps_deploy.report import report


@dataclass(frozen=True, kw_only=True, slots=True)
class TestPart:
    """All test images, uint8 `[N, C, H, W]`, and their labels, int64 `[N]`."""

    __test__ = False  # no test, whatever pytest thinks of the name

    images: Images
    labels: npt.NDArray[np.int64]

    def spread(self, count: int) -> npt.NDArray[np.int64]:
        """Indices of `count` images spread over the whole part."""
        return parity.pick_samples(len(self.labels), count)


def chain(
    options: Options, sources: Inputs, gated: Infer, sides: Variants, part: TestPart
) -> list[Parity]:
    """Every form of each network against the form that it was made from.

    One image more than the largest batch, so that the last batch of most sizes is a ragged one.
    """
    picked = part.spread(options.max_batch + 1)
    images = part.images[picked]
    limit = PARITY_LIMITS[options.precision.name]
    told: list[Parity] = []

    def passes(infer: Infer) -> list[Logits]:
        return parity.passes(infer, images, options.batches)

    def compare(
        stage: str,
        reference: list[Logits],
        candidate: list[Logits],
        limit: float,
    ) -> None:
        told.append(
            compare_logits(
                stage,
                reference,
                candidate,
                batches=options.batches,
                limit=limit,
                indices=picked.tolist(),
            )
        )

    def follow(name: str, side: Variant) -> None:
        """From torch over the ONNX file to the engine."""
        reference = passes(side.reference)
        compare(f"{name}-onnx", torch_passes[name], reference, limit)
        if side.engine is not None and not side.same:
            stage = "onnx-engine" if name == "compact" else f"{name}-engine"
            compare(stage, reference, passes(side.engine.infer), limit)

    torch_passes = {
        "compact": passes(sides.compact.torch.infer),
        "baseline": passes(sides.baseline.torch.infer),
    }
    folding = FOLDING_LIMIT if sources.compact.folded else 0.0
    compare("gated-compact", passes(gated), torch_passes["compact"], folding)
    follow("compact", sides.compact)
    follow("baseline", sides.baseline)
    return told


def accuracy(
    options: Options, sources: Inputs, sides: Variants, part: TestPart
) -> tuple[dict[str, Any], list[Check]]:
    """Each form of the compact network on the whole test part, and the drop from the baseline."""

    def named(infer: Infer) -> Classes:
        return classes(infer, part.images, options.max_batch)

    def share(found: Classes | None) -> float | None:
        return None if found is None else float((found == part.labels).mean())

    compact = sides.compact
    by_form = {"compact": named(compact.torch.infer), "onnx": named(compact.reference)}
    if compact.engine is not None:
        by_form["engine"] = by_form["onnx"] if compact.same else named(compact.engine.infer)
    # A processor may compute int8 and float16 otherwise than the file says and a GPU does: both
    # have to be good enough.
    shipped = [form for form in ("engine", "onnx") if form in by_form]
    judged = min(shipped, key=lambda form: (by_form[form] == part.labels).sum())
    agreement = min(float((by_form[form] == by_form["compact"]).mean()) for form in shipped)
    limit = AGREEMENT_LIMITS[options.precision.name]
    found: dict[str, Any] = {
        "baseline": None,
        **{form: share(by_form.get(form)) for form in ("compact", "onnx", "engine")},
        "samples": len(part.labels),
        "judged": judged,
        "agreement": agreement,
        "drop": None,
    }
    checks = [report.agreement_check(agreement, limit, len(part.labels))]
    if sources.baseline is None:
        return found, checks
    by_baseline = named(sides.baseline.torch.infer)
    drop = accuracy_drop(
        by_baseline == part.labels, by_form[judged] == part.labels, options.max_accuracy_drop
    )
    found |= {"baseline": share(by_baseline), "drop": report.drop_entry(drop)}
    return found, [*checks, report.accuracy_check(drop)]


def timed(
    options: Options,
    sides: Variants,
    part: TestPart,
    example: ExampleImage,
    say: Callable[[str], None],
) -> list[Latency]:
    """Both engines in turns, at batch 1 and 16, or the largest that they take."""
    baseline, compact = sides.baseline.engine, sides.compact.engine
    assert baseline is not None
    assert compact is not None
    timings = []
    for batch in sorted({min(size, options.max_batch) for size in latency.BATCHES}):
        say(f"measuring the latency at batch {batch}")
        images = part.images[part.spread(batch)]
        timings.append(
            latency.measure(
                [
                    Workload(engine=engine, images=images, example=example)
                    for engine in (baseline, compact)
                ],
                budget=options.time_budget,
                gpu=options.gpu,
            )
        )
    return timings
