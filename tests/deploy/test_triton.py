"""The Triton repository, parsed with Triton's own protobuf and compared with the engine."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton_pb

from eps_deploy.bundle import Bundle, load_bundle
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.triton import TritonModel, write_repository

DTYPES = {"tensor(uint8)": triton_pb.TYPE_UINT8, "tensor(float)": triton_pb.TYPE_FP32}


@pytest.fixture
def loaded(bundle: Path) -> Bundle:
    """A bundle that was verified; its repository is gone, and there is something like a plan."""
    found = load_bundle(bundle)
    shutil.rmtree(bundle / "triton")
    (bundle / "model.plan").write_bytes(b"a plan")
    return found


def served(bundle: Bundle, **changes: Any) -> TritonModel:
    fields: dict[str, Any] = {
        "input_shape": bundle.input_shape,
        "labels": bundle.labels,
        "preprocessing": bundle.preprocessing.described(),
        "max_batch": 32,
        "kind": "KIND_CPU",
        "threads": 1,
    }
    return TritonModel(**{**fields, **changes})


def images(bundle: Bundle) -> Any:
    return np.load(bundle.root / "samples.npz")["images"]


def read(path: Path) -> Any:
    return text_format.Parse(path.read_text(encoding="utf-8"), triton_pb.ModelConfig())


def write(bundle: Bundle, **changes: Any) -> tuple[Path, Any]:
    model = write_repository(bundle.root, served(bundle, **changes), images(bundle), name="mine")
    return model, read(model / "config.pbtxt")


def test_the_bundle_has_one(deployed: Path) -> None:
    found = load_bundle(deployed / "bundle")
    folder = found.root / "triton" / "eps_resnet"
    told = read(folder / "config.pbtxt")
    assert list(told.input[0].dims) == found.manifest["input"]["shape"][1:]
    assert told.max_batch_size == found.manifest["engine"]["max_batch"]
    assert (folder / "1" / "model.onnx").read_bytes() == found.read("model.onnx")
    assert (folder / "labels.txt").read_text(encoding="utf-8").splitlines() == list(found.labels)
    assert {"triton/eps_resnet/config.pbtxt", "triton/eps_resnet/1/model.onnx"} <= set(
        found.manifest["files"]
    )


def test_the_config_is_that_of_the_engine(loaded: Bundle) -> None:
    _, found = write(loaded)
    with OrtEngine(loaded.read("model.onnx")) as engine:
        ports = {
            port.name: (DTYPES[port.type], list(port.shape[1:]))
            for port in (*engine._session.get_inputs(), *engine._session.get_outputs())
        }
        assert found.max_batch_size <= engine.max_batch
        full = np.zeros((found.max_batch_size, *found.input[0].dims), dtype=np.uint8)
        assert engine.infer(full).shape == (32, found.output[0].dims[0])
    told = {port.name: (port.data_type, list(port.dims)) for port in (*found.input, *found.output)}
    assert told == ports


def test_what_is_served_is_the_bundle_s_model(loaded: Bundle) -> None:
    model, found = write(loaded)
    assert found.name == model.name == "mine"
    assert (found.backend, found.default_model_filename) == ("onnxruntime", "model.onnx")
    assert (model / "1" / "model.onnx").read_bytes() == loaded.read("model.onnx")
    assert not (model / "1" / "model.plan").exists()
    assert not (model / "configs").exists()
    assert [group.kind for group in found.instance_group] == [triton_pb.ModelInstanceGroup.KIND_CPU]
    assert found.parameters["intra_op_thread_count"].string_value == "1"
    told = json.loads(found.parameters["preprocessing"].string_value)
    assert (told["interpolation"], told["antialias"]) == ("bilinear", True)
    assert (told["fit"], told["pad_value"]) == ("crop", None)
    assert found.WhichOneof("scheduling_choice") == "dynamic_batching"


def test_a_plan_is_served_where_there_is_one_and_the_onnx_stays_at_hand(loaded: Bundle) -> None:
    model, found = write(loaded, capability="9.0", kind="KIND_AUTO", threads=None)
    assert (found.backend, found.default_model_filename) == ("tensorrt", "model.plan")
    assert dict(found.cc_model_filenames) == {"9.0": "model.plan"}
    assert (model / "1" / "model.plan").read_bytes() == b"a plan"
    assert found.instance_group[0].kind == triton_pb.ModelInstanceGroup.KIND_GPU
    other = read(model / "configs" / "onnx.pbtxt")
    assert (other.backend, other.default_model_filename) == ("onnxruntime", "model.onnx")
    assert other.instance_group[0].kind == triton_pb.ModelInstanceGroup.KIND_AUTO
    assert set(other.parameters) == {"preprocessing"}
    for field in ("name", "max_batch_size", "input", "output", "model_warmup"):
        assert getattr(other, field) == getattr(found, field)


@pytest.mark.parametrize(
    ("max_batch", "graphs"),
    [
        (32, [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]),
        (6, [(1, 1), (2, 2), (3, 4), (5, 6)]),
        (1, [(1, 1)]),
    ],
)
def test_a_plan_has_graphs_for_all_batches_and_two_instances_of_all_its_profiles(
    loaded: Bundle, max_batch: int, graphs: list[tuple[int, int]]
) -> None:
    model, found = write(loaded, capability="9.0", max_batch=max_batch)
    (group,) = found.instance_group
    profiles = BuildOptions(max_batch=max_batch, opt_batch=1).profiles
    assert (group.count, list(group.profile)) == (2, [str(i) for i in range(len(profiles))])
    assert found.optimization.cuda.graphs
    specs = found.optimization.cuda.graph_spec
    shape = list(loaded.input_shape)
    covered = []
    for spec in specs:
        assert list(spec.input["images"].dim) == shape
        lowest = spec.batch_size
        if spec.HasField("graph_lower_bound"):
            assert list(spec.graph_lower_bound.input["images"].dim) == shape
            lowest = spec.graph_lower_bound.batch_size
        covered.append((lowest, spec.batch_size))
    assert covered == graphs
    # They are for TensorRT alone: Triton refuses profiles of another backend.
    other = read(model / "configs" / "onnx.pbtxt")
    assert not other.HasField("optimization")
    assert not other.instance_group[0].profile


def test_warm_ups_are_real_images_of_one_sample_each(loaded: Bundle) -> None:
    model, found = write(loaded)
    samples = images(loaded)
    sizes = [warm_up.batch_size for warm_up in found.model_warmup]
    assert (min(sizes), max(sizes)) == (1, found.max_batch_size)
    assert len({warm_up.name for warm_up in found.model_warmup}) == len(sizes)
    for index, warm_up in enumerate(found.model_warmup[:-1]):
        given = warm_up.inputs["images"]
        # Triton repeats one image up to batch_size: neither dims nor the file hold a batch.
        assert (given.data_type, list(given.dims)) == (
            triton_pb.TYPE_UINT8,
            list(loaded.input_shape),
        )
        raw = (model / "warmup" / given.input_data_file).read_bytes()
        assert raw == samples[index].tobytes()
    used = {warm_up.inputs["images"].input_data_file for warm_up in found.model_warmup}
    assert used == {path.name for path in (model / "warmup").iterdir()}


def test_a_largest_batch_of_one(loaded: Bundle) -> None:
    _, found = write(loaded, max_batch=1)
    assert found.max_batch_size == 1
    assert {warm_up.batch_size for warm_up in found.model_warmup} == {1}


def test_labels_with_line_breaks(loaded: Bundle) -> None:
    names = ["plain", "two\nlines", 'a "quoted" one', "名前", *loaded.labels[4:]]
    model, found = write(loaded, labels=names)
    lines = (model / found.output[0].label_filename).read_text(encoding="utf-8").splitlines()
    assert lines[:4] == ["plain", "two lines", 'a "quoted" one', "名前"]
    assert len(lines) == found.output[0].dims[0]


def test_no_hard_links(loaded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("os.link", refuse)
    model, _ = write(loaded)
    assert (model / "1" / "model.onnx").read_bytes() == loaded.read("model.onnx")


def test_it_needs_neither_torch_nor_protobuf() -> None:
    code = "import sys, eps_deploy.triton; print(*sys.modules)"
    loaded_modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "google.protobuf", "onnx", "onnxruntime"} & set(loaded_modules)
