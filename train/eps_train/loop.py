"""The training loop: one class, one epoch after another, each a list of named steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from eps_train import graph, guards, snapshot
from eps_train.batches import Batches, DeviceBatches
from eps_train.checkpoint import Checkpoint
from eps_train.config import TrainingConfig
from eps_train.data import Data, Outline
from eps_train.deaths import Registry
from eps_train.epoch_report import EpochReport
from eps_train.evaluate import Score, score
from eps_train.images import ImageSet
from eps_train.network import NetworkSpec
from eps_train.networks import Normalize, SideHead
from eps_train.optimizer import keep_only, make_sgd
from eps_train.schedule import RateSchedule

CHECK_EVERY = 50  # steps between two looks at whether the loss is still finite (each one a sync)


class Stopped(Exception):
    """The run was asked to stop, and has saved itself."""


class Trainer:
    """Trains one network, with gates or plain, and keeps `best_path` and `last_path` up to date.

    A run is a function of its configuration and data alone: random choices are drawn per epoch
    from (seed, epoch), so that a run resumed from `last_path` goes on exactly as if never stopped.

    When `stop()` answers true after a step, that step is the last: the state is saved, in the
    middle of the epoch, and :meth:`run` raises :class:`Stopped`.
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
    ) -> None:
        self._stop = stop
        self.config, self.data, self.device = config, data, device
        self.best_path, self.last_path = best_path, last_path
        identity = data.identity
        self.spec = network_spec(config, identity.outline)
        torch.manual_seed(config.seed)
        self.model: fx.GraphModule = self.spec.build()
        self.normalize = Normalize(list(identity.mean), list(identity.std)).to(device)
        taps = graph.taps(self.model)
        self.side_head: SideHead | None = None
        if config.side_weight and taps:
            self.side_head = SideHead(taps[0].channels, len(identity.classes))
            taps[0].register_forward_hook(self._read_tap)
        self._tapped: Tensor | None = None
        self._place()
        self.batches: Batches = DeviceBatches(data.train, config, device)
        self.validation = data.validation.to(device)
        self.gates = graph.gates(self.model)
        self.optimizer = make_sgd(self.named_parameters(), config)
        self.schedule = RateSchedule(
            epochs=config.epochs, rates=config.rates, restart=config.restart, descent=config.descent
        )
        self.registry = Registry(self.spec.gated, closed_epochs=config.closed_epochs)
        self.retired: dict[str, Tensor] = {}  # tensors of removed blocks
        self.epoch = 0  # epochs done
        self.saved = 0  # epochs that `last_path` holds
        self.step = 0  # steps done of the epoch after that, and their loss and correct answers
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self.rng: tuple[Tensor, Tensor | None] | None = None  # where a resumed epoch goes on
        self.validated: Score | None = None  # the last epoch
        self.best: Score | None = None  # of the current structure
        self.seconds = 0.0

    # -- one run ---------------------------------------------------------------------------------

    def run(self, report: Callable[[EpochReport], None]) -> Checkpoint:
        """Train to the last epoch, then touch the test part once, with the best checkpoint."""
        while self.epoch < self.config.epochs:
            done = self.run_epoch()
            # Reported first: an epoch that is saved and then lost to a kill would go unreported.
            report(done)
            self.save(done)
            if self._stop() and self.epoch < self.config.epochs:
                raise Stopped
        return self._finish()

    def run_epoch(self) -> EpochReport:
        """Train one epoch, bury the dead, validate what would ship; :meth:`save` it after that."""
        started = time.perf_counter()
        epoch = self.epoch
        rate, epsilon = self.schedule.rate(epoch), self.epsilon(epoch)
        loss, accuracy, images = self._train_epoch(epoch, rate, epsilon)
        discarded = self.registry.record_epoch(self.gates, epsilon)
        self.schedule.observe(epoch, discarded)
        died = self._bury(epoch)
        validation = score(self.model, self.normalize, self.validation)
        self.epoch, self.step = epoch + 1, 0
        self.validated = validation
        if died:
            records = self.registry.records.values()
            guards.refuse_collapse(records, validation, self.data, epoch=self.epoch)
        best = bool(died) or self.best is None or _better(validation, self.best)
        if best:
            self.best = validation
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return EpochReport(
            epoch=self.epoch,
            rate=rate,
            epsilon=epsilon,
            loss=loss,
            train_accuracy=accuracy,
            validation=validation,
            discarded=discarded,
            died=died,
            gates=tuple(self.registry.records.values()),
            best=best,
            seconds=seconds,
            images=images,
        )

    def epsilon(self, epoch: int) -> float:
        """Threshold of the live gates in the 0-based `epoch`; 0 holds them open."""
        settled = round(self.config.settle_at * self.config.epochs)
        return self.config.epsilon if self.config.epsilon_from <= epoch < settled else 0.0

    # -- one epoch -------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int, rate: float, epsilon: float) -> tuple[float, float, int]:
        self._seed(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for gate in self.gates.values():
            gate.set_epsilon(epsilon)
        self.model.train()
        steps = self.batches.steps
        if not self.step:
            self.totals.zero_()
        for batch in self.batches.epoch(epoch, first=self.step):
            self.totals += self._train_step(batch)
            self.step += 1
            if self.step % CHECK_EVERY == 0 or self.step == steps:
                self._refuse_nonfinite()
            elif self._stop():
                self._refuse_nonfinite()
                self._save_last(snapshot.checkpoint(self))
                raise Stopped
        loss, correct = self.totals.tolist()
        images = steps * self.batches.size
        return loss / steps, correct / images, images

    def _seed(self, epoch: int) -> None:
        """Seed torch's own generators, which networks with dropout draw from."""
        torch.manual_seed(self.config.seed * 1_000_003 + epoch)
        if self.rng is not None and self.step:
            torch.set_rng_state(self.rng[0])
            if self.rng[1] is not None:
                torch.cuda.set_rng_state(self.rng[1], self.device)
        self.rng = None

    def _train_step(self, batch: ImageSet) -> Tensor:
        """One SGD step; returns (loss, correct answers) on the device."""
        logits = self.model(self._layout(self.normalize(batch.images)))
        loss = F.cross_entropy(logits, batch.labels)
        if self.side_head is not None and self._tapped is not None:
            side = F.cross_entropy(self.side_head(self._tapped), batch.labels)
            loss = loss + self.config.side_weight * side
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._tapped = None
        correct = (logits.detach().argmax(dim=1) == batch.labels).sum()
        return torch.stack([loss.detach().double(), correct.double()])

    def _refuse_nonfinite(self) -> None:
        if not bool(self.totals[0].isfinite()):
            kept = f"; {self.last_path} keeps the epoch before" if self.epoch else ""
            raise guards.nonfinite(self.gates, epoch=self.epoch + 1, step=self.step, kept=kept)

    def _bury(self, epoch: int) -> tuple[str, ...]:
        """Latch the blocks that died and take them out of the running network."""
        died = self.registry.latch(
            self.gates, self.model, self.normalize, self.validation.images, epoch=epoch
        )
        if died and self.config.live_removal:
            before = self.model.state_dict()
            self.model = graph.remove_blocks(self.model, died)
            after = self.model.state_dict().keys()
            # To the CPU: on a GPU they would keep the memory that their removal frees.
            self.retired |= {n: t.to("cpu", copy=True) for n, t in before.items() if n not in after}
            self.gates = graph.gates(self.model)
            keep_only(self.optimizer, self.named_parameters())
        return died

    # -- saving and resuming ---------------------------------------------------------------------

    def save(self, report: EpochReport) -> None:
        """Write `last_path` after an epoch, and `best_path` before it if the epoch was best."""
        checkpoint = snapshot.checkpoint(self)
        if report.best:
            checkpoint.save(self.best_path)
        self._save_last(checkpoint)

    def _save_last(self, checkpoint: Checkpoint) -> None:
        checkpoint.resume = snapshot.resume_state(self)
        checkpoint.save(self.last_path)
        self.saved = self.epoch

    def resume(self) -> None:
        """Go on from `last_path`; see :func:`snapshot.restore`."""
        snapshot.restore(self)

    def _finish(self) -> Checkpoint:
        """Test the best checkpoint, once, and write the result into it."""
        best = Checkpoint.load(self.best_path)
        if best.metrics["test"] is None:
            model = best.build_gated().to(self.device)
            test = score(model, self.normalize, self.data.test.to(self.device))
            best.metrics["test"] = test.to_dict()
            best.save(self.best_path)
        return best

    # -- parameters ------------------------------------------------------------------------------

    def _place(self) -> None:
        """Move to the device, convolutions in channels-last: a quarter faster on the CPUs tried."""
        for module in (self.model, self.side_head, self.normalize):
            if module is not None:
                module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)

    def _read_tap(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if module.training:
            self._tapped = output

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        named = list(self.model.named_parameters())
        if self.side_head is not None:
            named += [(f"side_head.{n}", p) for n, p in self.side_head.named_parameters()]
        return named


def network_spec(config: TrainingConfig, data: Outline) -> NetworkSpec:
    """The network that `config` asks for on `data`; without gates when epsilon is 0."""
    spec = NetworkSpec.parse(config.model, in_channels=data.shape[0], classes=data.classes)
    if config.plain:
        return replace(spec, gated=())
    return spec


def _better(new: Score, old: Score) -> bool:
    """Higher accuracy; at equal accuracy (small validation parts tie often) the lower loss."""
    return (new.accuracy, -new.loss) > (old.accuracy, -old.loss)
