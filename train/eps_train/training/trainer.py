"""The training loop: one class, one epoch after another, each a list of named steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from eps_core.errors import ConfigError
from eps_train.config import TrainingConfig
from eps_train.data.batches import Batches, make
from eps_train.data.dataset import Data, Outline
from eps_train.gating import rewriting
from eps_train.gating.pruning_state import BlockTracker, read_counters, write_counters
from eps_train.gating.rewriting import branch_parameters
from eps_train.gating.target import EpsilonController
from eps_train.models.cifar import Normalize, SideHead
from eps_train.models.spec import NetworkSpec
from eps_train.schedule import LearningRateSchedule
from eps_train.training import guards
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.distributed import ALONE, Group, running_statistics
from eps_train.training.evaluate import Score, score
from eps_train.training.forward import wide_float
from eps_train.training.guards import EpochMetrics
from eps_train.training.optimizer import keep_only, make_sgd, momentum, restore_momentum, set_rate
from eps_train.training.rotation import CheckpointRotation
from eps_train.training.step import GraphedStep, TrainingStep, build, graphed, parameters_of

if TYPE_CHECKING:
    pass

# -- A trainer's whole state, into a checkpoint and back: what makes a resumed run exact


def save_epoch(trainer: Trainer, *, best: bool) -> None:
    """Write the state at the end of an epoch: `last_path`, and before it what else is wanted."""
    written, state = checkpoint(trainer), resume_state(trainer)

    def write() -> None:
        if best:
            written.save(trainer.best_path)
        written.resume = state
        if trainer.kept is not None:
            trainer.kept.write(written)
        written.save(trainer.last_path)
        if trainer.kept is not None:
            trainer.kept.rotate(trainer.epoch)

    trainer.group.lead(write)


def save_midway(trainer: Trainer) -> None:
    """Write `last_path` in the middle of an epoch."""
    written = checkpoint(trainer)
    written.resume = resume_state(trainer)

    def write() -> None:
        written.save(trainer.last_path)

    trainer.group.lead(write)


def checkpoint(trainer: Trainer) -> Checkpoint:
    """The network and its record as they are now; what is needed to resume is not in it."""
    return Checkpoint(
        network=trainer.spec,
        state={**trainer.retired, **trainer.model.state_dict()},
        gates=list(trainer.registry.records.values()),
        data=trainer.data.identity,
        config=trainer.config.to_dict(),
        metrics={
            "epoch": trainer.epoch,
            "validation": None if trainer.validated is None else trainer.validated.to_dict(),
            "test": None,
            "seconds": trainer.seconds,
            "started_from": trainer.started_from,
        },
        side_head=None if trainer.side_head is None else dict(trainer.side_head.state_dict()),
    )


def resume_state(trainer: Trainer) -> dict[str, Any]:
    """What `last.pt` holds besides: all that decides how the run goes on.

    Every process has its part in it, so that all of them have to call this.
    """
    return {
        "processes": trainer.group.gather(_own_state(trainer)),
        "epoch": trainer.epoch,
        "step": trainer.step,
        "momentum": momentum(trainer.optimizer, trainer.named_parameters()),
        "precision": trainer.take_step.precision.state(),
        "schedule": trainer.schedule.state(),
        "streaks": trainer.registry.state(),
        "lead": None if trainer.lead is None else trainer.lead.state(),
        "best": None if trainer.best is None else trainer.best.to_dict(),
        "seconds": trainer.seconds,
    }


def _own_state(trainer: Trainer) -> dict[str, Any]:
    """What differs between the processes of a run, in the middle of an epoch."""
    on_gpu = trainer.device.type == "cuda"
    return {
        "totals": trainer.totals.tolist(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(trainer.device) if on_gpu else None,
        "gates": {block: tuple(found) for block, found in read_counters(trainer.gates).items()},
    }


def _restore_own_state(trainer: Trainer, state: dict[str, Any]) -> None:
    trainer.totals.copy_(torch.tensor(state["totals"], dtype=trainer.totals.dtype))
    trainer.rng = (state["rng"], state["cuda_rng"])
    write_counters(trainer.gates, state["gates"])


def restore(trainer: Trainer) -> None:
    """Bring a fresh trainer to where its `last_path` stands.

    Raises:
        FileFormatError: that file, or `best_path`, is missing or damaged.
        ConfigError: it belongs to another run.
    """
    last = Checkpoint.load(trainer.last_path)
    state = last.resume
    if state is None:
        raise ConfigError(f"{trainer.last_path}: holds no state to resume from")
    guards.refuse_other_run(trainer.last_path, last, trainer.config, trainer.data)
    guards.refuse_other_count(trainer.last_path, len(state["processes"]), trainer.group.size)
    if state["epoch"]:
        Checkpoint.load(trainer.best_path)  # better refused now than after the last epoch
    trainer.registry.restore(last.gates, state["streaks"])
    dead = trainer.registry.dead
    for block in dead:
        trainer.gates[block].latch()
    if dead and trainer.config.live_removal:
        trainer.adopt(rewriting.remove_blocks(trainer.model, dead))
    here = trainer.model.state_dict().keys()
    trainer.retired = {n: t for n, t in last.state.items() if n not in here}
    trainer.model.load_state_dict({n: last.state[n] for n in here})
    if trainer.side_head is not None:
        assert last.side_head is not None
        trainer.side_head.load_state_dict(last.side_head)
    restore_momentum(trainer.optimizer, trainer.named_parameters(), state["momentum"])
    trainer.schedule.restore(state["schedule"])
    if trainer.lead is not None:
        trainer.lead.restore(state["lead"])
    trainer.epoch = trainer.saved = state["epoch"]
    trainer.step = state["step"]
    _restore_own_state(trainer, state["processes"][trainer.group.rank])
    trainer.take_step.precision.restore(state["precision"])
    trainer.seconds = state["seconds"]
    trainer.best = None if state["best"] is None else Score(**state["best"])
    trainer.started_from = last.metrics["started_from"]
    trainer.resumed_otherwise = guards.changes(
        trainer.last_path, last, trainer.config, trainer.data
    )
    if last.metrics["validation"] is not None:
        trainer.validated = Score(**last.metrics["validation"])


CHECK_EVERY = 50  # steps between two looks at whether the loss is still finite (each one a sync)


class Stopped(Exception):
    """The run was asked to stop, and has saved itself."""


class Trainer:
    """Trains one network, with gates or plain, and keeps `best_path` and `last_path` up to date.

    A run is a function of its configuration and data alone: random choices are drawn per epoch
    from (seed, epoch), so that a run resumed from `last_path` goes on exactly as if never stopped.

    When `stop()` answers true after a step, that step is the last: the state is saved, in the
    middle of the epoch, and :meth:`run` raises :class:`Stopped`.

    `start` is a network to go on with, and its tensors, in the place of a fresh one as `config`
    names it. `cuda_graph` is `auto`, `on` or `off`; see :func:`cuda_graph.graphed`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: Data,
        *,
        best_path: Path,
        last_path: Path,
        device: torch.device,
        stop: Callable[[], bool] = lambda: False,
        kept: CheckpointRotation | None = None,
        group: Group = ALONE,
        start: tuple[NetworkSpec, Mapping[str, Tensor]] | None = None,
        cuda_graph: str = "auto",
    ) -> None:
        self._stop, self.group = stop, group
        self.config, self.data, self.device = config, data, device
        self.best_path, self.last_path, self.kept = best_path, last_path, kept
        identity = data.identity
        self.spec = start[0] if start else network_spec(config, identity.outline)
        torch.manual_seed(config.seed)
        self.network = build(self.spec, config, group, device, classes=len(identity.classes))
        if start:
            self.model.load_state_dict({name: start[1][name] for name in self.model.state_dict()})
        self.normalize = Normalize.of(identity).to(device)
        self.batches: Batches = make(data, config, device, group.part)
        self.validation = data.validation.to(device)
        self.gates = rewriting.gates(self.model)
        self.optimizer = make_sgd(self.named_parameters(), config)
        self.take_step: TrainingStep | GraphedStep = TrainingStep(
            self.network, self.normalize, self.optimizer, config, group, device
        )
        if graphed(cuda_graph, config, group, device):
            required = cuda_graph == "on"
            self.take_step = GraphedStep(self.take_step, device, required=required)
        self.schedule = LearningRateSchedule(
            epochs=config.epochs,
            lr_schedule=config.lr_schedule,
            lr_restart=config.lr_restart,
            final_decay=config.final_decay,
        )
        self.registry = BlockTracker(self.spec.gated, patience=config.patience)
        self.stages = rewriting.stages(self.model, identity.input_shape)
        self.lead: EpsilonController | None = None
        if config.target_parameters is not None:
            self.lead = EpsilonController.of(
                config,
                branch_parameters(self.model),
                self.parameters(),
                final_decay=self.schedule.descent_epoch,
                stages=self.stages,
            )
        self.retired: dict[str, Tensor] = {}  # tensors of removed blocks
        self.epoch = 0  # epochs done
        self.saved = 0  # epochs that `last_path` holds
        self.step = 0  # steps done of the epoch after that, and their loss and correct answers
        self.totals = torch.zeros(2, dtype=wide_float(device), device=device)
        self.rng: tuple[Tensor, Tensor | None] | None = None  # where a resumed epoch goes on
        self.validated: Score | None = None  # the last epoch
        self.best: Score | None = None  # of the current structure
        self.seconds = 0.0
        self.started_from: dict[str, str] | None = None  # name and SHA-256 of a file of weights
        self.resumed_otherwise: list[str] = []  # what is not as it was before, in words

    # -- one run ---------------------------------------------------------------------------------

    def run(self, report: Callable[[EpochMetrics], None]) -> Checkpoint:
        """Train to the last epoch, then touch the test part once, with the best checkpoint."""
        while self.epoch < self.config.epochs:
            done = self.run_epoch()
            # Reported first: an epoch that is saved and then lost to a kill would go unreported.
            report(done)
            self.save(done)
            if self._stop() and self.epoch < self.config.epochs:
                raise Stopped
        return self._finish()

    def run_epoch(self) -> EpochMetrics:
        """Train one epoch, bury the dead, validate what would ship; :meth:`save` it after that."""
        started = time.perf_counter()
        epoch = self.epoch
        rate, thresholds = self.schedule.rate(epoch), self.thresholds(epoch)
        loss, accuracy, images = self._train_epoch(epoch, rate, thresholds)
        self.group.share(running_statistics(self.network))
        discarded = self.registry.record_epoch(self.gates, thresholds, self.group)
        self.schedule.observe(epoch, discarded)
        with self._as_trained():
            died = self._bury(epoch)
            validation = self.group.lead(lambda: self._validate(died))
        self.epoch, self.step = epoch + 1, 0
        self.validated = validation
        if self.lead is not None:
            self.lead.observe(
                epoch,
                self.registry.records.values(),
                kept=self.parameters(),
                accuracy=validation.accuracy,
            )
        best = bool(died) or self.best is None or self._better(validation, self.best)
        if best:
            self.best = validation
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return EpochMetrics(
            epoch=self.epoch,
            rate=rate,
            epsilon=max(thresholds.values(), default=0.0),
            loss=loss,
            train_accuracy=accuracy,
            validation=validation,
            discarded=discarded,
            died=died,
            gates=tuple(self.registry.records.values()),
            parameters=self.parameters(),
            best=best,
            seconds=seconds,
            images=images,
        )

    def thresholds(self, epoch: int) -> dict[str, float]:
        """Epsilon of every gate in the running network in the 0-based `epoch`; 0 holds it open."""
        if self.lead is not None:
            return {block: self.lead.threshold(block) for block in self.gates}
        epsilon, settled = (
            self.config.epsilon,
            round(self.config.freeze_gates_at * self.config.epochs),
        )
        assert epsilon is not None
        acts = self.config.epsilon_warmup <= epoch < settled
        return dict.fromkeys(self.gates, epsilon if acts else 0.0)

    # -- one epoch -------------------------------------------------------------------------------

    def _train_epoch(
        self, epoch: int, rate: float, thresholds: Mapping[str, float]
    ) -> tuple[float, float, int]:
        self._seed(epoch)
        set_rate(self.optimizer, rate)
        for block, gate in self.gates.items():
            gate.set_epsilon(thresholds[block])
        self.network.train()
        steps = self.batches.steps
        if not self.step:
            self.totals.zero_()
        with self.take_step.precision.training():
            for batch in self.batches.epoch(epoch, first=self.step):
                self.totals += self.take_step(batch)
                self.step += 1
                if self.step % CHECK_EVERY == 0 or self.step == steps:
                    self._refuse_nonfinite()
                elif self._stop():
                    self._refuse_nonfinite()
                    save_midway(self)
                    raise Stopped
        loss, correct = self.group.add(self.totals.clone()).tolist()
        images = steps * self.batches.size
        return loss / (steps * self.group.size), correct / images, images

    def _seed(self, epoch: int) -> None:
        """Seed torch's own generators, which networks with dropout draw from."""
        seed = self.config.seed * 1_000_003 + epoch
        torch.manual_seed(seed * self.group.size + self.group.rank)
        if self.rng is not None and self.step:
            torch.set_rng_state(self.rng[0])
            if self.rng[1] is not None:
                torch.cuda.set_rng_state(self.rng[1], self.device)
        self.rng = None

    def _refuse_nonfinite(self) -> None:
        """Raise TrainingError when training has failed in any process. Waits for the device."""
        kept = f"; {self.last_path} keeps the epoch before" if self.epoch else ""
        now: Any = {"epoch": self.epoch + 1, "step": self.step, "kept": kept}
        if bool(self.group.largest(self.totals[0].isfinite().logical_not().int())):
            self.group.fail(guards.nonfinite(self.gates, **now, group=self.group))
        if self.take_step.precision.collapsed():
            self.group.fail(guards.unscalable(**now))

    def _validate(self, died: tuple[str, ...]) -> Score:
        validation = score(self.model, self.normalize, self.validation)
        if died:
            records = self.registry.records.values()
            guards.refuse_collapse(
                records, validation, self.data, epoch=self.epoch + 1, stages=self.stages
            )
        return validation

    @contextmanager
    def _as_trained(self) -> Iterator[None]:
        """Blocks that are led to their death are evaluated as they are trained: without them."""
        chosen = self.lead.chosen if self.lead is not None else ()
        gates = {block: self.gates[block] for block in chosen}
        for gate in gates.values():
            gate.latch()
        try:
            yield
        finally:
            for block, gate in gates.items():
                if block not in self.registry.dead:
                    gate.unlatch()

    def _better(self, new: Score, old: Score) -> bool:
        """Higher accuracy; at equal accuracy (small validation parts tie often) the lower loss.

        None is while blocks are still led to their death: they would ship with their branches.
        """
        pending = self.lead is not None and self.lead.chosen
        return not pending and (new.accuracy, -new.loss) > (old.accuracy, -old.loss)

    def _bury(self, epoch: int) -> tuple[str, ...]:
        """Latch the blocks that died and take them out of the running network."""
        died = self.registry.latch(
            self.gates,
            self.model,
            self.normalize,
            self.validation,
            epoch=epoch,
            group=self.group,
        )
        if died and self.config.live_removal:
            before = self.model.state_dict()
            self.adopt(rewriting.remove_blocks(self.model, died))
            after = self.model.state_dict().keys()
            # To the CPU: on a GPU they would keep the memory that their removal frees.
            self.retired |= {n: t.to("cpu", copy=True) for n, t in before.items() if n not in after}
        return died

    def adopt(self, model: fx.GraphModule) -> None:
        """Go on with `model`, which is the network so far without some of its blocks."""
        self.take_step.renew(model)
        self.gates = rewriting.gates(model)
        keep_only(self.optimizer, self.named_parameters())

    # -- saving and resuming ---------------------------------------------------------------------

    def save(self, report: EpochMetrics) -> None:
        """Write `last_path` after an epoch, and `best_path` before it if the epoch was best.

        What is kept besides also comes before it: a kill in between repeats the epoch, and so
        leaves no gap; only then are older ones removed.
        """
        save_epoch(self, best=report.best)
        self.saved = self.epoch

    def resume(self) -> None:
        """Go on from `last_path`; see :func:`snapshot.restore`."""
        restore(self)

    def _finish(self) -> Checkpoint:
        """Test the best checkpoint, once, and write the result into it."""
        self.group.lead(self._test)
        return Checkpoint.load(self.best_path)

    def _test(self) -> None:
        best = Checkpoint.load(self.best_path)
        if best.metrics["test"] is None:
            model = best.build_gated().to(self.device)
            test = score(model, self.normalize, self.data.test.to(self.device))
            best.metrics["test"] = test.to_dict()
            best.data = self.data.identity  # whose test part may be another by now
            best.save(self.best_path)

    # -- parameters ------------------------------------------------------------------------------

    @property
    def model(self) -> fx.GraphModule:
        """The network as it runs, without its side head."""
        return self.network.model

    @property
    def side_head(self) -> SideHead | None:
        return self.network.side_head

    def parameters(self) -> int:
        """Learned parameters of the network that would ship now, without its dead blocks."""
        model = self.model
        if not self.config.live_removal:
            model = rewriting.remove_blocks(model, self.registry.dead)
        return sum(parameter.numel() for parameter in model.parameters())

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return parameters_of(self.network)


def network_spec(config: TrainingConfig, data: Outline) -> NetworkSpec:
    """The network that `config` asks for on `data`; without gates when epsilon is 0."""
    channels, *size = data.shape
    spec = NetworkSpec.parse(
        config.model, in_channels=channels, classes=data.classes, image_size=(size[0], size[1])
    )
    if config.plain:
        return replace(spec, gated=())
    return spec
