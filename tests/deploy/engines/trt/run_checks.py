"""What running a plan must do, as checks on an engine's class: ours, or one broken on purpose."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from eps_deploy.engines.base import EngineError
from eps_deploy.engines.trt.cuda import host_facts
from tests.deploy.engines.trt.contract import VERSIONS, Version
from tests.deploy.engines.trt.fake_pycuda import MS_A_COPY
from tests.deploy.engines.trt.machine import (
    Machine,
    close,
    expected,
    images,
    metadata_of,
    network,
)
from tests.deploy.engines.trt.semantic_fake import MS_AN_IMAGE, make_plan

# Up, down and again, each size after smaller and after larger ones. 5, 7 and 8 are padded to the
# same size, as are 3 and 4; the smaller ones come first.
BATCHES = (1, 2, 3, 4, 5, 8, 7, 1, 8, 2, 3)


def agrees(kind: Any, version: Version, **arguments: Any) -> None:
    machine = Machine(version)
    with machine.engine(kind, **arguments) as engine:
        for turn, batch in enumerate(BATCHES):
            pixels = images(batch, turn)
            assert close(engine.infer(pixels), expected(pixels)), batch
    machine.gpu.check_clean()


def agrees_without_graphs(kind: Any, version: Version) -> None:
    agrees(kind, version, use_graphs=False)


def takes_any_layout(kind: Any, version: Version) -> None:
    """Strided images, and arrays that the caller uses again at once."""
    machine = Machine(version)
    with machine.engine(kind) as engine:
        pixels = images(8).transpose(0, 1, 3, 2)[::2]
        wanted = expected(pixels)
        first = engine.infer(pixels)
        pixels[:] = 0
        assert close(first, wanted)
        again = engine.infer(pixels)
        assert close(first, wanted)
        assert close(again, expected(pixels))


def does_no_more_than_asked(kind: Any, version: Version) -> None:
    """A smaller batch after a larger one takes the time of a smaller one, and of its padding.

    An inference copies once in each direction; `time_on_device` is without the copies.
    """
    machine = Machine(version)
    for use_graphs in (True, False):
        with machine.engine(kind, use_graphs=use_graphs) as engine:
            for batch, padded in ((8, 8), (2, 2), (3, 4), (1, 1)):
                for _ in range(2):
                    found = engine.time_on_device(images(batch), 3)
                    assert found.tolist() == [padded * MS_AN_IMAGE] * 3
                began = machine.gpu.clock
                assert close(engine.infer(images(batch)), expected(images(batch)))
                taken = machine.gpu.clock - began
                assert taken == padded * MS_AN_IMAGE + 2 * MS_A_COPY, batch


def pads_to_any_largest_batch(kind: Any, version: Version) -> None:
    """Also one that is no power of two, where the next power of two is not in the profile."""
    machine = Machine(version)
    for profiles in (((1, 1, 1), (2, 4, 6)), ((1, 1, 1), (2, 2, 3)), ((1, 1, 1),)):
        largest = profiles[-1][2]
        plan = make_plan(network(), profiles=profiles)
        metadata = metadata_of(plan, machine.host, profiles=profiles)
        with machine.engine(kind, plan, metadata=metadata) as engine:
            for batch in (*range(1, largest + 1), 1):
                assert close(engine.infer(images(batch)), expected(images(batch))), batch
            graphs = {1: [1], 3: [1, 2, 3], 6: [1, 2, 4, 6]}[largest]
            assert engine.describe()["cuda_graphs"]["batches"] == graphs
    machine.gpu.check_clean()


def serves_threads(kind: Any, version: Version) -> None:
    machine = Machine(version)
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            start.wait()
            for turn in range(10):
                pixels = images(1 + (number + turn) % 8, 10 * number + turn)
                assert close(engine.infer(pixels), expected(pixels))
        except BaseException as failure:
            failures.append(failure)

    with machine.engine(kind) as engine:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
    machine.gpu.check_clean()


_REFUSALS = {
    "set_optimization_profile_async": "does not select optimization profile 1",
    "set_input_shape": r"does not take images of the shape \[2, 3, 6, 6\]",
    "set_tensor_address": "does not take the address of images",
    "infer_shapes": r"does not know the shape of \['images'\]",
    "execute_async_v3": "queues no inference",
}


def checks_every_result(kind: Any, version: Version) -> None:
    """What TensorRT refuses is an error, and what comes after works again."""
    for call, told in _REFUSALS.items():
        for use_graphs in (True, False):
            machine = Machine(version)
            with machine.engine(kind, use_graphs=use_graphs) as engine:
                assert close(engine.infer(images(8)), expected(images(8)))
                machine.gpu.refuse[call] = 1
                with pytest.raises(
                    EngineError, match=f"model.plan: TensorRT {told}: {call} was told"
                ):
                    engine.infer(images(2))
                assert close(engine.infer(images(2)), expected(images(2)))
                assert close(engine.infer(images(8)), expected(images(8)))
            machine.gpu.check_clean()


def loads_nothing_foreign(kind: Any, version: Version) -> None:
    """A plan of another machine, or another plan, never gets to TensorRT."""
    machine = Machine(version)
    plan = make_plan(network())
    elsewhere = Machine(version)
    elsewhere.gpu.capability = (8, 6)
    host = host_facts(elsewhere.trt, elsewhere.cuda)
    for content, told in (
        (plan, metadata_of(plan, host)),
        (plan + b"x", metadata_of(plan, machine.host)),
    ):
        with pytest.raises(EngineError, match="rebuild it"):
            machine.engine(kind, content, metadata=told)
    assert not machine.trt.count("Runtime", "deserialize_cuda_engine")


def closes_in_order(kind: Any, version: Version) -> None:
    """Graphs, contexts, engine, runtime, memory, streams; each once, all in the context."""
    machine = Machine(version)
    with machine.engine(kind) as engine:
        engine.infer(images(1))
        engine.infer(images(8))
        engine.time_on_device(images(8), 2)
    machine.gpu.check_clean()
    kinds = list(dict.fromkeys(machine.gpu.order))
    assert kinds == [
        *("executable graph", "IExecutionContext", "ICudaEngine", "Runtime"),
        *("event", "page-locked", "device", "stream"),
    ]


CHECKS = (
    agrees,
    agrees_without_graphs,
    takes_any_layout,
    does_no_more_than_asked,
    pads_to_any_largest_batch,
    serves_threads,
    checks_every_result,
    loads_nothing_foreign,
    closes_in_order,
)
EVERY_CHECK = [
    pytest.param(check, version, id=f"{check.__name__}-{version}")
    for version in VERSIONS
    for check in CHECKS
]


def noticed(kind: Any, version: Version = "11.4") -> list[str]:
    """The checks that fail with an engine of this class."""
    found = []
    for check in CHECKS:
        try:
            check(kind, version)
        except (Exception, pytest.fail.Exception) as failure:
            found.append(f"{check.__name__}: {failure!r}")
    return found
