"""`--keep N`: the state at the end of each of the last N epochs, beside `last.pt`."""

from __future__ import annotations

from eps_core.errors import ConfigError, EpsError
from eps_train.config import TrainingConfig
from eps_train.data.dataset import Data
from eps_train.training import guards
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.files import RunPaths


class CheckpointRotation:
    """The files `epoch-0012.pt`: ways back that `ckpt.pt` and `last.pt` do not offer.

    `ckpt.pt` is the best epoch, to be used; `last.pt` is the newest state, to resume from. Each
    file here is what `last.pt` was at the end of that epoch. It serves for both: `eps-compact`
    takes it as it is, and copied over `last.pt` it is where `--resume` goes on.

    Only files that this very run has written are ever removed or written over: one that was found
    on resuming counts as such when it holds this configuration, this data and that epoch.
    """

    def __init__(self, files: RunPaths, count: int) -> None:
        """Keep the last `count` epochs; 0 writes none, and leaves alone what is there."""
        self._files, self._count = files, count
        self._ours: set[int] = set()

    def adopt(self, config: TrainingConfig, data: Data, *, epochs_done: int) -> None:
        """Take over what this run left before it was stopped.

        Raises ConfigError when a file of another origin lies where an epoch is yet to be kept.
        """
        if not self._count:
            return
        for epoch, path in self._files.all_kept().items():
            try:
                kept = Checkpoint.load(path)
                guards.refuse_other_run(path, kept, config, data)
                ours = kept.metrics["epoch"] == epoch
            except EpsError:
                ours = False
            if ours:
                self._ours.add(epoch)
            elif epochs_done < epoch <= config.epochs:
                raise ConfigError(
                    f"{path}: was not written by this run, and --keep needs its place; move it away"
                )

    def write(self, checkpoint: Checkpoint) -> None:
        """Keep `checkpoint`, the whole state at the end of an epoch."""
        if self._count:
            epoch = checkpoint.metrics["epoch"]
            checkpoint.save(self._files.kept(epoch))
            self._ours.add(epoch)

    def rotate(self, epoch: int) -> None:
        """After `epoch` was written, remove those that are older than the last N epochs."""
        if self._count:
            for old in [kept for kept in self._ours if kept <= epoch - self._count]:
                self._files.kept(old).unlink(missing_ok=True)
                self._ours.remove(old)
