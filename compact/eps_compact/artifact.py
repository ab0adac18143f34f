"""The artifact `compact.pt`: network, tensors and certificate; and the certificate's own file."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import msgspec
import torch
from torch import Tensor, fx, nn

from eps_core import checksummed
from eps_core.errors import ConfigError, FileFormatError, GraphError
from eps_train.data.dataset import DataIdentity
from eps_train.gating import folding, rewriting
from eps_train.gating.folding import Pair
from eps_train.gating.tracing import ByMode
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
        certificate: plain data: evidence for every removed block, the proofs of equality, evidence
            about the live blocks, sizes and costs.
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
        payload = {
            "format": FORMAT,
            "version": VERSION,
            "network": self.network.to_dict(),
            "state": {name: tensor.detach().cpu() for name, tensor in self.state.items()},
            "folded": [list(pair) for pair in self.folded],
            "data": self.data.to_dict(),
            "certificate": self.certificate,
            "checkpoint": self.checkpoint,
            "versions": self.versions,
        }
        self.digest = checksummed.write(path, payload)
        return self.digest

    @classmethod
    def load(cls, path: Path, *, any_code: bool = False) -> CompactArtifact:
        """Read and verify an artifact, its tensors and, but with `any_code`, its network's code.

        Raises FileFormatError that names the file: missing, damaged, foreign, too new, or with
        other tensors than its network needs.
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


# -- Fingerprint of a network's code: two builds of one network have the same
#
# A compact network is stored as its name and its tensors; its steps come from code, which may be
# edited or replaced by another version. So the certificate holds a digest of the steps, and a
# sketch of the constants that are not among the stored tensors.

_KNOWN = ("torch", "builtins", "eps_train")
_SCALARS = (bool, int, float, str, type(None), torch.dtype)
_TOLERANCE = 1e-4  # of a sketch: other processors and versions round constants differently


def fingerprint(model: fx.GraphModule) -> dict[str, Any]:
    """Return `code`, a SHA-256 of the network's steps, and `constants`, sketches by name.

    Steps are the operations with their constants, the layers with their settings, and the source
    code (without comments) of layers that are not torch's.
    """
    return {"code": _digest(model), "constants": _sketches(model)}


def difference(model: fx.GraphModule, recorded: Mapping[str, Any]) -> str | None:
    """Return how a network differs from the recorded fingerprint, in words; None if it does not."""
    found = fingerprint(model)
    if found["code"] != recorded["code"]:
        return "the code of its network is not the code that was compacted"
    constants = recorded["constants"]
    if found["constants"].keys() != constants.keys():
        return "the constants of its network are not those that were compacted"
    for name, sketch in found["constants"].items():
        size = max(map(abs, [*sketch, *constants[name]]))
        pairs = zip(sketch, constants[name], strict=True)
        if not all(math.isclose(a, b, abs_tol=_TOLERANCE * size) for a, b in pairs):
            return f"the constant {name} of its network is not the one that was compacted"
    return None


def _digest(model: fx.GraphModule) -> str:
    order = {node: _Word(f"%{index}") for index, node in enumerate(model.graph.nodes)}
    lines = []
    for node in model.graph.nodes:
        operands = fx.node.map_arg((node.args, node.kwargs), order.__getitem__)
        lines.append(f"{node.op} {_name(node.target)} {operands!r}")
        if node.op == "call_module":
            lines += _layer(model.get_submodule(str(node.target)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Word(str):
    """A string whose repr has no quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def _layer(module: nn.Module) -> list[str]:
    """Return the lines of a module and of all modules inside."""
    lines = []
    for path, inner in module.named_modules():
        kind = type(inner)
        lines.append(f"{path} {_name(kind)} {_settings(inner)}")
        if isinstance(inner, ByMode):
            lines.append(f"{_name(inner.function)} {inner.calls!r}")
        # The name of a known class says what it computes.
        lines += [_source(c) for c in kind.__mro__ if c.__module__.partition(".")[0] not in _KNOWN]
        lines += [_source(v) for v in vars(inner).values() if isinstance(v, FunctionType)]
    return lines


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return a layer's constructor arguments that are attributes and differ from the default.

    So an argument that a later version adds changes nothing.
    """
    held = vars(module)
    return {
        name: held[name]
        for name, parameter in inspect.signature(type(module).__init__).parameters.items()
        if name in held and _is_plain(held[name]) and held[name] != parameter.default
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, _SCALARS)


def _source(code: Any) -> str:
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(code))))
    except (OSError, SyntaxError, TypeError):  # from exec(), or a lambda within a call
        inner = getattr(code, "__code__", None)
        return f"{_name(code)} {inner and (inner.co_names, inner.co_consts[1:])}"


def _sketches(model: fx.GraphModule) -> dict[str, list[float]]:
    """Return three sums of each tensor that is not in the state dict, which tell most apart."""
    held = model.state_dict().keys()
    found = {name: buffer for name, buffer in model.named_buffers() if name not in held}
    for path, module in model.named_modules():
        plain = {n: v for n, v in vars(module).items() if isinstance(v, Tensor)}
        found |= {f"{path}.{name}" if path else name: value for name, value in plain.items()}
    sketches = {}
    for name, value in sorted(found.items()):
        v = value.detach().cpu().double().flatten().nan_to_num()
        places = torch.arange(len(v), dtype=torch.float64).mul(0.6180339887498949).frac()
        sketches[name] = [v.sum().item(), v.square().sum().item(), (v * places).sum().item()]
    return sketches
