"""Forward pass of a training step: DDP, torch.compile, devices and precision."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.nn.parallel import DistributedDataParallel

from eps_core import cli
from eps_core.errors import ConfigError
from eps_train.config import TrainingConfig
from eps_train.gating import rewriting
from eps_train.gating.gate import EpsilonGate, GateRecords
from eps_train.models.resnets import SideHead
from eps_train.training.distributed import Group, running_statistics

Logits = tuple[Tensor, Tensor | None]  # of the network and of its side head

# The fastest layout of images and convolution weights: tensor cores take no other in tf32, bf16 and
# fp16, and it is a quarter faster on the CPUs tried. What fp32 prefers on a GPU is not measured.
MEMORY_FORMAT = torch.channels_last


class TrainedNetwork(nn.Module):
    """Network and side head as one module, as DDP needs them."""

    def __init__(self, model: fx.GraphModule, side_head: SideHead | None) -> None:
        super().__init__()
        self.model, self.side_head = model, side_head
        self._tapped: Tensor | None = None
        self._records = GateRecords([])
        self.compiled: Callable[[Tensor], Tensor] | None = None  # computes what the model does
        if side_head is not None:
            rewriting.taps(model)[0].register_forward_hook(self._read_tap)

    def forward(self, images: Tensor) -> Logits:
        """Logits `[N, classes]` of normalised images `[N, C, H, W]`; of the side head, or None."""
        logits = self.model(images) if self.compiled is None else self.compiled(images)
        if self.training:
            self._records.update()
        tapped, self._tapped = self._tapped, None
        if self.side_head is None or tapped is None:
            return logits, None
        return logits, self.side_head(tapped)

    def join_records(self) -> None:
        """Update the gates' records together at the end of every pass (same records)."""
        gates = [
            self.model.get_submodule(str(node.target)) for node in rewriting.gate_nodes(self.model)
        ]
        calls = Counter(map(id, gates))
        once = [g for g in gates if isinstance(g, EpsilonGate) and calls[id(g)] == 1]
        self._records = GateRecords(once)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": None}  # a copy runs its own model

    def _read_tap(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if module.training:
            self._tapped = output


class Forward:
    """Calls a :class:`TrainedNetwork` through DDP and torch.compile, as the configuration asks.

    Raises ConfigError where this machine lacks what `--compile` needs.
    """

    def __init__(
        self, network: TrainedNetwork, config: TrainingConfig, group: Group, device: torch.device
    ) -> None:
        self._network, self._group, self._device = network, group, device
        self._compile = config.compile
        self._parts: dict[str, Callable[..., Any]] = {}  # compiled, by what they compute
        if config.compile:
            require_compiler(device)
        self._call: Callable[[Tensor], Logits] | None = None
        self.rewrap()

    def __call__(self, images: Tensor) -> Logits:
        if self._call is None:
            self._call = self._wrap()
        return self._call(images)

    def rewrap(self) -> None:
        """Continue after blocks were removed from the network's model.

        Only compiled parts that they leave unchanged are kept: the hooks of the previous DDP would
        hold the memory of removed blocks, and would run beside the new ones.
        """
        if self._compile:
            self._network.compiled = self._compiled()
        self._call = None

    def _wrap(self) -> Callable[[Tensor], Logits]:
        self._network.join_records()
        network: nn.Module = self._network
        if self._group.world is not None:
            # Each process's gates have records of their own. The running statistics of batch norm,
            # which nothing reads in training, are shared once an epoch by the training loop.
            self._group.share(running_statistics(network))
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                network, [name for name, _ in network.named_buffers()]
            )
            network = DistributedDataParallel(
                network,
                device_ids=[self._device.index] if self._device.type == "cuda" else None,
                gradient_as_bucket_view=True,  # gradients are sent from where they are, not copied
            )
        return network

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        """The model in parts, each compiled; parts that a removal leaves unchanged are reused."""
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
    """Split a network into a chain of submodules, one for each gate. Modules are shared.

    Removing a block leaves all parts but its own unchanged, unless something is between it and the
    next, such as a tap; and the compiler's cache has the kernels of parts of the same shape.
    """
    gates = rewriting.gate_nodes(model).keys()
    number, behind = {}, 0
    for node in model.graph.nodes:
        number[node] = behind
        behind += node in gates
    return split_module(model, model, number.__getitem__, keep_original_order=True)


def _what_it_computes(part: fx.GraphModule) -> str:
    """Key of a part: its operations with the names of modules, without those of operands.

    Identities are left out, because a removed block leaves its shortcut, which may be one.
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


def synchronise_batchnorm(network: nn.Module, group: Group, device: torch.device) -> None:
    """Replace the batch norms of a network by torch's SyncBatchNorm; parameters and names stay.

    Raises ConfigError where torch has none.
    """
    if device.type != "cuda":
        raise ConfigError(
            "--sync-batchnorm: torch's SyncBatchNorm only takes tensors on CUDA devices, not on"
            f" {device.type}; leave it out"
        )
    if group.size > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)


def drop_batch_counts(module: nn.Module) -> None:
    """Stop batch norms from counting batches, which costs a GPU one kernel per norm and step.

    Only a batch norm without momentum needs its count, and keeps it. State dicts have the others
    as 0, and may have any value when they are loaded.
    """

    def add_count(norm: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}num_batches_tracked"] = torch.tensor(0)

    def skip_count(norm: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.pop(f"{prefix}num_batches_tracked", None)

    for norm in module.modules():
        if (
            isinstance(norm, nn.modules.batchnorm._BatchNorm)
            and norm.momentum is not None
            and norm.num_batches_tracked is not None
        ):
            norm.num_batches_tracked = None
            norm.register_state_dict_post_hook(add_count)
            norm.register_load_state_dict_pre_hook(skip_count)


def require_compiler(device: torch.device) -> None:
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


# -- Devices


def choose(name: str) -> torch.device:
    """The device that `--device` names; `auto` is a CUDA device if there is one.

    Under torchrun `cuda` is the device whose index is the local rank of the process. Raises
    ConfigError for a device that is not available.
    """
    choices = "auto, cpu, cuda, cuda:N or mps"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; write {choices}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        return _cuda(device)
    if device.type != "mps":
        raise ConfigError(f"--device {name}: not supported; write {choices}")
    if not torch.backends.mps.is_available():
        raise ConfigError("--device mps: torch sees no Apple GPU here; use --device cpu")
    if cli.launched():
        raise ConfigError("--device mps: only one process can use it; leave torchrun out")
    return torch.device("mps")


def _cuda(device: torch.device) -> torch.device:
    present = torch.cuda.device_count()
    if not cli.launched():
        if (device.index or 0) >= present:
            raise ConfigError(
                f"--device {device}: torch sees {present} CUDA devices here; use --device cpu"
            )
        return device
    if device.index is not None:
        raise ConfigError(
            f"--device {device}: torchrun gives each process a device of its own; write cuda"
        )
    index = int(os.environ["LOCAL_RANK"])
    if index >= present:
        raise ConfigError(
            f"--device cuda: torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, and torch"
            f" sees {present} CUDA devices here; start as many as there are, or use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def wide_float(device: torch.device) -> torch.dtype:
    """The dtype for long sums: float64, or float32 on Apple GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Set torch's number of CPU threads for a block; 0 leaves it unchanged.

    The last bits of sums depend on it. More than one thread makes small networks no faster, and on
    a busy machine the threads wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- Precision of the training steps
#
# Parameters, gradients, optimizer, the gates' decisions, validation and the test are float32 in
# every precision: what is validated is what ships. TF32, which CUDA devices use for convolutions
# by default, is off unless `tf32` was asked for.

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LEAST_SCALE = 2.0**-24  # below it the gradient would have to exceed 1e12 to overflow float16


class TrainingPrecision:
    """One of `fp32`, `tf32`, `bf16`, `fp16` on a device.

    `fp32` is IEEE float32; `tf32` lets a CUDA device round the operands of convolutions and matrix
    products to 10 bits; `bf16` and `fp16` run these in that type (torch.autocast), the latter with
    an adaptive loss scale. Raises ConfigError when the device does not support it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self._device = name, device
        _require_precision(name, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        _set_tf32(False)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Context for the steps of an epoch, not for validation.

        TF32 is only allowed in here. All steps have one shape, so that cuDNN may benchmark its
        kernels and take the fastest: which it takes can differ from run to run, and with it the
        last bits. `torch.backends.cudnn.deterministic` disables that, for exactly repeatable runs.
        """
        before = torch.backends.cudnn.benchmark
        if self._device.type == "cuda":
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
        _set_tf32(self.name == "tf32")
        try:
            yield
        finally:
            _set_tf32(False)
            torch.backends.cudnn.benchmark = before

    def autocast(self) -> torch.autocast:
        """Context for the forward pass of one step."""
        dtype = _AUTOCAST.get(self.name)
        return torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""
        self._scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, *, clip_norm: float | None = None) -> None:
        """Run the optimizer step, with gradients scaled down to `clip_norm`.

        In fp16 the optimizer step is skipped when a gradient overflows, and the scale is halved.
        """
        if clip_norm is not None:
            self._scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        self._scaler.step(optimizer)
        self._scaler.update()

    def collapsed(self) -> bool:
        """Whether no loss scale keeps the gradients finite. Waits for the device.

        Without this check, a run whose gradients are NaN would silently skip every step.
        """
        return self._scaler.is_enabled() and self._scaler.get_scale() < _LEAST_SCALE

    def state_dict(self) -> dict[str, Any]:
        """The loss scale and its history; empty unless fp16."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._scaler.load_state_dict(state)


def _require_precision(name: str, device: torch.device) -> None:
    """Raise ConfigError unless `device` computes and differentiates a convolution in it."""
    on_gpu = device.type == "cuda"
    if name == "tf32" and not on_gpu:
        raise ConfigError(
            f"--precision tf32: a number format of CUDA devices, not of {device.type};"
            " use fp32 or bf16"
        )
    old = on_gpu and (
        (name == "tf32" and torch.cuda.get_device_capability(device) < (8, 0))
        or (name == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False))
    )
    if old:
        others = "fp32 or fp16" if name == "tf32" else "fp16"
        raise ConfigError(
            f"--precision {name}: {torch.cuda.get_device_name(device)} does not have it"
            f" (Ampere and later do); use {others}"
        )
    if name not in _AUTOCAST:
        return
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, dtype=_AUTOCAST[name]):
            weight = torch.zeros(8, 8, 3, 3, device=device, requires_grad=True)
            answer = torch.conv2d(torch.zeros(1, 8, 4, 4, device=device), weight)
        answer.float().sum().backward()
    except torch.OutOfMemoryError:
        raise  # of a busy device, which says nothing of the type
    except RuntimeError as error:  # of many kinds, one for each backend
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--precision {name}: this {device.type} device cannot train in it ({reason}); use fp32"
        ) from None


def _set_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in matrix products and convolutions, for the whole process.

    Uses the older of torch's two interfaces, because torch.compile still reads it and fails where
    the newer one was used (pytorch issue 166387).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
