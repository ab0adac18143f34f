"""One run from its files' point of view: start or resume, report, picture, summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eps_train import console
from eps_train.checkpoint import Checkpoint
from eps_train.config import TrainingConfig
from eps_train.data import Data
from eps_train.epoch_report import EpochReport
from eps_train.errors import Interrupted
from eps_train.loop import Stopped, Trainer
from eps_train.picture import draw
from eps_train.progress import LEGEND, EpochPrinter, MetricsLog
from eps_train.runfiles import RunFiles
from eps_train.sealed import replace_file
from eps_train.signals import StopRequest
from eps_train.summary import summarize


class Run:
    """A training run, prepared: whatever can be refused has been when this exists.

    Args:
        config, data: what to train.
        files: where its files go.
        device: where to train.
        resume: go on from `files.last` if it is there.
        weights: a state dict to start from.

    Raises:
        EpsError: what is given cannot be used.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: Data,
        files: RunFiles,
        *,
        device: torch.device,
        resume: bool,
        weights: Path | None,
    ) -> None:
        self.config, self.files = config, files
        self._log = console.log()
        self._stop = StopRequest()
        if config.cpu_threads:
            torch.set_num_threads(config.cpu_threads)
        self.trainer = Trainer(
            config,
            data,
            best_path=files.best,
            last_path=files.last,
            device=device,
            stop=self._stop,
        )
        if resume and files.last.exists():
            self.trainer.resume()
        elif resume:
            self._log.print(f"{files.last}: not there yet; starting from the first epoch")
        if weights and not (self.trainer.epoch or self.trainer.step):
            from eps_train.weights import load_weights

            skipped = load_weights(weights, self.trainer.model)
            fresh = f"; another number of classes, so not: {', '.join(skipped)}" if skipped else ""
            self._log.print(f"starting from {weights}{fresh}")

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the summary as plain data.

        Raises Interrupted when SIGINT or SIGTERM ended it early; all is saved then.
        """
        metrics = MetricsLog(self.files.metrics, epochs_done=self.trainer.epoch)
        if not self.config.plain:
            self._log.print(f"block map: {LEGEND}")
        best = self._train(metrics)
        title = f"{self._title}: {self.config.dataset}, {self.config.model}"
        replace_file(self.files.picture, draw(metrics.read(), title))
        if self._stop.signal is not None:  # it came too late to stop this run, but not the next one
            raise Interrupted(self._stop.signal)
        return summarize(best, self.files.best, self.trainer.seconds)

    def _train(self, metrics: MetricsLog) -> Checkpoint:
        done, epochs = self.trainer.epoch, self.config.epochs
        with EpochPrinter(self._log, self._title, epochs=epochs, epochs_done=done) as printer:

            def report(epoch: EpochReport) -> None:
                metrics.append(epoch)
                printer.show(epoch)

            try:
                with self._stop:
                    return self.trainer.run(report)
            except Stopped:
                self._say_what_is_kept(self.trainer.step)
                assert self._stop.signal is not None
                raise Interrupted(self._stop.signal) from None
            except (KeyboardInterrupt, OSError):
                self._say_what_is_kept()
                raise

    def _say_what_is_kept(self, steps: int = 0) -> None:
        if self.trainer.saved or steps:
            done = f"{self.trainer.saved} of {self.config.epochs} epochs"
            more = f" and {steps} steps" if steps else ""
            self._log.print(f"{self.files.last} holds {done}{more}; --resume goes on from there")

    @property
    def _title(self) -> str:
        return "plain network" if self.config.plain else "ε-ResNet"
