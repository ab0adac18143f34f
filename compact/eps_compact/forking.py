"""Leave-one-out: what a network says without each of its blocks, the rest computed once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from eps_train import graph
from eps_train.evaluate import BATCH, logits
from eps_train.images import ImageSet, Part

WORST = 1e4  # what the loss of an answer that is not a number counts as


class Forking:
    """Runs a gated network, and at each gate goes through the rest once more without that block.

    What lies before a block is computed once for all blocks behind it, so that leaving out each of
    N blocks costs about N / 2 passes instead of N.

    Attributes:
        blocks: the gated blocks, in the order of computation.
        passes: about how many full passes one call costs.
    """

    def __init__(self, model: fx.GraphModule) -> None:
        self._run = fx.Interpreter(model)
        self._nodes = list(model.graph.nodes)
        self._gates = graph.gate_nodes(model)
        self.blocks = tuple(self._gates.values())
        rests = sum(
            len(self._nodes) - place
            for place, node in enumerate(self._nodes)
            if node in self._gates
        )
        self.passes = 1 + rests / len(self._nodes)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Iterator[tuple[str | None, Tensor]]:
        """Yield each block with the logits without it, and last None with those of the whole.

        Args:
            images: normalised float32 `[N, C, H, W]`, on the network's device.

        Logits are float32 `[N, classes]`, and equal those of the network that
        `graph.remove_blocks` makes.
        """
        values: dict[fx.Node, Any] = {}
        for place, node in enumerate(self._nodes):
            if node in self._gates:
                yield self._gates[node], self._without(values, place)
            answer = self._step(values, node, images)
        yield None, answer.float()

    @torch.no_grad()
    def whole(self, images: Tensor) -> Tensor:
        """Logits of the whole network for `images` as :meth:`__call__` takes them."""
        values: dict[fx.Node, Any] = {}
        for node in self._nodes:
            answer = self._step(values, node, images)
        return answer.float()  # type: ignore[no-any-return]

    def _without(self, values: dict[fx.Node, Any], place: int) -> Tensor:
        gate = self._nodes[place]
        shortcut, _ = gate.all_input_nodes
        unneeded = self._run.user_to_last_uses.get(gate, ())
        left = {node: value for node, value in values.items() if node not in unneeded}
        # Copies: a step that works in place would alter what the next block's turn starts from. One
        # call for all, so that views of one tensor stay views of one tensor.
        forked = dict(zip(left, copy.deepcopy(list(left.values())), strict=True))
        forked[gate] = values[shortcut].clone()
        for node in self._nodes[place + 1 :]:
            answer = self._step(forked, node, None)
        return answer.float()  # type: ignore[no-any-return]

    def _step(self, values: dict[fx.Node, Any], node: fx.Node, images: Tensor | None) -> Any:
        """Compute one node, and forget the values that it was the last to need.

        Returns the node's value; that of the last node is the network's answer.
        """
        self._run.env = values
        values[node] = images if node.op == "placeholder" else self._run.run_node(node)
        for used in self._run.user_to_last_uses.get(node, ()):
            values.pop(used, None)  # a fork has less to forget
        return values[node]


class Answers:
    """What one network makes of a growing number of labelled images, one entry an image.

    Attributes:
        correct: whether the label is the top answer, bool `[N]`.
        loss: cross-entropy, float64 `[N]`, at most `WORST`.
    """

    def __init__(self) -> None:
        self._correct: list[Tensor] = []
        self._loss: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take note of logits `[n, classes]` and labels int64 `[n]`, both on one device."""
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        self._loss.append(loss.nan_to_num(nan=WORST, posinf=WORST).clamp(max=WORST))
        self._correct.append(logits.argmax(dim=1) == labels)

    def extend(self, other: Answers) -> None:
        """Take over the answers to further images."""
        self._loss += other._loss
        self._correct += other._correct

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = torch.cat(self._correct).cpu().numpy()
        return found

    @property
    def loss(self) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = torch.cat(self._loss).double().cpu().numpy()
        return found

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def mean_loss(self) -> float:
        return float(self.loss.mean())


def answer_all(
    forking: Forking, normalize: nn.Module, images: ImageSet
) -> dict[str | None, Answers]:
    """Answers without each block, and under None those of the whole network.

    `images` lie on the network's device.
    """
    found: dict[str | None, Answers] = {block: Answers() for block in (*forking.blocks, None)}
    for batch in images.batches(BATCH):
        for block, said in forking(normalize(batch.images)):
            found[block].add(said, batch.labels)
    return found


def answer(model: nn.Module, normalize: nn.Module, part: Part) -> Answers:
    """Answers of one network to a part that lies on its device, or on disk."""
    found = Answers()
    for batch in part.batches(BATCH):
        found.add(logits(model, normalize, batch.images), batch.labels)
    return found
