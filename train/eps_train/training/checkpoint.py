"""Checkpoints, their rotation (`--keep`), and the weights of other programs (`--weights`)."""

from __future__ import annotations

import io
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, fx, nn

from eps_core import checksummed
from eps_core.checksummed import read_bytes
from eps_core.cli import Log
from eps_core.errors import ConfigError, EpsError, FileFormatError
from eps_train.config import TrainingConfig
from eps_train.data.dataset import Data, DataIdentity
from eps_train.gating import rewriting
from eps_train.gating.tracing import OWN
from eps_train.models.spec import NetworkSpec
from eps_train.schedule import CosineDecay, LearningRateSchedule
from eps_train.training.paths import RunPaths

FORMAT = "eps-resnet-checkpoint"
VERSION = 2  # the resume state of version 1 had other keys


def current_versions() -> dict[str, str]:
    return {
        "eps_resnet": package_version("eps-resnet"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRecord:
    """Evidence for a dead block: the epochs in which its gate never opened.

    Attributes:
        epoch: 1-based epoch at whose end the gate was latched.
        epsilon: threshold then.
        steps: consecutive training steps on which the gate was closed.
        peak: largest response over those steps.
        heldout_peak: largest response over the validation part, in evaluation mode; below
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
    """Activity of one block's gate in its last epoch, and its prune record if it is dead.

    Responses are `max |F_i|`, or relative ones where the configuration says `relative_epsilon`.

    Attributes:
        block: name of the block.
        epsilon: threshold in the last epoch (0: the gate was held open).
        steps, closed_steps: training steps of the last epoch in which the gate was judged, and
            those on which it was closed; for a dead block those of its last epoch.
        peak: largest response over those steps.
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
    """A trained network with the records of its gates, its data and its configuration.

    Attributes:
        network: the network as built: `gated` names every gated block, dead ones too; `removed` is
            empty. Dead blocks are those whose record has a death.
        state: every tensor; those of dead blocks are as they were when the block died.
        gates: one record for each gated block, in the order of computation; empty for a baseline.
        data: identity of the data it was trained on.
        config: the whole training configuration.
        order: blocks of a nested run from the first to stay to the first to go; else empty.
        metrics: `epoch`, `validation`, at the end of the run `test`, and `started_from`: None, or
            `file` and `sha256` of the weights that `--weights` named.
        side_head: tensors of the side head; None without one.
        resume: the state of the run (optimizer, schedule, progress); only `last.pt` and the files
            of `--keep` have it.
        versions: of eps-resnet, torch and Python.
        digest: of the file it was read from or written to; "" before that.
    """

    network: NetworkSpec
    state: dict[str, Tensor]
    gates: list[GateRecord]
    data: DataIdentity
    config: dict[str, Any]
    metrics: dict[str, Any]
    order: tuple[str, ...] = ()
    side_head: dict[str, Tensor] | None = None
    resume: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=current_versions)
    digest: str = ""

    @property
    def dead(self) -> tuple[str, ...]:
        """Names of the dead blocks, in the order of computation."""
        return tuple(record.block for record in self.gates if record.death is not None)

    @property
    def relative_epsilon(self) -> bool:
        """Whether responses are relative to the block's input (`EpsilonGate.relative`)."""
        return bool(self.config.get("relative_epsilon"))  # not in files of earlier versions

    def build_gated(self) -> fx.GraphModule:
        """Build the gated network: every branch in place, dead gates latched, live gates live."""
        model = self.network.build(self.state)
        gates = rewriting.gates(model)
        for gate in gates.values():
            gate.relative = self.relative_epsilon
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
            "gates": msgspec.to_builtins(self.gates),
            "data": self.data.to_dict(),
            "config": self.config,
            "metrics": self.metrics,
            "order": list(self.order),
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
                gates=msgspec.convert(payload["gates"], list[GateRecord]),
                data=DataIdentity.from_dict(payload["data"]),
                config=payload["config"],
                metrics=payload["metrics"],
                order=tuple(payload["order"]) if payload["version"] == VERSION else (),
                side_head=payload["side_head"],
                resume=payload["resume"] if payload["version"] == VERSION else None,
                versions=payload["versions"],
                digest=digest,
            )
        except (KeyError, TypeError, AttributeError, ConfigError, msgspec.ValidationError) as error:
            raise FileFormatError(f"{path}: not a usable checkpoint ({error!r})") from error


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


# -- Whether a run may go on from a checkpoint


def require_same_run(path: Path, last: Checkpoint, config: TrainingConfig, data: Data) -> None:
    """Raise ConfigError unless `last`, read from `path`, belongs to this configuration and data.

    Three things may differ: the images of the test part, which the run has not used yet; how the
    folder of the same images is written; and the number of epochs, which may grow.
    """
    if last.resume is None:
        raise ConfigError(
            f"{path}: holds no state to resume from, or that of an older eps-resnet"
            f" (it was written by {last.versions.get('eps_resnet')}); resume with that version, or"
            " start anew in another --output folder"
        )
    part = last.data.changed_part(data.identity)
    if part not in (None, "test"):
        which = "" if part == "data" else f" (its {part} part differs)"
        raise ConfigError(
            f"{path}: was trained on other data{which}; resume with the same data options, or name"
            " where the original data is with --data-root"
        )
    theirs, ours = last.config, config.to_dict()
    if unknown := sorted(theirs.keys() - ours.keys()):
        raise ConfigError(
            f"{path}: written by an earlier version of eps-train, whose configuration had the field"
            f" {unknown[0]}; resume it with that version, or start anew in another --output folder"
        )
    for name in sorted(ours.keys() | theirs.keys()):
        old, new = theirs.get(name), ours.get(name)
        if old == new or (name == "dataset" and last.data.may_be(config.dataset)):
            continue
        if name == "epochs" and isinstance(old, int) and isinstance(new, int) and old < new:
            continue
        raise ConfigError(
            f"{path}: belongs to a run with {name} {old}, not {new};"
            " resume with the same options, or start anew in another --output folder"
        )


def resume_changes(path: Path, last: Checkpoint, config: TrainingConfig, data: Data) -> list[str]:
    """What differs in a resumed run that :func:`require_same_run` accepts; a line for each."""
    changes = []
    if last.data.changed_part(data.identity) == "test":
        changes.append(
            f"{path}: the images of the test part have changed since; those of training and"
            " validation are the same"
        )
    before = last.config["epochs"]
    if before == config.epochs:
        return changes
    changes.append(f"{path}: the run was to have {before} epochs, and goes on to {config.epochs}")
    if config.final_decay:
        old, new = (
            LearningRateSchedule(replace(config, epochs=epochs)).decay_epoch + 1
            for epochs in (before, config.epochs)
        )
        changes.append(f"the final decay of the learning rate begins in epoch {new}, not {old}")
    elif isinstance(config.lr_schedule, CosineDecay):
        changes.append("the learning rate follows the cosine of the longer run, and so rises again")
    if config.freeze_gates_at < 1:
        old, new = (round(config.freeze_gates_at * n) + 1 for n in (before, config.epochs))
        changes.append(f"live gates stay open from epoch {new} on, not {old}")
    if config.target is not None:
        changes.append("epsilon is adjusted to the target over the longer run")
    return changes


# -- `--keep N`: the state at the end of each of the last N epochs


class CheckpointRotation:
    """The files `epoch-0012.pt`: `last.pt` as it was at the end of each of the last `count` epochs.

    0 writes none, and leaves existing files alone. `eps-compact` takes such a file as it is; copied
    over `last.pt`, `--resume` goes on from there. Only files that this run has written are ever
    removed or overwritten: a file found on resuming counts as such when it holds this
    configuration, this data and that epoch.
    """

    def __init__(self, paths: RunPaths, count: int) -> None:
        self._paths, self._count = paths, count
        self._ours: set[int] = set()

    def adopt(self, config: TrainingConfig, data: Data, *, epochs_done: int) -> None:
        """Take over the files that this run wrote before it was stopped.

        Raises ConfigError when a file of another origin is in the place of a later epoch.
        """
        if not self._count:
            return
        for epoch, path in self._paths.epoch_checkpoints().items():
            try:
                checkpoint = Checkpoint.load(path)
                require_same_run(path, checkpoint, config, data)
                ours = checkpoint.metrics["epoch"] == epoch
            except EpsError:
                ours = False
            if ours:
                self._ours.add(epoch)
            elif epochs_done < epoch <= config.epochs:
                raise ConfigError(
                    f"{path}: was not written by this run, and --keep needs its place; move it away"
                )

    def write(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint`, the whole state at the end of an epoch."""
        if self._count:
            epoch = checkpoint.metrics["epoch"]
            checkpoint.save(self._paths.epoch_checkpoint(epoch))
            self._ours.add(epoch)

    def rotate(self, epoch: int) -> None:
        """After `epoch` was written, remove the files that are older than the last N epochs."""
        if self._count:
            for old in [ours for ours in self._ours if ours <= epoch - self._count]:
                self._paths.epoch_checkpoint(old).unlink(missing_ok=True)
                self._ours.remove(old)


# -- `--weights`: a state dict of another program, as `torch.save` or safetensors wrote it

# Keys under which state dicts are nested: averaged ones first, as timm takes them.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_NESTED = (*_AVERAGED, "state_dict", "model_state_dict", "state", "model")
_COUNTER = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")  # absent in older files; of EMA
_GATE_STATE = re.compile(r"(^|\.)gate\d*\.(epsilon|dead|steps|closed_steps|finite_steps|peak)$")


def load_weights(
    path: Path, model: fx.GraphModule, report: Log = lambda line: None
) -> tuple[str, ...]:
    """:func:`load_state` of a file: `.safetensors`, or what `torch.save` wrote.

    The latter is a state dict, bare or under `state_dict`, `model`, `model_state_dict` or `state`
    (as in a checkpoint of eps-train), or an averaged one under `state_dict_ema`, `model_ema` or
    `ema`. No pickled code is run. Raises FileFormatError for a file that is missing or of another
    kind.
    """
    return load_state(_read(path, report), model, source=f"--weights {path}", report=report)


def load_state(
    state: Mapping[str, Tensor], model: fx.GraphModule, *, source: str, report: Log
) -> tuple[str, ...]:
    """Load the tensors of a state dict into a freshly built network; its gates keep their state.

    The prefix of a wrapper is removed from the names (`module.` of DataParallel, `_orig_mod.` of
    torch.compile, the attribute that holds the network in a module of Lightning); tensors beside
    the network, as metrics have them, are left out. A first convolution for RGB images is summed
    over its channels where the network takes gray ones. `report` receives a line for each choice or
    change. Raises ConfigError, which begins with `source`, for tensors of another network.

    Returns:
        Names of the tensors that were not loaded: those of the last layers, when the state dict has
        them for another number of classes or has none.
    """
    needed = {name: t for name, t in model.state_dict().items() if not _GATE_STATE.search(name)}
    own = model.meta.get(OWN, needed.keys())
    found = {name: t for name, t in state.items() if not _GATE_STATE.search(name)}
    prefix = _wrapper_prefix(found, needed)
    given = {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}
    if beside := [n for n in found if not (n.startswith(prefix) or _COUNTER.search(n))]:
        report(f"taking the tensors below {prefix}, and not the {_counted(beside)}, beside them")
    head, first = first_and_last_layers(model)
    skipped = {name for name in needed if name in head and name not in given}
    # A tensor that the network as it was written does not save is a constant of its code.
    missing = [n for n in needed if n in own and n not in given and not _COUNTER.search(n)]
    surplus = [n for n in given if n not in needed and n not in own and not _COUNTER.search(n)]
    differences = [] if skipped.issuperset(missing) else [f"it lacks {_counted(missing)}"]
    differences += [f"it has others: {_counted(surplus)}"] if surplus else []
    if differences:
        difference = "; ".join(differences)
        raise ConfigError(
            f"{source}: not of this network ({difference}); --model must name the one that"
            " the file is of"
        )
    fitting = {}
    for name, here in needed.items():
        if (tensor := given.get(name)) is None:
            continue
        if name == first and tensor.dim() == 4 and (tensor.shape[1], here.shape[1]) == (3, 1):
            tensor = tensor.sum(1, keepdim=True)
            report(f"{name} is for RGB images, so its channels are summed")
        if tensor.shape == here.shape:
            fitting[name] = tensor
        elif name in head and tensor.shape[1:] == here.shape[1:]:
            skipped.add(name)
        else:
            theirs, ours = ("x".join(map(str, t.shape)) or "a scalar" for t in (tensor, here))
            raise ConfigError(f"{source}: {name} is {theirs} in the file, {ours} in the network")
    with torch.no_grad():
        for name, tensor in fitting.items():
            needed[name].copy_(tensor)
    return tuple(name for name in needed if name in skipped)


def _counted(names: list[str]) -> str:
    return f"{len(names)}, first {names[0]}"


def _read(path: Path, report: Log) -> Mapping[str, Tensor]:
    """The state dict of a file; warns of dead blocks that a new run starts with."""
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
    if isinstance(found, Mapping) and str(found.get("format")).startswith("eps-resnet"):
        if "gates" not in found:
            raise ConfigError(
                f"--weights {path}: is a compact network; to train one on, run eps-compact on its"
                " checkpoint with --finetune-epochs"
            )
        if dead := [record["block"] for record in found["gates"] if record.get("death")]:
            report(
                f"warning: {len(dead)} blocks that had died in {path.name} are alive again"
                f" ({dead[0]}, ...); to train on without them, use eps-compact --finetune-epochs"
            )
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


def _wrapper_prefix(given: Iterable[str], needed: Mapping[str, Tensor]) -> str:
    """What stands before the network's names in a state dict: the prefix of most of them.

    Of several copies of the network, the averaged one is taken, as timm does, or the first.
    """
    counts = Counter[str]()
    for name in given:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in needed:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    return max(counts, key=lambda prefix: (counts[prefix], "ema" in prefix), default="")


def first_and_last_layers(model: fx.GraphModule) -> tuple[set[str], str | None]:
    """Tensors of the layers that compute the output; the weight of the first convolution."""
    modules = dict(model.named_modules())
    layers = {
        node: modules[str(node.target)] for node in model.graph.nodes if node.op == "call_module"
    }
    last, waiting = set(), list(model.graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(layers.get(node), (nn.Linear, nn.Conv2d)):
            last |= {f"{node.target}.weight", f"{node.target}.bias"}
        elif node.op in ("call_function", "call_method") or (
            node in layers and not list(layers[node].parameters())
        ):
            waiting += node.all_input_nodes
    first = next((n.target for n, layer in layers.items() if isinstance(layer, nn.Conv2d)), None)
    return last, None if first is None else f"{first}.weight"
