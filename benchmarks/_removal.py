"""Live removal benchmark: whole runs of the digits recipe against the baseline."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _rounds import Options, Plan, seconds_of
from digits import train_side_by_side

from eps_train import recipes
from eps_train.config import TrainingConfig
from eps_train.data import dataset
from eps_train.data.dataset import Data
from eps_train.training.trainer import Trainer


def removal(options: Options) -> Plan:
    """Seconds of a run with live removal over those of the baseline."""
    recipe = recipes.digits()
    images = dataset.load(recipe.dataset)
    on_cpu = options.device.type == "cpu"

    def single_threaded(work: Callable[[], Any]) -> Any:
        """Use one thread, as the recipe does; the other sections use all cores."""
        threads = torch.get_num_threads()
        if on_cpu:
            torch.set_num_threads(recipe.cpu_threads)
        try:
            return work()
        finally:
            torch.set_num_threads(threads)

    def one_epoch() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return sum(
                seconds_of(trainer.run_epoch, options.device)
                for trainer in _sides(recipe, images, options, Path(folder)).values()
            )

    def measure() -> dict[str, Any]:
        return _summary(
            [_one_run(replace(recipe, seed=seed), images, options) for seed in options.seeds]
        )

    once = single_threaded(one_epoch)
    return Plan(once * recipe.epochs * len(options.seeds), lambda: single_threaded(measure))


def _one_run(config: TrainingConfig, images: Data, options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        sides = _sides(config, images, options, Path(folder))
        seconds = train_side_by_side(sides, config)
        tested = {s: trainer.run(lambda report: None) for s, trainer in sides.items()}
        return {
            "seed": config.seed,
            "seconds": seconds,
            "ratio": seconds["epsilon"] / seconds["plain"],
            "removed": len(sides["epsilon"].pruner.tracker.dead),
            "blocks": len(sides["epsilon"].pruner.tracker.records),
            "test_accuracy": {s: best.metrics["test"]["accuracy"] for s, best in tested.items()},
        }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [run["ratio"] for run in runs]
    return {
        "recipe": "digits",
        "runs": runs,
        "ratio": statistics.mean(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def _sides(
    config: TrainingConfig, images: Data, options: Options, folder: Path
) -> dict[str, Trainer]:
    return {
        side: Trainer(
            chosen,
            images,
            best_path=folder / f"{side}.pt",
            last_path=folder / f"{side}-last.pt",
            device=options.device,
        )
        for side, chosen in (("epsilon", config), ("plain", config.baseline()))
    }
