"""Training loop: trains a network epoch by epoch, removes dead blocks, saves and resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from eps_core.cli import Log
from eps_core.errors import ConfigError, TrainingError
from eps_train.config import TrainingConfig
from eps_train.data.batches import Batches
from eps_train.data.dataset import Data, Outline
from eps_train.gating import rewriting
from eps_train.gating.controller import EpsilonController
from eps_train.gating.costs import count_costs, make_timer, measure_latency
from eps_train.gating.nested import SubNetworks, nested_order, smallest_size
from eps_train.gating.pruner import GraphPruner
from eps_train.gating.targets import BlockCosts
from eps_train.models.resnets import Normalize, SideHead
from eps_train.models.spec import NetworkSpec, count_parameters
from eps_train.schedule import LearningRateSchedule
from eps_train.training import run_checks
from eps_train.training.checkpoint import (
    Checkpoint,
    CheckpointRotation,
    first_and_last_layers,
    require_same_run,
    resume_changes,
)
from eps_train.training.distributed import ALONE, Group, running_statistics
from eps_train.training.evaluate import EpochMetrics, NormalizedImages, Score, score
from eps_train.training.forward import wide_float
from eps_train.training.step import (
    GraphedStep,
    Teacher,
    TrainingStep,
    balanced_weights,
    build,
    set_lr,
    use_cuda_graph,
)

NESTED_AFTER = 0.1  # share of a nested run after which the order of its blocks is fixed
CHECK_EVERY = 50  # steps between two checks that the loss is finite (each one synchronises)


class Stopped(Exception):
    """The run was asked to stop, and has saved its state."""


class Trainer:
    """Trains one network, gated or baseline, and keeps `best_path` and `last_path` up to date.

    A run depends on its configuration and data only: random choices are drawn per epoch from
    (seed, epoch), so that a run resumed from `last_path` continues exactly as if never stopped.

    Args:
        best_path, last_path: the best checkpoint, and the state to resume from.
        stop: called after each step; when it returns true, the state is saved, in the middle of the
            epoch, and :meth:`run` raises :class:`Stopped`.
        rotation: writes the checkpoints of the last epochs too.
        group: the processes that train together.
        start: a network to continue with, and its tensors, instead of a new one as in `config`.
        cuda_graph: `auto`, `on` or `off`; see :func:`step.use_cuda_graph`.
        teacher: a network whose logits the training follows as well.
    """

    pruner_type = GraphPruner

    def __init__(
        self,
        config: TrainingConfig,
        data: Data,
        *,
        best_path: Path,
        last_path: Path,
        device: torch.device,
        stop: Callable[[], bool] = lambda: False,
        rotation: CheckpointRotation | None = None,
        group: Group = ALONE,
        start: tuple[NetworkSpec, Mapping[str, Tensor]] | None = None,
        cuda_graph: str = "auto",
        teacher: Teacher | None = None,
    ) -> None:
        self._stop, self.group, self._teacher = stop, group, teacher
        self.config, self.data, self.device = config, data, device
        self.best_path, self.last_path, self.rotation = best_path, last_path, rotation
        identity = data.identity
        self.spec = start[0] if start else network_spec(config, identity.outline)
        torch.manual_seed(config.seed)
        self.network = build(self.spec, config, group, device, classes=len(identity.classes))
        if start:
            self.model.load_state_dict({name: start[1][name] for name in self.model.state_dict()})
        self.normalize = Normalize.of(identity).to(device)
        self.batches = Batches(data, config, device, group.part)
        self.validation = data.validation.to(device)
        class_weights = None
        if config.class_weights == "balanced":
            class_weights = balanced_weights(data.train.labels, len(identity.classes)).to(device)
        self.training_step = TrainingStep(
            self.network,
            self.normalize,
            config,
            group,
            device,
            teacher=teacher,
            class_weights=class_weights,
        )
        self.optimizer, self.averaged = self.training_step.optimizer, self.training_step.averaged
        self.take_step: TrainingStep | GraphedStep = self.training_step
        if use_cuda_graph(cuda_graph, config, group, device):
            self.take_step = GraphedStep(self.training_step, device, required=cuda_graph == "on")
        self._head = self._require_head() if config.head_epochs else set()
        self._frozen: list[nn.Parameter] = []  # while the head alone is trained
        self.own_teacher: Teacher | None = None  # of a run with self-distillation
        self.schedule = LearningRateSchedule(config)
        self.pruner = self._make_pruner()
        if config.target is not None and config.target.currency != "latency":
            shape = identity.input_shape
            self._follow_target(count_costs(self.model, shape, config.target.currency))
        self.order: tuple[str, ...] = ()  # of a nested run, from its first epochs on
        if config.nested:
            self._require_nestable()
        self.saved = 0  # epochs that `last_path` holds
        # Total loss and correct answers of the current epoch.
        self.totals = torch.zeros(2, dtype=wide_float(device), device=device)
        self._rng: tuple[Tensor, Tensor | None] | None = None  # of the step to resume at
        self.validated: Score | None = None  # of the last epoch
        self.best: Score | None = None  # of the current structure
        self.stale = 0  # epochs since then
        self.seconds = 0.0
        self.started_from: dict[str, str] | None = None  # name and SHA-256 of a file of weights

    def _make_pruner(self) -> GraphPruner:
        config, shape = self.config, self.data.identity.input_shape
        stages = rewriting.stages(self.model, shape)
        active = run_checks.active_epochs(config)
        return self.pruner_type(
            self.model,
            self.spec,
            stages=stages,
            controller=None,
            epsilon=lambda epoch: (config.epsilon or 0.0) if epoch in active else 0.0,
            patience=config.patience,
            criterion=config.criterion,
            relative=config.relative_epsilon,
            seed=config.seed,
            live_removal=config.live_removal,
            group=self.group,
        )

    # -- Epochs

    def run(self, report: Callable[[EpochMetrics], None]) -> Checkpoint:
        """Train to the last epoch, then evaluate the best checkpoint on the test part, once."""
        self.measure_latency()
        if not self.config.epochs:
            self.validated = self.group.lead(lambda: self._score(self.model))
            checkpoint = self.checkpoint()
            self.group.lead(lambda: checkpoint.save(self.best_path))
        while not self.finished:
            metrics = self.run_epoch()
            # Reported first: an epoch that is saved and then lost to a kill would go unreported.
            report(metrics)
            self.save(metrics)
            if self._stop() and not self.finished:
                raise Stopped
        return self._finish()

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or no more are worth while (`early_stopping`).

        As long as blocks are still to be chosen the run goes on: until a target is met, until a
        fixed epsilon has acted for `patience` epochs, or until a nested run has its order.
        """
        config = self.config
        if self.epoch >= config.epochs:
            return True
        if not config.early_stopping or self.stale < config.early_stopping:
            return False
        if (controller := self.pruner.controller) is not None:
            return controller.shortfall(self.pruner.cost()) is None
        if config.nested:
            return bool(self.order)
        return config.plain or self.epoch >= config.epsilon_warmup + config.patience

    def measure_latency(self, report: Log = lambda line: None) -> None:
        """Time the blocks, if a target asks for it, unless the run has their times already.

        `report` receives a line when another runtime than ONNX Runtime is used, and one when the
        machine was too busy. Raises ConfigError when the runtime of `--timer` is not installed, and
        GraphError when it cannot run the network.
        """
        known = self.config.target is None or self.pruner.controller is not None
        if known or self.config.first_look:
            return

        def measured() -> BlockCosts:
            timer = make_timer(self.config.timer, self.data.identity, report)
            return measure_latency(rewriting.drop_taps(self.model), self.image, timer)

        self._follow_target(self.group.lead(measured))

    def _follow_target(self, costs: BlockCosts) -> None:
        """Have a controller prune to the target; `costs` are in its currency."""
        config = self.config
        assert config.target is not None
        self.pruner.controller = EpsilonController(
            target=config.target,
            costs=costs,
            epochs=config.epochs,
            end=self.schedule.decay_epoch,
            stages=self.pruner.stages,
            patience=config.patience,
            max_accuracy_drop=config.max_accuracy_drop,
            criterion=config.criterion,
            warmup=config.epsilon_warmup,
        )

    def run_epoch(self) -> EpochMetrics:
        """Train one epoch, remove the blocks that died, and validate; :meth:`save` comes next."""
        started = time.perf_counter()
        epoch = self.epoch
        lr = self.schedule.lr(epoch)
        loss, accuracy, images = self._train_epoch(epoch)
        self.group.share(running_statistics(self.network))
        if self.averaged is not None:
            self.group.share(self.averaged.tensors.values())
        found: list[Score] = []

        def validate(model: nn.Module) -> float:
            found.append(self._score(model))
            return found[0].accuracy

        # Without `averaged`: blocks are judged by the trained weights, the score is the average's.
        judged = self.pruner.judge_epoch(
            NormalizedImages(self.normalize, self.validation),
            optimizer=self.optimizer,
            metric=validate,
        )
        died = judged.died
        self.schedule.observe(epoch, judged.discarded)
        if died and self.config.live_removal:
            self.take_step.rewrap()

        def checked() -> Score:
            if died:
                run_checks.require_no_collapse(
                    self.pruner.tracker.records.values(),
                    found[0],
                    self.data.validation.labels,
                    epoch=self.epoch,
                    stages=self.pruner.stages,
                )
            return found[0]

        self.validated = validation = self.group.lead(checked)
        first_nested = max(1, self.config.epsilon_warmup, round(NESTED_AFTER * self.config.epochs))
        ordered = self.config.nested and not self.order and self.epoch >= first_nested
        if ordered:
            records = self.pruner.tracker.records
            scores = judged.scores or {block: records[block].peak for block in self.pruner.gates}
            self.order = nested_order(scores, self.pruner.stages)
            self._train_nested()
        best = bool(died) or ordered or self.best is None or self._better(validation, self.best)
        self.stale += 1
        if best:
            self.best, self.stale = validation, 0
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return EpochMetrics(
            epoch=self.epoch,
            lr=lr,
            epsilon=judged.epsilon,
            loss=loss,
            train_accuracy=accuracy,
            validation=validation,
            discarded=judged.discarded,
            died=died,
            gates=tuple(self.pruner.tracker.records.values()),
            parameters=self.parameters(),
            best=best,
            seconds=seconds,
            images=images,
        )

    def _train_epoch(self, epoch: int) -> tuple[float, float, int]:
        """Loss, accuracy and number of images of the epoch, or of what is left of it."""
        # Networks with dropout draw from torch's own generators.
        torch.manual_seed(
            (self.config.seed * 1_000_003 + epoch) * self.group.size + self.group.rank
        )
        if not self.step:
            self.totals.zero_()
        elif self._rng is not None:
            torch.set_rng_state(self._rng[0])
            if self._rng[1] is not None:
                torch.cuda.set_rng_state(self._rng[1], self.device)
        self._rng = None
        self.pruner.begin_epoch()
        self._enter_phase(epoch)
        self.network.train()
        steps, lr = self.batches.steps, math.nan
        with self.training_step.precision.training():
            for batch in self.batches.epoch(epoch, first=self.step):
                if lr != (lr := self.schedule.lr(epoch, (self.step + 0.5) / steps)):
                    set_lr(self.optimizer, lr)
                self.totals += self.take_step(batch)
                self.pruner.step()
                if self.step % CHECK_EVERY == 0 or self.step == steps:
                    self._require_finite()
                elif self._stop():
                    self._require_finite()
                    self.save(None)
                    raise Stopped
        loss, correct = self.group.add(self.totals.clone()).tolist()
        images = steps * self.batches.size
        return loss / (steps * self.group.size), correct / images, images

    def _require_finite(self) -> None:
        """Raise TrainingError when training has failed in any process. Waits for the device."""
        epoch, where, what = self.epoch + 1, f"step {self.step}", ""
        if bool(self.group.largest(self.totals[0].isfinite().logical_not().int())):
            what = "the loss is no longer finite; lower the learning rate"
            if culprit := run_checks.nonfinite_block(self.pruner.gates, self.group):
                block, passes = culprit  # perhaps some steps earlier
                where = f"step {math.ceil(passes / self.config.accumulate)}"
                what = f"block {block} is no longer finite; lower the learning rate"
        elif self.training_step.precision.collapsed():
            what = (
                "gradients are not finite in fp16 at any loss scale; use --precision bf16 or fp32"
            )
        if what:
            kept = f"; {self.last_path} keeps the epoch before" if self.epoch else ""
            self.group.fail(TrainingError(f"epoch {epoch}, {where}: {what}{kept}"))

    def _score(self, model: nn.Module) -> Score:
        """Validate the network, by its averaged weights where there are any."""
        with nullcontext() if self.averaged is None else self.averaged.applied():
            return score(model, self.normalize, self.validation)

    def _better(self, new: Score, old: Score) -> bool:
        """Higher accuracy; at equal accuracy (small validation parts tie often) the lower loss.

        Never while chosen blocks are still live, because they would ship with their branches.
        """
        controller = self.pruner.controller
        pending = controller is not None and controller.chosen
        return not pending and (new.accuracy, -new.loss) > (old.accuracy, -old.loss)

    # -- Phases of fine-tuning: the head alone, the whole network, pruning with a teacher

    def _enter_phase(self, epoch: int) -> None:
        """Freeze or unfreeze all but the head, and become one's own teacher, when it is time."""
        head_only = epoch < self.config.head_epochs
        if head_only != bool(self._frozen):
            if head_only:
                named = self.network.model.named_parameters()
                self._frozen = [p for n, p in named if n not in self._head and p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(not head_only)
            if not head_only:
                self._frozen = []
            self.take_step.rewrap()  # what is built from it is built anew
        controller = self.pruner.controller
        start = controller.start if controller else self.config.epsilon_warmup
        if self.config.self_distillation and self.own_teacher is None and epoch >= start:
            self._distil_from(Teacher(replace(self.checkpoint(), gates=[]), self.device))

    def _distil_from(self, teacher: Teacher) -> None:
        self.own_teacher = self.training_step.teacher = teacher
        self.take_step.rewrap()

    def _require_head(self) -> set[str]:
        """Names of the last layers' tensors. Raises ConfigError where there are none."""
        head, _ = first_and_last_layers(self.model)
        if not head:
            raise ConfigError(
                f"--head-epochs: {self.config.model} does not end in a linear layer or a"
                " convolution that could be trained first; give --head-epochs 0"
            )
        return head

    # -- Nested sub-networks

    def _require_nestable(self) -> None:
        """Raise ConfigError when no sub-network of this network can be trained."""
        if self.group.world is not None:
            raise ConfigError(
                "--nested: not with several processes; train one seed on each GPU instead"
            )
        if smallest_size(self.pruner.stages) >= len(self.pruner.gates):
            raise ConfigError(
                f"--nested: {self.config.model} has no block that a sub-network could leave out,"
                " as every stage keeps one; choose a deeper network"
            )

    def _train_nested(self) -> None:
        """Train sub-networks too, from the next step on, which lose blocks in `order`."""
        if self.pruner.scores is not None:
            self.pruner.scores.close()
            self.pruner.scores = None
        smallest = smallest_size(self.pruner.stages)
        self.training_step.sub_networks = SubNetworks(self.model, self.order, smallest=smallest)

    # -- Saving and resuming

    def checkpoint(self) -> Checkpoint:
        """The network and its records, without the state to resume from."""
        averaged = {} if self.averaged is None else self.averaged.tensors
        return Checkpoint(
            network=self.spec,
            state={**self.pruner.removed_tensors, **self.model.state_dict(), **averaged},
            gates=list(self.pruner.tracker.records.values()),
            data=self.data.identity,
            config=self.config.to_dict(),
            order=self.order,
            metrics={
                "epoch": self.epoch,
                "validation": self.validated and asdict(self.validated),
                "test": None,
                "seconds": self.seconds,
                "started_from": self.started_from,
                "teacher": self._teacher and self._teacher.digest,
            },
            side_head=None if self.side_head is None else dict(self.side_head.state_dict()),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that decides how the run continues, beside the tensors of :meth:`checkpoint`.

        Every process has its part in it, so all of them must call this.
        """
        on_gpu = self.device.type == "cuda"
        pruner = self.pruner.state_dict()
        own = {
            "totals": self.totals.tolist(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "gates": pruner["gates"],
            "scores": pruner["scores"],
        }
        return {
            "processes": self.group.gather(own),
            "epoch": self.epoch,
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "trained": self.averaged and self.averaged.trained(),
            "own_teacher": self.own_teacher and self.own_teacher.state,
            "precision": self.training_step.precision.state_dict(),
            "schedule": self.schedule.state_dict(),
            "tracker": pruner["tracker"],
            "controller": pruner["controller"],
            "best": self.best and asdict(self.best),
            "stale": self.stale,
            "seconds": self.seconds,
        }

    def load_checkpoint(self, last: Checkpoint) -> None:
        """Load what :meth:`checkpoint` and :meth:`state_dict` (its `resume`) gave, in a new run."""
        state = last.resume
        assert state is not None
        self.order = last.order
        if self.order:
            self._train_nested()
        own = state["processes"][self.group.rank]
        if (controller := state["controller"]) is not None and "costs" in controller:
            # As the run began, and not measured again. Earlier versions only counted parameters.
            self._follow_target(BlockCosts(**controller["costs"]))
        pruner = {**state, **own, "steps": state["step"], "removed": {}}
        self.pruner.load_state_dict(pruner, optimizer=self.optimizer)
        self.take_step.rewrap()
        names = self.model.state_dict().keys()
        self.pruner.removed_tensors = {n: t for n, t in last.state.items() if n not in names}
        self.model.load_state_dict({name: last.state[name] for name in names})
        for block, gate in self.pruner.gates.items():
            gate.load_state_dict(own["gates"][block])  # the checkpoint has those of the leader
        if self.averaged is not None:
            self.averaged.load(state["trained"], last.state)
        if self.side_head is not None:
            assert last.side_head is not None
            self.side_head.load_state_dict(last.side_head)
        if state["own_teacher"] is not None:
            taught = replace(last, state=state["own_teacher"], gates=[])
            self._distil_from(Teacher(taught, self.device))
        self.optimizer.load_state_dict(state["optimizer"])
        self.training_step.precision.load_state_dict(state["precision"])
        self.schedule.load_state_dict(state["schedule"])
        self.saved, self.seconds = state["epoch"], state["seconds"]
        self.best = state["best"] and Score(**state["best"])
        self.stale = state.get("stale", 0)  # not in files of earlier versions
        self.validated = last.metrics["validation"] and Score(**last.metrics["validation"])
        self.started_from = last.metrics["started_from"]
        self.totals.copy_(torch.tensor(own["totals"], dtype=self.totals.dtype))
        self._rng = (own["rng"], own["cuda_rng"])

    def save(self, metrics: EpochMetrics | None) -> None:
        """Write `last_path` at the end of an epoch, or in the middle of one if `metrics` is None.

        At the end of an epoch, `best_path` (if it was the best) and the rotation are written
        before: a kill in between repeats the epoch, and so leaves no gap. Older files are removed
        last.
        """
        checkpoint, resume = self.checkpoint(), self.state_dict()
        rotation = self.rotation if metrics is not None else None

        def write() -> None:
            if metrics is not None and metrics.best:
                checkpoint.save(self.best_path)
            checkpoint.resume = resume
            if rotation is not None:
                rotation.write(checkpoint)
            checkpoint.save(self.last_path)
            if rotation is not None:
                rotation.rotate(self.epoch)

        self.group.lead(write)
        if metrics is not None:
            self.saved = self.epoch

    def resume(self) -> list[str]:
        """Continue from `last_path`; returns what differs from the run before, a line for each.

        Raises FileFormatError when that file or `best_path` is missing or damaged, and ConfigError
        when it belongs to another run.
        """
        last = Checkpoint.load(self.last_path)
        require_same_run(self.last_path, last, self.config, self.data)
        assert last.resume is not None
        if last.metrics.get("teacher") != (self._teacher and self._teacher.digest):
            remedy = "name its teacher with" if last.metrics.get("teacher") else "leave out"
            raise ConfigError(
                f"{self.last_path}: belongs to a run with another teacher, or none; {remedy}"
                " --teacher"
            )
        processes = len(last.resume["processes"])
        if processes != self.group.size:
            # Each has its own share of the batch, and draws random numbers of its own.
            raise ConfigError(
                f"{self.last_path}: belongs to a run of {processes} processes, not"
                f" {self.group.size}; resume with torchrun --nproc-per-node {processes}, or without"
                " it for one process"
            )
        if last.resume["epoch"]:
            Checkpoint.load(self.best_path)  # fail now rather than after the last epoch
        self.load_checkpoint(last)
        return resume_changes(self.last_path, last, self.config, self.data)

    def _finish(self) -> Checkpoint:
        """Evaluate the best checkpoint on the test part, once, and write the score into it."""

        def test() -> None:
            best = Checkpoint.load(self.best_path)
            if best.metrics["test"] is None:
                model = best.build_gated().to(self.device)
                found = score(model, self.normalize, self.data.test.to(self.device))
                best.metrics["test"] = asdict(found)
                best.data = self.data.identity  # whose test part may be another by now
                best.save(self.best_path)

        self.group.lead(test)
        return Checkpoint.load(self.best_path)

    # -- The network

    @property
    def model(self) -> fx.GraphModule:
        """The network as it runs, without its side head."""
        return self.network.model

    @property
    def side_head(self) -> SideHead | None:
        return self.network.side_head

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.pruner.epoch

    @property
    def step(self) -> int:
        """Steps done of the current epoch."""
        return self.pruner.steps

    def parameters(self) -> int:
        """Number of learned parameters of the network that would ship now, without dead blocks."""
        return count_parameters(self.pruner.shipped())

    @property
    def image(self) -> Tensor:
        """A raw image to time networks on, uint8 `[1, C, H, W]`."""
        return next(iter(self.validation.batches(1))).images


def network_spec(config: TrainingConfig, data: Outline) -> NetworkSpec:
    """The network that `config` describes for `data`; without gates when epsilon is 0."""
    channels, *size = data.shape
    spec = NetworkSpec.parse(
        config.model, in_channels=channels, classes=data.classes, image_size=(size[0], size[1])
    )
    return replace(spec, gated=()) if config.plain else spec
