"""The compact network in other people's formats: readable where none of our packages is.

`pt2` is a `torch.export` archive, for a process that has torch alone. `safetensors` is the tensors,
and beside them a JSON description of every step (see `description`), for one that has not even
that. Both take raw pixels: the normalisation is inside.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from eps_compact.artifact import CompactArtifact
from eps_compact.outputs import export_files
from eps_core.errors import ConfigError, GraphError
from eps_core.files import replace_file
from eps_train.data.dataset import DataIdentity
from eps_train.models.cifar import Normalize

# -- A network as plain data: every step in order, by the name of its ATen operator
#
# The operators' meaning is PyTorch's (`aten.conv2d` is `torch.nn.functional.conv2d`, and so on);
# their arguments are named as in its schemas. No step overwrites an operand, so that a reader in
# any language can go through the list with a dictionary of results.

Step = dict[str, Any]
"""`name` of the result; `op`; `inputs`: arguments by name; `dtype` and `shape` of the result.

An argument is a number, a text, a list, null, or an object of one key: `step` (the result of that
name, or the network's input), `tensor` (a stored one), `dtype`, or `float` (`inf`, `-inf`, `nan`).
Arguments at their defaults are given too; those that say where and how to store are left out. In
shapes `N` is the batch. `getitem` takes one of an operator's several results; its `dtype` and
`shape` are those of that result, and such an operator's own are null.
"""

_STORAGE = ("device", "layout", "pin_memory", "memory_format", "requires_grad", "non_blocking")


def steps(program: ExportedProgram) -> tuple[list[Step], dict[str, str]]:
    """The steps of a functional program (`run_decompositions({})`), and its result as an argument.

    Raises GraphError for a step that is no ATen operator.
    """
    names = _stored(program)
    images = next(node for node in program.graph.nodes if _is_input(node, names))
    writer = _Writer(names, batch=str(images.meta["val"].shape[0]))
    found = []
    for node in program.graph.nodes:
        # Without in-place steps, what nothing reads is a check of torch's own.
        if node.op == "call_function" and node.users:
            found.append(writer.step(node))
    (output,) = next(node for node in program.graph.nodes if node.op == "output").args[0]
    return found, writer.argument(output)


def tensors(program: ExportedProgram, used_by: list[Step]) -> dict[str, Tensor]:
    """The stored tensors that the steps use, contiguous and each with memory of its own."""
    known = {**program.state_dict, **program.constants}
    wanted = {name for step in used_by for name in _mentioned(step["inputs"])}
    return {name: known[name].detach().cpu().contiguous().clone() for name in sorted(wanted)}


def _mentioned(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _mentioned(item)]
    if isinstance(value, dict):
        if isinstance(name := value.get("tensor"), str):
            return [name]
        return [name for item in value.values() for name in _mentioned(item)]
    return []


def _stored(program: ExportedProgram) -> dict[str, str]:
    """Names of the stored tensors by the graph's names for them."""
    return {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT and spec.target is not None
    }


def _is_input(node: fx.Node, stored: dict[str, str]) -> bool:
    return node.op == "placeholder" and node.name not in stored


class _Writer:
    """Turns the nodes of a graph into plain data."""

    def __init__(self, stored: dict[str, str], *, batch: str) -> None:
        self._stored = stored
        self._batch = batch

    def step(self, node: fx.Node) -> Step:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = str(target).removesuffix(".default")
            declared = target._schema.arguments
            given = dict(zip((a.name for a in declared), node.args, strict=False)) | node.kwargs
            # All of them: a reader of another language cannot look the defaults up.
            values = {
                a.name: given.get(a.name, a.default_value if a.has_default_value() else None)
                for a in declared
                if a.name not in _STORAGE
            }
        elif target is operator.getitem:
            name, values = "getitem", {"input": node.args[0], "index": node.args[1]}
        elif getattr(target, "__module__", "") == "_operator":  # on sizes
            name = f"operator.{getattr(target, '__name__', target)}"
            values = {f"arg{index}": value for index, value in enumerate(node.args)}
        else:
            raise GraphError(
                f"--export safetensors: step {node.name} ({target}) is no plain operator; use"
                " --export pt2"
            )
        inputs = {key: self.argument(value) for key, value in values.items()}
        return {"name": node.name, "op": name, "inputs": inputs, **self._result(node)}

    def argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            stored = self._stored.get(value.name)
            return {"tensor": stored} if stored is not None else {"step": value.name}
        if isinstance(value, (list, tuple)):
            return [self.argument(item) for item in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        return str(value)

    def _result(self, node: fx.Node) -> dict[str, Any]:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return {"dtype": None, "shape": None}
        shape = [
            size if type(size) is int else str(size).replace(self._batch, "N")
            for size in value.shape
        ]
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}


KINDS = ("pt2", "safetensors")
ABOUT = "eps_resnet.json"  # name of the description inside a pt2 archive
DESCRIPTION_FORMAT = "eps-resnet-network"
DESCRIPTION_VERSION = 1
INPUT, OUTPUT = "images", "logits"
# Where a recorded step was written: paths of the machine that exported it, of no use to others.
_WHEREABOUTS = ("stack_trace", "from_node", "custom")


class FromPixels(nn.Module):
    """What ships: images uint8 `[N, C, H, W]` to logits float32 `[N, classes]`."""

    def __init__(self, network: nn.Module, identity: DataIdentity) -> None:
        super().__init__()
        self.normalize = Normalize.of(identity)
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits


def files(path: Path, kind: str) -> tuple[Path, ...]:
    """The files that :func:`export` writes for `path`.

    Raises ConfigError when `kind` is none of `KINDS`, or `path` does not end in it.
    """
    if kind not in KINDS:
        raise ConfigError(f"--export {kind}: no such format; choose {' or '.join(KINDS)}")
    if path.suffix != f".{kind}":
        raise ConfigError(f"{path}: not a {kind} file's name; end it in .{kind}")
    return export_files(path, kind)


def export(
    artifact: CompactArtifact, path: Path, kind: str, *, force: bool = False
) -> tuple[Path, ...]:
    """Write the network of `artifact` behind its normalisation; returns the files written.

    It takes `images` uint8 `[N, C, H, W]`, N >= 1, and gives `logits` float32 `[N, classes]`. The
    same artifact gives the same bytes. Each file is written in one step, the tensors before their
    description.

    Args:
        artifact: a compact network, read from its file or not yet written.
        path: the file to write; it ends in `.pt2` or `.safetensors`.
        kind: `pt2` (with a description of preprocessing and classes as the extra file `ABOUT`), or
            `safetensors` (with the whole network's description beside it as `.safetensors.json`).
        force: overwrite what exists.

    Raises:
        ConfigError: a wrong name, an existing file, or no package safetensors.
        GraphError: torch.export cannot express the network.
    """
    written = files(path, kind)
    if existing := [str(file) for file in written if file.exists() and not force]:
        raise ConfigError(f"{', '.join(existing)}: exists; give --force to overwrite")
    program = capture(artifact)
    contents = _pt2(program, artifact) if kind == "pt2" else _safetensors(program, artifact, path)
    for file, content in zip(written, contents, strict=True):
        replace_file(file, content)
    return written


def capture(artifact: CompactArtifact) -> ExportedProgram:
    """The network behind its normalisation as a `torch.export` program with a dynamic batch.

    Raises GraphError when torch.export cannot express it.
    """
    model = FromPixels(artifact.build(), artifact.data).requires_grad_(False)
    # Two images, because torch.export takes a size of 1 for a constant.
    example = torch.zeros((2, *artifact.data.input_shape), dtype=torch.uint8)
    batch = torch.export.Dim("N", min=1)
    try:
        with quiet():
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # it raises dozens of unrelated types
        cause = " ".join(str(error).strip().partition("\n")[0].split())
        raise GraphError(f"--export: torch.export cannot express the network: {cause}") from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in _WHEREABOUTS:
                node.meta.pop(key, None)
    return program


def _pt2(program: ExportedProgram, artifact: CompactArtifact) -> tuple[bytes]:
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files={ABOUT: _json(_about(artifact))})
    return (buffer.getvalue(),)


def _safetensors(
    program: ExportedProgram, artifact: CompactArtifact, path: Path
) -> tuple[bytes, bytes]:
    try:
        from safetensors.torch import save
    except ModuleNotFoundError:
        raise ConfigError(
            "--export safetensors: the package is not installed; pip install safetensors"
        ) from None
    with quiet():
        # No decompositions: this only does away with steps in place.
        program = program.run_decompositions({})
    found, output = steps(program)
    values = tensors(program, found)
    content = save(values, metadata={"eps_resnet_digest": artifact.digest})
    described = {
        **_about(artifact),
        "tensors": {
            "file": path.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "names": {name: _signature(tensor) for name, tensor in sorted(values.items())},
        },
        "operators": sorted({step["op"] for step in found}),
        "steps": found,
        "result": output,
    }
    return content, _json(described, lines=found).encode()


def _about(artifact: CompactArtifact) -> dict[str, Any]:
    """What a program needs to know besides the network, as plain data."""
    data = artifact.data
    return {
        "format": DESCRIPTION_FORMAT,
        "version": DESCRIPTION_VERSION,
        "input": {"name": INPUT, "dtype": "uint8", "shape": ["N", *data.input_shape]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["N", len(data.classes)]},
        "classes": list(data.classes),
        "preprocessing": data.preprocessing.to_dict(),
        "data": {"name": data.name, "sha256": data.sha256},
        "compact": artifact.digest,
        "checkpoint": artifact.checkpoint.get("digest", ""),
        "versions": dict(artifact.versions),
    }


def _signature(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _json(value: dict[str, Any], lines: list[Step] | None = None) -> str:
    """JSON for people too: indented, but each of `lines`, the value of `steps`, in one line."""
    if lines is None:
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    whole = _json({**value, "steps": []})
    rows = ",\n  ".join(json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines)
    return whole.replace('"steps": []', f'"steps": [\n  {rows}\n ]', 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Torch's exporters talk on stdout, in warnings and in logs about their own workings."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
