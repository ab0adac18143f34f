"""Folding of batch norms into the convolutions before them; identities and dropout are removed.

In evaluation mode a batch norm is `y = scale * x + shift` per channel, so after a convolution it
can be merged into that one's weight and bias. That is exact algebra, whatever the padding, but
rounds differently: float32 logits change in their last digits. Of timm's batch norms with an
activation, the activation stays. A batch norm before a convolution (the zeros of the padding would
have to be shifted too) or after an addition cannot be folded.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from eps_core.errors import FileFormatError

BatchNorms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Exact types: a subclass may compute something else (an activation, standardised weights).
_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
# Layers that return their input in evaluation mode.
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# timm's batch norm with an activation, by name: timm need not be installed.
_WITH_ACTIVATION = ("timm.layers.norm_act", "BatchNormAct2d")


class Pair(NamedTuple):
    """Qualified names of a convolution and of the batch norm that is folded into it."""

    conv: str
    norm: str


class _Place(NamedTuple):
    """A pair and its nodes in a graph."""

    names: Pair
    conv: fx.Node
    norm: fx.Node


def fold(model: fx.GraphModule) -> tuple[fx.GraphModule, tuple[Pair, ...]]:
    """Fold every batch norm that can be folded, in a copy of `model`.

    The copy is for evaluation only: dropout and identities are removed. The folded tensors are
    computed in float64 and rounded once.

    Args:
        model: a network without gates, on one device.

    Returns:
        The folded network, in evaluation mode, and the pairs, in the order of computation.
    """
    folded = copy.deepcopy(model).eval()
    _drop_identities(folded)
    places = list(_places(folded))
    for place in places:
        conv, norm = map(folded.get_submodule, place.names)
        _merge(folded, place, *_folded(conv, norm))
    _tidy(folded)
    return folded, tuple(place.names for place in places)


def unfolded_state(state: Mapping[str, Tensor], pairs: Iterable[Pair]) -> dict[str, Tensor]:
    """Return `state` of a folded network with identity batch norms for those that are folded.

    A network that is not folded can load it. Raises FileFormatError when a convolution's weight is
    missing.
    """
    filled = dict(state)
    for conv, norm in pairs:
        weight = state.get(f"{conv}.weight")
        if weight is None or weight.dim() < 3:
            raise FileFormatError(f"tensors are missing, the first is {conv}.weight")
        channels = weight.shape[0]
        for name, value in {
            "weight": weight.new_ones(channels),
            "bias": weight.new_zeros(channels),
            "running_mean": weight.new_zeros(channels),
            "running_var": weight.new_ones(channels),
            "num_batches_tracked": torch.tensor(0),
        }.items():
            filled.setdefault(f"{norm}.{name}", value)
    return filled


def refold(model: fx.GraphModule, pairs: Iterable[Pair], state: Mapping[str, Tensor]) -> None:
    """Give `model`, loaded from `unfolded_state`, the structure and tensors of the folded network.

    Raises FileFormatError for a pair that this network cannot fold, or whose tensors are missing or
    of another shape.
    """
    _drop_identities(model)
    places = {place.names: place for place in _places(model)}
    for pair in pairs:
        place = places.pop(pair, None)
        if place is None:
            raise FileFormatError(f"{pair.norm} cannot be folded into {pair.conv} in this network")
        weight, bias = (state.get(f"{pair.conv}.{name}") for name in ("weight", "bias"))
        if weight is None or bias is None:
            raise FileFormatError(f"tensors are missing, the first is {pair.conv}.bias")
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise FileFormatError(
                f"tensor {pair.conv}.bias has another shape or type than its network"
            )
        _merge(model, place, weight.clone(), bias.clone())
    _tidy(model)


def _drop_identities(model: fx.GraphModule) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in list(model.graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        layer = modules[str(node.target)]
        if type(layer) in _IDENTITIES and not _hooked(layer):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def _places(model: fx.GraphModule) -> Iterable[_Place]:
    """Yield the places where a batch norm is the only reader of a convolution's result."""
    modules = dict(model.named_modules(remove_duplicate=False))
    called = model.graph.find_nodes(op="call_module", sort=False)
    calls = Counter(id(modules[str(node.target)]) for node in called)
    readings = [str(node.target) for node in model.graph.find_nodes(op="get_attr", sort=False)]
    owners = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    for node in model.graph.nodes:
        source = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        names = Pair(str(source.target), str(node.target))
        conv, norm = modules[names.conv], modules[names.norm]
        exclusive = calls[id(conv)] == 1 and owners[id(conv._parameters.get("weight"))] == 1
        if _activation(norm) is not None:  # which replaces this norm
            exclusive = exclusive and calls[id(norm)] == 1
        read = any(name.startswith(f"{names.conv}.") for name in readings)
        if exclusive and not read and _fit(conv, norm):
            yield _Place(names, source, node)


def _activation(norm: nn.Module) -> nn.Module | None:
    """Return the activation inside a batch norm of timm's, if it has no state."""
    if (type(norm).__module__, type(norm).__name__) != _WITH_ACTIVATION:
        return None
    drop, activation = norm.get_submodule("drop"), norm.get_submodule("act")
    return activation if type(drop) in _IDENTITIES and not activation.state_dict() else None


def _fit(conv: nn.Module, norm: nn.Module) -> bool:
    kind = type(norm) if _activation(norm) is None else nn.BatchNorm2d
    if _NORMS.get(type(conv)) is not kind or _hooked(conv) or _hooked(norm):
        return False
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    assert isinstance(norm, BatchNorms)
    if norm.running_mean is None or norm.running_var is None:
        return False  # it uses the statistics of each batch
    kinds = {conv.weight.dtype, norm.running_mean.dtype}
    return conv.out_channels == norm.num_features and kinds <= {torch.float32}


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution with the batch norm folded in, float32.

    Computed in float64 by single operations, which IEEE 754 rounds the same on every machine, so
    that `eps-verify` reproduces them to the last bit.
    """

    def wide(tensor: object, default: float) -> Tensor:
        if isinstance(tensor, Tensor):
            return tensor.detach().double()
        return torch.full_like(mean, default)

    assert isinstance(norm.running_mean, Tensor)
    mean = norm.running_mean.detach().double()
    std = (wide(norm.running_var, 1) + float(norm.eps)).sqrt()  # type: ignore[arg-type]
    scale = wide(norm.weight, 1) / std
    bias = (wide(conv.bias, 0) - mean) * scale + wide(norm.bias, 0)
    weight = wide(conv.weight, 0)
    per_channel = scale.view(-1, *[1] * (weight.dim() - 1))
    return (weight * per_channel).float(), bias.float()


def _merge(model: fx.GraphModule, place: _Place, weight: Tensor, bias: Tensor) -> None:
    conv, norm = map(model.get_submodule, place.names)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    if (activation := _activation(norm)) is not None:
        model.add_submodule(place.names.norm, activation)
        return
    place.norm.replace_all_uses_with(place.conv)
    model.graph.erase_node(place.norm)


def _tidy(model: fx.GraphModule) -> None:
    model.delete_all_unused_submodules()
    model.graph.lint()
    model.recompile()
