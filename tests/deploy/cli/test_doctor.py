"""`eps-doctor`: every part is tried, each problem has a remedy, and the exit code is 0."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from eps_core.machine import Gpu
from eps_deploy.cli import doctor as doctor
from eps_deploy.cli.doctor import Diagnosis, ask_process, examine, lines, main
from tests.commands import run

H100 = Gpu(
    index=0,
    name="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    memory=81559,
    free=81046,
    driver="580.95.05",
)


class Pretended:
    """A machine on which everything works, but for what `problems` names."""

    def __init__(self, **problems: str) -> None:
        self.problems = problems

    def __call__(self, arguments: Sequence[str]) -> dict[str, Any]:
        name = "_".join(arguments)
        if name in self.problems:
            return {"problem": self.problems[name]}
        answer: dict[str, Any] = {"found": "1.0"}
        if name == "torch":
            answer |= {"cuda": "13.0", "gpus": ["NVIDIA H100 80GB HBM3"]}
        return answer


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eps_core.machine.gpus", lambda: (H100,))
    monkeypatch.setattr("eps_core.machine.driver_version", lambda: "580.95.05")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eps_core.machine.gpus", lambda: ())
    monkeypatch.setattr("eps_core.machine.driver_version", lambda: None)


def missing(found: Diagnosis) -> dict[str, tuple[str, ...]]:
    return {ability.name: ability.missing for ability in found.abilities}


@pytest.mark.usefixtures("gpu")
def test_where_everything_works() -> None:
    found = examine(Pretended())
    assert not any(missing(found).values())
    assert not any(part.remedy for part in found.parts)
    text = lines(found)
    assert any("H100" in line and "81,046 of 81,559 MiB free" in line for line in text)
    assert not any("What is missing" in line for line in text)


def test_a_gpu_without_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = replace(H100, name="NVIDIA GB10", memory=None, free=None)
    monkeypatch.setattr("eps_core.machine.gpus", lambda: (shared,))
    found = examine(Pretended())
    assert any("GB10" in line and "no memory of its own" in line for line in lines(found))
    assert {part.name: part.works for part in found.parts}["NVIDIA driver"]


def old_driver(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("eps_core.machine.gpus", lambda: (replace(H100, driver=version),))


def test_a_driver_that_is_too_old_for_cuda_13(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip installs needs 580; packages for CUDA 12 do not."""
    old_driver(monkeypatch, "570.86.15")
    found = examine(Pretended(tensorrt="does not load"))
    assert found.parts[0].found == "570.86.15, 1 GPU; too old for CUDA 13, which needs 580"
    text = "\n".join(lines(found))
    assert "update it to 580 or later" in text
    assert "tensorrt-cu12" in text
    assert "onnxruntime-gpu[cuda,cudnn]<1.27" in text


@pytest.mark.parametrize(
    ("version", "problems"),
    [
        ("570.86.15", {}),  # with packages for CUDA 12
        ("580.65.06", {"tensorrt": "does not load"}),
        ("1000.1", {"tensorrt": "does not load"}),
    ],
)
def test_a_driver_that_is_no_trouble(
    version: str, problems: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old_driver(monkeypatch, version)
    assert examine(Pretended(**problems)).parts[0].remedy is None


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_rest_is_still_possible() -> None:
    able = missing(examine(Pretended()))
    assert not able["train on the CPU"]
    assert not able["deploy and serve with ONNX Runtime on the CPU"]
    assert able["deploy with --engine trt"] == ("NVIDIA driver",)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("problem", "part", "remedy", "stops"),
    [
        ("torch", "torch", "eps-resnet[train]", "train on the CPU"),
        ("package_onnx", "ONNX export", "eps-resnet[deploy]", "deploy with --engine trt"),
        ("onnxruntime", "ONNX Runtime on the CPU", "eps-resnet[ort]", "deploy and serve"),
        ("provider_cuda", "ONNX Runtime on CUDA", "eps-resnet[ort-gpu]", "--provider cuda"),
        ("provider_tensorrt", "ONNX Runtime on TensorRT", "--engine trt", "--provider tensorrt"),
        ("tensorrt", "TensorRT", "eps-resnet[trt]", "run TensorRT plans"),
        ("pycuda", "pycuda", "nvcc", "run TensorRT plans"),
        ("cuda_bindings", "cuda-bindings", "without CUDA graphs", "CUDA graphs"),
        ("tensorrt_rtx", "TensorRT for RTX", "tensorrt-rtx-cu13", "parser and builder"),
    ],
)
def test_what_is_missing_comes_with_what_helps(
    problem: str, part: str, remedy: str, stops: str
) -> None:
    found = examine(Pretended(**{problem: "it broke"}))
    broken = {item.name: item for item in found.parts if not item.works}
    assert part in broken
    assert broken[part].found == "it broke"
    assert remedy in str(broken[part].remedy)
    assert [name for name, parts in missing(found).items() if stops in name and part in parts]
    text = "\n".join(lines(found))
    assert f"  {part}: {broken[part].remedy}" in text


@pytest.mark.usefixtures("gpu")
def test_graphs_are_not_needed_to_run_plans() -> None:
    able = missing(examine(Pretended(cuda_bindings="it broke")))
    assert not able["run TensorRT plans"]
    assert able["run them as CUDA graphs"] == ("cuda-bindings",)


@pytest.mark.usefixtures("no_gpu")
def test_a_torch_built_for_the_cpu() -> None:
    class CpuTorch(Pretended):
        def __call__(self, arguments: Sequence[str]) -> dict[str, Any]:
            answer = super().__call__(arguments)
            return {**answer, "cuda": None, "gpus": []} if arguments == ["torch"] else answer

    parts = {part.name: part for part in examine(CpuTorch()).parts}
    assert parts["torch"].works
    assert parts["torch on a GPU"].found == "built for the CPU only, finds no GPU"


REGISTER = (
    "ONNX Runtime cannot load it: /onnxruntime_src/onnxruntime/python/pybind_state.cc:505 void"
    " onnxruntime::python::RegisterTensorRTPluginsAsCustomOps(PySessionOptions&, const"
    " ProviderOptions&) Please install TensorRT libraries as mentioned in the GPU requirements"
    " page, make sure they're in the PATH or LD_LIBRARY_PATH, and that your GPU is supported."
)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("problem", "found"),
    [
        (
            f"{REGISTER} (libnvinfer.so.10: cannot open shared object file)",
            "libnvinfer.so.10: cannot open shared object file",
        ),
        (REGISTER, "ONNX Runtime cannot load it: Please install TensorRT libraries as mentioned"),
        ("no TensorRT provider; install it", "no TensorRT provider"),
    ],
    ids=["logged", "exception", "ours"],
)
def test_a_long_reason_is_one_short_line(problem: str, found: str) -> None:
    report = examine(Pretended(provider_tensorrt=problem))
    (part,) = (part for part in report.parts if part.name == "ONNX Runtime on TensorRT")
    assert part.found.startswith(found)
    assert len(part.found) <= 100
    assert part.facts["problem"] == problem
    (line,) = (line for line in lines(report) if line.startswith("  ONNX Runtime on TensorRT  no"))
    assert line.endswith(part.found)


def test_probes_of_what_is_here() -> None:
    """In processes of their own, as the command runs them."""
    assert ask_process(["torch"])["found"] == torch.__version__
    assert ask_process(["onnxruntime"])["found"] == onnxruntime.__version__
    assert ask_process(["provider", "cpu"]) == {"found": "runs"}
    assert ask_process(["package", "onnx"]) == {"found": onnx.__version__}


def test_probes_of_what_is_not() -> None:
    assert ask_process(["package", "no_such_package"]) == {
        "problem": "no_such_package is not installed"
    }


def probes(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a probe run `code` instead."""
    (folder / "broken_library.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended with status -11"),
        ("raise OSError('libfoo.so.1: cannot open\\nshared object file')", "libfoo.so.1: cannot"),
        ("import sys; print('Error: no libfoo', file=sys.stderr); raise ValueError", "no libfoo"),
        ("print('chatter'); raise RuntimeError('out of luck')", "out of luck"),
    ],
    ids=["crash", "library", "stderr", "stdout"],
)
def test_a_library_that_breaks_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, text: str
) -> None:
    probes(tmp_path, code, monkeypatch)
    problem = ask_process(["package", "broken_library"])["problem"]
    assert text in problem
    assert "\n" not in problem


def test_a_library_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SECONDS", 0.5)
    probes(tmp_path, "import threading; threading.Event().wait()", monkeypatch)
    assert "no answer within" in ask_process(["package", "broken_library"])["problem"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ask_process", Pretended(tensorrt="TensorRT is not installed"))
    result = run("eps-doctor", main, cwd=tmp_path)
    assert (result.code, result.stderr) == (0, "")
    assert "GiB free on this disk" in result.stdout.splitlines()[0]
    assert "  TensorRT: pip install 'eps-resnet[trt]'" in result.stdout.splitlines()
    as_json = run("eps-doctor", main, "--json", cwd=tmp_path)
    assert (as_json.code, as_json.stderr) == (0, "")
    report = json.loads(as_json.stdout)
    assert {"schema", "system", "gpus", "parts", "abilities"} == set(report)
    assert report["system"]["disk_free"] > 0
    assert run("eps-doctor", main, "extra", cwd=tmp_path).code == 2


def test_it_needs_neither_torch_nor_onnxruntime() -> None:
    """It is what one runs when nothing else works."""
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnxruntime", "pycuda", "tensorrt"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from eps_deploy.cli import doctor
from eps_deploy import doctor_probes
def ask(arguments):
    try:
        return doctor_probes.PROBES[arguments[0]](*arguments[1:])
    except ModuleNotFoundError as error:
        return {"problem": f"{error.name} is not installed"}
    except Exception as error:
        return {"problem": str(error)}
parts = {part.name: part for part in doctor.examine(ask).parts}
assert parts["torch"].found == "torch is not installed", parts["torch"]
assert parts["ONNX Runtime on the CPU"].found == "onnxruntime is not installed"
assert not parts["TensorRT"].works
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Whatever is installed: the driver and torch work, for this test runs."""
    found = examine()
    parts = {part.name: part for part in found.parts}
    assert found.gpus
    assert parts["NVIDIA driver"].works
    assert parts["torch on a GPU"].works
