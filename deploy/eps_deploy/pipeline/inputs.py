"""The input files of a deployment: compact network, checkpoint, and trained baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eps_compact import CompactArtifact
from eps_core.errors import ConfigError, FileFormatError
from eps_train.models.spec import NetworkSpec
from eps_train.training.checkpoint import Checkpoint

BASELINE = "baseline.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The input files, read and verified.

    Attributes:
        compact: the compact network.
        checkpoint: the checkpoint that it was made from.
        baseline: the baseline of the same depth; None when none was trained.
        baseline_path: its file.
    """

    compact: CompactArtifact
    checkpoint: Checkpoint
    baseline: Checkpoint | None
    baseline_path: Path | None

    def blocks(self) -> tuple[str, ...]:
        """Names of the compact network's residual blocks, in the order of computation."""
        network = self.compact.network
        return tuple(name for name in network.all_blocks() if name not in network.removed)


def find_inputs(
    model: Path, checkpoint: Path | None = None, baseline: Path | None = None
) -> Inputs:
    """Read a compact network, its checkpoint and its baseline.

    Args:
        model: the compact network (`compact.pt`).
        checkpoint: as `--checkpoint`; None: the path recorded in `model`.
        baseline: as `--baseline`; None: `baseline.pt` beside `model` or beside its checkpoint.

    Raises:
        FileFormatError: a file is damaged, of another kind or too new, or a named one is missing.
        ConfigError: `model` was not made from the checkpoint, or the baseline is of another network
            or other data.
    """
    compact = CompactArtifact.load(model)
    if not compact.checkpoint.keys() >= {"path", "digest"}:
        raise FileFormatError(f"{model}: does not say which checkpoint it was made from")
    checkpoint_path = checkpoint or model.parent / compact.checkpoint["path"]
    source = _load_checkpoint(checkpoint_path, model, compact, named=checkpoint is not None)
    if baseline is None:
        beside = (model.parent / BASELINE, checkpoint_path.parent / BASELINE)
        # A broken link was meant to be there: it is an error, not a missing baseline.
        found = (path for path in beside if path.exists() or path.is_symlink())
        baseline = next(found, None)
    return Inputs(
        compact=compact,
        checkpoint=source,
        baseline=None if baseline is None else _load_baseline(baseline, compact),
        baseline_path=baseline,
    )


def _load_checkpoint(
    path: Path, model: Path, compact: CompactArtifact, *, named: bool
) -> Checkpoint:
    if not named and not path.exists():
        raise ConfigError(
            f"{path}: the checkpoint that {model} was made from is not there;"
            " name it with --checkpoint"
        )
    checkpoint = Checkpoint.load(path)
    if checkpoint.digest != compact.checkpoint["digest"]:
        raise ConfigError(
            f"{path}: not the checkpoint that {model} was made from (digest"
            f" {checkpoint.digest[:12]}, recorded {compact.checkpoint['digest'][:12]}); name that"
            " one with --checkpoint, or run eps-compact on this one"
        )
    return checkpoint


def _load_baseline(path: Path, compact: CompactArtifact) -> Checkpoint:
    baseline = Checkpoint.load(path)
    remedy = "name another with --baseline, or move this one away"
    if baseline.network.gated:
        raise ConfigError(f"{path}: has ε-gates, so it is no plain baseline; {remedy}")
    theirs, ours = baseline.network, compact.network
    if (theirs.family, theirs.arguments) != (ours.family, ours.arguments) or theirs.removed:
        raise ConfigError(
            f"{path}: the network {_describe(theirs)}, not {_describe(ours)}, which was compacted;"
            f" {remedy}"
        )
    if baseline.data.sha256 != compact.data.sha256:
        raise ConfigError(f"{path}: trained on other images than the compact network; {remedy}")
    return baseline


def _describe(network: NetworkSpec) -> str:
    if network.holds_graph:
        return "stored as a graph"
    arguments = ", ".join(f"{key} {value}" for key, value in network.arguments.items())
    return f"{network.family} ({arguments})"
