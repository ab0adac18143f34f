"""Blocks timed on ONNX Runtime."""

from __future__ import annotations

from eps_compact.branch_costs import branch_costs, live_network
from eps_compact.timing import MIN_ROUNDS, block_times, plain
from eps_deploy.block_timer import OrtTimer
from eps_train import data, graph
from tests.checkpoints import make_checkpoint


def test_every_network_is_timed_as_often() -> None:
    checkpoint = make_checkpoint(depth=8)
    image = data.load("digits").validation.images[:1]
    model = live_network(checkpoint)
    timer = OrtTimer(checkpoint.data, image.numpy())
    found = timer([plain(model), plain(model, graph.gates(model))], image.float(), seconds=0)
    assert [len(rounds) for rounds in found] == [MIN_ROUNDS, MIN_ROUNDS]
    times = block_times(
        model, branch_costs(model, checkpoint.data.input_shape), timer, image.float(), 0.5
    )
    assert list(times) == list(graph.gates(model))
    assert timer.name.startswith("onnxruntime ")
