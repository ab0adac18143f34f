"""Probes of `eps-doctor`, each run in a process of its own: `python -m eps_deploy.doctor_probes`.

A library that does not fit its driver may crash the process that loads it, and most of them print
to stderr; neither may happen to the command itself. The answer is one JSON object on stdout:
`{"found": ..., ...}` or `{"problem": ..., ...}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any, get_args

Answer = dict[str, Any]


def torch() -> Answer:
    """Version and CUDA of torch, and whether a matrix product on each GPU is right."""
    module = import_module("torch")
    answer: Answer = {"found": str(module.__version__), "cuda": module.version.cuda, "gpus": []}
    if not module.cuda.is_available():
        return answer
    for index in range(module.cuda.device_count()):
        weights = module.ones(64, 64, device=f"cuda:{index}")
        if float((weights @ weights).sum()) != 64.0**3:
            return {**answer, "problem": f"a matrix product on GPU {index} is wrong"}
        answer["gpus"].append(str(module.cuda.get_device_name(index)))
    return answer


def onnxruntime() -> Answer:
    module = import_module("onnxruntime")
    listed = list(module.get_available_providers())  # what it is built for; it may not run on it
    return {"found": str(module.__version__), "listed": listed}


def provider(name: str) -> Answer:
    """Whether a session really runs on the provider: ONNX Runtime silently replaces it if not."""
    from eps_deploy.engines.base import EngineError
    from eps_deploy.engines.ort import Provider, try_provider

    chosen: Provider = next(known for known in get_args(Provider) if known == name)
    try:
        try_provider(chosen)
    except EngineError as error:
        return {"problem": str(error).removeprefix(f"--provider {name}: ")}
    return {"found": "runs"}


def tensorrt() -> Answer:
    """Version of TensorRT, and whether its builder starts on the GPU, if there is one."""
    from eps_deploy.engines.base import EngineError
    from eps_deploy.engines.trt.cuda import Cuda
    from eps_deploy.engines.trt.plan import collect_messages, load_tensorrt, logger_of

    trt = load_tensorrt()
    answer = {"found": str(trt.__version__)}
    try:
        cuda = Cuda()
    except EngineError:
        return {**answer, "builder": "not tried: no GPU, or no pycuda"}
    with cuda.current(), collect_messages(trt) as messages:
        try:
            trt.Builder(logger_of(trt))
        except Exception as error:  # pybind11 raises if the builder is null
            return {"problem": f"{answer['found']} does not start: {messages.reason()} ({error})"}
    return {**answer, "builder": "starts"}


def tensorrt_rtx() -> Answer:
    return {"found": str(import_module("tensorrt_rtx").__version__)}


def pycuda() -> Answer:
    """Version of pycuda and name of the GPU, after some GPU memory was allocated and freed."""
    from eps_deploy.engines.trt.cuda import Cuda

    cuda = Cuda()
    with cuda.current():
        cuda.allocate(1024).free()
    facts = cuda.facts()
    return {"found": version("pycuda"), "cuda": facts["cuda"], "gpu": facts["device"]}


def cuda_bindings() -> Answer:
    from eps_deploy.engines.trt.cuda import load_bindings

    driver = load_bindings()
    status, newest = driver.cuDriverGetVersion()
    if status != driver.CUresult.CUDA_SUCCESS:
        return {"problem": f"cuDriverGetVersion: {status.name}"}
    return {"found": version("cuda-bindings"), "cuda": f"{newest // 1000}.{newest % 1000 // 10}"}


def package(name: str) -> Answer:
    """Version of a package that only has to be importable."""
    import_module(name)
    return {"found": version(name)}


PROBES: dict[str, Callable[..., Answer]] = {
    probe.__name__: probe
    for probe in (torch, onnxruntime, provider, tensorrt, tensorrt_rtx, pycuda, cuda_bindings)
} | {"package": package}


def main(arguments: list[str]) -> None:
    name, *rest = arguments
    try:
        answer = PROBES[name](*rest)
    except Exception as error:  # whatever a library raises is the problem to report
        if isinstance(error, ModuleNotFoundError):
            error = ImportError(f"{error.name} is not installed")
        text = " ".join(str(error).split())
        answer = {"problem": text or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
