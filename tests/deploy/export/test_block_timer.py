"""Block times on ONNX Runtime, and blocks removed from the graph that it runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

from eps_compact.analysis.importance import live_network
from eps_core.errors import GraphError
from eps_core.timing import MIN_BLOCKS
from eps_deploy.engines.ort import OrtEngine
from eps_deploy.export import block_timer
from eps_deploy.export.block_timer import OrtTimer, Removable
from eps_deploy.export.export import export_onnx
from eps_train.data import dataset
from eps_train.gating import costs, rewriting
from eps_train.gating.costs import block_times, branch_costs, plain
from eps_train.models.resnets import Normalize
from tests.checkpoints import make_checkpoint

DIGITS = dataset.load("digits")
ALL = tuple(f"stages.{stage}.{block}" for stage in range(3) for block in range(2))
IMAGES = DIGITS.validation.images[:3].numpy()


@pytest.fixture(scope="module")
def model() -> fx.GraphModule:
    return live_network(make_checkpoint(depth=14))


@pytest.fixture(scope="module")
def exported(model: fx.GraphModule) -> Removable:
    return Removable(model, DIGITS.identity)


@pytest.mark.parametrize(
    "blocks",
    [(), ("stages.1.0",), ("stages.0.0", "stages.0.1", "stages.2.1"), ALL],
    ids=["none", "one", "neighbours", "all"],
)
def test_what_is_left_is_what_an_export_without_them_makes(
    model: fx.GraphModule, exported: Removable, blocks: tuple[str, ...], tmp_path: Path
) -> None:
    export_onnx(plain(model, blocks), DIGITS.identity, tmp_path / "model.onnx")
    found, expected = exported.without(blocks), (tmp_path / "model.onnx").read_bytes()
    steps = Counter(node.op_type for node in onnx.load_from_string(found).graph.node)
    assert steps.pop("Identity", 0) == len(blocks), "which ONNX Runtime takes out"
    kinds = ("Conv", "Relu", "Gemm", "AveragePool", "Pad")
    wanted = Counter(node.op_type for node in onnx.load_from_string(expected).graph.node)
    assert {kind: steps[kind] for kind in kinds} == {kind: wanted[kind] for kind in kinds}
    with OrtEngine(found) as ours, OrtEngine(expected) as theirs:
        np.testing.assert_allclose(ours.infer(IMAGES), theirs.infer(IMAGES), rtol=0, atol=1e-5)


def test_a_network_with_other_additions_and_products() -> None:
    """Its squeeze-excite multiplies, its activation adds 3, its head adds two tensors."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.act = nn.Hardswish()
            self.squeeze = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            found = self.act(self.conv(x))
            squeezed: Tensor = self.squeeze(found.mean((2, 3), keepdim=True))
            out: Tensor = x + found * squeezed.sigmoid() * 3.0
            return out

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 4, 3)
            self.blocks = nn.Sequential(Block(), Block())
            self.left, self.right = nn.Linear(4, 10), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.blocks(self.stem(x)).mean((2, 3))
            logits: Tensor = self.left(pooled) + self.right(pooled)
            return logits

    torch.manual_seed(0)
    model = rewriting.insert_gates(Network().eval())
    exported = Removable(model, DIGITS.identity)
    identity = DIGITS.identity
    normalize = Normalize.of(identity)
    for blocks in ((), ("blocks.0",), ("blocks.1",), ("blocks.0", "blocks.1")):
        with OrtEngine(exported.without(blocks)) as engine, torch.no_grad():
            expected = plain(model, blocks)(normalize(torch.from_numpy(IMAGES)))
            np.testing.assert_allclose(engine.infer(IMAGES), expected, rtol=0, atol=1e-4)


def test_every_network_is_timed_equally_often(
    model: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "SECONDS_EACH", 0.0)
    timer = OrtTimer(DIGITS.identity)
    measure = timer.load(model, torch.from_numpy(IMAGES[:1]))
    found = measure([(), tuple(rewriting.gates(model))])
    assert [len(times) for times in found] == [MIN_BLOCKS, MIN_BLOCKS]
    _, times = block_times(branch_costs(model, DIGITS.identity.input_shape), measure)
    assert list(times) == list(rewriting.gates(model))
    assert timer.name.startswith("onnxruntime ")


def test_the_same_network_is_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importance and sweep load the same one; other weights make another network."""
    made: list[object] = []
    monkeypatch.setattr(block_timer, "Removable", lambda *given: made.append(given))
    timer = OrtTimer(DIGITS.identity)
    image = torch.from_numpy(IMAGES[:1])
    for seed in (0, 0, 1):
        timer.load(live_network(make_checkpoint(depth=8, seed=seed)), image)
    assert len(made) == 2


def test_a_network_that_cannot_be_exported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise GraphError("model.onnx: the network cannot be exported to ONNX: no")

    monkeypatch.setattr(block_timer, "export_onnx", refuse)
    with pytest.raises(GraphError, match=r": no; or have torch time the blocks: --timer torch$"):
        Removable(live_network(make_checkpoint(depth=8)), DIGITS.identity)
