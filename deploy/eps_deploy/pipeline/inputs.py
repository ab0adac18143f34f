"""The input networks of a deployment: compact network, checkpoint, and trained baseline."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from eps_compact import CompactArtifact
from eps_core.errors import ConfigError, FileFormatError, GraphError, one_line
from eps_train.data.dataset import DataIdentity
from eps_train.gating import rewriting
from eps_train.models.spec import GraphSpec, NetworkSpec
from eps_train.training.checkpoint import Checkpoint
from eps_train.training.evaluate import answers

BASELINE = "baseline.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The input networks, verified.

    Attributes:
        compact: the compact network.
        checkpoint: the checkpoint that it was made from.
        baseline: the baseline of the same depth; None when none was trained.
        baseline_path: its file; None without one.
    """

    compact: CompactArtifact
    checkpoint: Checkpoint
    baseline: Checkpoint | None
    baseline_path: Path | None = None

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
    path = checkpoint or model.parent / compact.checkpoint["path"]
    if checkpoint is None and not path.exists():
        raise ConfigError(
            f"{path}: the checkpoint that {model} was made from is not there;"
            " name it with --checkpoint"
        )
    source = Checkpoint.load(path)
    recorded = compact.checkpoint["digest"]
    if source.digest != recorded:
        raise ConfigError(
            f"{path}: not the checkpoint that {model} was made from (digest {source.digest[:12]},"
            f" recorded {recorded[:12]}); name that one with --checkpoint, or run eps-compact on"
            " this one"
        )
    if baseline is None:
        beside = (model.parent / BASELINE, path.parent / BASELINE)
        # A broken link was meant to be there: it is an error, not a missing baseline.
        baseline = next((path for path in beside if path.exists() or path.is_symlink()), None)
    return Inputs(
        compact=compact,
        checkpoint=source,
        baseline=None if baseline is None else _load_baseline(baseline, compact),
        baseline_path=baseline,
    )


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


def traced_baseline(module: nn.Module, identity: DataIdentity) -> Checkpoint:
    """The module `deploy(baseline=)` as the checkpoint of a baseline.

    Raises:
        ConfigError: it has gates, or other logits than the compact network.
        GraphError: it cannot be traced or run.
    """
    try:
        # Copied and moved first: it is evaluated as it ships, and the caller's keeps its mode.
        graph = rewriting.trace(copy.deepcopy(module).cpu().eval(), one_mode=True)
    except GraphError as error:
        raise GraphError(f"deploy(baseline=): {error}") from None
    if rewriting.gates(graph):
        raise ConfigError("deploy(baseline=): has ε-gates; give a network that was never pruned")
    classes = len(identity.classes)
    try:
        logits = answers(graph, [torch.zeros((2, *identity.input_shape))])[0]
    except Exception as error:  # whatever the module's own code raises
        line = one_line(error)
        size = "x".join(map(str, identity.input_shape))
        raise GraphError(f"deploy(baseline=): does not run on images of {size} ({line})") from error
    if logits.shape != (2, classes):
        raise ConfigError(
            f"deploy(baseline=): returns {'x'.join(map(str, logits.shape))} for 2 images, not"
            f" logits of 2x{classes}, as the compact network does"
        )
    return Checkpoint(
        network=GraphSpec(family="own", arguments={}, graph=graph),
        state=dict(graph.state_dict()),
        gates=[],
        data=identity,
        config={},
        metrics={},
    )
