"""`eps-doctor`: check what this machine can do, and name a remedy for each part that is missing.

Each part is tried in a process of its own (`eps_deploy.doctor_probes`), not looked up.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import click

from eps_core import cli as console
from eps_core import machine

SCHEMA = 1
_GIB = 2**30
_SECONDS = 120.0  # importing torch from a cold disk, or the first start of CUDA, takes tens of them
_LINE = 100  # characters of a problem that are printed
_LOCATION = re.compile(r"\S+\.(?:cc|cpp|h):\d+ [^()]*(?:\([^()]*\))?\s*")  # as in C++ exceptions
_DRIVER = "NVIDIA driver"
_PROVIDERS = {
    "cpu": "ONNX Runtime on the CPU",
    "cuda": "ONNX Runtime on CUDA",
    "tensorrt": "ONNX Runtime on TensorRT",
}
_TRT_PROBES = {
    "TensorRT": "tensorrt",
    "pycuda": "pycuda",
    "cuda-bindings": "cuda_bindings",
    "TensorRT for RTX": "tensorrt_rtx",
}
_UPDATE_DRIVER = (
    f"update it to {machine.CUDA_13_DRIVER} or later, which CUDA 13 needs; or install packages"
    " built for CUDA 12: torch from its web site's index, 'onnxruntime-gpu[cuda,cudnn]<1.27',"
    " tensorrt-cu12 in place of tensorrt, 'cuda-bindings<13'"
)
_extra = "pip install 'eps-resnet[{}]'".format
_REMEDIES = {
    _DRIVER: "requires an NVIDIA GPU and its driver (in a container: start it with --gpus all)",
    "torch": _extra("train"),
    "torch on a GPU": "install a build of torch for this driver's CUDA, as torch's web site says",
    "ONNX export": _extra("deploy"),
    "ONNX Runtime on the CPU": _extra("ort"),
    "ONNX Runtime on CUDA": (
        "pip uninstall onnxruntime && pip install 'eps-resnet[ort-gpu]',"
        " with the CUDA and cuDNN libraries that it was built for"
    ),
    "ONNX Runtime on TensorRT": (
        "as for CUDA, with the libraries of TensorRT 10 in an environment of its own;"
        " or use --engine trt, which does without ONNX Runtime"
    ),
    "TensorRT": _extra("trt"),
    "pycuda": (
        f"{_extra('trt')}: pip compiles it, with g++ and the CUDA toolkit (nvcc on the PATH), or"
        " with the headers of pip's CUDA packages, as the Dockerfile and `make gpu-report` do"
    ),
    "cuda-bindings": f"{_extra('trt')}; without it TensorRT engines run without CUDA graphs",
    "TensorRT for RTX": "pip install tensorrt-rtx-cu13 (Linux x86-64)",
}

# The parts for which the driver's version matters.
_ON_GPU = {"torch on a GPU", "ONNX Runtime on CUDA", "TensorRT", "pycuda"}

_EXPORT = ("torch", "ONNX export")
_EXPORT_ON_GPU = (_DRIVER, *_EXPORT)
# What can be done, and the parts that it requires.
_ABILITIES = {
    "train on the CPU": ("torch",),
    "train on a GPU": (_DRIVER, "torch", "torch on a GPU"),
    "deploy and serve with ONNX Runtime on the CPU": (*_EXPORT, "ONNX Runtime on the CPU"),
    "the same with --provider cuda": (*_EXPORT_ON_GPU, "ONNX Runtime on CUDA"),
    "the same with --provider tensorrt": (*_EXPORT_ON_GPU, "ONNX Runtime on TensorRT"),
    "deploy with --engine trt": (*_EXPORT_ON_GPU, "TensorRT", "pycuda"),
    "run TensorRT plans": (_DRIVER, "TensorRT", "pycuda"),
    "run them as CUDA graphs": (_DRIVER, "TensorRT", "pycuda", "cuda-bindings"),
    "try TensorRT's parser and builder without a GPU": ("TensorRT for RTX",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """Result of one probe.

    Attributes:
        found: version and the like, or the problem in one line.
        remedy: how to make it work, if it does not.
        facts: the whole answer of the probe.
    """

    name: str
    works: bool
    found: str
    remedy: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """A use of eps-resnet, and the missing parts that prevent it."""

    name: str
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything that `eps-doctor` prints, in the order of output; `gpus` are those of nvidia-smi.

    `system` has versions of eps-resnet and Python, system, processor, CPUs, and bytes of memory and
    disk.
    """

    system: Mapping[str, Any]
    gpus: tuple[machine.Gpu, ...]
    parts: tuple[ProbeResult, ...]
    abilities: tuple[Ability, ...]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def cli(as_json: bool) -> int:
    """Check this machine: NVIDIA driver, GPUs, torch, ONNX Runtime, TensorRT, disk.

    Each part is tried, not looked up: an ONNX Runtime provider that is listed but does not load is
    reported as not working. The exit code is 0 whatever is found.
    """
    found = examine()
    if as_json:
        console.emit_json({"schema": SCHEMA, **asdict(found)})
    else:
        for line in lines(found):
            click.echo(line)
    return 0


def main() -> NoReturn:
    console.run(cli)


def lines(found: Diagnosis) -> list[str]:
    """The diagnosis as text."""
    system = found.system
    memory = f", {system['memory'] / _GIB:.1f} GiB of memory" if system["memory"] else ""
    text = [
        f"eps-resnet {system['eps_resnet']}, Python {system['python']}, {system['system']}"
        f" {system['processor']}, CPUs: {system['cpus']}{memory},"
        f" {system['disk_free'] / _GIB:.1f} GiB free on this disk"
    ]
    for gpu in found.gpus:
        free = "no memory of its own"
        if gpu.memory is not None and gpu.free is not None:
            free = f"{gpu.free:,} of {gpu.memory:,} MiB free"
        text.append(
            f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}, {free},"
            f" driver {gpu.driver}"
        )
    text.append("")
    width = max(len(part.name) for part in found.parts)
    for part in found.parts:
        text.append(f"  {part.name:{width}}  {'works' if part.works else 'no   '}  {part.found}")
    text += ["", "What can be done here:"]
    width = max(len(ability.name) for ability in found.abilities)
    for ability in found.abilities:
        able = f"no: {', '.join(ability.missing)}" if ability.missing else "yes"
        text.append(f"  {ability.name:{width}}  {able}")
    remedies = [f"  {part.name}: {part.remedy}" for part in found.parts if part.remedy]
    if remedies:
        text += ["", "What is missing, and what helps:", *remedies]
    return text


Ask = Callable[[Sequence[str]], dict[str, Any]]
"""Runs one of `eps_deploy.doctor_probes` by its arguments."""


def examine(ask: Ask | None = None) -> Diagnosis:
    """Try every part, by default in processes; takes some seconds, most of them to import torch."""
    ask = ask_process if ask is None else ask
    gpus = machine.gpus()
    others = (
        *_torch(ask),
        _onnx(ask),
        *_onnxruntime(ask),
        *(_part(title, ask([probe])) for title, probe in _TRT_PROBES.items()),
    )
    on_gpu = {part.name for part in others if not part.works} & _ON_GPU
    parts = (_driver(gpus, complete=not on_gpu), *others)
    working = {part.name for part in parts if part.works}
    abilities = tuple(
        Ability(name=name, missing=tuple(part for part in needs if part not in working))
        for name, needs in _ABILITIES.items()
    )
    return Diagnosis(system=_system(), gpus=gpus, parts=parts, abilities=abilities)


def ask_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Run one probe in a process of its own and return its answer."""
    command = [sys.executable, "-m", "eps_deploy.doctor_probes", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer within {_SECONDS:.0f} seconds"}
    # The last error that a library logged, without its time stamp and colours.
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    logged = ""
    if errors:
        logged = errors[-1].rpartition("error: ")[2].strip().removesuffix("\x1b[m")
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"problem": f"ended with status {done.returncode}{logged and ': ' + logged}"}
    if "problem" in answer and logged:
        answer["problem"] += f" ({logged})"
    return answer


def _part(name: str, answer: Mapping[str, Any], found: str | None = None) -> ProbeResult:
    if "problem" not in answer:
        return ProbeResult(name=name, works=True, found=found or answer["found"], facts=answer)
    problem = _summary(answer["problem"])
    return ProbeResult(name=name, works=False, found=problem, remedy=_REMEDIES[name], facts=answer)


def _summary(problem: str) -> str:
    """The problem in one short line.

    Our own errors end with the remedy, which is printed elsewhere. A C++ exception begins with its
    location in the source; if the library also logged an error, only that one tells the cause.
    """
    text = problem.partition("; ")[0]
    if _LOCATION.search(text) and text.endswith(")"):
        text = text[text.rindex(" (") + 2 : -1]
    return textwrap.shorten(_LOCATION.sub("", text), _LINE, placeholder=" …")


def _driver(gpus: tuple[machine.Gpu, ...], *, complete: bool) -> ProbeResult:
    """`complete`: every part that needs the driver works, so that an old one does no harm."""
    driver = machine.driver_version()
    if gpus:
        count = "1 GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
        found = f"{gpus[0].driver}, {count}"
        if complete or not machine.is_too_old(gpus[0].driver):
            return _part(_DRIVER, {"found": found})
        found += f"; too old for CUDA 13, which needs {machine.CUDA_13_DRIVER}"
        return ProbeResult(name=_DRIVER, works=True, found=found, remedy=_UPDATE_DRIVER)
    if driver is None:
        return _part(_DRIVER, {"problem": "none"})
    return _part(_DRIVER, {"problem": f"{driver} is loaded, but nvidia-smi lists no GPU"})


def _torch(ask: Ask) -> list[ProbeResult]:
    answer = ask(["torch"])
    if "found" not in answer:
        return [_part("torch", answer)]
    cuda = answer["cuda"]
    built = f"built for CUDA {cuda}" if cuda else "built for the CPU only"
    if "problem" not in answer and not answer["gpus"]:
        answer = {**answer, "problem": f"{built}, finds no GPU"}
    return [
        _part("torch", {"found": answer["found"], "cuda": cuda}),
        _part("torch on a GPU", answer, f"{built}; {', '.join(answer['gpus'])}"),
    ]


def _onnx(ask: Ask) -> ProbeResult:
    answers = {name: ask(["package", name]) for name in ("onnx", "onnxscript", "jinja2")}
    problems = [answer["problem"] for answer in answers.values() if "problem" in answer]
    if problems:
        return _part("ONNX export", {"problem": ", ".join(problems)})
    found = ", ".join(f"{name} {answer['found']}" for name, answer in answers.items())
    return _part("ONNX export", {"found": found})


def _onnxruntime(ask: Ask) -> list[ProbeResult]:
    answer = ask(["onnxruntime"])
    if "problem" in answer:
        return [_part(title, answer) for title in _PROVIDERS.values()]
    return [
        _part(title, {**answer, **ask(["provider", name])}, str(answer["found"]))
        for name, title in _PROVIDERS.items()
    ]


def _system() -> dict[str, Any]:
    disk = shutil.disk_usage(Path.cwd())
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # the system does not report it
        memory = None
    return {
        "eps_resnet": version("eps-resnet"),
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "python": platform.python_version(),
        "cpus": machine.cpus(),
        "memory": memory,
        "disk_free": disk.free,
        "disk_total": disk.total,
    }
