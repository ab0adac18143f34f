"""Networks by name: found, called with their arguments, or one line of error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eps_core.errors import ConfigError
from eps_train.gating import rewriting
from eps_train.models import registry
from eps_train.models.registry import arguments_for, check_ends, find, make


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_factories_are_called_with_what_they_take(own: str) -> None:
    sizes = {"in_channels": 1, "classes": 7}
    assert arguments_for(f"{own}:Net", **sizes) == {"num_classes": 7, "in_channels": 1}
    assert arguments_for(f"{own}:keywords", **sizes) == {"n_classes": 7}
    assert arguments_for(f"{own}:several", **sizes) == {"num_classes": 7, "in_chans": 1}
    made = make(f"{own}:keywords", {"n_classes": 7})
    assert made(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("fixed", "not a network factory: it has none of the arguments num_classes, classes"),
        ("demanding", "requires depth too; a factory is called with num_classes"),
        ("Nets", "there is no network Nets in somebodys; did you mean Net?"),
        ("OWN", "there is no network OWN in somebodys"),
    ],
)
def test_what_is_not_a_factory(own: str, member: str, reason: str) -> None:
    message = error_of(arguments_for, f"{own}:{member}", in_channels=1, classes=7)
    assert message.startswith(f"{own}:{member}: {reason}")


def test_what_factories_may_do_wrong(own: str) -> None:
    assert "returned int, not torch.nn.Module" in error_of(
        make, f"{own}:nothing", {"num_classes": 7}
    )
    assert "failed with RuntimeError: two lines" in error_of(
        make, f"{own}:broken", {"num_classes": 7}
    )


@pytest.mark.parametrize("name", ["nowhere.at.all:net", "nowhere:net", "somebodys.inner:net"])
def test_modules_that_are_not_there(own: str, name: str) -> None:
    assert "no module named " in error_of(find, name)


@pytest.mark.parametrize("name", ["os:abort", "sys:exit", "builtins:exec", "os.path:join"])
def test_pythons_own_modules_make_no_networks(name: str) -> None:
    assert "is part of Python and has no networks" in error_of(make, name, {})


@pytest.mark.parametrize(
    "arguments",
    [{}, {"width": 4}, {"num_classes": "7"}, {"num_classes": 7, "width": 9}, {"num_classes": True}],
)
def test_a_file_cannot_choose_other_arguments(own: str, arguments: dict[str, Any]) -> None:
    error_of(make, f"{own}:Net", arguments)


@pytest.mark.parametrize("name", ["a:b:c", "a b:c", "a:", ":a", "a:b.c"])
def test_names_that_are_none(name: str) -> None:
    assert "write mypackage.module:factory" in error_of(find, name)


def ends(model: nn.Module, **sizes: int) -> None:
    check_ends("it", rewriting.trace(model), **sizes)


def test_ends_that_do_not_fit_the_data(own: str) -> None:
    net = make(f"{own}:Net", {"num_classes": 7, "in_channels": 3})
    ends(net, in_channels=3, classes=7)
    message = error_of(ends, net, in_channels=1, classes=7)
    assert message.startswith("it: takes images of 3 channels, the data has 1; choose")
    message = error_of(ends, net, in_channels=3, classes=5)
    assert message == "it: returns 7 logits, the data has 5 classes"
    pair = make(f"{own}:several", {"num_classes": 7, "in_chans": 3})
    assert "returns several outputs" in error_of(ends, pair, in_channels=3, classes=7)


class Shaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).relu().flatten(1)
        return out


def test_only_what_is_plainly_wrong_is_refused() -> None:
    assert "returns 12 logits" in error_of(ends, Shaped(), in_channels=1, classes=7)
    ends(nn.Sequential(Shaped(), nn.Conv1d(1, 1, 1)), in_channels=1, classes=7)


@pytest.mark.usefixtures("timm_models")
@pytest.mark.parametrize(
    ("name", "near"),
    [("torchvision:resnet51", "resnet50"), ("timm:resnetv2_51", "resnetv2_50")],
)
def test_unknown_names_list_near_ones(name: str, near: str) -> None:
    message = error_of(find, name)
    assert message.startswith(f"{name}: there is no network ")
    assert near in message.partition("did you mean")[2]
    assert "did you mean" not in error_of(find, f"{name.partition(':')[0]}:zzzzqqqq")


@pytest.mark.usefixtures("timm_models")
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet26d"])
def test_libraries_take_classes_and_channels(name: str) -> None:
    found = arguments_for(name, in_channels=1, classes=7)
    assert found == {"num_classes": 7, "in_chans": 1}


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "cannot be imported"),
        ("import not_there_at_all", "not_there_at_all is not installed; pip install "),
    ],
)
def test_libraries_that_cannot_be_imported(
    library: str, code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{library}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    message = error_of(find, f"{library}:resnet18")
    assert message.startswith(f"{library}:resnet18: ")
    assert reason in message


def test_every_family_has_a_gated_member() -> None:
    sizes = {"cifar": 8, "imagenet": 18}
    assert registry.FAMILIES.keys() == sizes.keys()
    for family, depth in sizes.items():
        assert rewriting.gates(make(family, {"depth": depth, "width": 2}))
