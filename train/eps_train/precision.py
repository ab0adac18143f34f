"""In which numbers a training step computes; everything else always computes in float32.

Parameters, gradients, optimizer, the gates' decisions, validation and the test are float32 in every
precision: what is validated is what ships. TF32, which CUDA devices use for convolutions unless
told otherwise, is off wherever `tf32` was not asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from eps_train.errors import ConfigError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LEAST_SCALE = 2.0**-24  # below it the gradient would have to exceed 1e12 to overflow float16


class Precision:
    """One of `fp32`, `tf32`, `bf16`, `fp16` on a device.

    `fp32` is IEEE float32; `tf32` lets a CUDA device round the operands of convolutions and matrix
    products to 10 bits; `bf16` and `fp16` run these in that type (torch.autocast), the latter with
    a loss scale that is adapted as the run goes.

    Raises:
        ConfigError: the device cannot do it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self._device = name, device
        if name == "tf32":
            _refuse_tf32(device)
        elif name in _AUTOCAST:
            _refuse_half(name, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        _set_tf32(False)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around the steps of an epoch, not around validation.

        TF32 is allowed in here alone. All steps have one shape, so that cuDNN may try its kernels
        and take the fastest: which it takes can differ from run to run, and with it the last bits.
        `torch.backends.cudnn.deterministic` switches that off, for runs that are to repeat exactly.
        """
        tried = torch.backends.cudnn.benchmark
        if self._device.type == "cuda":
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
        _set_tf32(self.name == "tf32")
        try:
            yield
        finally:
            _set_tf32(False)
            torch.backends.cudnn.benchmark = tried

    def autocast(self) -> torch.autocast:
        """Around the forward pass of one step."""
        dtype = _AUTOCAST.get(self.name)
        if dtype is None:  # autocast checks the type even where it is disabled
            return torch.autocast(self._device.type, enabled=False)
        return torch.autocast(self._device.type, dtype=dtype)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Backward pass and optimizer step; in fp16 the step is left out when a gradient overflows.

        Then the scale is halved and the loss stays what it was: finite.
        """
        self._scaler.scale(loss).backward()
        self._scaler.step(optimizer)
        self._scaler.update()

    def collapsed(self) -> bool:
        """Whether no loss scale keeps the gradients finite. Waits for the device.

        A run whose gradients are NaN for another reason would leave out every step in silence.
        """
        return self._scaler.is_enabled() and self._scaler.get_scale() < _LEAST_SCALE

    def state(self) -> dict[str, Any]:
        """The loss scale and its history as plain data; empty but for fp16."""
        return dict(self._scaler.state_dict())

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        if state:
            self._scaler.load_state_dict(state)


def memory_format(name: str, device: torch.device) -> torch.memory_format:
    """The order in memory of images and convolution weights that is fastest in a precision.

    Channels-last: tensor cores take no other in `tf32`, `bf16` and `fp16`, and it is a quarter
    faster on the CPUs tried. What `fp32` prefers on a GPU is not measured.
    """
    return torch.channels_last


def _refuse_tf32(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(
            f"--precision tf32: a number format of CUDA devices, not of {device.type};"
            " use fp32 or bf16"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            f"--precision tf32: {torch.cuda.get_device_name(device)} does not have it"
            " (Ampere and later do); use fp32 or fp16"
        )


def _refuse_half(name: str, device: torch.device) -> None:
    """Raise ConfigError unless `device` computes and differentiates a convolution in this type."""
    if (
        name == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not have it"
            " (Ampere and later do); use fp16"
        )
    try:
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, dtype=_AUTOCAST[name]):
            weight = torch.zeros(8, 8, 3, 3, device=device, requires_grad=True)
            answer = torch.conv2d(torch.zeros(1, 8, 4, 4, device=device), weight)
        answer.float().sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--precision {name}: this {device.type} device cannot train in it ({reason}); use fp32"
        ) from None


def _set_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in matrix products and convolutions, for the whole process.

    By the older of torch's two interfaces: torch.compile still reads that one, and refuses to go on
    where the newer one was used (pytorch issue 166387).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
