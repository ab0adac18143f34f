"""One run from its files' point of view: start or resume, report, picture, summary."""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eps_core import cli
from eps_core.errors import ConfigError, DataError, Interrupted
from eps_core.files import replace_file
from eps_train.config import TrainingConfig
from eps_train.data.dataset import Data, Outline
from eps_train.gating import rewriting
from eps_train.gating.rewriting import branch_parameters
from eps_train.models.spec import cost
from eps_train.schedule import Steps
from eps_train.training import progress
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.distributed import ALONE, AgreedStop, Group, StopRequest
from eps_train.training.files import RunPaths
from eps_train.training.forward import TrainedNetwork
from eps_train.training.guards import EpochMetrics
from eps_train.training.plots import TensorBoardLog, draw, require
from eps_train.training.progress import LEGEND, EpochPrinter, MetricsLog
from eps_train.training.rotation import CheckpointRotation
from eps_train.training.step import obstacle
from eps_train.training.trainer import Stopped, Trainer, network_spec

# -- What it costs that the gates of several processes decide together (`--gate-scope global`)

ROUNDS = 10


@dataclass(frozen=True, slots=True)
class AgreementCost:
    """Seconds of one training forward pass, eager, in float32: gates apart, and together.

    Medians over `ROUNDS` passes each, taken in turn; waiting for the slowest process is in both,
    for the passes start together, but between the gates of one pass only in the second.
    """

    apart: float
    together: float

    @property
    def seconds(self) -> float:
        """What a step takes longer."""
        return self.together - self.apart


@torch.no_grad()
def measure(network: TrainedNetwork, images: Tensor, group: Group) -> AgreementCost:
    """Time passes of normalised `images` through copies of `network`, which is left as it was."""
    apart, together = copy.deepcopy(network).train(), copy.deepcopy(network).train()
    for gate in rewriting.gates(together.model).values():
        gate.process_group = group.world
    on_gpu = [images.device] if images.device.type == "cuda" else []
    times: dict[TrainedNetwork, list[float]] = {apart: [], together: []}
    with torch.random.fork_rng(devices=on_gpu):
        for _ in range(ROUNDS + 2):
            for contender, taken in times.items():
                group.post_largest(0)()  # all start together
                _synchronise(images.device)
                started = time.perf_counter()
                contender(images)
                _synchronise(images.device)
                taken.append(time.perf_counter() - started)
    return AgreementCost(*(statistics.median(taken[2:]) for taken in times.values()))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- Tables about a run: what would be trained, and what came out


def summarize(best: Checkpoint, path: Path, seconds: float) -> dict[str, Any]:
    """A finished run as plain data: what was trained, kept, reached, and where it is."""
    shape = best.data.input_shape
    blocks = len(best.network.all_blocks())
    whole = cost(best.build_gated(), shape)
    kept = cost(replace(best.network, removed=best.dead).build(best.state), shape)
    return {
        "path": str(path),
        "model": "plain" if not best.gates else "ε-ResNet",
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
    rows = [
        (
            summary["model"],
            f"{summary['blocks']['kept']}/{summary['blocks']['total']}",
            f"{summary['parameters']['kept']:,} ({_share(summary['parameters']):.0%})",
            f"{_share(summary['flops']):.0%}",
            f"{summary['validation']['accuracy']:.2%}",
            f"{summary['test']['accuracy']:.2%} of {summary['test']['samples']}",
            f"{summary['seconds']:.0f} s",
            summary["path"],
        )
        for summary in summaries
    ]
    columns = ("network", "blocks", "parameters", "FLOPs", "validation", "test", "time", "written")
    log = cli.log()
    table = cli.table("Trained", columns, rows)
    unbounded = log.options.update(width=10_000)
    if (
        log.measure(table, options=unbounded).maximum > log.width
    ):  # a column a run instead, with whole words
        first, *others = zip(columns, *rows, strict=True)
        table = cli.table("Trained", first, others)
    log.print(table)


def _share(cost: dict[str, int]) -> float:
    return cost["kept"] / cost["total"]


def show_plan(chosen: TrainingConfig, data: Outline) -> None:
    """Print what a run would train; the network is built without memory for its tensors."""
    spec = network_spec(chosen, data)
    total = cost(spec.skeleton(), data.shape)
    steps = max(1, data.train // chosen.batch_size)
    rows = [
        ("data", f"{chosen.dataset}: {data.train:,} training images of {_size(data.shape)}"),
        ("model", f"{chosen.model}, {len(spec.all_blocks())} blocks"),
        ("parameters", f"{total.parameters:,}"),
        ("FLOPs an image", f"{total.flops:,}"),
        ("epochs", f"{chosen.epochs} of {steps} steps of {chosen.batch_size} images"),
        ("rate", _steps(chosen.lr_schedule)),
        ("after a loss", _steps(chosen.lr_restart) if chosen.lr_restart else "no restart"),
        ("last descent", f"{_steps(chosen.final_decay)} of the run"),
        ("epsilon", _epsilon(chosen)),
    ]
    log = cli.log()
    log.print(cli.table(f"Recipe {chosen.recipe} (dry run)", ("", ""), rows))
    if chosen.plain:
        return
    skeleton = spec.skeleton()
    for line in rewriting.told(rewriting.ungated(skeleton)):
        log.print(f"not gated: {line}")
    stages = rewriting.stages(skeleton, data.shape)
    sizes = branch_parameters(skeleton)
    warnings = progress.unreachable(chosen, sizes, total.parameters, stages)
    for warning in [progress.before_training(chosen, steps=steps), *warnings]:
        if warning:
            log.print(f"warning: {warning}")


def _epsilon(chosen: TrainingConfig) -> str:
    if chosen.plain:
        return "none: plain network"
    start = f" from epoch {chosen.epsilon_warmup + 1} on" if chosen.epsilon_warmup else ""
    if chosen.epsilon is None:
        return f"led to keep {chosen.target_parameters:.0%} of the parameters{start}"
    return f"{chosen.epsilon:g}{start}"


def _size(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


def _steps(steps: Steps) -> str:
    return ", ".join(f"{value:g} from {start:g}" for start, value in steps)


class Run:
    """A training run, prepared: whatever can be refused has been when this exists.

    Args:
        config, data: what to train.
        files: where its files go.
        device: where to train.
        resume: go on from `files.last` if it is there.
        weights: a state dict to start from.
        keep: how many of the last epochs' checkpoints stay; see :class:`kept.KeptCheckpoints`.
        tensorboard: whether TensorBoard's event files are written.
        group: the processes that train together; their leader alone writes and prints.
        cuda_graph: `auto`, `on` or `off`; see :func:`cuda_graph.graphed`.

    Raises:
        EpsError: what is given cannot be used.
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
        keep: int = 0,
        tensorboard: bool = False,
        group: Group = ALONE,
        cuda_graph: str = "auto",
    ) -> None:
        self._group = group
        self.config, self.files, self._tensorboard = config, files, tensorboard
        if tensorboard:
            require()
        self._log = cli.log()
        self._stop = StopRequest()
        self._agreed_stop = AgreedStop(self._stop, group)
        self._kept = CheckpointRotation(files, keep)
        if config.cpu_threads:
            torch.set_num_threads(config.cpu_threads)
        self.trainer = Trainer(
            config,
            data,
            best_path=files.best,
            last_path=files.last,
            device=device,
            stop=self._agreed_stop,
            kept=self._kept,
            group=group,
            cuda_graph=cuda_graph,
        )
        if cuda_graph == "auto" and device.type == "cuda":
            reason = obstacle(config, group, device)
            self._log.print(f"CUDA graph: {'on' if reason is None else f'off, {reason}'}")
        self._parameters = self.trainer.parameters()  # of the whole network: nothing has left yet
        if resume and files.last.exists():
            self.trainer.resume()
            for change in self.trainer.resumed_otherwise:
                self._log.print(change)
        elif resume:
            self._log.print(f"{files.last}: not there yet; starting from the first epoch")
        self._refuse_other_folders()
        if resume:
            self._kept.adopt(config, data, epochs_done=self.trainer.epoch)
        if weights and not (self.trainer.epoch or self.trainer.step):
            from eps_train.training.checkpoint import load_weights

            skipped = load_weights(weights, self.trainer.model, self._log.print)
            fresh = f"; for other classes, or not in it: {', '.join(skipped)}" if skipped else ""
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            self.trainer.started_from = {"file": weights.name, "sha256": digest}
            self._log.print(f"starting from {weights}{fresh}")

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the summary as plain data.

        Raises Interrupted when SIGINT or SIGTERM ended it early; all is saved then.
        """
        processes = self._processes()
        self._group.lead(self._open)
        best = self._train()
        self._group.lead(self._close)
        if self._agreed_stop.at_last():  # it came too late to stop this run, but not the next one
            assert self._stop.signal is not None
            raise Interrupted(self._stop.signal)
        return summarize(best, self.files.best, self.trainer.seconds) | processes

    def _open(self) -> None:
        """Prepare what the leader writes and says while the run goes."""
        trainer = self.trainer
        config = json.dumps(self.config.to_dict(), indent=2) + "\n"
        replace_file(self.files.config, config.encode())
        self._metrics = MetricsLog(
            self.files.metrics, epochs_done=trainer.epoch, parameters=self._parameters
        )
        self._kept.rotate(trainer.epoch)  # a kill may have come before it
        if not self.config.plain:
            self._log.print(f"block map: {LEGEND}")
        if not (trainer.epoch or trainer.step):
            self._warn_before()
        before = self._metrics.read()
        self._deaths = progress.PruneLog(
            self.config,
            trainer.data.validation.labels,
            trainer.stages,
            before=before,
            records=trainer.registry.records.values(),
        )
        self._board: TensorBoardLog | None = None
        if self._tensorboard:
            self._board = TensorBoardLog(self.files, epochs=self.config.epochs, before=before)

    def _close(self) -> None:
        """Draw the run, and say so when it did not get where it was led."""
        trainer = self.trainer
        missed = trainer.lead and trainer.lead.shortfall(trainer.parameters())
        self._warn([missed] if missed else [])
        title = f"{self._title}: {self.config.dataset}, {self.config.model}"
        replace_file(self.files.picture, draw(self._metrics.read(), title))

    def _processes(self) -> dict[str, Any]:
        """What the summary tells about several processes, and what their gates' agreement costs."""
        group, trainer = self._group, self.trainer
        if group.world is None:
            return {}
        told: dict[str, Any] = {"processes": group.size}
        if self.config.gate_scope == "global" and trainer.gates:
            shape = (trainer.batches.size // group.size, *trainer.data.identity.input_shape)
            blank = torch.zeros(shape, dtype=torch.uint8, device=trainer.device)
            cost = measure(trainer.network, trainer.normalize(blank), group)
            told["gate_agreement_seconds"] = cost.seconds
            self._log.print(
                f"gate scope global: the agreement of {len(trainer.gates)} gates makes a forward"
                f" pass of {1e3 * cost.apart:.1f} ms {1e3 * cost.seconds:.1f} ms longer"
                f" ({group.size} processes, median of {ROUNDS})"
            )
        return told

    def _refuse_other_folders(self) -> None:
        here = (self.trainer.epoch, self.trainer.step)
        if any(there != here for there in self._group.gather(here)):
            self._group.fail(
                ConfigError(
                    f"{self.files.last}: is not the same for all processes; end the run that is"
                    " writing it, or give an --output folder that all machines share"
                )
            )

    def _warn_before(self) -> None:
        """Say what the plan alone tells about how the run will end."""
        trainer = self.trainer
        if not self.config.plain:
            for line in rewriting.told(rewriting.ungated(trainer.model)):
                self._log.print(f"not gated: {line}")
        found = [progress.before_training(self.config, steps=trainer.batches.steps)]
        sizes = branch_parameters(trainer.model)
        found += progress.unreachable(self.config, sizes, self._parameters, trainer.stages)
        found.append(
            progress.zero_branches(
                trainer.model,
                trainer.normalize,
                trainer.gates,
                trainer.validation,
                epsilon=max(trainer.thresholds(0).values(), default=0.0),
            )
        )
        self._warn(warning for warning in found if warning is not None)

    def _warn(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            self._log.print(f"warning: {warning}")

    def _train(self) -> Checkpoint:
        trainer = self.trainer
        with self._printer() as printer:

            def tell(epoch: EpochMetrics) -> None:
                line = self._metrics.append(epoch)
                printer.show(epoch)
                self._warn(self._deaths.observe(epoch))
                if self._board is not None:
                    self._board.add(line, self._metrics.read)

            try:
                with self._stop:
                    return trainer.run(lambda epoch: self._group.lead(lambda: tell(epoch)))
            except Stopped:
                self._say_what_is_kept(trainer.step)
                assert self._stop.signal is not None
                raise Interrupted(self._stop.signal) from None
            except (KeyboardInterrupt, OSError, DataError, RuntimeError):
                self._say_what_is_kept()
                raise

    def _printer(self) -> EpochPrinter:
        trainer = self.trainer
        return EpochPrinter(
            self._log,
            self._title,
            epochs=self.config.epochs,
            epochs_done=trainer.epoch,
            parameters=self._parameters,
            position=lambda: trainer.epoch + trainer.step / trainer.batches.steps,
            compiles=self.config.compile,
        )

    def _say_what_is_kept(self, steps: int = 0) -> None:
        if self.trainer.saved or steps:
            done = f"{self.trainer.saved} of {self.config.epochs} epochs"
            more = f" and {steps} steps" if steps else ""
            self._log.print(f"{self.files.last} holds {done}{more}; --resume goes on from there")

    @property
    def _title(self) -> str:
        return "plain network" if self.config.plain else "ε-ResNet"
