"""`eps-deploy` in every precision, for both engines, dry, and deferred."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from eps_compact.cli import main as compact_main
from eps_deploy import load_bundle
from eps_deploy.bench.accuracy import PARITY_LIMITS
from eps_deploy.cli.deploy import main
from eps_deploy.cli.verify import main as verify_main
from eps_deploy.engines.base import EngineError
from eps_deploy.export.export import Deployed
from eps_deploy.export.types import layer_types
from eps_deploy.pipeline import builder, write
from eps_deploy.pipeline.inputs import find_inputs
from eps_deploy.pipeline.pipeline import TestSet
from eps_train.data import dataset
from eps_train.gating import rewriting
from eps_train.models.resnets import Normalize
from tests.checkpoints import make_checkpoint
from tests.commands import Result, files_in, run
from tests.deploy.fake_ort import FakeSession

ANYTHING_GOES = ("--min-speedup", "0", "--max-accuracy-drop", "100", "--time-budget", "0.4")
DEFERRED = ("--engine", "trt", "--defer-build")
FULL_CHAIN = ["gated-compact", "compact-onnx", "onnx-engine", "baseline-onnx", "baseline-engine"]


def deploy(folder: Path, *args: object) -> Result:
    return run("eps-deploy", main, *ANYTHING_GOES, *args, cwd=folder)


def report_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "bundle" / "report.json").read_bytes())
    return loaded


@pytest.mark.usefixtures("any_class")
def test_int8_is_judged_as_the_file_says_and_as_it_is_served(workshop: Path) -> None:
    """ONNX Runtime's int8 kernels round otherwise than the file says."""
    result = deploy(workshop, "--engine", "ort", "--int8", "--calibration-samples", "128")
    assert result.code == 0, result.stderr
    report = report_of(workshop)
    assert [stage["stage"] for stage in report["parity"]] == FULL_CHAIN
    limits = {stage["stage"]: stage["limit"] for stage in report["parity"]}
    assert limits["onnx-engine"] == limits["baseline-engine"] == PARITY_LIMITS["int8"]
    assert "parity-onnx-engine" in [check["name"] for check in report["checks"]]
    accuracy = report["accuracy"]
    assert accuracy[accuracy["judged"]] == min(accuracy["onnx"], accuracy["engine"])
    assert verify(workshop / "bundle") == {
        "files": True,
        "report": True,
        "onnx": True,
        "engine": True,
    }
    precision = report["precision"]
    assert (precision["name"], precision["calibration"]["samples"]) == ("int8", 128)
    assert set(precision["graph"]) == {"int8"}
    assert len(report["latency"]) == 2
    assert load_bundle(workshop / "bundle").manifest["precision"] == "int8"


SPOILED = "stages.1.1"


def make_spoiled(folder: Path) -> Path:
    """A workshop whose network is right in float, and in int8 wrong because of one block alone.

    One channel of that block is so much larger than the others that int8 leaves nothing of them;
    the next convolution takes it back. The classifiers are fitted, so that many answers are right.
    """
    digits = dataset.load("digits")
    for name, gated in (("ckpt.pt", True), ("baseline.pt", False)):
        made = make_checkpoint(depth=14, width=8, gated=gated)
        network = rewriting.drop_taps(rewriting.drop_gates(made.build_gated())).eval()
        with torch.no_grad():
            if gated:
                network.get_parameter(f"{SPOILED}.bn2.weight")[0] = 3000
                network.get_parameter(f"{SPOILED}.conv2.weight")[:, 0] /= 3000
            network.get_parameter("classifier.bias").zero_()
            network.get_parameter("classifier.weight").copy_(_fitted(network, digits))
        state = made.state | dict(network.state_dict())
        replace(made, state=state).save(folder / name)
    assert run("eps-compact", compact_main, "ckpt.pt", "--no-data", cwd=folder).code == 0
    return folder


def _fitted(network: torch.nn.Module, digits: dataset.Data) -> torch.Tensor:
    """Weights of the classifier by least squares on the test images."""
    seen: list[torch.Tensor] = []
    classifier = network.get_submodule("classifier")
    hook = classifier.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    network(Normalize.of(digits.identity)(digits.test.images))
    hook.remove()
    wanted = torch.nn.functional.one_hot(digits.test.labels, 10).float()
    # The default driver, gelsy, gives another solution from time to time: one feature is always 0.
    solution: torch.Tensor = torch.linalg.lstsq(seen[0], wanted, driver="gelsd").solution
    return solution.T


def test_repair_keeps_the_blocks_that_int8_harms_and_no_other(tmp_path: Path) -> None:
    folder = make_spoiled(tmp_path)
    flags = ("--int8", "--calibration-samples", "100", "--repair", "--max-accuracy-drop", "20")
    deploy(folder, "--engine", "ort", *flags)
    report = report_of(folder)
    precision, repair = report["precision"], report["precision"]["repair"]
    assert repair["drop_before"] > 20 >= repair["drop_after"]
    assert repair["passed"]
    assert precision["kept"] == [SPOILED]
    types = layer_types(onnx.load(folder / "bundle" / "model.onnx"))
    in_float = {layer for layer, found in types.items() if found == "float32"}
    assert in_float == {f"{SPOILED}.conv1", f"{SPOILED}.conv2"}
    assert report["accuracy"]["drop"]["points"] == pytest.approx(repair["drop_after"])
    (check,) = [check for check in report["checks"] if check["name"] == "accuracy"]
    assert check["passed"]
    told = (folder / "bundle" / "report.md").read_text()
    assert f"kept in higher precision: {SPOILED}\n" in told.replace(".\n", "\n")


@pytest.mark.parametrize(
    "flags", [("--repair", "--int8"), ("--max-class-drop", "5")], ids=["repair", "class"]
)
def test_what_wants_something_to_measure_against(workshop: Path, flags: tuple[str, ...]) -> None:
    (workshop / "baseline.pt").unlink()
    before = files_in(workshop)
    result = deploy(workshop, "--engine", "ort", *flags)
    assert result.code == 1
    assert f"{flags[0]}: there is no trained baseline" in result.error
    assert files_in(workshop) == before


def test_a_class_that_is_forgotten_fails_its_check(tmp_path: Path) -> None:
    """The baseline answers 3 to every image, the compact network 5: on average nothing is lost."""
    for name, gated, answer in (("ckpt.pt", True, 5), ("baseline.pt", False, 3)):
        made = make_checkpoint(depth=8, gated=gated)
        made.state["classifier.bias"] = 50.0 * torch.nn.functional.one_hot(torch.tensor(answer), 10)
        made.save(tmp_path / name)
    assert run("eps-compact", compact_main, "ckpt.pt", "--no-data", cwd=tmp_path).code == 0
    flags = ("--engine", "ort", "--max-accuracy-drop", "2", "--max-class-drop")
    result = deploy(tmp_path, *flags, "30")
    assert result.code == 3, result.stderr
    assert "Verdict: FAILED: class-accuracy (1 of 7 checks); classes: 3" in result.stderr
    report = report_of(tmp_path)
    assert report["goals"]["max_class_drop"] == 30
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["accuracy"]["passed"]
    assert not checks["class-accuracy"]["passed"]
    three, five = (report["answers"]["classes"][index] for index in (3, 5))
    assert (three["baseline"], three["judged"], three["drop"]["points"]) == (1, 0, 100)
    assert (five["baseline"], five["judged"], five["drop"]["points"]) == (0, 1, -100)
    assert checks["class-accuracy"]["value"] == three["drop"]["at_least"] > 30
    for page in ("report.md", "report.html"):
        text = (tmp_path / "bundle" / page).read_text()
        assert "class 3: drop +100.00 points on 37 images" in text
    assert deploy(tmp_path, *flags, "90", "--force").code == 0


def test_fp16_on_the_processor_is_a_check_of_accuracy_alone(workshop: Path) -> None:
    result = deploy(workshop, "--engine", "ort", "--fp16")
    assert result.code == 0, result.stderr
    report = report_of(workshop)
    assert report["passed"] is True
    assert set(report["precision"]["graph"]) == {"float16"}
    assert set(report["precision"]["executed"]) == {"float32"}
    assert [stage["stage"] for stage in report["parity"]] == FULL_CHAIN
    (headroom,) = [check for check in report["checks"] if check["name"] == "headroom"]
    assert 0 < headroom["value"] < headroom["limit"] == 65504
    for page in ("report.md", "report.html"):
        text = (workshop / "bundle" / page).read_text()
        assert f"largest activation {headroom['value']:,.5g} at " in text
        assert "on 359 test images; float16 ends at 65504" in text
    assert report["latency"] == []
    assert "speedup" not in [check["name"] for check in report["checks"]]
    (left,) = report["not_run"]
    assert left["what"] == "latency"
    assert "float32, with casts" in left["why"]


@pytest.mark.parametrize("engine", [("--engine", "ort"), DEFERRED], ids=["ort", "deferred"])
def test_a_network_that_overflows_in_float16_fails(tmp_path: Path, engine: tuple[str, ...]) -> None:
    """In float32 all is well, and so it is where a runtime computes float16 in float32."""
    gain = 30_000.0
    for name, gated in (("ckpt.pt", True), ("baseline.pt", False)):
        made = make_checkpoint(depth=8, gated=gated)
        if gated:
            made.state["head.0.weight"] = torch.full_like(made.state["head.0.weight"], gain)
            made.state["classifier.weight"] = made.state["classifier.weight"] / gain
        made.save(tmp_path / name)
    assert run("eps-compact", compact_main, "ckpt.pt", "--no-data", cwd=tmp_path).code == 0
    result = deploy(tmp_path, *engine, "--fp16")
    assert result.code == 3, result.stderr
    checks = {check["name"]: check for check in report_of(tmp_path)["checks"]}
    assert checks["parity-compact-onnx"]["text"] == "some logits are not finite"
    assert not checks["agreement"]["passed"]
    assert not checks["headroom"]["passed"]
    assert checks["headroom"]["value"] > 65504
    assert verify(tmp_path / "bundle")["onnx"] is False


def verify(bundle: Path) -> dict[str, bool | None]:
    """Outcomes of eps-verify by the names of its checks."""
    result = run("eps-verify", verify_main, bundle, "--json", cwd=bundle.parent)
    return {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}


@pytest.mark.usefixtures("any_class")
@pytest.mark.parametrize(
    ("flags", "precision", "graph"),
    [
        (["--bf16"], "bf16", {"bfloat16"}),
        (["--int8", "--calibration-samples", "128"], "int8-fp16", {"int8"}),
    ],
)
def test_a_deferred_plan_leaves_the_verdict_open(
    workshop: Path, flags: list[str], precision: str, graph: set[str]
) -> None:
    result = deploy(workshop, *DEFERRED, *flags)
    assert result.code == 0, result.stderr
    assert "Verdict: NOT JUDGED YET" in result.stderr
    report = report_of(workshop)
    assert report["passed"] is None
    assert report["precision"]["name"] == precision
    assert set(report["precision"]["graph"]) == graph
    assert report["accuracy"]["engine"] is None
    assert report["latency"] == []
    assert "latency" in [entry["what"] for entry in report["not_run"]]
    engine = load_bundle(workshop / "bundle").manifest["engine"]
    assert engine.items() >= {"name": "trt", "deferred": True, "file": "model.onnx"}.items()
    assert (engine["opt_batch"], engine["max_batch"]) == (16, 32)


@pytest.mark.trt_rtx
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no tensorrt_rtx")
def test_a_deferred_bundle_has_been_through_nvidias_builder(workshop: Path) -> None:
    assert deploy(workshop, *DEFERRED, "--fp16").code == 0
    (builder,) = [check for check in report_of(workshop)["checks"] if check["name"] == "builder"]
    assert builder["passed"]
    assert "TensorRT for RTX" in builder["text"]


def test_a_failed_goal_of_a_deferred_bundle_exits_with_3(workshop: Path) -> None:
    result = deploy(workshop, *DEFERRED, "--fp16", "--max-accuracy-drop", "0", "--min-speedup", "9")
    report = report_of(workshop)
    missed = report["accuracy"]["drop"]["points"] > 0
    assert result.code == (3 if missed else 0)
    assert report["passed"] is (False if missed else None)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="has TensorRT")
def test_without_tensorrt_the_refusal_names_the_ways_out(workshop: Path) -> None:
    before = files_in(workshop)
    result = deploy(workshop, "--engine", "trt", "--fp16")
    assert result.code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "TensorRT is not installed; pip install 'eps-resnet[trt]'" in result.error
    assert "--defer-build" in result.error
    assert files_in(workshop) == before


def test_a_dry_run_checks_and_writes_nothing(workshop: Path) -> None:
    before = files_in(workshop)
    result = deploy(workshop, "--engine", "ort", "--int8", "--dry-run", "--json")
    assert result.code == 0, result.stderr
    steps = json.loads(result.stdout)["steps"]
    assert "would calibrate int8 on 512 training images" in steps
    assert "would write bundle" in steps
    assert files_in(workshop) == before
    (workshop / "compact.pt").unlink()
    assert deploy(workshop, "--engine", "ort", "--dry-run").code == 1


def test_onnx_runtime_on_tensorrt_is_deployed_to_the_end(
    workshop: Path, with_gpu: type[FakeSession]
) -> None:
    """It does not save the graph that it compiled: the types of its layers are not known."""
    result = deploy(workshop, "--engine", "ort", "--provider", "tensorrt")
    assert result.code == 0, result.stderr
    report = report_of(workshop)
    assert report["precision"]["executed"] is None
    assert "not reported by the runtime" in (workshop / "bundle" / "report.md").read_text()
    assert report["environment"]["engine"]["provider"] == "TensorrtExecutionProvider"
    assert len(report["latency"]) == 2


def test_the_references_take_all_that_the_machine_has(
    workshop: Path, with_gpu: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has the threads that were asked for; what it is held to is not timed."""
    moved: list[tuple[int, int]] = []

    @contextmanager
    def on_gpu(device: int, *held: Deployed) -> Iterator[None]:
        moved.append((device, len(held)))
        yield

    monkeypatch.setattr("eps_deploy.pipeline.builder.cpus", lambda: 3)
    monkeypatch.setattr("eps_deploy.pipeline.builder.on_gpu", on_gpu)
    assert deploy(workshop, "--engine", "ort", "--provider", "cuda", "--threads", "2").code == 0
    assert set(with_gpu.threads) >= {("CUDAExecutionProvider", 2), ("CPUExecutionProvider", 3)}
    assert moved == [(0, 2)]


def test_networks_are_moved_to_the_gpu_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be seen without one; `test_accuracy_on_a_gpu` does it."""
    places: list[str] = []

    class Moved:
        def to(self, device: object) -> None:
            places.append(str(device))

    moved: Any = Moved()
    with builder.on_gpu(torch.cuda.device_count(), moved):
        assert not places
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(builder, "TrainingPrecision", lambda name, device: places.append(name))
    with builder.on_gpu(1, moved):
        assert places == ["fp32", "cuda:1"]
    assert places == ["fp32", "cuda:1", "cpu"]


@pytest.mark.gpu
def test_accuracy_on_a_gpu(workshop: Path) -> None:
    built = builder.build_networks(find_inputs(workshop / "compact.pt", None, None))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
    expected = built.compact.infer(pixels)
    with builder.on_gpu(0, built.compact):
        assert next(built.compact.parameters()).is_cuda
        found = built.compact.infer(pixels)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (built.compact.infer(pixels) == expected).all()


def test_a_graph_that_is_not_saved_ends_no_deployment(
    workshop: Path, with_gpu: type[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: bytes, **options: object) -> None:
        raise EngineError("the graph cannot be saved")

    monkeypatch.setattr(write, "executed_types", refuse)
    assert deploy(workshop, "--engine", "ort", "--provider", "cuda").code == 0
    assert report_of(workshop)["precision"]["executed"] is None


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["", "dry"])
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_here_is_refused_before_any_work(
    workshop: Path, with_gpu: type[FakeSession], provider: str, dry: tuple[str, ...]
) -> None:
    """ONNX Runtime lists it, and runs on the processor in silence."""
    with_gpu.granted = ["CPUExecutionProvider"]
    before = files_in(workshop)
    result = deploy(workshop, "--engine", "ort", "--provider", provider, *dry)
    assert result.code == 1
    (line,) = result.stderr.splitlines()
    assert f"--provider {provider}: ONNX Runtime runs it on CPUExecutionProvider, not on" in line
    assert files_in(workshop) == before


@pytest.mark.parametrize("total", [1, 5, 33, 359, 10_000])
def test_samples_spread_over_the_whole_test_part(total: int) -> None:
    test = TestSet(images=np.zeros((total, 1, 1, 1), np.uint8), labels=np.zeros(total, np.int64))
    picked = test.spread(33)
    assert len(picked) == 33
    assert picked.min() == 0
    assert picked.max() == total - 1
    assert len(set(picked.tolist())) == min(total, 33)


def test_a_killed_run_leaves_nothing(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    before = files_in(workshop)
    with monkeypatch.context() as patch:
        patch.setattr("eps_deploy.bench.latency.measure", killed)
        assert deploy(workshop, "--engine", "ort").code == 130
    assert files_in(workshop) == before


def test_a_full_disk_is_told_of_the_bundle_not_of_a_hidden_file(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    before = files_in(workshop)
    monkeypatch.setattr("eps_deploy.report.report.write_json", full)
    result = deploy(workshop, "--engine", "ort")
    assert result.code == 1
    assert "bundle: No space left on device; free some space" in result.error
    assert ".part" not in result.error
    assert files_in(workshop) == before


def test_a_smaller_largest_batch_holds_everywhere(workshop: Path) -> None:
    result = deploy(workshop, "--engine", "ort", "--opt-batch", "3", "--max-batch", "5")
    assert result.code == 0, result.stderr
    report = report_of(workshop)
    assert report["parity"][0]["batches"] == [1, 2, 3, 5]
    assert [entry["batch"] for entry in report["latency"]] == [1, 5]
    assert load_bundle(workshop / "bundle").manifest["engine"]["max_batch"] == 5
    assert (
        "max_batch_size: 5"
        in (workshop / "bundle" / "triton" / "eps_resnet" / "config.pbtxt").read_text()
    )


def test_every_run_of_the_latency_measurement_is_kept(deployed: Path) -> None:
    report = report_of(deployed)
    with np.load(deployed / "bundle" / "latency.npz") as samples:
        for entry in report["latency"]:
            runs = samples[f"batch-{entry['batch']}.compact"]
            assert runs.shape == (entry["blocks"], entry["runs_per_block"])
            assert np.median(runs) == pytest.approx(entry["compact_ms"]["p50"], rel=1e-5)


def test_the_script_that_makes_the_bundle_again(deployed: Path) -> None:
    script = (deployed / "bundle" / "reproduce.sh").read_text()
    manifest = load_bundle(deployed / "bundle").manifest
    assert manifest["source"]["compact_digest"] in script
    assert "torch==" in script
    assert "+cpu" not in script
    assert "eps-deploy --engine ort --max-accuracy-drop 100.0 --min-speedup 0" in script
    assert str(deployed) not in script
