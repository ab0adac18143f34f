"""Weights to start from: read, put in place, or refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eps_core.errors import ConfigError, EpsError, FileFormatError
from eps_train.gating import rewriting
from eps_train.models.spec import NetworkSpec
from eps_train.training.checkpoint import load_weights
from tests.checkpoints import make_checkpoint

SPEC = NetworkSpec.parse("cifar:8x4", in_channels=1, classes=3)


def trained() -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = SPEC.build()
    model(torch.randn(4, 1, 8, 8))
    return dict(model.state_dict())


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As somebody without gates would have saved it."""
    return {name: tensor for name, tensor in state.items() if ".gate." not in name}


def refusal(path: Path, kind: type[EpsError] = ConfigError, spec: NetworkSpec = SPEC) -> str:
    model = spec.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind) as error:
        load_weights(path, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_a_state_dict(nested: str | None, tmp_path: Path) -> None:
    state, path = plain(trained()), tmp_path / "weights.pth"
    torch.save({nested: state, "epoch": 3} if nested else state, path)
    model = SPEC.build()
    assert load_weights(path, model) == ()
    assert all(
        torch.equal(tensor, state[n]) for n, tensor in plain(dict(model.state_dict())).items()
    )


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state, path = plain(trained()), tmp_path / "weights.safetensors"
    safetensors.save_file(state, path)
    model = SPEC.build()
    assert load_weights(path, model) == ()
    assert all(
        torch.equal(tensor, state[n]) for n, tensor in plain(dict(model.state_dict())).items()
    )


def test_a_checkpoint_of_ours_starts_with_fresh_gates(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(depth=8, dead=["stages.1.0"])
    checkpoint.state["stages.1.0.gate.dead"] = torch.tensor(True)
    checkpoint.save(tmp_path / "ckpt.pt")
    model = NetworkSpec.parse("cifar:8x4", in_channels=1, classes=10).build()
    assert load_weights(tmp_path / "ckpt.pt", model) == ()
    assert not any(bool(gate.dead) for gate in rewriting.gates(model).values())
    assert torch.equal(model.get_parameter("stem.0.weight"), checkpoint.state["stem.0.weight"])


def test_files_from_before_batch_norms_counted(tmp_path: Path) -> None:
    state = {n: t for n, t in plain(trained()).items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    assert load_weights(tmp_path / "old.pt", SPEC.build()) == ()


def test_a_classifier_of_another_size_stays_fresh(tmp_path: Path) -> None:
    torch.save(plain(trained()), tmp_path / "three.pt")
    model = NetworkSpec.parse("cifar:8x4", in_channels=1, classes=7).build()
    before = model.get_parameter("classifier.weight").detach().clone()
    skipped = load_weights(tmp_path / "three.pt", model)
    assert skipped == ("classifier.weight", "classifier.bias")
    assert torch.equal(model.get_parameter("classifier.weight"), before)
    assert torch.equal(model.get_parameter("stem.0.weight"), trained()["stem.0.weight"])


def test_weights_of_another_network(tmp_path: Path) -> None:
    state = plain(trained())
    del state["stem.0.weight"], state["stem.1.bias"]
    torch.save(state | {"more": torch.zeros(1)}, tmp_path / "other.pt")
    message = refusal(tmp_path / "other.pt")
    assert "it lacks 2, first stem.0.weight; it has others: 1, first more" in message
    wide = NetworkSpec.parse("cifar:8x6", in_channels=1, classes=3)
    torch.save(plain(trained()), tmp_path / "narrow.pt")
    message = refusal(tmp_path / "narrow.pt", spec=wide)
    assert "stem.0.weight is 4x1x3x3 in the file, 6x1x3x3 in the network" in message


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK" * 99, pickle.dumps(Code()), pickle.dumps([1])])
def test_files_that_hold_no_weights(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(tmp_path / name, FileFormatError)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(1)], {"state_dict": {}}])
def test_data_that_is_no_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "data.pt")
    assert "holds no state dict" in refusal(tmp_path / "data.pt", FileFormatError)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pt", FileFormatError).endswith("none.pt: no such file")


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "model.backbone."],
)
def test_prefixes_of_wrappers(prefix: str, tmp_path: Path) -> None:
    state = plain(trained())
    torch.save({f"{prefix}{name}": t for name, t in state.items()}, tmp_path / "wrapped.pt")
    model = SPEC.build()
    assert load_weights(tmp_path / "wrapped.pt", model) == ()
    assert torch.equal(model.get_parameter("stem.0.weight"), state["stem.0.weight"])


@pytest.mark.parametrize("prefix", ["net.", "student.encoder."])
def test_what_lightning_saves_beside_the_network_is_left_out(prefix: str, tmp_path: Path) -> None:
    state = plain(trained())
    saved = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    saved |= {"criterion.weight": torch.ones(3), "accuracy.tp": torch.ones(1)}
    content = {"state_dict": saved, "epoch": 3, "hyper_parameters": {"lr": 0.1}, "loops": {}}
    torch.save(content, tmp_path / "last.ckpt")
    model, told = SPEC.build(), list[str]()
    assert load_weights(tmp_path / "last.ckpt", model, told.append) == ()
    assert torch.equal(model.get_parameter("stem.0.weight"), state["stem.0.weight"])
    assert told == [
        f"taking the tensors below {prefix}, and not the 2, first criterion.weight, beside them"
    ]


def test_of_two_copies_the_averaged_one_is_taken(tmp_path: Path) -> None:
    state = plain(trained())
    both = {f"model.{name}": tensor for name, tensor in state.items()}
    both |= {f"ema.module.{name}": tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": both}, tmp_path / "both.ckpt")
    model = SPEC.build()
    assert load_weights(tmp_path / "both.ckpt", model) == ()
    assert torch.equal(model.get_parameter("stem.0.weight"), state["stem.0.weight"] + 1)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_are_taken_and_named(key: str, tmp_path: Path) -> None:
    state = plain(trained())
    averaged = {f"module.{name}": tensor + 1 for name, tensor in state.items()}
    averaged["n_averaged"] = torch.tensor(3)
    torch.save({"model": state, key: averaged}, tmp_path / "both.pt")
    model, told = SPEC.build(), list[str]()
    assert load_weights(tmp_path / "both.pt", model, told.append) == ()
    assert torch.equal(model.get_parameter("stem.0.weight"), state["stem.0.weight"] + 1)
    assert told == [f"taking the averaged weights of both.pt ({key})"]


def test_a_pruned_run_says_that_its_dead_blocks_are_alive_again(tmp_path: Path) -> None:
    make_checkpoint(depth=8, dead=["stages.1.0"]).save(tmp_path / "ckpt.pt")
    model, told = NetworkSpec.parse("cifar:8x4", in_channels=1, classes=10).build(), list[str]()
    load_weights(tmp_path / "ckpt.pt", model, told.append)
    (line,) = told
    assert line.startswith("warning: 1 blocks that had died in ckpt.pt are alive again (stages.1.0")
    assert "eps-compact --finetune-epochs" in line


def test_colour_weights_for_grey_images(tmp_path: Path) -> None:
    state = plain(trained())
    colours = torch.randn(4, 3, 3, 3)
    torch.save(state | {"stem.0.weight": colours}, tmp_path / "rgb.pt")
    model, told = SPEC.build(), list[str]()
    load_weights(tmp_path / "rgb.pt", model, told.append)
    assert torch.equal(model.get_parameter("stem.0.weight"), colours.sum(1, keepdim=True))
    assert told == ["stem.0.weight is for RGB images, so its channels are summed"]


def test_a_file_without_a_head(tmp_path: Path) -> None:
    state = {name: t for name, t in plain(trained()).items() if not name.startswith("classifier")}
    torch.save(state, tmp_path / "body.pt")
    skipped = load_weights(tmp_path / "body.pt", SPEC.build())
    assert skipped == ("classifier.weight", "classifier.bias")


class TwoHeads(nn.Module):
    """A linear and a convolutional head, whose answers are averaged; a mask that is not saved."""

    mask: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("mask", torch.ones(8, 1, 1), persistent=False)
        self.head, self.side = nn.Conv2d(8, classes, 1), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.block(x)) * self.mask
        pooled = x.mean((2, 3), keepdim=True)
        logits: Tensor = (self.head(pooled).flatten(1) + self.side(pooled.flatten(1))) / 2
        return logits


def test_two_heads_of_other_classes_and_a_buffer_that_is_not_saved(tmp_path: Path) -> None:
    saved = TwoHeads(5)
    torch.save(saved.state_dict(), tmp_path / "five.pt")
    model = rewriting.insert_gates(TwoHeads(3))
    skipped = load_weights(tmp_path / "five.pt", model)
    assert set(skipped) == {"head.weight", "head.bias", "side.weight", "side.bias"}
    assert torch.equal(model.get_parameter("block.weight"), saved.block.weight)


def test_a_file_with_more_than_tensors_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"model": plain(trained()), "args": Path("x")}, tmp_path / "theirs.pt")
    assert "weights_only=False" in refusal(tmp_path / "theirs.pt", FileFormatError)


def test_a_compact_network_is_refused_with_the_way_to_train_it_on(tmp_path: Path) -> None:
    torch.save({"format": "eps-resnet-compact", "state": plain(trained())}, tmp_path / "compact.pt")
    assert "--finetune-epochs" in refusal(tmp_path / "compact.pt")
