"""The ε-gate: a residual addition that a block has to earn (Yu et al., CVPR 2018, 1804.01661)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

RELU_SCALE = 1e6  # L in the paper's construction

_COUNTERS = ("closed_steps", "finite_steps", "steps")
_FLOATS = ("epsilon", "peak", "_limits")


class EpsilonGate(nn.Module):
    """Residual addition behind a threshold: `shortcut + S(branch)` (paper, section 3).

    `S(F)` is 0 when `max |F_i| <= epsilon` over the whole tensor (batch, channels, height, width:
    one decision per call) and `F` otherwise. In evaluation mode a live gate is a plain addition,
    which is what ships; a dead gate is shut in both modes.

    The decision is made in float32 and never leaves an accelerator. A non-finite response is never
    hidden: it opens the gate, and `finite_steps` stops counting at that step.

    The state dict holds, 0-dim, to be read once an epoch: `epsilon` float32; `dead` bool; and the
    training record `steps`, `closed_steps`, `finite_steps` int64, `peak` float32 (largest
    `max |F_i|`; infinite from the first response on that was not finite).

    Attributes:
        process_group: where several processes train on parts of one batch, each gate judges its
            own part, as in the paper; given a group, it judges (and records) the largest response
            in that group. Then every member must call its gates in the same order. The group is a
            handle of this process, not owned: the state dict, copies and pickles do not have it.
    """

    epsilon: Tensor
    dead: Tensor
    peak: Tensor
    _counts: Tensor
    _limits: Tensor
    # Weak: a group that outlives `destroy_process_group()` aborts the process at its exit (gloo).
    _group: weakref.ref[ProcessGroup] | None = None

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("epsilon", torch.tensor(0.0))
        self.register_buffer("dead", torch.tensor(False))
        self.register_buffer("peak", torch.tensor(0.0))
        # The counters in one tensor, and what a response is held against to step them: on a GPU
        # every operation counts, however small.
        self.register_buffer("_counts", torch.zeros(len(_COUNTERS), dtype=torch.int64))
        self.register_buffer("_limits", torch.zeros(len(_COUNTERS)), persistent=False)
        self.set_epsilon(epsilon)

    @property
    def process_group(self) -> ProcessGroup | None:
        group = self._group
        if group is None:
            return None
        found = group()
        if found is None:
            raise RuntimeError("the process group of this gate has been destroyed")
        return found

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._group = None if group is None else weakref.ref(group)

    @property
    def closed_steps(self) -> Tensor:
        """Training steps in which the response was within epsilon; a view of the record."""
        return self._counts[0]

    @property
    def finite_steps(self) -> Tensor:
        """Training steps with a finite response; a view of the record."""
        return self._counts[1]

    @property
    def steps(self) -> Tensor:
        """Training steps; a view of the record."""
        return self._counts[2]

    def set_epsilon(self, epsilon: float) -> None:
        """Set the threshold, in units of the branch's output; 0 opens the gate for good."""
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise ValueError(f"epsilon must be finite and at least 0, not {epsilon}")
        self.epsilon.fill_(epsilon)
        self._set_limits()

    def latch(self) -> None:
        """Shut the gate for good, in training and in evaluation."""
        self.dead.fill_(True)

    def reset_record(self) -> None:
        """Forget the training record; called at the start of an epoch."""
        self._counts.zero_()
        self.peak.zero_()

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return `shortcut + S(branch)`; both `[N, ...]`, same shape and dtype."""
        shut = self._judge(branch.detach()) if self.training else self.dead
        if _host_knows(shut) and not shut:
            return shortcut + branch  # hands the gradient on as it is, where a factor copies it
        # One pass: the factor, false or true, rides along in the addition, forward and backward.
        # A shut gate's branch gets a gradient of zeros, not none: weight decay has to act on it.
        return torch.addcmul(shortcut, branch, shut.logical_not())

    def _judge(self, branch: Tensor) -> Tensor:
        """Decide on a detached branch and keep the record; a few scalar operations in all."""
        peak = response(branch).nan_to_num(nan=math.inf, posinf=math.inf)
        if (group := self.process_group) is not None:
            torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=group)
        within = peak <= self._limits
        self._counts.add_(within)
        torch.maximum(self.peak, peak, out=self.peak)
        return within[0] | self.dead

    def _set_limits(self) -> None:
        """The largest response that counts as closed, as finite and as a step, in this order."""
        if self.epsilon.is_meta:
            return  # set when the network gets its numbers
        # At epsilon 0 even an all-zero branch (zero-initialised, say) must stay open.
        closed = torch.where(self.epsilon > 0, self.epsilon, -1.0)
        finite = torch.full_like(closed, torch.finfo(torch.float32).max)
        limits = torch.stack([closed, finite, torch.full_like(closed, math.inf)])
        if self._limits.device == limits.device:
            self._limits.copy_(limits)  # in place: a CUDA graph knows a tensor by its address
        else:
            self._limits = limits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EpsilonGate:
        """Follow the network to a device, but not to half precision, where epsilon would round."""
        before = {name: getattr(self, name) for name in _FLOATS}
        nn.Module._apply(self, fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "_counts"]
        for name in _COUNTERS:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        found = {n: state_dict.pop(prefix + n) for n in _COUNTERS if prefix + n in state_dict}
        missing_keys += [prefix + name for name in _COUNTERS if name not in found]
        complete = len(found) == len(_COUNTERS)
        state_dict[prefix + "_counts"] = (
            torch.stack([found[name] for name in _COUNTERS]) if complete else self._counts
        )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        self._set_limits()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_group"}

    def extra_repr(self) -> str:
        state = "meta" if self.epsilon.is_meta else f"epsilon={float(self.epsilon):g}"
        return state + (", dead" if not self.dead.is_meta and bool(self.dead) else "")


def _host_knows(decision: Tensor) -> bool:
    """Whether Python may look at a decision: it is a number in the host's own memory.

    An accelerator would have to be waited for; where a graph is compiled there is no number yet.
    """
    if torch.compiler.is_compiling():
        return False
    return type(decision) is Tensor and decision.device.type == "cpu"


def response(branch: Tensor) -> Tensor:
    """Largest magnitude in `branch`, a float32 scalar on its device; NaN when any element is NaN.

    One read of the tensor (`abs().max()` writes a temporary). The norm, one kernel on GPUs, is
    twenty times slower on CPUs than the range.
    """
    return _largest_by_norm(branch) if branch.is_cuda else _largest_by_range(branch)


def _largest_by_norm(branch: Tensor) -> Tensor:
    peak: Tensor = torch.linalg.vector_norm(branch, math.inf, dtype=torch.float32)
    return peak


def _largest_by_range(branch: Tensor) -> Tensor:
    # `aminmax` is slow on a strided view; hence the detour over memory order for channels-last.
    if branch.dim() == 4 and branch.is_contiguous(memory_format=torch.channels_last):
        branch = branch.permute(0, 2, 3, 1)
    low, high = torch.aminmax(branch)
    return torch.maximum(high, low.neg()).float()


def relu_gate(branch: Tensor, epsilon: float) -> Tensor:
    """`S(branch)` as the paper builds it from four ReLUs; the reference for the tests.

    `s = max_i(relu(F_i - eps) + relu(-F_i - eps))`, `w = relu(1 - L relu(1 - L s))`, `S(F) = w F`.
    It equals the threshold except for a response within (epsilon, epsilon + 1/L), where `w` ramps.
    """
    excess = (torch.relu(branch.float() - epsilon) + torch.relu(-branch.float() - epsilon)).amax()
    weight = torch.relu(1 - RELU_SCALE * torch.relu(1 - RELU_SCALE * excess))
    return weight.to(branch.dtype) * branch
