"""Running plans of TensorRT itself, on a GPU: what no fake can show.

Building is tested in `test_build_gpu.py`, what the engines really compute in there too.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eps_compact import compact
from eps_core.errors import DataError
from eps_deploy.bench.accuracy import PARITY_LIMITS
from eps_deploy.engines.base import EngineError, Images, Logits
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.engines.trt.build import BuildOptions, build
from eps_deploy.engines.trt.cuda import Cuda, host_facts
from eps_deploy.engines.trt.engine import TrtEngine
from eps_deploy.engines.trt.plan import AMPERE, Host, Plan, load_tensorrt
from eps_deploy.export.export import in_precision
from eps_deploy.precision import PRECISIONS
from tests.checkpoints import make_checkpoint
from tests.deploy.engines.trt.networks import every_precision

pytestmark = pytest.mark.gpu

OPTIONS = BuildOptions(opt_batch=4, max_batch=32)
BATCHES = (1, 2, 4, 32, 31, 1, 32)  # up, down and again; 31 is ragged
LIVES = 1000
LEAK = 8 * 2**20  # bytes: less than one engine's buffers in ten of these lives


def opened(plan: Plan, **arguments: Any) -> TrtEngine:
    return TrtEngine(plan.content, plan.metadata, **arguments)


class Plans:
    """Builds each precision's plan once."""

    def __init__(self, folder: Path) -> None:
        self.trt, self.cuda = load_tensorrt(), Cuda()
        self.host: Host = host_facts(self.trt, self.cuda)
        self.models = every_precision(folder)
        self._plans: dict[str, Plan] = {}

    def plan(self, precision: str = "fp32") -> Plan:
        if self.host.capability < AMPERE and precision in ("tf32", "bf16"):
            pytest.skip(f"{self.host.device} has no {precision}")
        if precision not in self._plans:
            self._plans[precision] = build(
                self.models[precision],
                PRECISIONS[precision],
                OPTIONS,
                host=self.host,
                trt=self.trt,
                on_device=self.cuda.current,
            )
        return self._plans[precision]

    def expected(self, precision: str, images: Images) -> Logits:
        """What the same ONNX file says on the CPU, or torch where no runtime has its type."""
        choice = PRECISIONS[precision]
        if choice.float == "bfloat16":
            checkpoint = make_checkpoint(depth=8)
            network = compact(checkpoint.build_gated())
            return in_precision(network, checkpoint.data, choice).infer(images)
        with OrtEngine(self.models[precision], exact_qdq=choice.quantized) as engine:
            return engine.infer(images)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return Plans(tmp_path_factory.mktemp("onnx"))


@pytest.fixture
def engine(plans: Plans) -> Iterator[TrtEngine]:
    with opened(plans.plan()) as engine:
        yield engine


def pixels(engine: TrtEngine, count: int, seed: int = 0) -> Images:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (count, *engine.input_shape), dtype=np.uint8)


def differ(found: Logits, wanted: Logits) -> float:
    """The largest difference, relative to the largest logit."""
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("use_graphs", [True, False], ids=["graph", "enqueue"])
@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_parity(plans: Plans, precision: str, use_graphs: bool) -> None:
    """With the CPU, at batch 1, the optimum, the largest and a ragged one, in any order."""
    with opened(plans.plan(precision), use_graphs=use_graphs) as engine:
        for turn, batch in enumerate(BATCHES):
            images = pixels(engine, batch, turn)
            off = differ(engine.infer(images), plans.expected(precision, images))
            assert off <= PARITY_LIMITS[precision], f"{precision}, batch {batch}"


def test_graphs_are_really_used(engine: TrtEngine) -> None:
    for batch in BATCHES:
        engine.infer(pixels(engine, batch))
    told = engine.describe()["cuda_graphs"]
    assert told == {
        "used": True,
        "why_not": None,
        "batches": [1, 2, 4, 32],  # 31 is padded
        "not_captured": {},
    }


def test_a_graph_equals_the_enqueued_launches(plans: Plans, engine: TrtEngine) -> None:
    with opened(plans.plan(), use_graphs=False) as plain:
        for batch in BATCHES:
            images = pixels(engine, batch, batch)
            assert differ(engine.infer(images), plain.infer(images)) <= 1e-6


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_threads(plans: Plans, contexts: int) -> None:
    """More than there are execution contexts; each gets the answers to its own images."""
    failures: list[BaseException] = []
    engine = opened(plans.plan(), contexts=contexts)
    start = threading.Barrier(6)
    jobs = [pixels(engine, 1 + number * 5 % 32, number) for number in range(6)]
    wanted = [plans.expected("fp32", images) for images in jobs]

    def work(number: int) -> None:
        try:
            start.wait(60)
            for _ in range(100):
                off = differ(engine.infer(jobs[number]), wanted[number])
                assert off <= PARITY_LIMITS["fp32"]
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert not failures, failures


def test_time_on_device(engine: TrtEngine) -> None:
    for batch in (1, 32):
        times = engine.time_on_device(pixels(engine, batch), 50)
        assert times.shape == (50,)
        assert (times > 0).all()
    images = pixels(engine, 4)
    before = engine.infer(images)
    engine.time_on_device(images, 5)
    assert differ(engine.infer(images), before) <= 1e-6


def test_batches_outside_the_profile_are_refused(engine: TrtEngine) -> None:
    for count in (0, 33):
        with pytest.raises(DataError, match="1 to 32 images"):
            engine.infer(pixels(engine, count))
    engine.infer(pixels(engine, 32))


def test_a_closed_engine_says_so(plans: Plans) -> None:
    with opened(plans.plan()) as engine:
        images = pixels(engine, 1)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.infer(images)


def test_another_thread_may_close_it(plans: Plans) -> None:
    engine = opened(plans.plan())
    engine.infer(pixels(engine, 2))
    thread = threading.Thread(target=engine.close)
    thread.start()
    thread.join()


def test_a_thousand_engines_leave_nothing_behind(plans: Plans) -> None:
    """Memory of the GPU after a thousand engines, against that after the first ten."""
    plan = plans.plan()
    images: Images | None = None
    before = 0
    for life in range(LIVES):
        with opened(plan) as engine:
            images = pixels(engine, 32) if images is None else images
            engine.infer(images)
        if life == 9:
            with plans.cuda.current():
                before = plans.cuda.free_memory()
    with plans.cuda.current():
        assert before - plans.cuda.free_memory() < LEAK


def test_torch_lives_in_the_same_process(plans: Plans) -> None:
    """Before, while and after there is an engine, on the same GPU and in the same thread."""
    weights = torch.arange(64.0, device="cuda").reshape(8, 8)

    def check() -> None:
        product = weights @ weights
        torch.cuda.synchronize()
        expected = np.arange(64.0).reshape(8, 8)
        assert np.allclose(product.cpu().numpy(), expected @ expected)

    check()
    with opened(plans.plan()) as engine:
        images = pixels(engine, 8)
        check()
        first = engine.infer(images)
        check()
        again = engine.infer(images)
        assert differ(again, first) <= 1e-6
    check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        later = weights * 2
    graph.replay()
    torch.cuda.synchronize()
    assert later.sum().item() == 2 * weights.sum().item()


@pytest.mark.parametrize(
    "changed",
    [{"tensorrt": "10.0.0.1"}, {"compute_capability": "7.5"}, {"platform": "win32-amd64"}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_plan_of_another_machine_is_refused_and_built_again(
    plans: Plans, changed: dict[str, Any]
) -> None:
    plan = plans.plan()
    foreign = replace(plan.metadata, host=replace(plan.metadata.host, **changed))
    with pytest.raises(EngineError, match=r"built for .*; this machine has .*; rebuild it"):
        TrtEngine(plan.content, foreign)
    built = build(
        plans.models["fp32"],
        PRECISIONS["fp32"],
        OPTIONS,
        host=plans.host,
        trt=plans.trt,
        on_device=plans.cuda.current,
    )
    with opened(built) as engine:
        images = pixels(engine, 3)
        off = differ(engine.infer(images), plans.expected("fp32", images))
        assert off <= PARITY_LIMITS["fp32"]


def test_other_bytes_than_a_plan_are_refused(plans: Plans) -> None:
    """Also where the metadata has nothing against it: TensorRT gives None, and says why in its log.

    A plan that is cut in half is no input for this: TensorRT does not promise to survive it.
    """
    content = b"not a plan" * 100
    metadata = replace(plans.plan().metadata, plan_sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(EngineError, match="TensorRT does not load it: "):
        TrtEngine(content, metadata)
    opened(plans.plan()).close()


_ALONE = """
import sys
from pathlib import Path
import numpy as np
from eps_deploy.engines.trt.engine import TrtEngine
from eps_deploy.engines.trt.plan import PlanMetadata

plan = Path(sys.argv[1])
engine = TrtEngine(plan.read_bytes(), PlanMetadata.load(Path(sys.argv[2])))
print(engine.infer(np.zeros((1, *engine.input_shape), np.uint8)).shape)
if sys.argv[3] == "close":
    engine.close()
"""


@pytest.mark.parametrize("end", ["close", "no close"])
def test_a_process_ends_without_complaint(plans: Plans, tmp_path: Path, end: str) -> None:
    """Without torch; pycuda writes to stderr, or aborts, when something was not freed in order."""
    plan = plans.plan()
    (tmp_path / "model.plan").write_bytes(plan.content)
    (tmp_path / "model.plan.json").write_bytes(plan.metadata.to_json())
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, "model.plan", "model.plan.json", end],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"(1, {plan_classes(plans)})\n"
    if end == "close":
        assert "PyCUDA" not in done.stderr


def plan_classes(plans: Plans) -> int:
    with opened(plans.plan()) as engine:
        return engine.classes
