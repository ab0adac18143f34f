"""Block times on ONNX Runtime, for training to a latency, block importance and sweeps.

An export may take seconds, so the network is exported once with every block, and blocks are removed
from the ONNX graph: the residual addition becomes its shortcut, and unused nodes are dropped. The
result is what an export without these blocks would be. Names do not survive the export, so each
branch is multiplied by a constant of its own, by which its addition is found again; these
multiplications are removed first.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx

from eps_core.errors import GraphError
from eps_core.timing import Runs
from eps_deploy.engines.ort import THREADS, OrtEngine
from eps_deploy.export.export import export_onnx
from eps_train.data.dataset import DataIdentity
from eps_train.gating import rewriting
from eps_train.gating.costs import Measure, interleaved
from eps_train.gating.folding import fold

# Markers are float32 numbers that no network has by chance, far from 1 and from each other, as
# exporters merge constants that are close.
_FIRST_MARKER = 3.0
_STEP = 2.0**-12


class OrtTimer:
    """Block timer plug-in (`eps_train.gating.costs.Timer`) that runs `OrtEngine`."""

    name = f"onnxruntime {onnxruntime.__version__} on the CPU, {THREADS} thread, batch 1"

    def __init__(self, identity: DataIdentity) -> None:
        self._identity = identity
        self._last: tuple[bytes, Removable] | None = None  # one command may load it twice

    def load(self, model: fx.GraphModule, image: Tensor) -> Measure:
        """Implement `Timer.load`; the network may be on any device."""
        key = _fingerprint(model)
        if self._last is None or self._last[0] != key:
            self._last = key, Removable(model, self._identity)
        _, exported = self._last
        pixels = image.cpu().numpy()

        def measure(without: Sequence[Collection[str]]) -> list[Runs]:
            with ExitStack() as stack:
                networks = map(exported.without, without)
                engines = [stack.enter_context(OrtEngine(network)) for network in networks]
                return interleaved([partial(engine.infer, pixels) for engine in engines])

        return measure


class Removable:
    """An ONNX network from which blocks can be removed.

    Made of a network with gates at all blocks that may be removed. Raises GraphError if it cannot
    be exported, or a block is not found in the exported graph.
    """

    def __init__(self, model: fx.GraphModule, identity: DataIdentity) -> None:
        marked, blocks = _marked(model)
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                export_onnx(marked, identity, path)
                self._whole = onnx.load(path)
        except GraphError as error:
            raise GraphError(f"{error}; or have torch time the blocks: --timer torch") from error
        self._shortcuts = _unmark(self._whole.graph, blocks)

    def without(self, blocks: Collection[str]) -> bytes:
        """Return the ONNX file of the network without these blocks."""
        less = onnx.ModelProto()
        less.CopyFrom(self._whole)
        shortcuts = dict(self._shortcuts[block] for block in blocks)
        for node in less.graph.node:
            if node.output[0] in shortcuts:
                source, result = [shortcuts[node.output[0]]], list(node.output)
                # ONNX Runtime eliminates it.
                node.CopyFrom(helper.make_node("Identity", source, result, name=node.name))
        _remove_unused(less.graph)
        return bytes(less.SerializeToString())


def _fingerprint(model: fx.GraphModule) -> bytes:
    """SHA-256 of the layers, the code and the tensors."""
    found = hashlib.sha256(f"{model}{model.code}".encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.digest()


def _marked(model: fx.GraphModule) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Return a folded copy on the CPU, each gate replaced by `shortcut + branch * marker`.

    Also returns its blocks, in the order of their markers.
    """
    folded, _ = fold(rewriting.drop_taps(model))
    folded.cpu()
    gates = rewriting.gate_nodes(folded)
    for number, node in enumerate(gates):
        shortcut, branch = node.args
        with folded.graph.inserting_before(node):
            factor = folded.graph.call_function(torch.mul, (branch, _marker(number)))
            addition = folded.graph.call_function(torch.add, (shortcut, factor))
        node.replace_all_uses_with(addition)
        folded.graph.erase_node(node)
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded, tuple(gates.values())


def _marker(number: int) -> float:
    return _FIRST_MARKER + (number + 1) * _STEP


def _unmark(graph: onnx.GraphProto, blocks: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Remove the markers. Returns for each block the names of its sum and of its shortcut."""
    scalars = _scalars(graph)
    numbers = {_marker(number): block for number, block in enumerate(blocks)}
    marks: dict[str, tuple[str, str]] = {}  # by the name of the product: block, name of the branch
    for node in [node for node in graph.node if node.op_type == "Mul"]:
        for branch, factor in (tuple(node.input), tuple(node.input)[::-1]):
            if block := numbers.get(scalars.get(factor, 0.0)):
                marks[node.output[0]] = block, branch
    shortcuts: dict[str, tuple[str, str]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in marks and node.op_type == "Add" and len(node.input) == 2:
                block, node.input[index] = marks.pop(name)
                shortcuts[block] = node.output[0], node.input[1 - index]
    if marks or shortcuts.keys() != set(blocks):
        lost = ", ".join(sorted(set(blocks) - shortcuts.keys())) or "more than one addition"
        raise GraphError(
            f"cannot find {lost} in the exported network; have torch time the blocks: --timer torch"
        )
    _remove_unused(graph)
    return shortcuts


def _scalars(graph: onnx.GraphProto) -> dict[str, float]:
    """Values of float32 scalar constants, by name."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    return {
        name: float(numpy_helper.to_array(tensor).reshape(()))
        for name, tensor in tensors.items()
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) == 1
    }


def _remove_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that no output depends on."""
    needed = {port.name for port in graph.output}
    for index in reversed(range(len(graph.node))):  # nodes are topologically sorted
        node = graph.node[index]
        if needed.intersection(node.output):
            needed.update(node.input)
        else:
            del graph.node[index]
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in needed:
            del graph.initializer[index]
    del graph.value_info[:]
