"""A machine with a fake GPU, and a small network with its plan, for the tests of running plans.

With an `OnnxBuilder` it builds plans too, and `Machine.install` lets the commands find all of it.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from eps_deploy.engines.base import Images, Logits
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.engines.trt.cuda import Cuda, host_facts
from eps_deploy.engines.trt.plan import Host, PlanMetadata
from eps_deploy.export.types import layer_types
from tests.deploy.engines.trt.builder import FLOAT, HALF, MODEL, Builder
from tests.deploy.engines.trt.contract import FakeModule, Version
from tests.deploy.engines.trt.fake_bindings import make_bindings
from tests.deploy.engines.trt.fake_gpu import FakeGpu
from tests.deploy.engines.trt.fake_pycuda import make_pycuda
from tests.deploy.engines.trt.semantic_fake import PROFILES, FakeTensorRT, make_plan

SHAPE, CLASSES = (3, 6, 6), 5


@cache
def network(seed: int = 0) -> bytes:
    """An ONNX file as eps-deploy exports it: normalisation, convolution, mean, linear layer.

    Each pixel and each channel has a weight of its own, so that nothing can change places unseen.
    """
    draw = np.random.default_rng(seed)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(draw.normal(size=shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["float", "mean"], ["centred"]),
        helper.make_node("Conv", ["centred", "kernels"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["features"], ["active"]),
        helper.make_node("Flatten", ["active"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix", "bias"], ["logits"]),
    ]
    constants = [
        constant("mean", 1, 3, 1, 1),
        constant("kernels", 4, 3, 3, 3),
        constant("matrix", 4 * 6 * 6, CLASSES),
        constant("bias", CLASSES),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def images(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def expected(batch: Images, model: bytes | None = None) -> Logits:
    """What ONNX Runtime says."""
    with OrtEngine(network() if model is None else model) as engine:
        return engine.infer(batch)


def metadata_of(plan: bytes, host: Host, **changes: Any) -> PlanMetadata:
    facts: dict[str, Any] = {
        "host": host,
        "onnx_sha256": "0" * 64,
        "plan_sha256": hashlib.sha256(plan).hexdigest(),
        "precision": "fp32",
        "profiles": PROFILES,
        "flags": (),
        "hardware_compatibility": "none",
        "version_compatible": False,
        "layers": {},
        "seconds": 1.0,
        "log": (),
    }
    return PlanMetadata(**{**facts, **changes})


@dataclass
class OnnxBuilder(Builder):
    """Builds plans that the `semantic_fake` runs, of the ONNX files that it is given.

    Attributes:
        built: how many so far.
    """

    built: int = field(init=False, default=0)

    def _parse(self, parser: Any, model: bytes, path: str | None) -> bool:
        proto = onnx.load_from_string(model)
        by_name = layer_types(proto)
        self.names, types = tuple(by_name), [*by_name.values()]
        high = HALF if TensorProto.FLOAT16 in _element_types(proto) else FLOAT
        self._model, self.quantized = bytes(model), "int8" in types
        self.kinds = tuple({"float32": FLOAT, "float16": HALF}.get(kind, high) for kind in types)
        self.ports = tuple(
            (port.name, kind, (-1, *(dim.dim_value for dim in port.type.tensor_type.shape.dim[1:])))
            for port, kind in ((proto.graph.input[0], "UINT8"), (proto.graph.output[0], FLOAT))
        )
        return super()._parse(parser, MODEL, path)

    def _build(self, builder: Any, network: Any, config: Any) -> Any:
        self.built += 1
        if super()._build(builder, network, config) is None:
            return None
        profiles = [[shape[0] for shape in shapes] for _, *shapes in self.profiles]
        plan = make_plan(self._model, profiles=tuple((a, b, c) for a, b, c in profiles))
        return self.trt.make("IHostMemory", _content=plan)


def _element_types(proto: onnx.ModelProto) -> set[int]:
    return {tensor.data_type for tensor in proto.graph.initializer}


@dataclass
class Machine:
    """A fake GPU with its TensorRT, pycuda and cuda-bindings."""

    version: Version = "11.4"
    gpu: FakeGpu = field(default_factory=FakeGpu)
    builder: OnnxBuilder | None = None
    trt: FakeModule = field(init=False)
    pycuda: ModuleType = field(init=False)
    bindings: ModuleType = field(init=False)
    cuda: Cuda = field(init=False)
    host: Host = field(init=False)

    def __post_init__(self) -> None:
        behaviour = None
        if self.builder is not None:
            self.builder.on_start = partial(self.gpu.require_context, "Builder")
            behaviour = self.builder._behaviour()
        self.trt = FakeTensorRT(self.gpu, self.version, behaviour).module
        if self.builder is not None:
            self.builder.trt = self.trt
        self.pycuda = make_pycuda(self.gpu)
        self.bindings = make_bindings(self.gpu)
        self.cuda = Cuda(driver=self.pycuda, bindings=self.bindings)
        self.host = host_facts(self.trt, self.cuda)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have everything in this process that imports TensorRT, pycuda or cuda-bindings get it."""
        package = ModuleType("pycuda")
        package.__dict__["driver"] = self.pycuda
        for module in (self.trt, package, self.pycuda, self.bindings):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def engine(self, kind: Any, plan: bytes | None = None, **arguments: Any) -> Any:
        """A `TrtEngine` of this class, of the small network unless `plan` is given."""
        plan = make_plan(network()) if plan is None else plan
        metadata = arguments.pop("metadata", None) or metadata_of(plan, self.host)
        return kind(plan, metadata, trt=self.trt, cuda=self.cuda, **arguments)


def close(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> bool:
    return found.dtype == np.float32 and np.allclose(found, wanted, rtol=1e-5, atol=1e-4)
