"""`eps-bench` on our own and on foreign model files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from eps_deploy.cli.bench import main
from tests.commands import Result, files_in, run


def bench(folder: Path, *args: object) -> Result:
    return run("eps-bench", main, "--time-budget", "0.1", *args, cwd=folder)


def foreign(
    path: Path,
    *,
    shape: tuple[int | str, ...] = ("batch", 3, 8, 8),
    kind: int = TensorProto.FLOAT,
    classes: int = 10,
    inputs: int = 1,
) -> Path:
    """A convolution and a mean, with unusual names."""
    weight = np.random.default_rng(0).normal(size=(classes, 3, 3, 3)).astype(np.float32)
    ports = [
        helper.make_tensor_value_info(f"pixel_values_{n}", kind, list(shape)) for n in range(inputs)
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["pixel_values_0"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
            helper.make_node("GlobalAveragePool", ["y"], ["z"]),
            helper.make_node("Flatten", ["z"], ["probs"]),
        ],
        "somebody",
        ports,
        [helper.make_tensor_value_info("probs", TensorProto.FLOAT, [shape[0], classes])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, path)
    return path


def test_two_files_of_a_bundle(deployed: Path) -> None:
    result = bench(deployed, "bundle/baseline.onnx", "bundle/model.onnx", "--json")
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [batch["batch"] for batch in found["batches"]] == [1, 16]
    assert found["passed"] is True
    assert found["unlike"] == {}
    assert found["files"][1] == {
        "file": "bundle/model.onnx",
        "input": "uint8 [1, 8, 8]",
        "output": "float32 [10]",
        "precision": "fp32",
        "runtime": found["files"][0]["runtime"],
        "provider": "cpu",
        "threads": 1,
        "remark": None,
    }
    for batch in found["batches"]:
        first, second = (each["call"] for each in batch["files"])
        assert first["speedup"] is None
        assert second["speedup"]["low"] <= second["speedup"]["high"]
        assert second["verdict"] in ("faster", "slower", "cannot tell")
        assert list(second["ms"].values()) == sorted(second["ms"].values())
        assert batch["noise"]
    assert "speed-up (95 % interval)" in result.stderr
    assert "reference" in result.stderr


def test_a_bundle_is_timed_from_the_image_on_too(deployed: Path) -> None:
    result = bench(deployed, "bundle", "bundle", "--batch", 1, "--json")
    assert result.code == 0, result.stderr
    (batch,) = json.loads(result.stdout)["batches"]
    assert set(batch["files"][1]) == {"file", "call", "end_to_end"}
    assert "from an image's bytes to a label" in result.stderr


def test_networks_in_torch(deployed: Path) -> None:
    result = bench(deployed, "ckpt.pt", "compact.pt", "baseline.pt", "--batch", 2, "--json")
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {each["precision"] for each in found["files"]} == {"fp32"}
    assert found["files"][0]["runtime"].startswith("torch ")
    assert len(found["batches"][0]["files"]) == 3


def test_a_mismatch_is_refused_and_then_stated(deployed: Path) -> None:
    files = ("compact.pt", "bundle/model.onnx", "--batch", 1)
    refused = bench(deployed, *files)
    assert (refused.code, refused.stdout) == (1, "")
    assert "compact.pt and bundle/model.onnx do not match: runtime torch" in refused.error
    assert "--allow-mismatch" in refused.error
    allowed = bench(deployed, *files, "--allow-mismatch", "--json")
    assert allowed.code == 0, allowed.stderr
    assert "MISMATCH in runtime" in allowed.stderr
    assert list(json.loads(allowed.stdout)["unlike"]) == ["runtime"]
    header = next(line for line in allowed.stderr.splitlines() if "p50 ms" in line)
    assert "runtime" in header


@pytest.mark.parametrize(
    ("shape", "kind", "batches", "input"),
    [
        (("batch", 3, 8, 8), TensorProto.FLOAT, [1, 16], "float32 [3, 8, 8]"),
        ((4, 3, 8, 8), TensorProto.FLOAT, [4], "float32 [3, 8, 8]"),
        (("n", 3, 8, 8), TensorProto.UINT8, [1, 16], "uint8 [3, 8, 8]"),
        (("n", 3, 6, 9), TensorProto.FLOAT16, [1, 16], "float16 [3, 6, 9]"),
    ],
)
def test_a_foreign_network(
    tmp_path: Path, shape: tuple[int | str, ...], kind: int, batches: list[int], input: str
) -> None:
    foreign(tmp_path / "theirs.onnx", shape=shape, kind=kind)
    result = bench(tmp_path, "theirs.onnx", "--json")
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [batch["batch"] for batch in found["batches"]] == batches
    assert (found["files"][0]["input"], found["files"][0]["precision"]) == (input, "fp32")


def test_weights_beside_the_file_are_found(tmp_path: Path) -> None:
    model = onnx.load(foreign(tmp_path / "theirs.onnx"))
    onnx.save(
        model, tmp_path / "split.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    assert (tmp_path / "w").exists()
    assert bench(tmp_path, "split.onnx", "--batch", 1).code == 0
    # As a download cache has them: both are links into a store.
    (tmp_path / "blobs").mkdir()
    for name, blob in (("split.onnx", "1"), ("w", "2")):
        (tmp_path / name).rename(tmp_path / "blobs" / blob)
        (tmp_path / name).symlink_to(f"blobs/{blob}")
    linked = bench(tmp_path, "split.onnx", "--batch", 1)
    assert linked.code == 0, linked.stderr


@pytest.mark.parametrize("location", ["../w", "missing"])
def test_weights_that_are_not_beside_the_file(tmp_path: Path, location: str) -> None:
    model = onnx.load(foreign(tmp_path / "theirs.onnx"))
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "split.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w", size_threshold=0)
    (tmp_path / "inner" / "w").rename(tmp_path / "w")
    split = onnx.load(path, load_external_data=False)
    for entry in split.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(split.SerializeToString())
    result = bench(tmp_path, path, "--batch", 1)
    assert result.code == 1
    assert len(result.stderr.splitlines()) == 1
    assert str(path) in result.error


def test_a_float16_file_on_a_processor_without_float16_has_a_remark(
    tmp_path: Path,
) -> None:
    """ONNX Runtime computes it in float32: what is timed is not what the file says."""
    model = onnx.load(foreign(tmp_path / "theirs.onnx"))
    weight = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    model.graph.node[0].attribute[0].i = TensorProto.FLOAT16
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    result = bench(tmp_path, "half.onnx", "--batch", 1, "--json")
    assert result.code == 0, result.stderr
    (file,) = json.loads(result.stdout)["files"]
    assert file["precision"] == "fp16"
    assert "says nothing" in file["remark"] or "say nothing" in file["remark"]
    assert "float32, with casts" in result.stderr
    unlike = bench(tmp_path, "theirs.onnx", "half.onnx")
    assert unlike.code == 1
    assert "precision fp32 and fp16" in unlike.error


def test_the_batch_with_most_throughput_under_a_limit(deployed: Path) -> None:
    result = run(
        "eps-bench", main, "bundle/model.onnx", "--slo-ms", 60_000, "--time-budget", 0, "--json",
        cwd=deployed,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    (sweep,) = json.loads(result.stdout)["sweeps"]
    tried = [each["batch"] for each in sweep["tried"]]
    assert tried == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert sweep["best"]["rate"] == max(each["rate"] for each in sweep["tried"])


def test_a_limit_that_nothing_keeps_is_a_failed_check(deployed: Path) -> None:
    result = bench(deployed, "bundle/model.onnx", "--slo-ms", "1e-6", "--json")
    assert result.code == 3
    found = json.loads(result.stdout)
    assert found["passed"] is False
    assert found["sweeps"][0]["best"] is None
    assert "no batch size keeps p99 within" in result.stderr


def test_all_of_it_goes_into_a_file(deployed: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    arguments = ("bundle/model.onnx", "--batch", 1, "-o", output)
    assert bench(deployed, *arguments).code == 0
    found: dict[str, Any] = json.loads(output.read_bytes())
    (batch,) = found["batches"]
    samples = batch["files"][0]["call"]["samples"]
    assert (len(samples), len(samples[0])) == (batch["blocks"], batch["runs_per_block"])
    before = output.read_bytes()
    again = bench(deployed, *arguments)
    assert again.code == 1
    assert "exists already" in again.error
    assert output.read_bytes() == before
    assert bench(deployed, *arguments, "--force").code == 0


def make_bad_files(folder: Path) -> None:
    (folder / "text.onnx").write_text("not a network")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "foreign.pt").write_bytes(b"PK not ours")
    (folder / "alone.plan").write_bytes(b"ftrt")
    (folder / "folder").mkdir()
    foreign(folder / "two.onnx", inputs=2)
    foreign(folder / "sizes.onnx", shape=("n", 3, "h", "w"))
    foreign(folder / "fixed.onnx", shape=(4, 3, 8, 8))
    foreign(folder / "ints.onnx", kind=TensorProto.INT64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.onnx"], "nowhere.onnx: no such file"),
        (["nowhere.pt"], "nowhere.pt: no such file"),
        (["nowhere.plan"], "nowhere.plan: no such file"),
        (["nowhere"], "nowhere: no such file"),
        (["notes.txt"], "notes.txt: no such file; name a bundle's folder"),
        (["text.onnx"], "text.onnx: not an ONNX file"),
        (["empty.onnx"], "empty.onnx: "),
        (["foreign.pt"], "foreign.pt: damaged, truncated, or not an eps-resnet file"),
        (["alone.plan"], "alone.plan.json: no such file, and a plan is not loaded without it"),
        (["folder"], "folder: not a bundle of eps-deploy"),
        (["two.onnx"], "two.onnx: eps-bench times networks with one input of images"),
        (["ints.onnx"], "ints.onnx: eps-bench times networks with one input of images"),
        (["sizes.onnx"], "sizes.onnx: the size of its images is not fixed"),
        (["fixed.onnx", "--batch", "1"], "fixed.onnx: takes batches of exactly 4 images, not 1"),
        (["fixed.onnx", "--slo-ms", "5"], "fixed.onnx: takes batches of exactly 4 images"),
        (["foreign.pt", "--provider", "tensorrt"], "torch has no such provider"),
        (["fixed.onnx", "-o", "text.onnx"], "text.onnx: exists already"),
        (["nowhere.onnx", "-o", "text.onnx"], "nowhere.onnx: no such file"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    make_bad_files(tmp_path)
    before = files_in(tmp_path)
    result = bench(tmp_path, *arguments)
    assert (result.code, result.stdout) == (1, "")
    assert message in result.error
    assert len(result.error.splitlines()) == 1
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.onnx", "--batch", "0"],
        ["a.onnx", "--threads", "0"],
        ["a.onnx", "--time-budget", "-1"],
        ["a.onnx", "--time-budget", "nan"],
        ["a.onnx", "--slo-ms", "0"],
        ["a.onnx", "--slo-ms", "5", "--batch", "1"],
        ["a.onnx", "--provider", "rocm"],
    ],
)
def test_usage_errors(tmp_path: Path, arguments: list[str]) -> None:
    assert bench(tmp_path, *arguments).code == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ckpt.pt", "compact.pt"])
def test_torch_on_a_gpu(deployed: Path, name: str) -> None:
    result = bench(deployed, name, "--provider", "cuda", "--json")
    assert result.code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["files"][0]["provider"], found["files"][0]["threads"]) == ("cuda", None)
