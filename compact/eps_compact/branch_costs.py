"""What each residual branch costs: what would leave the network with that block alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from eps_train import graph
from eps_train.branches import branch_nodes, branch_parameters
from eps_train.checkpoint import Checkpoint
from eps_train.gate import EpsilonGate


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchCost:
    """One block's branch, for one float32 image.

    Attributes:
        block: its name.
        parameters: learned parameters that leave the network with this block alone.
        flops: as `eps_train.cost` counts them: the difference that removal makes.
        activation_bytes: of all tensors that the branch's steps make.
        kind: equal for blocks of the same layers on the same shapes, which cost the same time.
    """

    block: str
    parameters: int
    flops: int
    activation_bytes: int
    kind: str


def live_network(checkpoint: Checkpoint) -> fx.GraphModule:
    """The checkpoint's network without its dead blocks, in evaluation mode, every other gate live.

    A plain network gets open gates at all its residual additions, so that its blocks can be
    weighed and taken out too. Nothing is shared with `checkpoint`.
    """
    network = checkpoint.network
    gone = set(network.removed).union(checkpoint.dead)
    blocks = network.gated or network.all_blocks()
    spec = replace(
        network,
        gated=tuple(block for block in blocks if block not in gone),
        removed=(*network.removed, *checkpoint.dead),
    )
    state = checkpoint.state
    if not network.gated:
        fresh = EpsilonGate().state_dict()
        gates = [n for n, m in spec.skeleton().named_modules() if isinstance(m, EpsilonGate)]
        state = {f"{gate}.{name}": fresh[name] for gate in gates for name in fresh} | state
    return spec.build(state).eval()


def branch_costs(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> list[BranchCost]:
    """Every gated block's cost, in the order of computation; nothing is computed.

    Args:
        model: a network with gates.
        input_shape: `[C, H, W]` of an image.
    """
    skeleton = copy.deepcopy(model).to("meta").eval()
    shapes = _Shapes(skeleton)
    with torch.no_grad(), shapes.counter:
        shapes.run(torch.empty((1, *input_shape), device="meta"))
    parameters = branch_parameters(model)
    found = []
    for node, block in graph.gate_nodes(skeleton).items():
        branch = branch_nodes(node)
        found.append(
            BranchCost(
                block=block,
                parameters=parameters[block],
                flops=sum(shapes.flops[member] for member in branch),
                activation_bytes=sum(shapes.bytes[member] for member in branch),
                kind="; ".join(
                    f"{shapes.layer(member)}@{shapes.shape[member]}"
                    for member in [*branch, *node.all_input_nodes]
                ),
            )
        )
    return found


class _Shapes(fx.Interpreter):
    """Runs a network on the meta device and notes every node's FLOPs, bytes and shapes."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.counter = FlopCounterMode(display=False)
        self.flops: dict[fx.Node, int] = {}
        self.bytes: dict[fx.Node, int] = {}
        self.shape: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> object:
        before = self.counter.get_total_flops()
        result: object = super().run_node(n)
        self.flops[n] = self.counter.get_total_flops() - before
        # Tuples of tensors are taken apart by a node of their own, which is counted instead. What
        # hands its input on (an identity, a step in place) takes no memory.
        same = any(result is self.env.get(node) for node in n.all_input_nodes)
        tensors = [result] if isinstance(result, Tensor) else []
        self.bytes[n] = 0 if same else sum(tensor.nbytes for tensor in tensors)
        self.shape[n] = ",".join("x".join(map(str, tensor.shape)) for tensor in tensors)
        return result

    def layer(self, node: fx.Node) -> str:
        """What the node computes, as far as time depends on it."""
        if node.op == "call_module":
            return repr(self.submodules[str(node.target)])
        return getattr(node.target, "__name__", str(node.target))
