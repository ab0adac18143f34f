"""The forward pass of a training step: network and side head, distributed and compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.nn.parallel import DistributedDataParallel

from eps_train import graph
from eps_train.config import TrainingConfig
from eps_train.distributed import Group, running_statistics
from eps_train.errors import ConfigError
from eps_train.gate import EpsilonGate, GateRecords
from eps_train.networks import SideHead

Answers = tuple[Tensor, Tensor | None]  # logits of the network and of its side head


class TrainedNetwork(nn.Module):
    """Network and side head as one module, which DDP has to see together."""

    def __init__(self, model: fx.GraphModule, side_head: SideHead | None) -> None:
        super().__init__()
        self.model, self.side_head = model, side_head
        self._tapped: Tensor | None = None
        self._records = GateRecords([])
        self._run: Callable[[Tensor], Tensor] | None = None
        if side_head is not None:
            graph.taps(model)[0].register_forward_hook(self._read_tap)

    def forward(self, images: Tensor) -> Answers:
        """Logits `[N, classes]` of normalised images `[N, C, H, W]`; of the side head, or None."""
        logits = self.model(images) if self._run is None else self._run(images)
        if self.training:
            self._records.update()
        tapped, self._tapped = self._tapped, None
        if self.side_head is None or tapped is None:
            return logits, None
        return logits, self.side_head(tapped)

    def run_by(self, run: Callable[[Tensor], Tensor]) -> None:
        """Pass images through `run`, which computes what the model does."""
        self._run = run

    def join_records(self) -> None:
        """Have the gates' records updated together at the end of every pass (same records)."""
        gates = [
            self.model.get_submodule(str(node.target)) for node in graph.gate_nodes(self.model)
        ]
        calls = Counter(map(id, gates))
        once = [g for g in gates if isinstance(g, EpsilonGate) and calls[id(g)] == 1]
        self._records = GateRecords(once)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}  # a copy passes images through its own model

    def _read_tap(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if module.training:
            self._tapped = output


class Forward:
    """Calls a :class:`TrainedNetwork` as the configuration asks, whatever shape it has by now.

    Raises:
        ConfigError: this machine lacks what `--compile` or `--sync-batchnorm` needs.
    """

    def __init__(
        self, network: TrainedNetwork, config: TrainingConfig, group: Group, device: torch.device
    ) -> None:
        self._network, self._group, self._device = network, group, device
        self._compile = config.compile
        self._parts: dict[str, Callable[..., Any]] = {}  # compiled, by what they compute
        if config.compile:
            refuse_compile(device)
            network.run_by(self._compiled())
        self._call: Callable[[Tensor], Answers] | None = None

    def __call__(self, images: Tensor) -> Answers:
        if self._call is None:
            self._call = self._wrap()
        return self._call(images)

    def renew(self, model: fx.GraphModule) -> None:
        """Go on with `model`, which shares its modules with the one before.

        Of that one nothing is kept but compiled parts that are the same in both: the hooks of its
        DDP would hold the memory of removed blocks, and would run beside the new ones.
        """
        self._network.model = model
        if self._compile:
            self._network.run_by(self._compiled())
        self._call = None

    def _wrap(self) -> Callable[[Tensor], Answers]:
        self._network.join_records()
        network: nn.Module = self._network
        if self._group.world is not None:
            # Each process's gates have records of their own. The running statistics of batch norm,
            # which nothing reads in training, the loop shares once an epoch.
            self._group.share(running_statistics(network))
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                network, [name for name, _ in network.named_buffers()]
            )
            network = DistributedDataParallel(
                network,
                device_ids=[self._device.index] if self._device.type == "cuda" else None,
                gradient_as_bucket_view=True,  # a gradient is sent from where it is, not copied
            )
        return network

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        """The model in parts, each compiled; those that were there before a removal stay so."""
        whole, parts = in_parts(self._network.model), {}
        for name, part in list(whole.named_children()):
            assert isinstance(part, fx.GraphModule)
            key = _what_it_computes(part)
            known = self._parts.get(key)
            parts[key] = torch.compile(part, dynamic=False) if known is None else known
            setattr(whole, name, parts[key])
        self._parts = parts
        run: Callable[[Tensor], Tensor] = whole.forward
        return run


def in_parts(model: fx.GraphModule) -> fx.GraphModule:
    """The same network as a chain of submodules, cut behind each gate. Modules are shared.

    Removing a block leaves all parts but its own as they were, unless something stands between it
    and the next, such as a tap; and of parts of one shape the compiler finds the kernels in its
    cache.
    """
    gates = graph.gate_nodes(model).keys()
    number, behind = {}, 0
    for node in model.graph.nodes:
        number[node] = behind
        behind += node in gates
    return split_module(model, model, number.__getitem__, keep_original_order=True)


def _what_it_computes(part: fx.GraphModule) -> str:
    """Its steps, with the modules' names, but without those of its operands, and no identities.

    A removed block leaves its shortcut behind, which is one.
    """
    modules = dict(part.named_modules())
    order: dict[fx.Node, int] = {}
    steps: list[Any] = []
    for node in part.graph.nodes:
        if node.op == "call_module" and type(modules[str(node.target)]) is nn.Identity:
            order[node] = order[node.all_input_nodes[0]]
            continue
        order[node] = len(steps)
        named = node.op != "placeholder"
        operands = fx.node.map_arg((node.args, node.kwargs), order.__getitem__)
        steps.append((node.op, node.target, operands) if named else node.op)
    return repr(steps)


def synchronise_batchnorm(module: nn.Module, group: Group, device: torch.device) -> nn.Module:
    """The same module with torch's SyncBatchNorm in the place of every batch norm.

    Parameters and names stay. Raises ConfigError where torch has none.
    """
    if device.type != "cuda":
        raise ConfigError(
            "--sync-batchnorm: torch's SyncBatchNorm takes tensors on CUDA devices alone, not on"
            f" {device.type}; leave it out"
        )
    if group.size == 1:
        return module
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return converted


def drop_batch_counts(module: nn.Module) -> None:
    """Have its batch norms no longer count batches, which costs a GPU a kernel each and step.

    The count only matters to a batch norm without momentum, which keeps it. State dicts have the
    others as 0, and may have any when they are loaded.
    """
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.momentum is not None:
            if norm.num_batches_tracked is None:
                continue
            norm.num_batches_tracked = None
            norm.register_state_dict_post_hook(_add_count)
            norm.register_load_state_dict_pre_hook(_pass_over_count)


def _add_count(norm: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state[f"{prefix}num_batches_tracked"] = torch.tensor(0)


def _pass_over_count(norm: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}num_batches_tracked", None)


def refuse_compile(device: torch.device) -> None:
    """Raise ConfigError where torch.compile has no compiler to work with."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "--compile: needs the package triton, which torch brings on Linux; leave it out"
            )
    elif device.type == "cpu":
        usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
        compiler = os.environ.get("CXX", usual)
        if shutil.which(compiler) is None:
            raise ConfigError(
                f"--compile: needs a C++ compiler, and {compiler} is not here; install it, name"
                " another in the environment variable CXX, or leave --compile out"
            )
    else:
        raise ConfigError(f"--compile: not supported on {device.type}; leave it out")
