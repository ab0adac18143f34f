"""Alternatives benchmark: pruned networks against what a user would get who did the obvious.

For a data set and a base depth, every method is trained for each seed and brought to the size of
shallower networks of the same family. Methods:

    baseline         the base network, not pruned
    fixed            a run with the recipe's epsilon; its size is what comes of it
    scratch          a shallower network from scratch, equal epochs
    scratch-time     the same, trained for as many epochs as the nested run took of its time
    greedy           the baseline; blocks removed one by one (eps-compact), then fine-tuned
    channels         the baseline; channels removed by Torch-Pruning, then fine-tuned (channels.py,
                     needs the package torch-pruning)
    l1, influence, random, response, gradient
                     a run with --target-parameters that chooses blocks by that criterion
    target           a run with --target-flops, --criterion gradient and a warm-up of one epoch,
                     equal epochs
    target-time      the same with the recipe's warm-up, for as many epochs as take the time of the
                     nested run
    nested           one run with --nested, cut to each size
    nested-gradient  the same with --criterion gradient, which orders the blocks
    nested-tuned     as nested, each size fine-tuned

The same with `-teacher` behind it (fixed, scratch, target, nested, nested-tuned) is distilled from
the baseline in its training.

Every training is a command of the product in a folder of its own under --work, named by a digest of
the command and of those that it starts from: a benchmark that was stopped goes on, and more seeds
or methods add to what is there. Networks of a size keep as many blocks as the shallower network
(:meth:`Benchmark.share`); their latency is measured on ONNX Runtime, one image, one thread,
interleaved with the baseline's. Accuracies are of the whole test part. Training seconds are
processor time, those of all commands that a network needs. The last line printed is one JSON
object.

    python benchmarks/alternatives.py --dataset cifar10 --data-root DATA --image-size 16 \\
        --depth 26 --depths 14,8 --width 8 --epochs 10 --shift 2 --seeds 0
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch
from _commands import Step, run

from eps_compact.analysis.importance import live_network
from eps_core.files import replace_file
from eps_core.stats import ratio_of_medians
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export.export import export_onnx
from eps_train.data import dataset
from eps_train.data.dataset import Data
from eps_train.gating import rewriting
from eps_train.gating.costs import branch_costs, interleaved, plain
from eps_train.models.resnets import Normalize
from eps_train.models.spec import NetworkSpec, cost
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import logits
from eps_train.training.plots import new_figure, png

CRITERIA = ("l1", "influence", "random", "response", "gradient")
WHOLE = ("baseline", "fixed", "fixed-teacher")  # not brought to a size
TARGET = ("target", "target-teacher", "target-time")
SIZED = ("scratch", "scratch-time", "scratch-teacher", "greedy", "channels", *TARGET, *CRITERIA)
NESTED = ("nested", "nested-gradient", "nested-tuned", "nested-teacher", "nested-tuned-teacher")
METHODS = (*WHOLE, *SIZED, *NESTED)
OURS = (*WHOLE[1:], *TARGET, "response", "gradient", *NESTED)
BEFORE = 6  # epochs of a run with a target that cost as much as those of the whole network
CURVES = ("baseline", "epsilon", "nested")
EQUAL = 1.1  # at most so many times the latency counts as an equal one
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by number of seeds


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The options of the command."""

    dataset: str
    data_root: Path
    image_size: int
    depth: int
    depths: tuple[int, ...]
    width: int
    epochs: int
    finetune_epochs: int
    weight_decay: float
    shift: int
    work: Path

    # -- Methods: the commands that make their networks

    def train(self, seed: int, *words: str, depth: int = 0, epochs: int = 0) -> tuple[str, ...]:
        """The command that trains a network of the family, by default the base network."""
        options = {
            "recipe": "fashion-mnist",
            "dataset": self.dataset,
            "image-size": self.image_size,
            "model": f"cifar:{depth or self.depth}x{self.width}",
            "epochs": epochs or self.epochs,
            "weight-decay": self.weight_decay,
            "shift": self.shift,
            "aux-loss-weight": 0,
            "seed": seed,
        }
        given = [f"--{name}={value}" for name, value in options.items()]
        if self.dataset == "digits":
            given.append("--no-flip")
        return ("eps-train", *given, *words)

    def step(self, method: str, seed: int, depth: int) -> Step:
        """The step that makes the network of a method, of the size of depth `depth`."""
        baseline = Step(words=self.train(seed, "--epsilon=0"))
        teacher = {"teacher": baseline} if "-teacher" in method else {}
        method = method.replace("-teacher", "")

        def train(*words: str, depth: int = 0, epochs: int = 0) -> Step:
            if teacher:
                words = (*words, "--teacher={teacher}")
            return Step(words=self.train(seed, *words, depth=depth, epochs=epochs), needs=teacher)

        order = ["--criterion=gradient"] if method == "nested-gradient" else []
        nested = train("--nested", *order)
        flops = f"--target-flops={self.share(depth, 'flops')}"
        tuned = f"--finetune-epochs={self.finetune_epochs}"
        if method == "baseline":
            return baseline
        if method == "fixed":
            return train()
        if method == "scratch":
            return train("--epsilon=0", depth=depth)
        if method == "target":  # a short run: the recipe's warm-up would leave no epoch for it
            return train(flops, "--criterion=gradient", "--epsilon-warmup=1")
        if method.endswith("-time"):
            small = self.seconds(self.step("scratch", seed, depth)) / self.epochs
            left = self.seconds(nested)
            if method == "scratch-time":
                return train("--epsilon=0", depth=depth, epochs=math.ceil(left / small))
            left -= BEFORE * self.seconds(baseline) / self.epochs
            epochs = BEFORE + math.ceil(left / small)
            return train(flops, "--criterion=gradient", epochs=epochs)
        if method == "channels":
            words = ("channels.py", "{from}", flops, tuned)
            return Step(words=words, needs={"from": baseline}, makes="tuned.pt")
        if method == "greedy" or method in NESTED:
            start = baseline if method == "greedy" else nested
            last = () if method in ("nested", "nested-gradient") else (tuned,)
            return Step(
                words=("eps-compact", "{from}", "-o", "compact.pt", flops, *last),
                needs={"from": start},
                makes="tuned.pt" if last else "cut.pt",
            )
        target = f"--target-parameters={self.share(depth, 'parameters')}"
        return train(target, f"--criterion={method}")

    def share(self, depth: int, of: str) -> float:
        """Share of the base network's parameters or FLOPs that a network of `depth` may have.

        It is that of the base network with as many blocks in each stage as depth `depth` has, the
        most expensive ones: first blocks of a stage are cheaper, and a method may drop them.
        """
        shape = self.data.identity.input_shape
        spec = NetworkSpec.parse(
            f"cifar:{self.depth}x{self.width}",
            in_channels=shape[0],
            classes=len(self.data.identity.classes),
        )
        base = spec.build()
        whole, stages = getattr(cost(base, shape), of), rewriting.stages(base, shape)
        saved: dict[str, list[int]] = {}
        for block in branch_costs(base, shape):
            saved.setdefault(stages[block.block], []).append(getattr(block, of))
        kept = (depth - 2) // 6
        gone = sum(sum(sorted(costs)[: len(costs) - kept]) for costs in saved.values())
        return float(math.ceil(1e4 * (whole - gone) / whole) / 1e4)

    def curve(self, method: str, seed: int) -> list[dict[str, Any]]:
        """Accuracy after removing more and more blocks, without any fine-tuning.

        Of the baseline, of a run whose gates remove blocks up to the first size of `depths` (what
        is left of them is removed further), and of a nested run; one point is blocks left, share
        of the FLOPs, and accuracy on held-out images that chose no block.
        """
        target = f"--target-parameters={self.share(self.depths[0], 'parameters')}"
        words = {"baseline": "--epsilon=0", "epsilon": target, "nested": "--nested"}
        trained = Step(words=self.train(seed, words[method]))
        swept = Step(
            words=("eps-compact", "{from}", "-o", "compact.pt", "--sweep", "--samples=4000"),
            needs={"from": trained},
            makes="compact.json",
        )
        found = json.loads(self.run(swept).read_text())
        left = found["counts"]["blocks"]["after"]
        return [
            {
                "blocks": left - len(point["removed"]),
                "flops_share": point["flops_share"],
                "accuracy": point["accuracy"],
            }
            for point in found["sweep"]["points"]
        ]

    # -- Running

    def run(self, step: Step) -> Path:
        """Run a step and those it needs, unless it has been; returns its checkpoint's path."""
        return run(step, self.work, "--data-root", str(self.data_root.resolve()), "--device", "cpu")

    def seconds(self, step: Step) -> float:
        """Processor seconds of a step, without those that it needs."""
        self.run(step)
        record = json.loads((self.work / step.key / "step.json").read_text())
        return float(record["seconds"])

    def costs(self, step: Step) -> dict[str, float]:
        """Processor seconds of a step and of all that it needs, by their keys."""
        found = {step.key: self.seconds(step)}
        for other in step.needs.values():
            found |= self.costs(other)
        return found

    # -- Measuring

    @cached_property
    def data(self) -> Data:
        size = (self.image_size, self.image_size)
        return dataset.load(self.dataset, self.data_root, image_size=size)

    def evaluate(self, path: Path) -> dict[str, Any]:
        """Test accuracy and size of the network that a checkpoint ships as; kept beside it."""
        kept = path.with_suffix(".eval.json")
        if kept.exists():
            found: dict[str, Any] = json.loads(kept.read_text())
            return found
        checkpoint = Checkpoint.load(path)
        network = plain(live_network(checkpoint))
        normalize, test = Normalize.of(checkpoint.data), self.data.test
        correct = logits(network, normalize, test).argmax(dim=1) == test.labels
        size = cost(network, checkpoint.data.input_shape)
        found = {
            "accuracy": correct.double().mean().item(),
            "parameters": size.parameters,
            "flops": size.flops,
        }
        kept.write_text(json.dumps(found))
        return found

    def latency(self, paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        """Milliseconds of each network, and its share of the first one's, interleaved."""
        pixels = self.data.test[torch.arange(1)].images.numpy()
        calls = []
        with tempfile.TemporaryDirectory() as folder:
            for number, path in enumerate(paths.values()):
                checkpoint = Checkpoint.load(path)
                exported = Path(folder) / f"{number}.onnx"
                export_onnx(plain(live_network(checkpoint)), checkpoint.data, exported)
                calls.append(partial(OrtEngine(exported.read_bytes()).infer, pixels))
        times = interleaved(calls)
        shares = [ratio_of_medians(each, times[0]) for each in times]
        return {
            name: {
                "ms": statistics.median(each.ravel().tolist()),
                "latency_share": share.value,
                "latency_interval": [share.low, share.high],
            }
            for name, each, share in zip(paths, times, shares, strict=True)
        }

    def rows(self, methods: tuple[str, ...], seed: int) -> Iterator[dict[str, Any]]:
        """One row for each method and size of a seed."""
        made: dict[str, tuple[Step, dict[str, Any]]] = {}
        for method in methods:
            for depth in (self.depth,) if method in WHOLE else self.depths:
                step = self.step(method, seed, depth)
                made[f"{method} {depth}"] = step, {"method": method, "size_of_depth": depth}
        paths = {name: self.run(step) for name, (step, _) in made.items()}
        times = self.latency(paths)
        for name, (step, row) in made.items():
            yield {
                **row,
                "seed": seed,
                **self.evaluate(paths[name]),
                **times[name],
                "training_seconds": sum(self.costs(step).values()),
                "steps": self.costs(step),
            }


# -- Summary over the seeds, and its plot


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds; for our methods also the difference to the best alternative.

    Alternatives have the same seeds, and a latency of at most `EQUAL` times ours.
    """

    def share(group: list[dict[str, Any]]) -> float:
        return float(statistics.mean(row["latency_share"] for row in group))

    found = []
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["size_of_depth"], row["method"]), []).append(row)
    steps: dict[str, dict[int, dict[str, float]]] = {}  # of all sizes, shared ones once
    for row in rows:
        steps.setdefault(row["method"], {}).setdefault(row["seed"], {}).update(row["steps"])
    means = {key: statistics.mean(r["accuracy"] for r in group) for key, group in groups.items()}
    for (size, method), group in groups.items():
        entry = {
            "size_of_depth": size,
            "method": method,
            "seeds": len(group),
            # Of the costliest seed: one that lacks a size would lower a mean.
            "seconds_for_all_sizes": max(sum(each.values()) for each in steps[method].values()),
            "accuracy": means[size, method],
            **{
                name: statistics.mean(row[name] for row in group)
                for name in ("parameters", "flops", "latency_share", "training_seconds")
            },
        }
        rivals = {
            rival: means[s, rival]
            for (s, rival), theirs in groups.items()
            if s == size
            and rival not in OURS
            and {row["seed"] for row in theirs} >= {row["seed"] for row in group}
            and share(theirs) <= EQUAL * share(group)
        }
        if method in OURS and rivals:
            best = max(rivals, key=rivals.__getitem__)
            theirs = {row["seed"]: row["accuracy"] for row in groups[size, best]}
            points = [100 * (r["accuracy"] - theirs[r["seed"]]) for r in group]
            entry["against"] = best
            entry["points_over_best"] = statistics.mean(points)
            if len(points) in T_95:
                half = T_95[len(points)] * statistics.stdev(points) / math.sqrt(len(points))
                mean = statistics.mean(points)
                entry["interval"] = [mean - half, mean + half]
        found.append(entry)
    return found


def draw(found: Mapping[str, Any]) -> bytes:
    """Draw results as PNG: accuracy against latency, training cost and, if swept, blocks left."""
    panels = 3 if found["curves"] else 2
    figure = new_figure(5 * panels, 4.8)
    by_latency, by_cost, *by_blocks = figure.subplots(1, panels)
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in found["summary"]:
        entries.setdefault(entry["method"], []).append(entry)
    for number, (method, sizes) in enumerate(entries.items()):
        # The dark colours of tab20 first, then its light ones.
        color = matplotlib.colormaps["tab20"]((2 * number + number // 10) % 20)
        style = {"marker": "o" if method in OURS else "s", "color": color}
        style["linestyle"] = "-" if method in OURS else ":"
        accuracy = [100 * entry["accuracy"] for entry in sizes]
        by_latency.plot(
            [100 * entry["latency_share"] for entry in sizes], accuracy, label=method, **style
        )
        seconds = sizes[0]["seconds_for_all_sizes"]
        by_cost.plot(seconds / 60, min(accuracy), marker=style["marker"], color=style["color"])
        by_cost.annotate(method, (seconds / 60, min(accuracy)), fontsize=7)
    for axes in by_blocks:
        for method, points in found["curves"].items():
            left = [point["blocks"] for point in points]
            accuracy = [100 * point["accuracy"] for point in points]
            axes.plot(left, accuracy, "o-", markersize=3, label=method)
        axes.set_xlabel("blocks left, without fine-tuning")
        axes.set_ylabel("held-out accuracy, %")
        axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8)
    by_latency.set_xlabel("latency, % of the baseline's (ONNX Runtime, batch 1, one thread)")
    by_latency.set_ylabel("test accuracy, %")
    by_cost.set_xlabel("processor minutes for all sizes")
    by_cost.margins(x=0.2)
    by_cost.set_ylabel("test accuracy of the smallest, %")
    by_latency.legend(frameon=False, fontsize=7)
    return png(figure)


@click.command()
@click.option("--dataset", default="digits", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path), default=Path())
@click.option("--image-size", type=int, default=8, show_default=True)
@click.option("--depth", type=int, default=26, show_default=True)
@click.option("--depths", default="14,8", show_default=True, help="Sizes to prune to.")
@click.option("--width", type=int, default=8, show_default=True)
@click.option("--epochs", type=int, default=10, show_default=True)
@click.option("--finetune-epochs", type=int, default=3, show_default=True)
@click.option("--weight-decay", type=float, default=1e-3, show_default=True)
@click.option("--shift", type=int, default=1, show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--curves/--no-curves", help="Also sweep without fine-tuning, of the first seed.")
@click.option("--plot", type=click.Path(path_type=Path), help="PNG to write.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/alternatives"))
def main(
    seeds: str, methods: str, depths: str, curves: bool, plot: Path | None, **options: Any
) -> None:
    """Train, prune and compare."""
    options["depths"] = tuple(int(depth) for depth in depths.split(","))
    chosen = tuple(methods.split(","))
    if unknown := set(chosen) - set(METHODS):
        raise click.UsageError(f"--methods: unknown: {', '.join(sorted(unknown))}")
    benchmark = Benchmark(**options)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in seeds.split(","):
        rows += benchmark.rows(chosen, int(seed))
        print(json.dumps(rows[-len(chosen) :]), file=sys.stderr, flush=True)
    machine = {"cpus": os.cpu_count(), "threads": 1, "torch": str(torch.__version__), "gpu": None}
    setting = {name: value for name, value in options.items() if name not in ("work", "data_root")}
    first = int(seeds.split(",")[0])
    found = {
        "machine": machine,
        "date": time.strftime("%Y-%m-%d"),
        "setting": setting,
        "summary": summary(rows),
        "curves": {method: benchmark.curve(method, first) for method in CURVES if curves},
        "rows": rows,
    }
    if plot is not None:
        replace_file(plot, draw(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
