"""The artifact `compact.pt`: network, tensors and certificate; and the certificate's own file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, fx

from eps_compact.certificate import difference
from eps_core import checksummed
from eps_core.errors import ConfigError, FileFormatError, GraphError
from eps_train.data.dataset import DataIdentity
from eps_train.gating import folding, rewriting
from eps_train.gating.folding import Pair
from eps_train.models.spec import NetworkSpec
from eps_train.training.checkpoint import Checkpoint, current_versions

FORMAT = "eps-resnet-compact"
VERSION = 2  # 1: never folded, so it has no `folded`
CERTIFICATE_FORMAT = "eps-resnet-certificate"
CERTIFICATE_VERSION = 1
_UNUSABLE = (KeyError, TypeError, ValueError, AttributeError, ConfigError, msgspec.ValidationError)


@dataclass(kw_only=True, slots=True)
class CompactArtifact:
    """A compact network as a file.

    Attributes:
        network: the network without its dead blocks (`removed`); no gates (`gated` is empty).
        state: exactly the tensors of :meth:`build`.
        folded: convolutions with the batch norm that is folded into each; () without folding.
        data: what it was trained on: classes, mean and std, preprocessing, split, sha256.
        certificate: plain data from `certificate.certificate`: evidence for every removed block,
            the proofs of equality, evidence about the live blocks, sizes and costs.
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
        """Build the network, in evaluation mode, on the CPU, sharing nothing with this object.

        It maps normalised float32 images `[N, C, H, W]` to float32 logits `[N, classes]`.
        Raises FileFormatError when the tensors are not those of the network.
        """
        if self.network.gated:
            raise FileFormatError("a compact network has no gates")
        state = folding.unfolded_state(self.state, self.folded)
        model = rewriting.drop_taps(self.network.build(state)).eval()
        if self.folded:
            folding.refold(model, self.folded, self.state)
        if surplus := sorted(self.state.keys() - model.state_dict().keys()):
            raise FileFormatError(f"tensors that the network does not have, first {surplus[0]}")
        return model

    def gated(self, checkpoint: Checkpoint) -> fx.GraphModule:
        """Build its checkpoint's network in evaluation mode with all removed blocks' gates latched.

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
        """Read and verify an artifact, including its tensors and its network's code.

        With `any_code` the network's code may differ from what was compacted; see
        :meth:`other_code`. Raises FileFormatError that names the file: missing, damaged, foreign,
        too new, or with other tensors than its network needs.
        """
        payload, digest = checksummed.read(path, format=FORMAT, version=VERSION)
        try:
            folded = payload["folded"] if payload["version"] > 1 else ()
            artifact = cls(
                network=NetworkSpec.from_dict(payload["network"]),
                state=dict(payload["state"]),
                folded=msgspec.convert(folded, tuple[Pair, ...]),
                data=DataIdentity.from_dict(payload["data"]),
                certificate=msgspec.convert(payload["certificate"], dict[str, Any]),
                checkpoint=msgspec.convert(payload["checkpoint"], dict[str, str]),
                versions=msgspec.convert(payload["versions"], dict[str, str]),
                digest=digest,
            )
        except _UNUSABLE as error:
            raise FileFormatError(f"{path}: not a usable compact network ({error!r})") from error
        try:
            model = artifact.build()
        except (FileFormatError, GraphError) as error:
            raise FileFormatError(f"{path}: {error}; run eps-compact again") from error
        if not any_code and (reason := artifact.other_code(model)):
            raise FileFormatError(f"{path}: {reason}")
        return artifact

    def other_code(self, model: fx.GraphModule) -> str | None:
        """Return how `model` differs from the network that was proven; None if it does not.

        Files of earlier versions have no fingerprint to compare with.
        """
        recorded = self.certificate.get("network")
        try:
            reason = recorded and difference(model, recorded)
        except (KeyError, TypeError, AttributeError, ValueError):
            return "its certificate holds no usable digest of the network's code"
        if not reason:
            return None
        made = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        own = "" if self.network.holds_graph else f"the source of {self.network.family}, or "
        return (
            f"{reason}: {own}a library has changed (it was made with {made}); go back to that, or"
            " run eps-compact again"
        )

    def certificate_file(self) -> dict[str, Any]:
        """Return the content of `compact.json`: the certificate with the digests of both files."""
        return {
            "format": CERTIFICATE_FORMAT,
            "version": CERTIFICATE_VERSION,
            "artifact": self.digest,
            **self.certificate,
            "checkpoint": dict(self.checkpoint),
        }


def read_certificate(path: Path) -> dict[str, Any]:
    """Read a `compact.json`. Raises FileFormatError when it is something else."""
    try:
        found = json.loads(checksummed.read_bytes(path))
    except ValueError as error:
        raise FileFormatError(f"{path}: is not JSON ({error}); run eps-compact again") from None
    if not isinstance(found, dict) or found.get("format") != CERTIFICATE_FORMAT:
        raise FileFormatError(f"{path}: is no certificate of eps-compact; run it again")
    return found


def load(path: Path) -> fx.GraphModule:
    """Load the network of a `compact.pt`, in evaluation mode: see `CompactArtifact.build`."""
    return CompactArtifact.load(Path(path)).build()
