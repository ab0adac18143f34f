"""`ckpt.pt`, `last.pt` and `baseline.pt`: a trained network, its gates' record, its data."""

from __future__ import annotations

import io
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from eps_core import checksummed
from eps_core.checksummed import read_bytes
from eps_core.errors import ConfigError, FileFormatError
from eps_train.data.dataset import DataIdentity
from eps_train.gating import rewriting
from eps_train.gating.tracing import OWN
from eps_train.models.spec import NetworkSpec

FORMAT = "eps-resnet-checkpoint"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRecord:
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
    death: PruneRecord | None = None


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
        gates = rewriting.gates(model)
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
        self.digest = checksummed.write(path, payload)
        return self.digest

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read and verify a checkpoint. Raises FileFormatError that names the file."""
        payload, digest = checksummed.read(path, format=FORMAT, version=VERSION)
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
    return GateRecord(**{**fields, "death": None if death is None else PruneRecord(**death)})


# -- Weights to start from: somebody's state dict, as `torch.save` or safetensors wrote it

# Under what others, and eps-train, keep their tensors: averaged ones first, as timm takes them.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_NESTED = (*_AVERAGED, "state_dict", "model_state_dict", "state", "model")
# Of DataParallel, torch.compile, Lightning, and what trains a network as part of another.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_COUNTERS = ("num_batches_tracked", "n_averaged")  # of batch norms, which older files lack; of EMA
_OF_A_GATE = re.compile(
    r"(^|\.)gate\d*\.(epsilon|dead|steps|closed_steps|finite_steps|peak)$"
)  # gates start anew


def load_weights(
    path: Path, model: fx.GraphModule, report: Callable[[str], None] = lambda line: None
) -> tuple[str, ...]:
    """Fill a network that was just built with the tensors of a file; its gates are left alone.

    Prefixes of wrappers are taken off the names. A first convolution for coloured images is summed
    over its channels where the network takes grey ones.

    Args:
        path: `.safetensors`, or what `torch.save` wrote: a state dict, bare or under `state_dict`,
            `model`, `model_state_dict` or `state` (as in a checkpoint of eps-train), or an averaged
            one under `state_dict_ema`, `model_ema` or `ema`. No pickled code is run.
        model: with gates or without.
        report: told, a line each, what was chosen or changed.

    Returns:
        Names of the tensors that stay as they were: those of the last layers, when the file has
        them for another number of classes or has none.

    Raises:
        FileFormatError: no such file, or not of one of these kinds.
        ConfigError: its tensors are not those of `model`.
    """
    needed = {name: t for name, t in model.state_dict().items() if not _OF_A_GATE.search(name)}
    own = model.meta.get(OWN, needed.keys())
    found = {name: t for name, t in _read(path, report).items() if not _OF_A_GATE.search(name)}
    given = _without_prefixes(found, needed)
    head, first = _ends(model)
    skipped = [name for name in needed if name in head and name not in given]
    # What the network as it was written does not save is a constant of its code.
    missing = [n for n in needed if n in own and n not in given and not _is_counter(n)]
    missing = [] if set(missing) <= set(skipped) else missing
    surplus = [name for name in given if name not in needed and name not in own]
    surplus = [name for name in surplus if not _is_counter(name)]
    if missing or surplus:
        raise ConfigError(
            f"--weights {path}: not of this network ({_difference(missing, surplus)}); --model must"
            " name the one that the file is of"
        )
    fitting = {}
    for name in [name for name in needed if name in given]:
        tensor, here = given[name], needed[name]
        if name == first and tensor.dim() == 4 and (tensor.shape[1], here.shape[1]) == (3, 1):
            tensor = tensor.sum(1, keepdim=True)
            report(f"{name} is for coloured images, so its channels are summed")
        if tensor.shape == here.shape:
            fitting[name] = tensor
        elif name in head and tensor.shape[1:] == here.shape[1:]:
            skipped.append(name)
        else:
            raise ConfigError(
                f"--weights {path}: {name} is {_shape(tensor)} in the file, {_shape(here)} in the"
                " network"
            )
    with torch.no_grad():
        for name, tensor in fitting.items():
            needed[name].copy_(tensor)
    return tuple(name for name in needed if name in skipped)


def _read(path: Path, report: Callable[[str], None]) -> Mapping[str, Tensor]:
    content = read_bytes(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return dict(load(content))
        found: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise ConfigError(
            f"--weights {path}: safetensors is not installed; pip install safetensors"
        ) from None
    except Exception as error:  # both libraries raise many types
        raise FileFormatError(
            f"{path}: no state dict (.pt, .pth) and no .safetensors file, or damaged, or it holds"
            " more than tensors; if you trust it, save its tensors alone, with"
            f' torch.save(torch.load("{path.name}", weights_only=False)["model"], "weights.pt")'
        ) from error
    _say_what_revives(path, found, report)
    while isinstance(found, Mapping) and (
        key := next((k for k in _NESTED if isinstance(found.get(k), Mapping)), None)
    ):
        if key in _AVERAGED:
            report(f"taking the averaged weights of {path.name} ({key})")
        found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise FileFormatError(f"{path}: holds no state dict")
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise FileFormatError(f"{path}: holds no state dict: some of its values are no tensors")
    return {str(name): tensor for name, tensor in found.items()}


def _say_what_revives(path: Path, found: Any, report: Callable[[str], None]) -> None:
    """A run starts with all of its blocks, also those that the file's own run took out."""
    if not isinstance(found, Mapping) or not str(found.get("format")).startswith("eps-resnet"):
        return
    if "gates" not in found:
        raise ConfigError(
            f"--weights {path}: is a compact network; to train one on, run eps-compact on its"
            " checkpoint with --finetune-epochs"
        )
    dead = [record["block"] for record in found["gates"] if record.get("death")]
    if dead:
        report(
            f"warning: {len(dead)} blocks that had died in {path.name} are alive again"
            f" ({dead[0]}, ...); to train on without them, use eps-compact --finetune-epochs"
        )


def _without_prefixes(
    given: Mapping[str, Tensor], needed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors by the names that the network has for them."""
    found = dict(given)
    while not found.keys() & needed.keys():
        prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in found)), None)
        if prefix is None:
            return dict(given)
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def _ends(model: fx.GraphModule) -> tuple[set[str], str | None]:
    """Tensors of the layers that the output comes from; the weight that the images meet first."""
    modules = dict(model.named_modules())
    layers = {
        node: modules[str(node.target)] for node in model.graph.nodes if node.op == "call_module"
    }
    weighted = (nn.Linear, nn.Conv2d)
    last, waiting = set(), list(model.graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(layers.get(node), weighted):
            last |= {f"{node.target}.weight", f"{node.target}.bias"}
        elif node.op in ("call_function", "call_method") or (
            node in layers and not list(layers[node].parameters())
        ):
            waiting += node.all_input_nodes
    first = next((n.target for n, layer in layers.items() if isinstance(layer, nn.Conv2d)), None)
    return last, None if first is None else f"{first}.weight"


def _difference(missing: list[str], surplus: list[str]) -> str:
    parts = [
        f"{what} {len(names)}, first {names[0]}"
        for what, names in (("it lacks", missing), ("it has others:", surplus))
        if names
    ]
    return "; ".join(parts)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
