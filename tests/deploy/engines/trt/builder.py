"""What TensorRT's builder does, as far as a caller can tell, for the contract fake.

Also what it does to callers who are wrong: a parser whose network is gone ends the process in
reality, and fails an assertion here.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from eps_deploy.engines.trt.plan import Host
from tests.deploy.engines.trt.contract import FakeModule, Version, make_fake

MODEL = b"an ONNX file"
PLAN = b"a plan"
HOST = Host(
    tensorrt="11.4.0.106",
    compute_capability="9.0",
    device="NVIDIA H100 80GB HBM3",
    memory=85_000_000_000,
    driver="580.95.05",
    cuda="13.0",
    platform="linux-x86_64",
)
WEAK_FLAGS = {"FP16", "BF16", "INT8", "FP8", "INT4", "FP4"}  # not for strongly typed networks
NEVER = 300_000  # steps of a build that is cancelled long before it ends
FLOAT, HALF = "FLOAT", "HALF"


@dataclass
class Builder:
    """A TensorRT of one version, and what it is to do.

    Attributes:
        version: of the manifest.
        kinds: type of each convolution; the last one is the linear layer.
        names: of these layers; empty: numbered.
        quantized: whether their inputs come from a DequantizeLinear.
        refuse: calls that fail, by the name of the method.
        steps: of the build's only phase.
        information: what the inspector says; None: of `kinds`, in this version's form.
        cache: content of the timing cache after the build.
        on_start: called when a `Builder` is made.
    """

    version: Version = "11.4"
    kinds: tuple[str, ...] = (FLOAT, FLOAT)
    names: tuple[str, ...] = ()
    quantized: bool = False
    refuse: tuple[str, ...] = ()
    steps: int = 3
    information: str | None = None
    cache: bytes = b"times"
    on_start: Callable[[], None] = lambda: None
    ports: tuple[tuple[str, str, tuple[int, ...]], ...] = (
        ("images", "UINT8", (-1, 3, 8, 8)),
        ("logits", FLOAT, (-1, 10)),
    )
    trt: FakeModule = field(init=False)
    config: Any = field(init=False, default=None)
    profiles: list[tuple[Any, ...]] = field(init=False, default_factory=list)
    finished: bool = field(init=False, default=False)
    combined: list[bytes] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.trt = make_fake(self.version, self._behaviour())
        self.host = replace(HOST, tensorrt=self.trt.__version__)

    def _behaviour(self) -> dict[str, dict[str, Callable[..., Any]]]:
        return {
            "Builder": {
                "__init__": lambda builder, logger: self.on_start(),
                "create_network": self._create_network,
                "create_builder_config": self._create_config,
                "create_optimization_profile": self._create_profile,
                "build_serialized_network": self._build,
            },
            "INetworkDefinition": {
                "num_inputs": lambda network: 1,
                "num_outputs": lambda network: len(self.ports) - 1,
                "num_layers": lambda network: len(network._layers),
                "get_input": lambda network, index: self._port(index),
                "get_output": lambda network, index: self._port(index + 1),
                "get_layer": lambda network, index: network._layers[index],
            },
            "ILayer": {
                "num_outputs": lambda layer: 1,
                "get_input": lambda layer, index: layer._input,
                "get_output": lambda layer, index: layer._output,
            },
            "OnnxParser": {
                "__init__": self._make_parser,
                "parse": self._parse,
                "num_errors": lambda parser: parser._errors,
                "get_error": lambda parser, index: self.trt.make("ParserError"),
            },
            "ParserError": {
                "desc": lambda error: "Non-zero zero point\nis not supported.",
                "node_name": lambda error: "0007_QuantizeLinear",
                "node_operator": lambda error: "QuantizeLinear",
            },
            "IOptimizationProfile": {
                "set_shape": self._set_shape,
                "__bool__": self._is_valid,
            },
            "IBuilderConfig": {
                "set_memory_pool_limit": lambda config, pool, size: None,
                "set_flag": lambda config, flag: config._flags.add(flag.name),
                "clear_flag": self._clear_flag,
                "get_flag": lambda config, flag: flag.name in config._flags,
                "add_optimization_profile": self._add_profile,
                "create_timing_cache": self._create_cache,
                "set_timing_cache": self._set_cache,
                "get_timing_cache": lambda config: self._given("get_timing_cache", config._cache),
            },
            "ITimingCache": {"serialize": self._serialize, "combine": self._combine},
            "IHostMemory": {"__bytes__": lambda memory: memory._content},
            "Runtime": {"deserialize_cuda_engine": self._deserialize},
            "ICudaEngine": {
                "create_engine_inspector": lambda engine: self._given(
                    "create_engine_inspector", self.trt.make("EngineInspector")
                )
            },
            "EngineInspector": {"get_engine_information": self._inform},
        }

    def log(self, level: str, text: str, logger: Any = None) -> None:
        """Say something as TensorRT does: to the logger that it was given first."""
        if logger is None:
            made = [call for call in self.trt.calls if call[:2] == ("Builder", "__init__")]
            (logger,) = made[0].arguments
        logger.log(self.trt.ILogger.Severity[level], text)

    def _given(self, name: str, value: Any) -> Any:
        if name in self.refuse:
            self.log("ERROR", f"{name}\nfailed for a reason")
            self.log("ERROR", "and this came of it")
            return None
        return value

    def _create_network(self, builder: Any, flags: Any) -> Any:
        bit = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        strong = bool(int(flags) & bit) or self.version == "11.4"
        network = self.trt.make(
            "INetworkDefinition", _strong=strong, _layers=[], _parser=lambda: None
        )
        return self._given("create_network", network)

    def _port(self, index: int) -> Any:
        name, kind, shape = self.ports[index]
        return self._tensor(name, kind, shape)

    def _tensor(self, name: str, kind: str, shape: tuple[int, ...] = (-1, 8)) -> Any:
        return self.trt.make(
            "ITensor", _set_name=name, _set_dtype=self.trt.DataType[kind], _set_shape=shape
        )

    def _make_parser(self, parser: Any, network: Any, logger: Any) -> None:
        parser._network, parser._errors = weakref.ref(network), 0

    def _parse(self, parser: Any, model: bytes, path: str | None) -> bool:
        assert path is None, "our files hold their weights"
        network = parser._network()
        assert network is not None, "segmentation fault: the parser's network was freed"
        if bytes(model) != MODEL or "parse" in self.refuse:
            self.log("ERROR", "ModelImporter: something is wrong")
            parser._errors = 0 if "get_error" in self.refuse else 1
            return False
        network._layers.extend(self._layers())
        network._parser = weakref.ref(parser)
        return True

    def _layers(self) -> list[Any]:
        layers = []
        last = len(self.kinds) - 1
        for index, kind in enumerate(self.kinds):
            source = self._tensor(f"t{index}", kind)
            if self.quantized:
                layers.append(self._layer(f"dq{index}", "DEQUANTIZE", source, source))
            name, of = (
                ("0009_Gemm", "MATRIX_MULTIPLY")
                if index == last
                else (f"{index:04d}_Conv", "CONVOLUTION")
            )
            name = self.names[index] if self.names else name
            layers.append(self._layer(name, of, source, self._tensor(f"u{index}", kind)))
        return layers

    def _layer(self, name: str, of: str, source: Any, output: Any) -> Any:
        kind = self.trt.LayerType[of]
        return self.trt.make(
            "ILayer", _set_name=name, _set_type=kind, _input=source, _output=output
        )

    def _create_config(self, builder: Any) -> Any:
        self.profiles.clear()
        self.config = self.trt.make("IBuilderConfig", _flags={"TF32"}, _cache=None)
        return self._given("create_builder_config", self.config)

    def _clear_flag(self, config: Any, flag: Any) -> None:
        if "clear_flag" not in self.refuse:
            config._flags.discard(flag.name)

    def _create_profile(self, builder: Any) -> Any:
        return self.trt.make("IOptimizationProfile", _shapes=None)

    def _set_shape(self, profile: Any, *shapes: Any) -> None:
        profile._shapes = shapes

    def _is_valid(self, profile: Any) -> bool:
        if "bool" in self.refuse or profile._shapes is None:
            return False
        _, smallest, optimal, largest = profile._shapes
        return all(1 <= a <= b <= c for a, b, c in zip(smallest, optimal, largest, strict=True))

    def _add_profile(self, config: Any, profile: Any) -> int:
        if "add_optimization_profile" in self.refuse:
            self.log("ERROR", "the profile is bad")
            return -1
        if not bool(profile):
            return -1
        self.profiles.append(profile._shapes)
        return len(self.profiles) - 1

    def _build(self, builder: Any, network: Any, config: Any) -> Any:
        assert network._parser() is not None, "segmentation fault: the weights were freed"
        if not self.profiles:
            self.log("ERROR", "Network has dynamic or shape inputs, but no optimization profile")
            return None
        if network._strong and config._flags & WEAK_FLAGS:
            self.log("ERROR", "precision flags do not go with a strongly typed network")
            return None
        assert network._strong, "weakly typed: TensorRT 10 chooses the types that it likes"
        self.log("VERBOSE", "thousands of these")
        self.log("INFO", "building")
        self.log("WARNING", "a slow\nkernel")
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, self.steps)
        for step in range(self.steps):
            if monitor.step_complete("Building engine", step) is not True:
                self.log("ERROR", "Error Code 7: Internal Error (BuildCanceled)")
                return None
        self.finished = True
        monitor.phase_finish("Building engine")
        if config._cache is not None:
            config._cache._content = self.cache
        return self._given("build_serialized_network", self.trt.make("IHostMemory", _content=PLAN))

    def _create_cache(self, config: Any, content: bytes) -> Any:
        return self._given(
            "create_timing_cache", self.trt.make("ITimingCache", _content=bytes(content))
        )

    def _set_cache(self, config: Any, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch, "times of another GPU"
        if "set_timing_cache" in self.refuse and cache._content:
            return False
        config._cache = cache
        return True

    def _serialize(self, cache: Any) -> Any:
        return self._given("serialize", self.trt.make("IHostMemory", _content=cache._content))

    def _combine(self, cache: Any, other: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch, "times of another GPU"
        self.combined.append(other._content)
        cache._content += other._content
        return "combine" not in self.refuse

    def _deserialize(self, runtime: Any, plan: bytes) -> Any:
        trusted = vars(runtime).get("_set_engine_host_code_allowed", False)
        if plan != PLAN or ("VERSION_COMPATIBLE" in self.config._flags and not trusted):
            self.log("ERROR", "the plan holds host code")
            return None
        return self._given("deserialize_cuda_engine", self.trt.make("ICudaEngine"))

    def _inform(self, inspector: Any, form: Any) -> str:
        assert form is self.trt.LayerInformationFormat.JSON
        if self.information is not None:
            return self.information
        kinds = [{FLOAT: "Float", HALF: "Half"}.get(kind, kind) for kind in self.kinds]
        new = self.version == "11.4"
        layers = [
            {
                "Name": f"layer {index}",
                "LayerType": "gemm",
                "Inputs": [
                    {"Format": "linear", "Datatype": kind} if new else {"Format/Datatype": kind}
                ],
            }
            for index, kind in enumerate(kinds)
        ]
        return json.dumps({"Layers": layers})
