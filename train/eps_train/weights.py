"""Weights to start from: somebody's state dict, as `torch.save` or safetensors wrote it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from eps_train.errors import ConfigError, FileFormatError
from eps_train.sealed import read_bytes

_NESTED = ("state_dict", "state", "model")  # under which others, and eps-train, keep their tensors
_COUNTER = ".num_batches_tracked"  # of batch norms; older files have none
_OF_A_GATE = re.compile(
    r"(^|\.)gate\d*\.(epsilon|dead|steps|closed_steps|finite_steps|peak)$"
)  # gates start anew


def load_weights(path: Path, model: fx.GraphModule) -> tuple[str, ...]:
    """Fill a network that was just built with the tensors of a file; its gates are left alone.

    Args:
        path: `.safetensors`, or what `torch.save` wrote: a state dict, bare or under `state_dict`,
            `model` or `state` (as in a checkpoint of eps-train). No pickled code is run.
        model: with gates or without.

    Returns:
        Names of the tensors that stay as they were: those of the last linear layer, when the file
        has it for another number of classes.

    Raises:
        FileFormatError: no such file, or not of one of these kinds.
        ConfigError: its tensors are not those of `model`.
    """
    given = {name: t for name, t in _read(path).items() if not _OF_A_GATE.search(name)}
    needed = {name: t for name, t in model.state_dict().items() if not _OF_A_GATE.search(name)}
    missing = [name for name in needed if name not in given and not name.endswith(_COUNTER)]
    surplus = [name for name in given if name not in needed]
    if missing or surplus:
        raise ConfigError(
            f"--weights {path}: not of this network ({_difference(missing, surplus)}); --model must"
            " name the one that the file is of"
        )
    head = _head(model)
    skipped = []
    for name, tensor in given.items():
        here = needed[name]
        if tensor.shape == here.shape:
            continue
        if name not in head or tensor.shape[1:] != here.shape[1:]:
            raise ConfigError(
                f"--weights {path}: {name} is {_shape(tensor)} in the file, {_shape(here)} in the"
                " network"
            )
        skipped.append(name)
    with torch.no_grad():
        for name in given.keys() - set(skipped):
            needed[name].copy_(given[name])
    return tuple(skipped)


def _read(path: Path) -> Mapping[str, Tensor]:
    content = read_bytes(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return dict(load(content))
        found: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise ConfigError(
            f"--weights {path}: safetensors is not installed; pip install safetensors"
        ) from None
    except Exception as error:  # both libraries raise many types
        raise FileFormatError(
            f"{path}: no state dict (.pt, .pth) and no .safetensors file, or damaged, or it holds"
            " more than tensors"
        ) from error
    while isinstance(found, Mapping) and (key := next((k for k in _NESTED if k in found), None)):
        found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise FileFormatError(f"{path}: holds no state dict")
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise FileFormatError(f"{path}: holds no state dict: some of its values are no tensors")
    return {str(name): tensor for name, tensor in found.items()}


def _head(model: fx.GraphModule) -> set[str]:
    """Tensors of the linear layer that is computed last."""
    modules = dict(model.named_modules())
    linear = [
        str(node.target)
        for node in model.graph.nodes
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.Linear)
    ]
    return {f"{linear[-1]}.weight", f"{linear[-1]}.bias"} if linear else set()


def _difference(missing: list[str], surplus: list[str]) -> str:
    parts = [
        f"{what} {len(names)}, first {names[0]}"
        for what, names in (("it lacks", missing), ("it has others:", surplus))
        if names
    ]
    return "; ".join(parts)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
