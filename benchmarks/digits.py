"""Digits benchmark: the digits recipe over several seeds; size, accuracy, latency, training time.

For each seed three runs are interleaved, one epoch of each at a time (the order rotates), so that
other work on the machine affects all of them: the ε-network, the same with dead branches left in
place, and the baseline. The compact network and the baseline are then exported, and their latency
on ONNX Runtime is compared. The last line printed is one JSON object.

    python benchmarks/digits.py [--seeds 0,1,2] [--epochs N] [--model SPEC]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from eps_compact.compaction import Compaction, compact_checkpoint
from eps_deploy.bench import latency
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export.export import export_onnx
from eps_train.config import TrainingConfig
from eps_train.data import dataset
from eps_train.data.dataset import Data
from eps_train.gating import rewriting
from eps_train.models.spec import cost
from eps_train.recipes import digits
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.trainer import Trainer

LATENCY_SECONDS = 20.0  # a batch size


@click.command()
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds, comma-separated.")
@click.option("--epochs", type=click.IntRange(min=1), help="Length.  [default: the recipe's]")
@click.option("--model", help="As eps-train --model.  [default: the recipe's]")
def main(seeds: str, epochs: int | None, model: str | None) -> None:
    """Train, compact, export and time the digits recipe for every seed."""
    recipe = digits()
    recipe = replace(recipe, epochs=epochs or recipe.epochs, model=model or recipe.model)
    images = dataset.load(recipe.dataset)
    torch.set_num_threads(recipe.cpu_threads)
    results = [_one_seed(replace(recipe, seed=int(seed)), images) for seed in seeds.split(",")]
    print(json.dumps({"machine": _machine(), "seeds": results, "mean": _mean(results)}))


def _one_seed(config: TrainingConfig, images: Data) -> dict[str, Any]:
    configs = {
        "epsilon": config,
        "kept": replace(config, live_removal=False),
        "plain": config.baseline(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainers = {
            run: Trainer(
                chosen,
                images,
                best_path=folder / f"{run}.pt",
                last_path=folder / f"{run}-last.pt",
                device=torch.device("cpu"),
            )
            for run, chosen in configs.items()
        }
        seconds = train_side_by_side(trainers, config)
        best = {run: trainer.run(lambda report: None) for run, trainer in trainers.items()}
        compaction = compact_checkpoint(
            Checkpoint.load(folder / "epsilon.pt"),
            images.validation.images,
            checkpoint_path="epsilon.pt",
        )
        return {
            "seed": config.seed,
            **_accuracy(best["epsilon"], best["plain"]),
            **_saved(compaction, best["plain"]),
            "training_seconds": seconds,
            "training_ratio": {
                "to_plain": seconds["epsilon"] / seconds["plain"],
                "to_no_removal": seconds["epsilon"] / seconds["kept"],
            },
            "latency": _latency(compaction, best["plain"], images, folder),
        }


def train_side_by_side(trainers: dict[str, Trainer], config: TrainingConfig) -> dict[str, float]:
    """Train all runs interleaved; returns the wall seconds of their epochs, saving included."""
    seconds = dict.fromkeys(trainers, 0.0)
    for epoch in range(config.epochs):
        order = list(trainers)
        order = order[epoch % len(order) :] + order[: epoch % len(order)]
        for run in order:
            began = time.perf_counter()
            trainers[run].save(trainers[run].run_epoch())
            seconds[run] += time.perf_counter() - began
        if (epoch + 1) % 10 == 0:
            spent = ", ".join(f"{run} {value:.0f} s" for run, value in seconds.items())
            print(f"seed {config.seed}, epoch {epoch + 1}: {spent}", file=sys.stderr, flush=True)
    return seconds


def _accuracy(epsilon: Checkpoint, plain: Checkpoint) -> dict[str, Any]:
    ours, theirs = epsilon.metrics["test"], plain.metrics["test"]
    return {
        "test_accuracy": {"epsilon": ours["accuracy"], "plain": theirs["accuracy"]},
        "points_lost": 100 * (theirs["accuracy"] - ours["accuracy"]),
        "test_images": ours["samples"],
    }


def _saved(compaction: Compaction, plain: Checkpoint) -> dict[str, Any]:
    shape = plain.data.input_shape
    whole = cost(plain.build_gated(), shape)
    counts = compaction.counts
    return {
        "blocks": counts["blocks"],
        "parameters": {"plain": whole.parameters, "compact": counts["parameters"]["after"]},
        "parameters_removed": 1 - counts["parameters"]["after"] / whole.parameters,
        "flops_ratio": whole.flops / counts["flops"]["after"],
    }


def _latency(
    compaction: Compaction, plain: Checkpoint, images: Data, folder: Path
) -> list[dict[str, Any]]:
    networks = {
        "compact": compaction.artifact.build(),
        "plain": rewriting.drop_taps(plain.build_gated()),
    }
    for name, network in networks.items():
        export_onnx(network, plain.data, folder / f"{name}.onnx")
    timings = []
    with (
        OrtEngine((folder / "compact.onnx").read_bytes()) as compact,
        OrtEngine((folder / "plain.onnx").read_bytes()) as baseline,
    ):
        for batch in latency.BATCHES:
            pixels = images.test.images[:batch].numpy()
            loads = [latency.Workload(engine=e, images=pixels) for e in (baseline, compact)]
            whole, less = latency.measure(loads, budget=LATENCY_SECONDS).times[latency.CALL]
            assert less.speedup is not None
            timings.append(
                {
                    "batch": batch,
                    "plain_ms": whole.ms["p50"],
                    "compact_ms": less.ms["p50"],
                    "speedup": less.speedup.value,
                    "interval": [less.speedup.low, less.speedup.high],
                }
            )
    return timings


def _mean(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds; accuracy over the images of all seeds."""
    series = {
        "parameters_removed": [result["parameters_removed"] for result in results],
        "points_lost": [result["points_lost"] for result in results],
        "flops_ratio": [result["flops_ratio"] for result in results],
        "speedup_batch_1": [result["latency"][0]["speedup"] for result in results],
        "training_ratio_to_plain": [r["training_ratio"]["to_plain"] for r in results],
        "training_ratio_to_no_removal": [r["training_ratio"]["to_no_removal"] for r in results],
    }
    return {
        name: {"mean": statistics.mean(values), "low": min(values), "high": max(values)}
        for name, values in series.items()
    }


def _machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "gpu": None,
    }


if __name__ == "__main__":
    main()
