"""`compact.pt`: the plain network, its tensors, and the certificate that it is what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from eps_compact import certificate as fingerprint
from eps_compact import folding
from eps_compact.folding import Pair
from eps_core import checksummed
from eps_core.errors import ConfigError, FileFormatError, GraphError
from eps_train.data.dataset import DataIdentity
from eps_train.gating import rewriting
from eps_train.models.spec import NetworkSpec
from eps_train.training.checkpoint import Checkpoint, current_versions

FORMAT = "eps-resnet-compact"
VERSION = 2  # 1: never folded, so it has no `folded`


@dataclass(kw_only=True, slots=True)
class CompactArtifact:
    """What `eps-compact` leaves behind.

    Attributes:
        network: the network without its dead blocks (`removed`); no gates (`gated` is empty).
        state: exactly the tensors of :meth:`build`.
        folded: convolutions that took up the batch norm behind them; () when it is as trained.
        data: what it was trained on: classes, mean and std, preprocessing, split, sha256.
        certificate: plain data, as `certificate.certificate` makes it: evidence for every
            removed block, the proofs of equality, what the live blocks do, sizes and costs.
        checkpoint: `path` of the checkpoint relative to this file's folder, and its `digest`.
        versions: of eps-resnet, torch and Python.
        digest: of the file it was read from or written to; "" before that.
    """

    network: NetworkSpec
    state: dict[str, Tensor]
    data: DataIdentity
    certificate: dict[str, Any]
    checkpoint: dict[str, str]
    folded: tuple[Pair, ...] = ()
    versions: dict[str, str] = field(default_factory=current_versions)
    digest: str = ""

    def build(self) -> fx.GraphModule:
        """The network, in evaluation mode, on the CPU, sharing nothing with this object.

        It maps normalised float32 images `[N, C, H, W]` to float32 logits `[N, classes]`.
        Raises FileFormatError when the tensors are not those of the network.
        """
        if self.network.gated:
            raise FileFormatError("a compact network has no gates")
        state = folding.unfolded_state(self.state, self.folded)
        model = rewriting.drop_taps(self.network.build(state)).eval()
        if self.folded:
            folding.refold(model, self.folded, self.state)
        surplus = sorted(self.state.keys() - model.state_dict().keys())
        if surplus:
            raise FileFormatError(f"tensors that the network does not have, first {surplus[0]}")
        return model

    def gated(self, checkpoint: Checkpoint) -> fx.GraphModule:
        """The network of its checkpoint in evaluation mode, with all removed blocks' gates shut.

        Before folding, that is what :meth:`build` computes. Raises FileFormatError when this
        network was not made from `checkpoint`.
        """
        model = checkpoint.build_gated().eval()
        gates = rewriting.gates(model)
        shut = set(self.network.removed).difference(checkpoint.network.removed)
        if unknown := sorted(shut - gates.keys()):
            raise FileFormatError(f"removed {unknown[0]}, which the checkpoint's network has not")
        for block in shut:
            gates[block].latch()
        return model

    def save(self, path: Path) -> str:
        """Write the artifact atomically; returns its digest."""
        self.digest = checksummed.write(
            path,
            {
                "format": FORMAT,
                "version": VERSION,
                "network": self.network.to_dict(),
                "state": {name: tensor.detach().cpu() for name, tensor in self.state.items()},
                "folded": [list(pair) for pair in self.folded],
                "data": self.data.to_dict(),
                "certificate": self.certificate,
                "checkpoint": dict(self.checkpoint),
                "versions": dict(self.versions),
            },
        )
        return self.digest

    @classmethod
    def load(cls, path: Path, *, any_code: bool = False) -> CompactArtifact:
        """Read and verify an artifact, its tensors and its network's code included.

        With `any_code` the network may be built by other code than was compacted; see
        :meth:`other_code`. Raises FileFormatError that names the file: missing, damaged, foreign,
        too new, or holding other tensors than its network needs.
        """
        payload, digest = checksummed.read(path, format=FORMAT, version=VERSION)
        try:
            artifact = cls(
                network=NetworkSpec.from_dict(payload["network"]),
                state=dict(payload["state"]),
                folded=_pairs(payload["folded"] if payload["version"] > 1 else ()),
                data=DataIdentity.from_dict(payload["data"]),
                certificate=_mapping(payload["certificate"]),
                checkpoint=_mapping(payload["checkpoint"]),
                versions=_mapping(payload["versions"]),
                digest=digest,
            )
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise FileFormatError(f"{path}: not a usable compact network ({error!r})") from error
        try:
            model = artifact.build()
        except (FileFormatError, GraphError) as error:
            raise FileFormatError(f"{path}: {error}; run eps-compact again") from error
        if not any_code and (reason := artifact.other_code(model)):
            raise FileFormatError(f"{path}: {reason}")
        return artifact

    def other_code(self, model: fx.GraphModule) -> str | None:
        """How `model`, built just now, differs from the network that was proven; None: it does not.

        Files of earlier versions say nothing about it.
        """
        recorded = self.certificate.get("network")
        try:
            reason = recorded and fingerprint.difference(model, recorded)
        except (KeyError, TypeError, AttributeError, ValueError):
            return "its certificate holds no usable digest of the network's code"
        if not reason:
            return None
        made = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{reason}: the source of {self.network.family}, or a library, has changed (it was made"
            f" with {made}); go back to that, or run eps-compact again"
        )


def load(path: Path) -> fx.GraphModule:
    """The network of a `compact.pt`, in evaluation mode: see `CompactArtifact.build`."""
    return CompactArtifact.load(Path(path)).build()


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"expected a mapping, not {type(value).__name__}")
    return dict(value)


def _pairs(value: Any) -> tuple[Pair, ...]:
    pairs = tuple(Pair(*names) for names in value)
    if not all(isinstance(name, str) for pair in pairs for name in pair):
        raise TypeError("folded: expected pairs of names")
    return pairs
