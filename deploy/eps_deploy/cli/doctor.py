"""The command `eps-doctor`: what this machine can do, and what helps where it cannot."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from eps_core import cli as console
from eps_deploy.bench import machine
from eps_deploy.bench.machine import cpus

if TYPE_CHECKING:
    from eps_deploy.bench import machine

_GIB = 2**30


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def cli(as_json: bool) -> int:
    """Say what this machine can do: driver, GPUs, torch, ONNX Runtime, TensorRT, disk.

    Each part is tried, not looked up: a provider of ONNX Runtime that is listed but does not load
    is said not to work. Exit code 0 whatever is found.
    """

    found = examine()
    if as_json:
        console.emit_json(found.to_dict())
    else:
        for line in lines(found):
            click.echo(line)
    return 0


def lines(found: Findings) -> list[str]:
    """What was found, in words."""
    system = found.system
    memory = f", {system['memory'] / _GIB:.1f} GiB of memory" if system["memory"] else ""
    told = [
        f"eps-resnet {system['eps_resnet']}, Python {system['python']}, {system['system']}"
        f" {system['processor']}, CPUs: {system['cpus']}{memory},"
        f" {system['disk_free'] / _GIB:.1f} GiB free on this disk"
    ]
    told += [
        f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability},"
        f" {_free(gpu)}, driver {gpu.driver}"
        for gpu in found.gpus
    ]
    told += ["", *_columns([(p.name, "works" if p.works else "no", p.found) for p in found.parts])]
    able = [
        (item.name, "no: " + ", ".join(item.missing) if item.missing else "yes")
        for item in found.abilities
    ]
    told += ["", "What can be done here:", *_columns(able)]
    remedies = [(part.name, part.remedy) for part in found.parts if part.remedy]
    if remedies:
        told += ["", "What is missing, and what helps:"]
        told += [f"  {name}: {remedy}" for name, remedy in remedies]
    return told


def _free(gpu: machine.Gpu) -> str:
    if gpu.memory is None or gpu.free is None:
        return "no memory of its own"
    return f"{gpu.free:,} of {gpu.memory:,} MiB free"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines; every column but the last is as wide as its longest entry."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]) - 1)]
    return [
        "  " + "  ".join((*(t.ljust(w) for t, w in zip(row, widths, strict=False)), row[-1]))
        for row in rows
    ]


def main() -> NoReturn:
    console.run(cli)


# -- What this machine can do: each part tried, not looked up, and what helps where one is
#    missing

SCHEMA = 1
_SECONDS = 120.0  # torch from a cold disk, or CUDA's first start, takes tens of them
_DRIVER = "NVIDIA driver"
_PROVIDERS = {
    "cpu": "ONNX Runtime on the CPU",
    "cuda": "ONNX Runtime on CUDA",
    "tensorrt": "ONNX Runtime on TensorRT",
}
_UPDATE_DRIVER = (
    f"update it to {machine.CUDA_13_DRIVER} or later, which CUDA 13 needs; or install what is built"
    " for CUDA 12: torch from its web site's index, 'onnxruntime-gpu[cuda,cudnn]<1.27',"
    " tensorrt-cu12 in place of tensorrt, 'cuda-bindings<13'"
)
_INSTALL_DRIVER = (
    "takes a GPU from NVIDIA and its driver (in a container: start that with --gpus all)"
)


def _extra(name: str) -> str:
    return f"pip install 'eps-resnet[{name}]'"


_REMEDIES = {
    _DRIVER: _INSTALL_DRIVER,
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

# What the driver's version matters to.
_ON_GPU = {"torch on a GPU", "ONNX Runtime on CUDA", "TensorRT", "pycuda"}

# What can be done, and the parts that it needs.
_ABILITIES = {
    "train on the CPU": ("torch",),
    "train on a GPU": (_DRIVER, "torch", "torch on a GPU"),
    "deploy and serve with ONNX Runtime on the CPU": (
        "torch",
        "ONNX export",
        "ONNX Runtime on the CPU",
    ),
    "the same with --provider cuda": (
        _DRIVER,
        "torch",
        "ONNX export",
        "ONNX Runtime on CUDA",
    ),
    "the same with --provider tensorrt": (
        _DRIVER,
        "torch",
        "ONNX export",
        "ONNX Runtime on TensorRT",
    ),
    "deploy with --engine trt": (_DRIVER, "torch", "ONNX export", "TensorRT", "pycuda"),
    "run TensorRT plans": (_DRIVER, "TensorRT", "pycuda"),
    "run them as CUDA graphs": (_DRIVER, "TensorRT", "pycuda", "cuda-bindings"),
    "try TensorRT's parser and builder without a GPU": ("TensorRT for RTX",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Something that was tried.

    Attributes:
        name: what it is.
        works: whether it did what was asked of it.
        found: its version and the like, or what is wrong.
        remedy: what helps, where it does not work.
        facts: whatever else it said.
    """

    name: str
    works: bool
    found: str
    remedy: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """Something to do with eps-resnet, and the parts whose lack stands in the way."""

    name: str
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All that `eps-doctor` says.

    Attributes:
        system: version of eps-resnet, system, processor, Python, CPUs, bytes of memory and disk.
        gpus: what nvidia-smi lists.
        parts, abilities: in the order in which they are told.
    """

    system: Mapping[str, Any]
    gpus: tuple[machine.Gpu, ...]
    parts: tuple[Part, ...]
    abilities: tuple[Ability, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


Ask = Callable[[Sequence[str]], dict[str, Any]]


def examine(ask: Ask | None = None) -> Findings:
    """Try everything; takes some seconds, most of them for importing torch.

    `ask` runs one of `probes` by its arguments; None: :func:`ask_process`.
    """
    ask = ask_process if ask is None else ask
    gpus = machine.gpus()
    others = (*_torch(ask), *_onnx(ask), *_onnxruntime(ask), *_trt(ask))
    on_gpu = {part.name for part in others if not part.works} & _ON_GPU
    parts = (_driver(gpus, complete=not on_gpu), *others)
    working = {part.name for part in parts if part.works}
    abilities = tuple(
        Ability(name=name, missing=tuple(part for part in needs if part not in working))
        for name, needs in _ABILITIES.items()
    )
    return Findings(system=_system(), gpus=gpus, parts=parts, abilities=abilities)


def ask_process(arguments: Sequence[str]) -> dict[str, Any]:
    """The answer of one probe, run in a process of its own."""
    command = [sys.executable, "-m", "eps_deploy.doctor_probes", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer within {_SECONDS:.0f} seconds"}
    said = _reason(done.stderr)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"problem": f"ended with status {done.returncode}{said and ': ' + said}"}
    if "problem" in answer and said:
        answer["problem"] += f" ({said})"
    return answer


def _reason(stderr: str) -> str:
    """What a library last complained of, without its time stamps and colours."""
    lines = [line for line in stderr.splitlines() if "error" in line.lower()]
    return lines[-1].rpartition("error: ")[2].strip().removesuffix("\x1b[m") if lines else ""


def _part(name: str, answer: Mapping[str, Any], found: str | None = None) -> Part:
    works = "problem" not in answer
    return Part(
        name=name,
        works=works,
        # Our own errors end with the remedy, which has its place elsewhere.
        found=(found or answer["found"]) if works else answer["problem"].partition("; ")[0],
        remedy=None if works else _REMEDIES[name],
        facts=answer,
    )


def _driver(gpus: tuple[machine.Gpu, ...], *, complete: bool) -> Part:
    """`complete`: all that needs it works, so that an old one is no trouble."""
    driver = machine.driver_version()
    if gpus:
        found = f"{gpus[0].driver}, {_plural(len(gpus), 'GPU')}"
        if complete or not machine.is_too_old(gpus[0].driver):
            return _part(_DRIVER, {"found": found})
        found += f"; too old for CUDA 13, which needs {machine.CUDA_13_DRIVER}"
        return Part(name=_DRIVER, works=True, found=found, remedy=_UPDATE_DRIVER)
    if driver is None:
        return _part(_DRIVER, {"problem": "none"})
    return _part(_DRIVER, {"problem": f"{driver} is loaded, but nvidia-smi lists no GPU"})


def _torch(ask: Ask) -> list[Part]:
    answer = ask(["torch"])
    if "found" not in answer:
        return [_part("torch", answer)]
    cuda = answer["cuda"]
    built = f"built for CUDA {cuda}" if cuda else "built for the CPU alone"
    here = _part("torch", {"found": answer["found"], "cuda": cuda})
    if "problem" in answer:
        return [here, _part("torch on a GPU", answer)]
    if not answer["gpus"]:
        return [here, _part("torch on a GPU", {**answer, "problem": f"{built}, sees no GPU"})]
    return [here, _part("torch on a GPU", answer, f"{built}; {', '.join(answer['gpus'])}")]


def _onnx(ask: Ask) -> list[Part]:
    answers = {name: ask(["package", name]) for name in ("onnx", "onnxscript", "jinja2")}
    problems = [answer["problem"] for answer in answers.values() if "problem" in answer]
    if problems:
        return [_part("ONNX export", {"problem": "; ".join(problems)})]
    found = ", ".join(f"{name} {answer['found']}" for name, answer in answers.items())
    return [_part("ONNX export", {"found": found})]


def _onnxruntime(ask: Ask) -> list[Part]:
    answer = ask(["onnxruntime"])
    if "problem" in answer:
        return [_part(title, answer) for title in _PROVIDERS.values()]
    found = str(answer["found"])
    return [
        _part(title, {**answer, **ask(["provider", name])}, found)
        for name, title in _PROVIDERS.items()
    ]


def _trt(ask: Ask) -> list[Part]:
    titles = {
        "TensorRT": "tensorrt",
        "pycuda": "pycuda",
        "cuda-bindings": "cuda_bindings",
        "TensorRT for RTX": "tensorrt_rtx",
    }
    return [_part(title, ask([probe])) for title, probe in titles.items()]


def _system() -> dict[str, Any]:
    disk = shutil.disk_usage(Path.cwd())
    return {
        "eps_resnet": version("eps-resnet"),
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "python": platform.python_version(),
        "cpus": cpus(),
        "memory": _memory(),
        "disk_free": disk.free,
        "disk_total": disk.total,
    }


def _memory() -> int | None:
    """Bytes of main memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
