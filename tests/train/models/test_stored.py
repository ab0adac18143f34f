"""Networks as plain data: rebuilt as they were, or refused; hostile files call nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from eps_core.errors import ConfigError, GraphError
from eps_train.gating import rewriting
from eps_train.models import stored
from eps_train.models.stored import NotStorable
from tests.train.idioms import IDIOMS

# Their layers have code of their own, which no file holds.
REFUSED = (
    *("stochastic depth", "stochastic depth, torch", "stochastic depth, survival"),
    *("buffer that is written", "buffer that is replaced", "buffer written by the block"),
    *("straight-through", "drop path", "reached by a closure", "hook", "weight norm"),
    *("spectral norm", "torch's encoder"),
)


def through_a_file(model: fx.GraphModule) -> fx.GraphModule:
    return stored.rebuild(json.loads(json.dumps(stored.store(model))))


@pytest.mark.parametrize("name", IDIOMS)
def test_an_idiom_is_rebuilt_to_the_last_bit_or_refused(name: str) -> None:
    torch.manual_seed(0)
    try:
        model = rewriting.add_gates(IDIOMS[name][1]())
    except GraphError:
        return  # has no gates, so no file
    try:
        stored.store(model)
    except NotStorable:
        # Whether fx follows torch.utils.checkpoint depends on what else was imported.
        assert name in (*REFUSED, "checkpointed")
        return
    assert name not in REFUSED
    again = through_a_file(model)
    again.load_state_dict(model.state_dict())
    assert again.state_dict().keys() == model.state_dict().keys()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, p in again.named_parameters() if not p.requires_grad]
    images = torch.randn(3, 3, 8, 8)
    for training in (True, False):
        results = []
        for each in (model.train(training), again.train(training)):
            torch.manual_seed(1)
            results.append(each(images))
        assert torch.equal(*results)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


class Residual(nn.Module):
    """A block over any layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.layer(x)
        return x + branch


def gated(layer: nn.Module) -> fx.GraphModule:
    return rewriting.add_gates(nn.Sequential(Residual(layer)))


class Loud(nn.ReLU):
    """Derives from a layer of torch, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def changed() -> nn.Module:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    layer.padding = (2, 2)
    layer.stride = (1, 2)
    return layer


def annotated() -> nn.Module:
    layer = nn.ReLU()
    vars(layer)["note"] = object()
    return layer


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Loud, r"^0\.layer\.1: .*Loud is no layer of torch\.nn, and its code would be needed"),
        (annotated, r"^0\.layer\.1: ReLU was changed after it was made"),
    ],
)
def test_a_layer_with_code_of_its_own_is_named(
    layer: Callable[[], nn.Module], expected: str
) -> None:
    with pytest.raises(NotStorable, match=expected):
        stored.store(gated(nn.Sequential(nn.Conv2d(3, 3, 1), layer())))


def test_a_layer_whose_settings_were_changed_keeps_them() -> None:
    model = gated(changed())
    layer = through_a_file(model).get_submodule("0.layer")
    assert isinstance(layer, nn.Conv2d)
    assert (layer.padding, layer.stride) == ((2, 2), (1, 2))


def test_tied_weights_stay_tied() -> None:
    first, second = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
    second.weight = first.weight
    again = through_a_file(rewriting.add_gates(nn.Sequential(Residual(first), Residual(second))))
    assert again.get_parameter("0.layer.weight") is again.get_parameter("1.layer.weight")


def tampered(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    content = copy.deepcopy(stored.store(gated(nn.Conv2d(3, 3, 1))))
    change(content)
    return content


def call(content: dict[str, Any], **node: Any) -> None:
    empty = {"args": {"tuple": []}, "kwargs": {"dict": {}}, "name": "evil"}
    content["nodes"].insert(1, {**empty, **node})


@pytest.mark.parametrize(
    "change",
    [
        lambda c: call(c, op="call_function", target="torch.load"),
        lambda c: call(c, op="call_function", target="os.system"),
        lambda c: call(c, op="call_function", target="torch.hub.load"),
        lambda c: call(
            c, op="call_function", target="getattr", args={"tuple": [{"node": "x"}, "__class__"]}
        ),
        lambda c: call(c, op="call_method", target="__reduce__", args={"tuple": [{"node": "x"}]}),
        lambda c: call(c, op="call_method", target="apply_", args={"tuple": [{"node": "x"}]}),
        lambda c: call(c, op="get_attr", target='x");import os;("'),
        lambda c: call(c, op="placeholder", target="y=print(1)"),
        lambda c: call(c, op="run", target="x"),
        lambda c: c["layers"]["0.layer"].update(type="Module"),
        lambda c: c["layers"]["0.layer"].update(type="utils"),
        lambda c: c["layers"].update({'a");b("': c["layers"]["0.layer"]}),
        lambda c: c["nodes"][0].update(args={"object": "x"}),
        lambda c: c.update(name="x: pass"),
        lambda c: c.pop("layers"),
        lambda c: c["nodes"].clear(),
        lambda c: c["tensors"].update(w={"shape": [1], "dtype": "load", "parameter": True}),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(ConfigError):
        stored.rebuild(tampered(change))


def test_what_a_file_may_call_has_no_effects_beyond_tensors() -> None:
    functions = stored._functions()
    assert {"torch.relu", "torch.nn.functional.gelu", "operator.add"} <= functions.keys()
    for name in ("load", "save", "from_file", "compile", "set_num_threads", "import_ir_module"):
        assert f"torch.{name}" not in functions
    assert not stored._methods() & {"numpy", "backward", "register_hook", "__reduce_ex__"}
