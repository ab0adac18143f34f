"""ONNX Runtime as an engine: what it answers, and what it refuses."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from onnx import TensorProto, helper

from eps_core.errors import DataError
from eps_deploy.engines import ort
from eps_deploy.engines.base import Engine, EngineError
from eps_deploy.engines.ort import OrtEngine, Provider
from eps_deploy.export.export import export_onnx
from eps_deploy.export.quantize import quantize
from eps_deploy.precision import PRECISIONS
from tests.deploy.engines.trt.mutation import mutated
from tests.deploy.export.test_export import identity, network
from tests.deploy.fake_ort import GPU, FakeSession


def tiny_model(
    *, dtype: int = TensorProto.UINT8, name: str = "images", height: int | str = 2
) -> bytes:
    """Pixel sums by channel, as an ONNX model with the bundle's inputs and outputs."""
    nodes = [
        helper.make_node("Cast", [name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["float", "axes"], ["logits"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, dtype, ["N", 3, height, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("batch", [1, 5, 256])
def test_infer(batch: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (batch, 3, 2, 2), dtype=np.uint8)
    engine: Engine
    with OrtEngine(tiny_model()) as engine:
        logits = engine.infer(images)
    assert logits.dtype == np.float32
    assert logits.tolist() == images.sum(axis=(2, 3)).tolist()


def test_a_strided_view_is_as_good_as_a_copy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 2, 2, 3), dtype=np.uint8)
    view = images.transpose(0, 3, 1, 2)[::2]
    with OrtEngine(tiny_model()) as engine:
        assert (engine.infer(view) == engine.infer(np.ascontiguousarray(view))).all()


def test_signature_and_description() -> None:
    with OrtEngine(tiny_model(), threads=2) as engine:
        assert (engine.input_shape, engine.classes, engine.max_batch) == ((3, 2, 2), 3, 256)
        told = engine.describe()
    assert (told["name"], told["provider"], told["threads"]) == ("ort", "CPUExecutionProvider", 2)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (np.zeros((1, 3, 2, 2), np.float32), "uint8"),
        (np.zeros((1, 3, 2, 2), np.int8), "uint8"),
        ([[1, 2]], "uint8"),
        (np.zeros((3, 2, 2), np.uint8), r"\[N, 3, 2, 2\], not \[3, 2, 2\]"),
        (np.zeros((1, 3, 2, 4), np.uint8), r"\[N, 3, 2, 2\], not \[1, 3, 2, 4\]"),
        (np.zeros((0, 3, 2, 2), np.uint8), "1 to 256 images, not 0"),
        (np.zeros((257, 3, 2, 2), np.uint8), "1 to 256 images, not 257"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Any, told: str) -> None:
    with OrtEngine(tiny_model()) as engine, pytest.raises(DataError, match=told) as refusal:
        engine.infer(images)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"not onnx", tiny_model()[:50]])
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match=r"some\.onnx: ONNX Runtime cannot load it"):
        OrtEngine(content, name="some.onnx")


@pytest.mark.parametrize(
    "foreign",
    [tiny_model(name="pixels"), tiny_model(dtype=TensorProto.FLOAT)],
    ids=["other input", "other type"],
)
def test_a_stranger_s_model_is_refused(foreign: bytes) -> None:
    with pytest.raises(EngineError, match="not a network exported by eps-deploy"):
        OrtEngine(foreign)


def test_image_size_must_be_fixed() -> None:
    with pytest.raises(EngineError, match="must be fixed"):
        OrtEngine(tiny_model(height="H"))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_onnxruntime_without_gpu_names_the_one_that_has_it(
    monkeypatch: pytest.MonkeyPatch, provider: Provider
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"a\.onnx: .*eps-resnet\[ort-gpu\]") as refusal:
        OrtEngine(tiny_model(), provider=provider, name="a.onnx")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("provider", "remedy"), [("cuda", "eps-doctor"), ("tensorrt", "libnvinfer.so.10")]
)
def test_the_provider_that_really_runs_is_asserted(
    with_gpu: type[FakeSession], provider: Provider, remedy: str
) -> None:
    """ONNX Runtime falls back in silence when a provider's libraries do not load."""
    with_gpu.granted = ["CPUExecutionProvider"]
    with pytest.raises(EngineError, match=f"runs it on CPU.*, not on .*{remedy}") as refusal:
        OrtEngine(tiny_model(), provider=provider)
    assert "\n" not in str(refusal.value)


def test_cuda_rounds_to_tf32_only_when_asked(
    with_gpu: type[FakeSession], capfd: pytest.CaptureFixture[str]
) -> None:
    for name, flag in (("fp32", "0"), ("tf32", "1")):
        with OrtEngine(tiny_model(), provider="cuda", precision=PRECISIONS[name]) as engine:
            told = engine.describe()
        provider, settings = with_gpu.providers[0]
        assert (provider, settings["use_tf32"]) == ("CUDAExecutionProvider", flag)
        assert (told["provider"], told["tf32"]) == ("CUDAExecutionProvider", name == "tf32")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_cuda_does_not_time_every_algorithm_at_each_batch_size(
    with_gpu: type[FakeSession], provider: Provider
) -> None:
    """ONNX Runtime's default does: a server would stall at each size that it has not seen."""
    with OrtEngine(tiny_model(), provider=provider):
        settings = dict(with_gpu.providers)["CUDAExecutionProvider"]
    assert settings["cudnn_conv_algo_search"] == "HEURISTIC"


BATCHES = (1, 3, 4, 8, 5, 1, 7, 2, 3, 10)
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 3, 2, 2), dtype=np.uint8)


def runs_on_cuda(kind: Any, session: type[FakeSession], **arguments: Any) -> dict[str, Any]:
    """Right answers for batches in any order, and for strided ones; what `describe` says then."""
    with kind(tiny_model(), provider="cuda", max_batch=10, **arguments) as engine:
        for batch in BATCHES:
            first = np.ascontiguousarray(PIXELS[:batch])
            for images in (first, first[::-1], first.transpose(0, 1, 3, 2)):
                found = engine.infer(images)
                assert found.dtype == np.float32
                assert found.tolist() == images.sum(axis=(2, 3)).tolist(), batch
        kept = engine.infer(PIXELS[:2])
        engine.infer(PIXELS[2:4])
        assert kept.tolist() == PIXELS[:2].sum(axis=(2, 3)).tolist()
        told: dict[str, Any] = engine.describe()["cuda_graphs"]
    return told


def test_cuda_runs_each_padded_size_as_one_graph(with_gpu: type[FakeSession]) -> None:
    told = runs_on_cuda(OrtEngine, with_gpu)
    assert told == {
        "used": True,
        "why_not": None,
        "batches": [1, 2, 4, 8, 10],
        "not_captured": {},
    }
    assert sorted(with_gpu.captured) == [1, 2, 4, 8, 10]


def test_a_network_that_cuda_cannot_capture_runs_without_graphs(
    with_gpu: type[FakeSession],
) -> None:
    with_gpu.refuse_graphs = True
    told = runs_on_cuda(OrtEngine, with_gpu)
    assert (told["used"], told["batches"]) == (False, [])
    assert "cannot use the graph capture feature" in told["why_not"]


def test_after_a_failed_capture_cuda_runs_without_graphs(with_gpu: type[FakeSession]) -> None:
    with_gpu.fail_capture = 1
    told = runs_on_cuda(OrtEngine, with_gpu)
    assert (told["used"], told["batches"]) == (False, [])
    assert told["why_not"] == "CUDA failure 901: operation failed due to a previous error"
    assert [name for name, _ in with_gpu.threads] == ["CUDAExecutionProvider"] * 2


def test_cuda_runs_one_call_at_a_time(
    with_gpu: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's threads may share an engine, and a capture must not meet another run."""
    started = threading.Event()

    def during() -> None:
        started.set()
        time.sleep(0.02)

    monkeypatch.setattr(with_gpu, "during", staticmethod(during))
    answers: list[Any] = []
    with OrtEngine(tiny_model(), provider="cuda", max_batch=4) as engine:
        threads = [
            threading.Thread(target=lambda: answers.append(engine.infer(PIXELS[:3]).tolist()))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [PIXELS[:3].sum(axis=(2, 3)).tolist()] * 3


CUDA_FAULTS = {
    "one graph for all sizes": ("_GRAPH_ID, str(size)", '_GRAPH_ID, "1"'),
    "no graph id": (
        "if self._why_not is None:\n            options",
        "if False:\n            options",
    ),
    "the id that is ONNX Runtime's": ("_GRAPH_ID, str(size)", '_GRAPH_ID, "0"'),
    "the next smaller size": (
        "size for size in self._sizes if size >= len(images))",
        "size for size in self._sizes[::-1] if size <= len(images))",
    ),
    "tensors on the host": ('np.uint8, "cuda", 0)', 'np.uint8, "cpu", 0)'),
    "logits of another type": ('np.float32, "cuda", 0)', 'np.float16, "cuda", 0)'),
    "images not copied again": (
        "        bound.images.update_inplace(bound.staged)",
        "        if size not in self._bound:\n"
        "            bound.images.update_inplace(bound.staged)",
    ),
    "a strided array copied": (
        "bound.images.update_inplace(bound.staged)",
        "bound.images.update_inplace(images if len(images) == size else bound.staged)",
    ),
    "tensors bound anew": ("self._bound.get(size) or self._bind(size)", "self._bind(size)"),
    "run without its binding": (
        "self.session.run_with_iobinding(bound.binding, bound.options)",
        "self.session.run(None, {INPUT_NAME: bound.staged})",
    ),
    "all rows of the padded batch": ("[: len(images)].copy()", "[:size].copy()"),
}


@pytest.mark.parametrize("name", CUDA_FAULTS)
def test_a_broken_use_of_cuda_is_noticed(with_gpu: type[FakeSession], name: str) -> None:
    broken = mutated(ort, CUDA_FAULTS[name])
    try:
        told = runs_on_cuda(broken.OrtEngine, with_gpu)
    except (AssertionError, EngineError, ValueError):
        return
    assert not told["used"], "wrong, and nothing says so"


@pytest.mark.parametrize(("name", "flag"), [("fp32", "0"), ("fp16", "1"), ("int8-fp16", "1")])
def test_cuda_computes_float16_channels_last(
    with_gpu: type[FakeSession], name: str, flag: str
) -> None:
    with OrtEngine(tiny_model(), provider="cuda", precision=PRECISIONS[name]):
        assert dict(with_gpu.providers)["CUDAExecutionProvider"]["prefer_nhwc"] == flag


def test_what_cudnn_tries_in_vain_is_not_printed(with_gpu: type[FakeSession]) -> None:
    """cuDNN's attempts go to the logger of the process; a failure is raised as an exception."""
    with OrtEngine(tiny_model(), provider="cuda", precision=PRECISIONS["fp16"]):
        assert with_gpu.severities == [4]


def test_tensorrt_is_tried_before_cuda(with_gpu: type[FakeSession]) -> None:
    with OrtEngine(tiny_model(), provider="tensorrt") as engine:
        assert engine.describe()["provider"] == "TensorrtExecutionProvider"
    assert tuple(name for name, _ in with_gpu.providers) == GPU


def test_the_largest_batch_is_a_choice() -> None:
    images = np.zeros((3, 3, 2, 2), np.uint8)
    with OrtEngine(tiny_model(), max_batch=2) as engine:
        assert (engine.max_batch, engine.describe()["max_batch"]) == (2, 2)
        with pytest.raises(DataError, match="1 to 2 images, not 3"):
            engine.infer(images)
    with pytest.raises(EngineError, match="at least 1, not 0"):
        OrtEngine(tiny_model(), max_batch=0)


def test_bfloat16_cannot_run_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(network(3), identity((8, 8), 3), path, precision=PRECISIONS["bf16"])
    with pytest.raises(EngineError, match=r"bfloat16 .* use --fp32 or --fp16") as refusal:
        OrtEngine(path.read_bytes())
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_exact_arithmetic_is_that_of_the_file(tmp_path: Path) -> None:
    """Not ONNX Runtime's int8 kernels, which round biases too; TensorRT does as the file says."""
    path = tmp_path / "model.onnx"
    export_onnx(network(3), identity((8, 8), 3), path)
    images = np.random.default_rng(0).integers(0, 256, (100, 3, 8, 8), dtype=np.uint8)
    model = quantize(path.read_bytes(), images, PRECISIONS["int8"])
    reference = onnx.load_from_string(model)
    reference.opset_import[0].version = 19  # the first that the evaluator knows; it means the same
    evaluator = onnx.reference.ReferenceEvaluator(reference)
    expected = np.asarray(next(iter(evaluator.run(None, {"images": images[:4]}))))
    with OrtEngine(model, exact_qdq=True) as engine:
        assert engine.describe()["exact_qdq"]
        found = engine.infer(images[:4])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    with OrtEngine(tiny_model()) as engine:
        pass
    with pytest.raises(EngineError, match="closed"):
        engine.infer(np.zeros((1, 3, 2, 2), np.uint8))


CPUINFO = "processor\t: 0\nmodel name\t: Any\nflags\t\t: fpu avx2 {}\nbugs\t\t: avx_vnni\n"


@pytest.mark.parametrize(
    ("cpuinfo", "known"),
    [
        (CPUINFO.format("avx512_vnni"), True),
        (CPUINFO.format("avx_vnni sse"), True),
        (CPUINFO.format("avx512f"), False),
        ("", False),
        (None, False),
    ],
)
def test_whether_the_processor_has_vnni(
    cpuinfo: str | None, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **_: str) -> str:
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)
    assert ort.has_vnni() is known


@pytest.mark.parametrize("vnni", [True, False])
def test_without_vnni_int8_kernels_are_the_exact_ones(
    vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is judged is what is served: the fast kernels saturate on such processors."""
    monkeypatch.setattr(ort, "has_vnni", lambda: vnni)
    with OrtEngine(tiny_model()) as engine:
        options = engine._session.get_session_options()
        key = "session.x64quantprecision"
        if vnni:
            with pytest.raises(RuntimeError, match=key):
                options.get_session_config_entry(key)
        else:
            assert options.get_session_config_entry(key) == "1"
