"""Check eps_deploy's CUDA layer on a GPU, without TensorRT.

Prints a line per check and one JSON object last; exit code 1 when a check failed.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt import cuda
from eps_deploy.engines.trt.cuda import Cuda, load_pycuda

CUDA = Cuda()
DRIVER: Any = load_pycuda()
BINDINGS = CUDA.graph_bindings()
MIB = 1 << 20


def facts() -> dict[str, Any]:
    return CUDA.facts()


def copies() -> dict[str, bool]:
    """A round trip through device memory keeps every byte."""
    with CUDA.current():
        stream, memory = CUDA.stream(), CUDA.allocate(MIB)
        sent, received = (CUDA.page_locked((MIB,), np.uint8) for _ in range(2))
        sent.array[:] = np.random.default_rng(0).integers(0, 256, MIB)
        received.array[:] = 0
        CUDA.copy_in(memory, sent.array, stream)
        CUDA.copy_out(received.array, memory, stream)
        stream.synchronize()
        same = bool((sent.array == received.array).all())
        aligned = memory.address % 256 == 0
        for resource in (sent, received, memory, stream):
            resource.free()
    if not same:
        raise AssertionError("bytes changed on the way")
    return {"aligned": aligned}


def graph() -> dict[str, Any]:
    """A captured memset and copy gives what the calls give; a refusal ends a capture."""
    with CUDA.current():
        stream, first, second = CUDA.stream(), CUDA.allocate(4096), CUDA.allocate(4096)
        out = CUDA.page_locked((1024,), np.uint32)

        def work(value: int = 7) -> bool:
            DRIVER.memset_d32_async(first.address, value, 1024, stream.raw)
            DRIVER.memcpy_dtod_async(second.address, first.address, 4096, stream.raw)
            return True

        def refused() -> bool:
            work()
            return False

        def read() -> set[int]:
            CUDA.copy_out(out.array, second, stream)
            stream.synchronize()
            return set(out.array.tolist())

        work(1)
        stream.synchronize()
        captured = cuda.capture(BINDINGS, stream.handle, work)
        for fill in (3, 5):
            DRIVER.memset_d32_async(second.address, fill, 1024, stream.raw)
            captured.launch(stream.handle)
            assert read() == {7}
        begin, end = CUDA.event(), CUDA.event()
        begin.record(stream)
        for _ in range(1000):
            captured.launch(stream.handle)
        end.record(stream)
        stream.synchronize()
        launches_ms = begin.milliseconds_till(end)
        try:
            cuda.capture(BINDINGS, stream.handle, refused)
            raise AssertionError("a refused capture gave a graph")
        except cuda.CudaGraphError as error:
            message = str(error)
        work(9)
        assert read() == {9}, "the stream is unusable after a failed capture"
        captured.free()
        for resource in (begin, end, out, first, second, stream):
            resource.free()
    return {"microseconds_per_launch": launches_ms, "refused": message}


def too_much_memory() -> str:
    with CUDA.current():
        try:
            CUDA.allocate(1 << 45)
        except EngineError as error:
            return str(error)
    raise AssertionError("32 TiB were allocated")


def threads() -> None:
    """Sixteen threads with a stream each never read another's bytes."""
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            with CUDA.current():
                stream, memory = CUDA.stream(), CUDA.allocate(1 << 16)
                host = CUDA.page_locked((1 << 16,), np.uint8)
                for turn in range(200):
                    host.array[:] = (seed + turn) % 251
                    CUDA.copy_in(memory, host.array, stream)
                    stream.synchronize()
                    host.array[:] = 255
                    CUDA.copy_out(host.array, memory, stream)
                    stream.synchronize()
                    if not (host.array == (seed + turn) % 251).all():
                        wrong.append(seed)
                for resource in (host, memory, stream):
                    resource.free()
        except Exception as error:
            wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong


def leaks() -> int:
    """Bytes of device memory lost over 2,000 lives of each kind of resource."""
    with CUDA.current():

        def life() -> None:
            for resource in (
                CUDA.stream(),
                CUDA.event(),
                CUDA.allocate(4 * MIB),
                CUDA.page_locked((MIB,), np.uint8),
            ):
                resource.free()

        for _ in range(20):
            life()
        before = CUDA.free_memory()
        for _ in range(2000):
            life()
        gc.collect()
        lost = before - CUDA.free_memory()
    assert lost < 8 * MIB, lost
    return lost


def torch_beside_it() -> str:
    """torch computes, and captures its own graphs, on the same primary context."""
    import torch

    matrix = torch.arange(64.0, device="cuda").reshape(8, 8)
    before = (matrix @ matrix).sum().item()
    with CUDA.current():
        stream, memory = CUDA.stream(), CUDA.allocate(MIB)
        assert (matrix @ matrix).sum().item() == before
        memory.free()
        stream.free()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        doubled = matrix * 2
    captured.replay()
    torch.cuda.synchronize()
    assert doubled.sum().item() == 2 * matrix.sum().item()
    return torch.cuda.get_device_name()


CHECKS: tuple[Callable[[], Any], ...] = (
    facts,
    copies,
    graph,
    too_much_memory,
    threads,
    leaks,
    torch_beside_it,
)


def main() -> int:
    report: dict[str, dict[str, Any]] = {}
    for check in CHECKS:
        began = time.perf_counter()
        try:
            report[check.__name__] = {"found": check()}
        except Exception as error:
            report[check.__name__] = {"error": f"{type(error).__name__}: {error}"}
        report[check.__name__]["seconds"] = round(time.perf_counter() - began, 3)
        print(check.__name__, json.dumps(report[check.__name__]), flush=True)
    failed = [name for name, found in report.items() if "error" in found]
    print(json.dumps({"failed": failed, "checks": report}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
