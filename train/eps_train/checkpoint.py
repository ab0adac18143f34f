"""`ckpt.pt`, `last.pt` and `baseline.pt`: a trained network, its gates' record, its data."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from eps_train import graph, sealed
from eps_train.data import DataIdentity
from eps_train.errors import ConfigError, FileFormatError
from eps_train.network import NetworkSpec

FORMAT = "eps-resnet-checkpoint"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """Why a block counts as dead: the record of the epochs in which its gate never opened.

    Attributes:
        epoch: 1-based epoch at whose end the gate was latched.
        epsilon: threshold then.
        steps: training steps in a row on which the gate was closed.
        peak: largest `max |F_i|` over those steps.
        heldout_peak: largest `max |F_i|` over the validation part, in evaluation mode; below
            epsilon.
        samples: images in that pass.
    """

    epoch: int
    epsilon: float
    steps: int
    peak: float
    heldout_peak: float
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRecord:
    """One block's gate: its last epoch's record, and its death if it died.

    Attributes:
        block: name of the block.
        epsilon: threshold in the last epoch (0: the gate was held open).
        steps, closed_steps: training steps of the last epoch in which the gate was judged, and
            those on which it was closed; for a dead block those of its last epoch.
        peak: largest `max |F_i|` over those steps.
        death: None while the gate is live.
    """

    block: str
    epsilon: float
    steps: int
    closed_steps: int
    peak: float
    death: Death | None = None


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """What `eps-train` leaves behind.

    Attributes:
        network: the network as built: `gated` names every gated block, dead ones too; `removed` is
            empty. Dead blocks are those whose record has a death.
        state: every tensor, those of dead blocks included, as they were when the block died.
        gates: one record a gated block, in the order of computation; empty for a plain network.
        data: what it was trained on.
        config: the whole training configuration.
        metrics: `epoch`, `validation`, at the end of the run `test`, and `started_from`: None, or
            `file` and `sha256` of the weights that `--weights` named.
        side_head: tensors of the side head; None without one.
        resume: what only `last.pt` holds (optimizer, schedule, progress).
        versions: of eps-resnet, torch and Python.
        digest: of the file it was read from; "" before that.
    """

    network: NetworkSpec
    state: dict[str, Tensor]
    gates: list[GateRecord]
    data: DataIdentity
    config: dict[str, Any]
    metrics: dict[str, Any]
    side_head: dict[str, Tensor] | None = None
    resume: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: current_versions())
    digest: str = ""

    @property
    def dead(self) -> tuple[str, ...]:
        """Names of the dead blocks, in the order of computation."""
        return tuple(record.block for record in self.gates if record.death is not None)

    def build_gated(self) -> fx.GraphModule:
        """The gated network: every branch in place, dead gates latched shut, live gates live."""
        model = self.network.build(self.state)
        gates = graph.gates(model)
        for block in self.dead:
            gates[block].latch()
        return model

    def save(self, path: Path) -> str:
        """Write the checkpoint atomically; returns its digest."""
        payload = {
            "format": FORMAT,
            "version": VERSION,
            "network": self.network.to_dict(),
            "state": _on_cpu(self.state),
            "gates": [asdict(record) for record in self.gates],
            "data": self.data.to_dict(),
            "config": self.config,
            "metrics": self.metrics,
            "side_head": None if self.side_head is None else _on_cpu(self.side_head),
            "resume": self.resume,
            "versions": self.versions,
        }
        self.digest = sealed.write(path, payload)
        return self.digest

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read and verify a checkpoint. Raises FileFormatError that names the file."""
        payload, digest = sealed.read(path, format=FORMAT, version=VERSION)
        try:
            return cls(
                network=NetworkSpec.from_dict(payload["network"]),
                state=payload["state"],
                gates=[_record(fields) for fields in payload["gates"]],
                data=DataIdentity.from_dict(payload["data"]),
                config=payload["config"],
                metrics=payload["metrics"],
                side_head=payload["side_head"],
                resume=payload["resume"],
                versions=payload["versions"],
                digest=digest,
            )
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise FileFormatError(f"{path}: not a usable checkpoint ({error!r})") from error


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def current_versions() -> dict[str, str]:
    return {
        "eps_resnet": package_version("eps-resnet"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _record(fields: Mapping[str, Any]) -> GateRecord:
    death = fields["death"]
    return GateRecord(**{**fields, "death": None if death is None else Death(**death)})
