"""The ε-gate: a residual addition that a block has to earn (Yu et al., CVPR 2018, 1804.01661)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

RELU_SCALE = 1e6  # L in the paper's construction


class EpsilonGate(nn.Module):
    """Residual addition behind a threshold: `shortcut + S(branch)` (paper, section 3).

    `S(F)` is 0 when `max |F_i| <= epsilon` over the whole tensor (batch, channels, height, width:
    one decision per call) and `F` otherwise. In evaluation mode a live gate is a plain addition,
    which is what ships; a dead gate is shut in both modes.

    The decision is made in float32 and never leaves the device. A non-finite response is never
    hidden: it opens the gate, and `finite_steps` stops counting at that step.

    Buffers (0-dim, read them once an epoch): `epsilon` float32; `dead` bool; and the training
    record `steps`, `closed_steps`, `finite_steps` int64, `peak` float32 (largest `max |F_i|`).
    """

    epsilon: Tensor
    dead: Tensor
    steps: Tensor
    closed_steps: Tensor
    finite_steps: Tensor
    peak: Tensor

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("epsilon", torch.tensor(0.0))
        self.register_buffer("dead", torch.tensor(False))
        for counter in ("steps", "closed_steps", "finite_steps"):
            self.register_buffer(counter, torch.tensor(0, dtype=torch.int64))
        self.register_buffer("peak", torch.tensor(0.0))
        self.set_epsilon(epsilon)

    def set_epsilon(self, epsilon: float) -> None:
        """Set the threshold, in units of the branch's output; 0 opens the gate for good."""
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise ValueError(f"epsilon must be finite and at least 0, not {epsilon}")
        self.epsilon.fill_(epsilon)

    def latch(self) -> None:
        """Shut the gate for good, in training and in evaluation."""
        self.dead.fill_(True)

    def reset_record(self) -> None:
        """Forget the training record; called at the start of an epoch."""
        for record in (self.steps, self.closed_steps, self.finite_steps, self.peak):
            record.zero_()

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return `shortcut + S(branch)`; both `[N, ...]`, same shape and dtype."""
        shut = self.dead | self._judge(branch.detach()) if self.training else self.dead
        # One pass: the factor, false or true, rides along in the addition, forward and backward.
        return torch.addcmul(shortcut, branch, shut.logical_not())

    def _judge(self, branch: Tensor) -> Tensor:
        """Decide on a detached branch and keep the record; a few scalar operations in all."""
        peak = response(branch)
        # At epsilon 0 even an all-zero branch (zero-initialised, say) must stay open.
        closed = (peak <= self.epsilon) & (self.epsilon > 0)
        self.steps.add_(1)
        self.closed_steps.add_(closed)
        self.finite_steps.add_(peak < math.inf)
        torch.maximum(self.peak, peak, out=self.peak)
        return closed

    def extra_repr(self) -> str:
        state = "meta" if self.epsilon.is_meta else f"epsilon={float(self.epsilon):g}"
        return state + (", dead" if not self.dead.is_meta and bool(self.dead) else "")


def response(branch: Tensor) -> Tensor:
    """Largest magnitude in `branch`, a float32 scalar on its device; NaN when any element is NaN.

    One read of the tensor: `aminmax` needs no temporary (`abs().max()` writes one) but is several
    times slower on a strided view, hence the detour over memory order for channels-last tensors.
    """
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
