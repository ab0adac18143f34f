"""Published weights of torchvision and timm: found, read from their cache, or one line of error."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import hub

from eps_core.errors import ConfigError
from eps_train.cli import main
from eps_train.models import registry
from eps_train.training.checkpoint import Checkpoint
from tests.commands import run

MOBILENET = "mobilenet_v2-7ebf99e0.pth"  # as torchvision's cache names the file


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchvision_models: None) -> Any:
    """The tensors of a mobilenet_v2 in the cache of torchvision."""
    from torchvision import models

    torch.manual_seed(3)
    state = models.mobilenet_v2().state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / MOBILENET)
    monkeypatch.setattr(hub, "_hub_dir", str(tmp_path / "hub"))
    return state


def test_a_run_starts_from_them_for_other_classes_and_gray_images(
    cached: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    args = ("--model", "torchvision:mobilenet_v2", "--pretrained", "--epochs", 0)
    result = run("eps-train", main, *args, "--aux-loss-weight", 0, cwd=tmp_path)
    assert result.code == 0, result.stderr
    log = " ".join(result.stderr.split())
    assert f"{MOBILENET}; for other classes, or not in it: classifier.1.weight, classifier." in log
    assert "the last layer is not trained, so that no accuracy means anything" in log
    best = Checkpoint.load(tmp_path / "ckpt.pt")
    stem = cached["features.0.0.weight"].sum(1, keepdim=True)
    assert torch.equal(best.state["features.0.0.weight"], stem)
    name = "features.3.conv.0.0.weight"
    assert torch.equal(best.state[name], cached[name])
    assert best.metrics["started_from"]["file"].endswith(MOBILENET)
    # ImageNet's, over the three channels.
    assert best.data.mean == pytest.approx([255 * (0.485 + 0.456 + 0.406) / 3])
    assert best.data.std == pytest.approx([255 * (0.229 + 0.224 + 0.225) / 3])


def test_without_a_network_one_line_names_the_file(
    torchvision_models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **rest: object) -> None:
        raise URLError("no\nnetwork")

    monkeypatch.setattr(hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(hub, "download_url_to_file", refused)
    found = registry.pretrained("torchvision:mobilenet_v2")
    with pytest.raises(ConfigError) as error:
        found.state("torchvision:mobilenet_v2")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("--pretrained: torchvision:mobilenet_v2: cannot fetch ")
    assert f"{MOBILENET} (<urlopen error no network>)" in message
    assert f"put it into {tmp_path}/checkpoints or give it with --weights" in message


def test_timm_fetches_them_itself(timm_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create, told = timm.create_model, dict[str, object]()

    def without_a_network(name: str, *, pretrained: bool, **further: Any) -> torch.nn.Module:
        told.update(name=name, pretrained=pretrained, **further)
        return create(name, **further)

    monkeypatch.setattr(timm, "create_model", without_a_network)
    found = registry.pretrained("timm:resnet10t,output_stride=16")
    assert found.source == "timm/resnet10t.c3_in1k/model.safetensors"
    assert found.state("timm:resnet10t")["fc.weight"].shape == (1000, 512)
    assert told == {"name": "resnet10t", "pretrained": True, "output_stride": 16}


def test_networks_that_have_none(timm_models: None) -> None:
    with pytest.raises(ConfigError, match="only networks of torchvision and timm"):
        registry.pretrained("cifar:20")
    with pytest.raises(ConfigError, match="there is no network resnet19"):
        registry.pretrained("torchvision:resnet19")
    with pytest.raises(ConfigError, match="timm:resnetv2_50d: timm publishes no weights for it"):
        registry.pretrained("timm:resnetv2_50d")


def test_the_normalization_is_the_librarys_or_imagenets(timm_models: None) -> None:
    half = ((0.5,) * 3,) * 2
    assert registry.normalization("timm:vit_tiny_patch16_224") == half
    for name in ("timm:resnet10t", "timm:resnetv2_50d", "torchvision:resnet18", "mine:net"):
        assert registry.normalization(name) == registry.IMAGENET
