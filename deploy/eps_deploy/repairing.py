"""`--repair` in a deployment: keeping what a lower precision harms most in a higher one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from eps_deploy import networks, runtimes
from eps_deploy.engines.base import Images
from eps_deploy.exporting.repair import Repair, Trial, repair, units
from eps_deploy.measures import TestPart
from eps_deploy.measuring.accuracy import Classes, accuracy_drop, classes
from eps_deploy.measuring.parity import Infer
from eps_deploy.networks import Models, Networks
from eps_deploy.options import Options
from eps_deploy.sources import Sources
from eps_deploy.stages import Stages
from eps_train.errors import ConfigError


def require(sources: Sources) -> None:
    """Raise ConfigError when there is nothing that could miss its limit."""
    if sources.baseline is None:
        raise ConfigError(
            "--repair: there is no trained baseline whose accuracy could be missed; name one with"
            " --baseline, or leave --repair out"
        )


def repaired(
    options: Options,
    sources: Sources,
    built: Networks,
    models: Models,
    calibration: Images | None,
    part: TestPart,
    stages: Stages,
    say: Callable[[str], None],
) -> tuple[Models, Repair]:
    """`models`, with blocks kept until the accuracy holds, and how they were found.

    Each trial is judged on the whole test part, as :func:`measures.accuracy` does, but for a plan,
    which would take minutes to build. When nothing helps, `models` stay as they are.
    """

    def named(infer: Infer) -> Classes:
        return classes(infer, part.images, options.max_batch)

    baseline = named(built.baseline.infer) == part.labels

    def attempt(kept: tuple[str, ...]) -> Trial:
        tried = networks.export(options, sources, built, calibration, stages, kept)
        with ExitStack() as stack:
            forms = runtimes.shipped(options, built.compact, tried.compact, stack)
            right = min((named(infer) == part.labels for infer in forms), key=np.sum)
        drop = accuracy_drop(baseline, right, options.max_accuracy_drop)
        say(f"  drop {drop.points.value:+.2f} points with {len(kept)} kept in higher precision")
        return Trial(passed=drop.passed, value=drop.points.value)

    found = repair(units(models.compact, sources.blocks()), attempt)
    if not found.kept:
        return models, found
    return networks.export(options, sources, built, calibration, stages, found.kept), found
