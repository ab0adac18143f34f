"""A training run with its files: start or resume, report, plot, summary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eps_core import cli
from eps_core.errors import ConfigError, DataError, EpsError, Interrupted
from eps_core.files import replace_file
from eps_train.config import TrainingConfig
from eps_train.data.dataset import Data, Outline
from eps_train.gating import rewriting
from eps_train.gating.costs import count_costs, latency_share, make_timer
from eps_train.models import registry
from eps_train.models.spec import NetworkSpec, cost
from eps_train.schedule import CosineDecay, Steps
from eps_train.training import run_checks
from eps_train.training import trackers as tracking
from eps_train.training.checkpoint import Checkpoint, CheckpointRotation, load_state, load_weights
from eps_train.training.distributed import ALONE, Group, StopRequest
from eps_train.training.evaluate import EpochMetrics
from eps_train.training.paths import RunPaths
from eps_train.training.plots import draw
from eps_train.training.probe import step_seconds
from eps_train.training.progress import LEGEND, EpochPrinter, MetricsLog
from eps_train.training.run_checks import PruneLog
from eps_train.training.step import Teacher, cuda_graph_obstacle
from eps_train.training.trainer import Stopped, Trainer, network_spec

# -- Tables: what would be trained, and what was trained


def summarize(best: Checkpoint, path: Path, seconds: float) -> dict[str, Any]:
    """Summary of a finished run as plain data: network, what is left of it, scores and path."""
    shape = best.data.input_shape
    network = best.network.skeleton()
    blocks = len(rewriting.gates(network))
    whole = cost(network, shape)
    kept = cost(rewriting.remove_blocks(network, best.dead), shape)
    return {
        "path": str(path),
        "model": "baseline" if not best.gates else "ε-ResNet",
        "blocks": {"total": blocks, "kept": blocks - len(best.dead)},
        "parameters": {"total": whole.parameters, "kept": kept.parameters},
        "flops": {"total": whole.flops, "kept": kept.flops},
        "epoch": best.metrics["epoch"],
        "validation": best.metrics["validation"],
        "test": best.metrics["test"],
        "seconds": seconds,
    }


def show(summaries: list[dict[str, Any]]) -> None:
    """Print finished runs as one table."""

    def share(cost: dict[str, int]) -> str:
        return f"{cost['kept'] / cost['total']:.0%}"

    targets = [summary.get("target", {}) for summary in summaries]
    latencies = [
        f"{target['measured']:.0%}"
        if target.get("currency") == "latency" and target["measured"] is not None
        else "–"
        for target in targets
    ]
    timed = any(latency != "–" for latency in latencies)
    rows = [
        (
            summary["model"],
            f"{summary['blocks']['kept']}/{summary['blocks']['total']}",
            f"{summary['parameters']['kept']:,} ({share(summary['parameters'])})",
            share(summary["flops"]),
            *([latency] if timed else []),
            f"{summary['validation']['accuracy']:.2%}",
            f"{summary['test']['accuracy']:.2%} of {summary['test']['samples']}",
            f"{summary['seconds']:.0f} s",
            summary["path"],
        )
        for summary, latency in zip(summaries, latencies, strict=True)
    ]
    columns = ["network", "blocks", "parameters", "FLOPs", *(["latency"] if timed else [])]
    columns += ["validation", "test", "time", "written"]
    log = cli.log()
    table = cli.table("Trained", columns, rows)
    unbounded = log.options.update(width=10_000)
    if log.measure(table, options=unbounded).maximum > log.width:
        # One column for each run instead, so that no word is broken.
        first, *others = zip(columns, *rows, strict=True)
        table = cli.table("Trained", first, others)
    log.print(table)


def show_plan(chosen: TrainingConfig, data: Outline, device: torch.device) -> None:
    """Print what a run would train, and about how long it would take on a device."""

    def listed(steps: Steps) -> str:
        return ", ".join(f"{value:g} from {start:g}" for start, value in steps)

    spec = network_spec(chosen, data)
    skeleton = spec.skeleton()
    total = cost(skeleton, data.shape)
    steps = max(1, data.train // chosen.batch_size)
    start = f" from epoch {chosen.epsilon_warmup + 1} on" if chosen.epsilon_warmup else ""
    target, stages = chosen.target, rewriting.stages(skeleton, data.shape)
    if chosen.plain:
        epsilon = "none: baseline"
    elif chosen.nested:
        epsilon = "none: gates stay open, and sub-networks of every depth are trained too"
    elif target is not None:
        epsilon = f"adjusted to keep {target.share:.0%} of the {target.unit}{start}"
    else:
        unit = " times the RMS of the block's input" if chosen.relative_epsilon else ""
        epsilon = f"{chosen.epsilon:g}{unit}{start}"
    if isinstance(chosen.lr_schedule, CosineDecay):
        rates = f"{chosen.lr_schedule.cosine:g}, falling to 0 along a cosine"
    else:
        rates = listed(chosen.lr_schedule)
    warm_up = f", after a warm-up of {chosen.lr_warmup:g} epochs" if chosen.lr_warmup else ""
    decay = f"{listed(chosen.final_decay)} of the run" if chosen.final_decay else "none"
    size = "x".join(map(str, data.shape))
    rows = [
        ("data", f"{chosen.dataset}: {data.train:,} training images of {size}"),
        ("model", f"{chosen.model}, {len(spec.all_blocks())} blocks"),
        ("parameters", f"{total.parameters:,}"),
        ("FLOPs an image", f"{total.flops:,}"),
        ("epochs", f"{chosen.epochs} of {steps} steps of {chosen.batch_size} images"),
        ("learning rate", rates + warm_up),
        ("restart", listed(chosen.lr_restart) if chosen.lr_restart else "none"),
        ("final decay", decay),
        ("epsilon", epsilon),
        ("time", _expected_time(chosen, spec, data, device, flops=total.flops)),
    ]
    log = cli.log()
    log.print(cli.table(f"Recipe {chosen.recipe} (dry run)", ("", ""), rows))
    if chosen.plain:
        return
    for line in rewriting.told(rewriting.ungated(skeleton)):
        log.print(f"not gated: {line}")
    warnings = [
        run_checks.schedule_warning(chosen, steps=steps),
        *run_checks.size_warnings(rewriting.branch_parameters(skeleton)),
    ]
    if target is not None and target.currency != "latency":  # which a run measures first
        costs = count_costs(skeleton, data.shape, target.currency)
        warnings.append(run_checks.unreachable_warning(target, costs, stages))
    for warning in filter(None, warnings):
        log.print(f"warning: {warning}")


def _expected_time(
    config: TrainingConfig, spec: NetworkSpec, data: Outline, device: torch.device, *, flops: int
) -> str:
    """The training time of a whole run if no block were removed, from a few steps on noise."""
    try:
        step = step_seconds(config, spec, data, device, flops=flops)
    except (ConfigError, torch.OutOfMemoryError) as error:
        return f"not estimated: {str(error).partition(chr(10))[0]}"
    seconds = step * max(1, data.train // config.batch_size) * config.epochs
    total = f"{seconds:.0f} s"
    if seconds >= 60:
        total = f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f"about {total} on {device}, at {step:.3g} s a step of the whole network"


class Run:
    """A training run, prepared: all checks of its input have passed when this exists.

    Args:
        config, data, device, group, cuda_graph: as for :class:`Trainer`; only the leader of the
            group writes and prints.
        files: paths of its files.
        resume: continue from `files.last` if it exists.
        weights: a state dict to start from.
        pretrained: start from the weights that the network's library publishes.
        teacher: a checkpoint to distil from; not for a baseline that is trained beside.
        keep: number of the last epochs whose checkpoints are kept (:class:`CheckpointRotation`).
        trackers: names of experiment trackers (:mod:`~eps_train.training.trackers`).

    Raises EpsError when an argument, or a file of an earlier run, cannot be used.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: Data,
        files: RunPaths,
        *,
        device: torch.device,
        resume: bool,
        weights: Path | None,
        pretrained: bool = False,
        teacher: Path | None = None,
        keep: int = 0,
        trackers: Sequence[str] = (),
        group: Group = ALONE,
        cuda_graph: str = "auto",
    ) -> None:
        self._group = group
        self.config, self.files = config, files
        self._title = "baseline" if config.plain else "ε-ResNet"
        self._trackers = tracking.Trackers(trackers, self._warn)
        self._log = cli.log()
        self._stop = StopRequest(group)
        self._rotation = CheckpointRotation(files, keep)
        if config.cpu_threads:
            torch.set_num_threads(config.cpu_threads)
        self.trainer = trainer = Trainer(
            config,
            data,
            best_path=files.best,
            last_path=files.last,
            device=device,
            stop=self._stop,
            rotation=self._rotation,
            group=group,
            cuda_graph=cuda_graph,
            teacher=None if teacher is None else Teacher.load(teacher, data.identity, device),
        )
        if cuda_graph == "auto" and device.type == "cuda":
            reason = cuda_graph_obstacle(config, group, device)
            self._log.print(f"CUDA graph: {'on' if reason is None else f'off, {reason}'}")
        self._parameters = trainer.parameters()  # of the whole network: no block is removed yet
        if resume and files.last.exists():
            for change in trainer.resume():
                self._log.print(change)
        elif resume:
            self._log.print(f"{files.last}: does not exist yet; starting from the first epoch")
        here = (trainer.epoch, trainer.step)
        if any(there != here for there in group.gather(here)):
            group.fail(
                ConfigError(
                    f"{files.last}: is not the same for all processes; end the run that is"
                    " writing it, or give an --output folder that all machines share"
                )
            )
        if resume:
            self._rotation.adopt(config, data, epochs_done=trainer.epoch)
        trainer.measure_latency(self._log.print)
        if here == (0, 0):
            self._load_weights(weights, pretrained=pretrained)

    def _load_weights(self, weights: Path | None, *, pretrained: bool) -> None:
        """Start from a file, or from the published weights; one line says what was not loaded."""
        model, report = self.trainer.model, self._log.print
        if weights is not None:
            source, name = str(weights), weights.name
            skipped = load_weights(weights, model, report)
            content = weights.read_bytes()
        elif pretrained:
            published = registry.pretrained(self.config.model)
            source = name = published.source
            report(f"reading the published weights {source}")
            state = self._group.first(lambda: published.state(self.config.model))
            skipped = load_state(state, model, source=f"--pretrained: {source}", report=report)
            content = b"".join(tensor.numpy().tobytes() for tensor in state.values())
        elif self.config.head_epochs or not self.config.epochs:
            option = "--head-epochs" if self.config.epochs else "--epochs 0"
            raise ConfigError(
                f"{option} only applies to a network with weights; give --pretrained or --weights"
                " FILE"
            )
        else:
            return
        digest = hashlib.sha256(content).hexdigest()
        self.trainer.started_from = {"file": name, "sha256": digest}
        if self.trainer.averaged is not None:
            self.trainer.averaged.restart()
        fresh = f"; for other classes, or not in it: {', '.join(skipped)}" if skipped else ""
        report(f"starting from {source}{fresh}")
        self._warn(run_checks.weights_warning(self.config))
        if skipped and not self.config.epochs:
            self._warn(
                "the last layer is not trained, so that no accuracy means anything; give --epochs 1"
                " --head-epochs 1 --epsilon-warmup 2, which train it alone"
            )

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the summary as plain data.

        Raises Interrupted when SIGINT or SIGTERM ended it early; its state is saved then.
        """
        trainer = self.trainer
        with self._trackers:
            self._group.lead(self._open)
            with EpochPrinter(
                self._log,
                self._title,
                epochs=self.config.epochs,
                epochs_done=trainer.epoch,
                parameters=self._parameters,
                position=lambda: trainer.epoch + trainer.step / trainer.batches.steps,
                compiles=self.config.compile,
            ) as self._printer:
                try:
                    with self._stop:
                        best = trainer.run(
                            lambda metrics: self._group.lead(lambda: self._report(metrics))
                        )
                except Stopped:
                    self._print_saved(trainer.step)
                    raise Interrupted(self._stop.signal) from None
                except (KeyboardInterrupt, OSError, DataError, RuntimeError):
                    self._print_saved()
                    raise
            if trainer.epoch < self.config.epochs:
                self._log.print(
                    f"stopped after epoch {trainer.epoch} of {self.config.epochs}: validation has"
                    f" not been better for {trainer.stale} epochs (--early-stopping)"
                )
            self._group.lead(self._close)
            if self._stop.wait():  # a signal too late to stop this run ends the next one
                raise Interrupted(self._stop.signal)
            summary = summarize(best, self.files.best, trainer.seconds)
            if trainer.pruner.controller is not None and not self.config.first_look:
                target = self._group.lead(lambda: self._compare_with_target(best, summary))
                summary["target"] = target
        return summary if self._group.world is None else summary | {"processes": self._group.size}

    def _open(self) -> None:
        """On the leader, before training: open the logs and print the pre-flight warnings."""
        trainer, config = self.trainer, self.config.to_dict()
        run = tracking.TrackedRun(
            paths=self.files, config=config, epochs=self.config.epochs, before=[]
        )
        fresh = not (trainer.epoch or trainer.step)
        if fresh:
            self._trackers.begin(run)  # before any file is written, because it may be refused
        replace_file(self.files.config, (json.dumps(config, indent=2) + "\n").encode())
        self._metrics = MetricsLog(
            self.files.metrics, epochs_done=trainer.epoch, parameters=self._parameters
        )
        self._rotation.rotate(trainer.epoch)  # the run may have been killed before it
        if not self.config.plain:
            self._log.print(f"block map: {LEGEND}")
        if fresh and not self.config.first_look:
            self._preflight()
        before = self._metrics.read()
        self._prune_log = PruneLog(
            self.config,
            trainer.data.validation.labels,
            trainer.pruner.stages,
            before=before,
            records=trainer.pruner.tracker.records.values(),
        )
        if not fresh:
            self._trackers.begin(replace(run, before=before))

    def _preflight(self) -> None:
        """Print which blocks are not gated, and warn of a run that cannot prune as configured."""
        trainer = self.trainer
        if not self.config.plain:
            for line in rewriting.told(rewriting.ungated(trainer.model)):
                self._log.print(f"not gated: {line}")
        unreachable = None
        if trainer.pruner.controller is not None:
            target, costs = trainer.pruner.controller.target, trainer.pruner.controller.costs
            self._log.print(costs.describe(target))
            unreachable = run_checks.unreachable_warning(target, costs, trainer.pruner.stages)
        self._warn(
            run_checks.schedule_warning(self.config, steps=trainer.batches.steps),
            run_checks.average_warning(self.config, steps=trainer.batches.steps),
            *run_checks.size_warnings(rewriting.branch_parameters(trainer.model)),
            unreachable,
            run_checks.zero_branches_warning(
                trainer.model,
                trainer.normalize,
                trainer.pruner.gates,
                trainer.validation,
                epsilon=max(trainer.pruner.thresholds(0).values(), default=0.0),
            ),
        )

    def _report(self, metrics: EpochMetrics) -> None:
        """On the leader, after every epoch."""
        line = self._metrics.append(metrics)
        self._printer.show(metrics)
        self._warn(*self._prune_log.observe(metrics))
        self._trackers.add(line, self._metrics.read)

    def _close(self) -> None:
        """On the leader, after training: plot the run, or say what is next."""
        if self.config.first_look and not self.config.plain:
            trained = "the last layer alone" if self.config.epochs else "nothing"
            command = f"eps-compact {self.files.best} --sweep --dry-run"
            self._log.print(f"{trained} was trained; {command} shows which blocks can go")
        title = f"{self._title}: {self.config.dataset}, {self.config.model}"
        if self.config.epochs:
            replace_file(self.files.plot, draw(self._metrics.read(), title))

    def _compare_with_target(self, best: Checkpoint, summary: dict[str, Any]) -> dict[str, Any]:
        """On the leader, after training: measure the cost that is left, and say what was asked for.

        Returns the entry `target` of the summary: shares of the cost asked for, predicted and
        measured, a latency's with its 95 % interval; None for one that could not be measured.
        """
        trainer = self.trainer
        assert trainer.pruner.controller is not None
        target, costs = trainer.pruner.controller.target, trainer.pruner.controller.costs
        predicted = costs.without(best.dead) / costs.whole
        found: dict[str, Any] = {"option": str(target), "currency": target.currency}
        found |= {"asked": target.share, "predicted": predicted}
        measured: float | None = None
        if target.currency != "latency":
            counts = summary[target.currency]
            measured = counts["kept"] / counts["total"]
            how = f"{measured:.1%} measured"
        else:
            try:
                timer = make_timer(self.config.timer, best.data, self._log.print)
                model = best.build_gated().to(trainer.device)
                share = latency_share(timer.load(model, trainer.image), best.dead)
            except EpsError as error:  # a run may be resumed where its runtime is not installed
                how = f"not measured ({error})"
            else:
                measured, low, high = share.value, share.low, share.high
                found |= {"low": low, "high": high, "timer": timer.name}
                how = f"{measured:.1%} measured ({low:.1%} to {high:.1%}; {timer.name})"
        found["measured"] = measured
        self._log.print(
            f"{target.unit}: {target.share:.1%} asked for ({target}), {predicted:.1%}"
            f" predicted, {how}"
        )
        missed = trainer.pruner.controller.shortfall(trainer.pruner.cost())
        if missed is None and measured is not None and measured > target.share:
            live = [record.block for record in best.gates if record.death is None]
            missed = (
                f"the measured {target.unit} is {100 * (measured - target.share):.1f} points above"
                " the target"
            )
            if rewriting.removable(live, live, trainer.pruner.stages):
                missed += f"; eps-compact {self.files.best} {target} prunes further"
            else:
                missed += ", and every stage is down to a block"
        self._warn(missed)
        return found

    def _warn(self, *warnings: str | None) -> None:
        for warning in filter(None, warnings):
            self._log.print(f"warning: {warning}")

    def _print_saved(self, steps: int = 0) -> None:
        if self.trainer.saved or steps:
            done = f"{self.trainer.saved} of {self.config.epochs} epochs"
            more = f" and {steps} steps" if steps else ""
            self._log.print(f"{self.files.last} holds {done}{more}; --resume goes on from there")
