"""The ε-gate: a thresholded residual addition (Yu et al., CVPR 2018, arXiv 1804.01661)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LEAST_RMS = 1e-12  # of a shortcut in a relative response, so that it is finite

_COUNTERS = ("closed_steps", "finite_steps", "steps")
_FLOATS = ("epsilon", "peak", "_limits", "_threshold")
_RECORD = ("peak", "_counts", "_limits")


class EpsilonGate(nn.Module):
    """Thresholded residual addition: `shortcut + S(branch)` (paper, section 3).

    `S(F)` is 0 when `max |F_i| <= epsilon` over the whole tensor (batch, channels, height, width:
    one decision per call) and `F` otherwise. In evaluation mode a live gate is a plain addition,
    as in the deployed network; a dead gate is closed in both modes.

    The decision is computed in float32, on the device of the branch, without a transfer to the
    host. Non-finite responses are never hidden: infinity opens the gate, NaN passes a closed gate
    too (`0 * NaN`), and `finite_steps` does not count the step.

    The state dict holds 0-dim tensors: `epsilon` float32; `dead` bool; and the training record of
    the epoch, `steps`, `closed_steps`, `finite_steps` int64 and `peak` float32 (largest
    `max |F_i|`; infinite after a non-finite response). A gate updates its record in every call,
    unless a :class:`GateRecords` updates the records of all gates of a network.

    Attributes:
        relative: whether the response is `max |F_i| / rms(shortcut)` (:func:`relative_response`),
            which does not depend on the scale of the activations; by default it is the paper's
            `max |F_i|`. An attribute of the object, which the state dict does not contain.
        process_group: in distributed training, a gate without a group decides by the response of
            its own process's part of the batch, as in the paper; with a group, it decides by (and
            records) the largest response in that group. Every member must then call its gates in
            the same order. The group is a weak reference that the state dict, copies and pickles
            do not contain.
    """

    epsilon: Tensor
    dead: Tensor
    peak: Tensor
    _counts: Tensor
    _limits: Tensor
    _threshold: Tensor
    relative: bool = False
    _response: Tensor | None = None  # set by GateRecords: receives the response of each call
    # Weak, since a gloo group that outlives `destroy_process_group()` aborts the process at exit.
    _group: weakref.ref[ProcessGroup] | None = None

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("epsilon", torch.tensor(0.0))
        self.register_buffer("dead", torch.tensor(False))
        self.register_buffer("peak", torch.tensor(0.0))
        # All counters in one tensor, and the limit of each, so that one comparison and one addition
        # update them: on a GPU each operation costs a kernel launch.
        self.register_buffer("_counts", torch.zeros(len(_COUNTERS), dtype=torch.int64))
        self.register_buffer("_limits", torch.zeros(len(_COUNTERS)), persistent=False)
        # A response above the threshold opens the gate.
        self.register_buffer("_threshold", torch.tensor(-1.0), persistent=False)
        self.set_epsilon(epsilon)

    @property
    def process_group(self) -> ProcessGroup | None:
        if self._group is None:
            return None
        if (group := self._group()) is None:
            raise RuntimeError("the process group of this gate has been destroyed")
        return group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._group = None if group is None else weakref.ref(group)

    @property
    def closed_steps(self) -> Tensor:
        """Training steps in which the response was at most epsilon; a view of the record."""
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
        """Set the threshold, in units of the response; at 0 the gate is always open."""
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise ValueError(f"epsilon must be finite and at least 0, not {epsilon}")
        self.epsilon.fill_(epsilon)
        self._set_limits()

    def latch(self) -> None:
        """Mark the gate as dead: closed in training and in evaluation, whatever the response."""
        self.dead.fill_(True)
        self._set_limits()

    def unlatch(self) -> None:
        """Undo :meth:`latch`."""
        self.dead.fill_(False)
        self._set_limits()

    def reset_record(self) -> None:
        """Reset the training record; called at the start of an epoch."""
        self._counts.zero_()
        self.peak.zero_()

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return `shortcut + S(branch)`; both `[N, ...]`, same shape and dtype."""
        opened = self._decide(shortcut, branch.detach()) if self.training else ~self.dead
        if torch.compiler.is_compiling():  # the compiler fuses the operations
            return torch.addcmul(shortcut, branch, opened)
        # Only a decision on the CPU can be read without waiting; a traced one has no value.
        if type(opened) is Tensor and opened.device.type == "cpu" and opened:
            return shortcut + branch  # its backward pass makes no copy of the gradient
        out: Tensor = _GatedAddition.apply(shortcut, branch, opened)  # type: ignore[no-untyped-call]
        return out

    def measure(self, shortcut: Tensor, branch: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the response that the gate compares with epsilon, a float32 scalar.

        `shortcut` and `branch` are of one shape and any floating-point type; `branch` is detached.
        """
        if self.relative:
            return relative_response(shortcut.detach(), branch, out=out)
        return response(branch, out=out)

    def _decide(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return whether the gate opens, a 0-dim bool, and record the response."""
        peak = self.measure(shortcut, branch, out=self._response)
        if (group := self.process_group) is not None:
            peak.nan_to_num_(nan=math.inf, posinf=math.inf)  # a maximum over processes may drop NaN
            torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=group)
        if self._response is None:
            _record(peak, self._limits, self._counts, self.peak)
        return peak > self._threshold

    def _set_limits(self) -> None:
        """Compute the limits of the counters and the threshold from `epsilon` and `dead`.

        A limit is the largest response that its counter counts, in the order of `_COUNTERS`. A dead
        gate has an infinite threshold, but its limits and hence its record follow `epsilon`.
        """
        if self.epsilon.is_meta:
            return  # computed when the state dict is loaded
        # At epsilon 0 the gate stays open even for an all-zero branch (zero-initialised weights).
        closed = torch.where(self.epsilon > 0, self.epsilon, -1.0)
        finite = torch.full_like(closed, torch.finfo(torch.float32).max)
        infinite = torch.full_like(closed, math.inf)
        limits = torch.stack([closed, finite, infinite])
        threshold = torch.where(self.dead, infinite, closed)
        if self._limits.device == limits.device:
            self._limits.copy_(limits)  # in place: a CUDA graph refers to a tensor by its address
            self._threshold.copy_(threshold)
        else:
            self._limits, self._threshold = limits, threshold

    def _join(self, response: Tensor, **record: Tensor) -> None:
        """Use these tensors as the record; their owner updates it."""
        self._response = response
        for name, tensor in record.items():
            setattr(self, name, tensor)

    def _leave(self) -> None:
        """Own the record again; does nothing for a gate that already does."""
        if self._response is not None:
            self._response = None
            for name in _RECORD:
                setattr(self, name, getattr(self, name).clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EpsilonGate:
        """Apply moves between devices, but not casts: epsilon would round in half precision."""
        self._leave()
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
        if local_metadata.get("assign_to_params_buffers", False):
            self._leave()
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
        state = {n: v for n, v in self.__dict__.items() if n not in ("_group", "_response")}
        if self._response is not None:  # a copy owns its record
            own = {name: getattr(self, name).clone() for name in _RECORD}
            state["_buffers"] = {**self._buffers, **own}
        return state

    def extra_repr(self) -> str:
        state = "meta" if self.epsilon.is_meta else f"epsilon={float(self.epsilon):g}"
        state += ", relative" if self.relative else ""
        return state + (", dead" if not self.dead.is_meta and bool(self.dead) else "")


class GateRecords:
    """Training records of many gates in shared tensors, updated by four operations in total.

    The gates' records become views of these tensors, and a call no longer updates them; call
    :meth:`update` once after each forward pass in training mode. A gate that is moved to another
    device, copied, or loaded with `assign=True` owns its record again.

    Args:
        gates: gates that are called exactly once in every forward pass; all on one device.
    """

    def __init__(self, gates: Sequence[EpsilonGate]) -> None:
        self._size = len(gates)
        if not gates:
            return
        self._peaks = torch.stack([gate.peak for gate in gates])
        self._counts = torch.stack([gate._counts for gate in gates])
        self._limits = torch.stack([gate._limits for gate in gates])
        self._responses = torch.zeros_like(self._peaks)
        rows = zip(self._responses, self._peaks, self._counts, self._limits, strict=True)
        for gate, (found, peak, counts, limits) in zip(gates, rows, strict=True):
            gate._join(found, peak=peak, _counts=counts, _limits=limits)

    def update(self) -> None:
        """Record the responses of the last forward pass, without waiting for the device."""
        if self._size:
            _record(self._responses, self._limits, self._counts, self._peaks)


def _record(responses: Tensor, limits: Tensor, counts: Tensor, peaks: Tensor) -> None:
    """Add one step to the records of gates, in place.

    Args:
        responses: float32 `[...]`, of this step.
        limits, counts: float32 and int64 `[..., 3]`, in the order of `_COUNTERS`.
        peaks: float32 `[...]`, the largest response so far.
    """
    found = responses.nan_to_num(nan=math.inf, posinf=math.inf)
    counts.add_(found.unsqueeze(-1) <= limits)
    torch.maximum(peaks, found, out=peaks)


class _GatedAddition(torch.autograd.Function):
    """Fused `shortcut + opened * branch`: one pass over each tensor, forward and backward.

    The branch of a closed gate receives a gradient of zeros rather than none, so that weight decay
    applies to its parameters.
    """

    @staticmethod
    def forward(shortcut: Tensor, branch: Tensor, opened: Tensor) -> Tensor:
        return torch.addcmul(shortcut, branch, opened)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (opened,) = ctx.saved_tensors
        return gradient, gradient * opened if ctx.needs_input_grad[1] else None, None


def response(branch: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Largest magnitude in `branch`, a float32 scalar on its device; NaN when any element is NaN.

    Reads the tensor once, while `abs().max()` writes a temporary. The norm is one kernel on GPUs,
    but twenty times slower on CPUs than the minimum and maximum.

    `branch` has any shape and floating-point type; it must not require grad when `out` is given.
    """
    by_norm = branch.is_cuda or branch.is_meta
    return _largest_by_norm(branch, out) if by_norm else _largest_by_range(branch, out)


def relative_response(shortcut: Tensor, branch: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`max |branch| / rms(shortcut)`, a float32 scalar; NaN when any element is NaN.

    Both are of one shape and any floating-point type. An RMS below 1e-12 counts as 1e-12.
    """
    norm = torch.linalg.vector_norm(shortcut, dtype=torch.float32)
    rms = (norm * shortcut.numel() ** -0.5).clamp(min=LEAST_RMS)
    return torch.div(response(branch), rms, out=out)


def _largest_by_norm(branch: Tensor, out: Tensor | None = None) -> Tensor:
    peak: Tensor = torch.linalg.vector_norm(branch, math.inf, dtype=torch.float32, out=out)
    return peak


def _largest_by_range(branch: Tensor, out: Tensor | None = None) -> Tensor:
    # `aminmax` is slow on strided views: reorder the axes of channels-last to memory order.
    if branch.dim() == 4 and branch.is_contiguous(memory_format=torch.channels_last):
        branch = branch.permute(0, 2, 3, 1)
    low, high = torch.aminmax(branch)
    return torch.maximum(high, low.neg(), out=out).float()
