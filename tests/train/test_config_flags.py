from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import click
import pytest

from eps_train import config
from eps_train.cli import cli, main
from eps_train.config import TrainingConfig
from eps_train.recipes import digits
from tests.commands import Result, run

TARGETS = {"target_parameters", "target_flops", "target_latency", "target_speedup"}
TARGET = ("--target-parameters", "0.3")
TOGETHER = {
    "criterion": TARGET,
    "max_accuracy_drop": TARGET,
    "timer": ("--target-speedup", "2"),
    "head_epochs": ("--epsilon-warmup", "3"),
    "relative_epsilon": ("--epsilon", "1.5"),
    "self_distillation": ("--epsilon-warmup", "3"),
}

# One option, its value, and the field's value that comes of it, for every field but `recipe`.
GIVEN = {
    "dataset": ("--dataset", "mnist", "mnist"),
    "image_size": ("--image-size", "14x20", [14, 20]),
    "fit": ("--fit", "letterbox", "letterbox"),
    "model": ("--model", "cifar:20", "cifar:20"),
    "epochs": ("--epochs", "3", 3),
    "batch_size": ("--batch-size", "32", 32),
    "head_epochs": ("--head-epochs", "2", 2),
    "seed": ("--seed", "5", 5),
    "epsilon": ("--epsilon", "1.5", 1.5),
    "target_parameters": ("--target-parameters", "0.3", 0.3),
    "target_flops": ("--target-flops", "0.3", 0.3),
    "target_latency": ("--target-latency", "0.3", 0.3),
    "target_speedup": ("--target-speedup", "2", 2.0),
    "timer": ("--timer", "torch", "torch"),
    "nested": ("--nested", None, True),
    "criterion": ("--criterion", "gradient", "gradient"),
    "max_accuracy_drop": ("--max-accuracy-drop", "1", 1.0),
    "relative_epsilon": ("--relative-epsilon", "", True),
    "epsilon_warmup": ("--epsilon-warmup", "2", 2),
    "freeze_gates_at": ("--freeze-gates-at", "0.8", 0.8),
    "patience": ("--patience", "3", 3),
    "live_removal": ("--no-live-removal", None, False),
    "optimizer": ("--optimizer", "adamw", "adamw"),
    "lr_warmup": ("--lr-warmup", "0.5", 0.5),
    "clip_grad_norm": ("--clip-grad-norm", "1", 1.0),
    "label_smoothing": ("--label-smoothing", "0.1", 0.1),
    "ema": ("--ema", "0.99", 0.99),
    "lr_schedule": ("--lr-schedule", "0:0.2,5:0.02", [[0, 0.2], [5, 0.02]]),
    "lr_restart": ("--lr-restart", "0:0.2", [[0, 0.2]]),
    "final_decay": ("--final-decay", "none", []),
    "momentum": ("--momentum", "0.5", 0.5),
    "nesterov": ("--nesterov", None, True),
    "weight_decay": ("--weight-decay", "0.001", 0.001),
    "self_distillation": ("--self-distillation", None, True),
    "distillation_weight": ("--distillation-weight", "0.9", 0.9),
    "temperature": ("--temperature", "2", 2.0),
    "early_stopping": ("--early-stopping", "5", 5),
    "class_weights": ("--class-weights", "balanced", "balanced"),
    "accumulate": ("--accumulate", "2", 2),
    "aux_loss_weight": ("--aux-loss-weight", "0", 0.0),
    "normalization": ("--normalization", "pixel", "pixel"),
    "augmentation": ("--augmentation", "svhn", "svhn"),
    "shift": ("--shift", "2", 2),
    "flip": ("--flip", None, True),
    "random_erasing": ("--random-erasing", "0.25", 0.25),
    "mixup": ("--mixup", "0.2", 0.2),
    "cutmix": ("--cutmix", "1", 1.0),
    "precision": ("--precision", "bf16", "bf16"),
    "compile": ("--compile", None, True),
    "sync_batchnorm": ("--sync-batchnorm", None, True),
    "gate_scope": ("--gate-scope", "global", "global"),
    "cpu_threads": ("--cpu-threads", "2", 2),
}


def show(cwd: Path, *args: object) -> Result:
    return run("eps-train", main, *args, "--show-recipe", cwd=cwd)


def test_every_field_has_an_option() -> None:
    options = {parameter.name for parameter in cli.params}
    assert {field.name for field in fields(TrainingConfig)} <= options
    assert GIVEN.keys() == {field.name for field in fields(TrainingConfig)} - {"recipe"}


@pytest.mark.parametrize("field", GIVEN)
def test_an_option_overrides_its_field_and_no_other(field: str, tmp_path: Path) -> None:
    option, text, value = GIVEN[field]
    result = show(tmp_path, option, *([text] if text else []), *TOGETHER.get(field, ()))
    assert result.code == 0, result.stderr
    shown, plain = json.loads(result.stdout), digits().to_dict()
    assert shown.pop(field) == value
    changed = {name for name, entry in shown.items() if entry != plain[name]}
    assert changed <= {"epsilon", "epsilon_warmup", *TARGETS}


@pytest.mark.parametrize("size", ["many", "1"])
def test_a_batch_size_is_a_number_or_auto(tmp_path: Path, size: str) -> None:
    result = show(tmp_path, "--batch-size", size)
    assert result.code == 2
    assert f"'--batch-size': {size} is neither auto nor a number from 2 on" in result.stderr


def test_a_target_and_a_threshold_replace_each_other(tmp_path: Path) -> None:
    target = ("--target-parameters", 0.3, "--max-accuracy-drop", 1, "--criterion", "l1")
    led = show(tmp_path, *target)
    assert json.loads(led.stdout)["epsilon"] is None
    (tmp_path / "led.json").write_text(led.stdout)
    fixed = json.loads(show(tmp_path, "--config", "led.json", "--epsilon", 2).stdout)
    assert fixed["epsilon"] == 2
    assert fixed["target_parameters"] is None
    assert fixed["criterion"] == "response"
    assert fixed["max_accuracy_drop"] is None


def test_one_target_replaces_another(tmp_path: Path) -> None:
    timed = show(tmp_path, "--target-speedup", 2, "--timer", "torch", "--max-accuracy-drop", 1)
    (tmp_path / "timed.json").write_text(timed.stdout)
    base = ("--config", "timed.json")
    latency = json.loads(show(tmp_path, *base, "--target-latency", 0.3).stdout)
    assert (latency["target_latency"], latency["target_speedup"]) == (0.3, None)
    assert (latency["timer"], latency["max_accuracy_drop"]) == ("torch", 1)
    flops = json.loads(show(tmp_path, *base, "--target-flops", 0.3).stdout)
    assert (flops["target_flops"], flops["target_speedup"]) == (0.3, None)
    assert (flops["timer"], flops["max_accuracy_drop"]) == (None, 1)
    nested = json.loads(show(tmp_path, *base, "--nested").stdout)
    assert {nested[name] for name in (*TARGETS, "timer", "max_accuracy_drop")} == {None}


def test_config_reads_back_what_show_recipe_prints(tmp_path: Path) -> None:
    printed = show(tmp_path, "--recipe", "svhn-110", "--seed", 3, "--image-size", 16).stdout
    (tmp_path / "mine.json").write_text(printed)
    assert show(tmp_path, "--config", "mine.json").stdout == printed
    again = json.loads(show(tmp_path, "--config", "mine.json", "--seed", 4).stdout)
    assert again == {**json.loads(printed), "seed": 4}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_config_as_powershell_writes_it(tmp_path: Path, encoding: str) -> None:
    printed = show(tmp_path, "--seed", 3).stdout
    (tmp_path / "mine.json").write_bytes(printed.encode(encoding))
    assert show(tmp_path, "--config", "mine.json").stdout == printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"recipe": "digits"}', "object missing required field `dataset`"),
        ('{"speed": 9}', "unknown configuration field speed"),
    ],
)
def test_a_config_that_is_none_is_refused_in_one_line(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "mine.json").write_bytes(content.encode("latin-1"))
    result = show(tmp_path, "--config", "mine.json")
    assert result.code == 1
    assert result.error.startswith("eps-train: error: --config mine.json: ")
    assert message in result.error


@pytest.mark.parametrize(
    "text", ["fast", "0", "0:0.1,0:0.2", "5:0.1,0:0.2", "-1:0.1", "0:-1", "0:nan", "0:0.1,", ""]
)
def test_steps_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        config.steps(text)


@pytest.mark.parametrize("text", ["cosine:", "cosine:fast", "cosine:-1", "cosine:inf", "cosine"])
def test_cosines_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        config.lr_schedule(text)


def test_a_cosine_replaces_restarts_and_final_decay(tmp_path: Path) -> None:
    args = ("--recipe", "cifar10-110", "--lr-schedule", "cosine:0.1")
    printed = show(tmp_path, *args).stdout
    shown = json.loads(printed)
    assert shown["lr_schedule"] == {"cosine": 0.1}
    assert shown["lr_restart"] == shown["final_decay"] == []
    (tmp_path / "mine.json").write_text(printed)
    assert show(tmp_path, "--config", "mine.json").stdout == printed


def test_without_pruning_nothing_is_distilled(tmp_path: Path) -> None:
    printed = show(tmp_path, "--recipe", "finetune", "--self-distillation").stdout
    assert json.loads(printed)["self_distillation"] is True
    (tmp_path / "mine.json").write_text(printed)
    for instead in (("--epsilon", 0), ("--nested",)):
        shown = json.loads(show(tmp_path, "--config", "mine.json", *instead).stdout)
        assert shown["self_distillation"] is False


def test_pretrained_weights_bring_their_normalization(tmp_path: Path) -> None:
    shown = json.loads(show(tmp_path, "--pretrained").stdout)
    assert shown["normalization"] == "pretrained"
    kept = json.loads(show(tmp_path, "--pretrained", "--normalization", "channel").stdout)
    assert kept["normalization"] == "channel"


@pytest.mark.parametrize(
    "args", [("--pretrained", "--weights", "w.pt"), ("--self-distillation", "--teacher", "t.pt")]
)
def test_two_sources_contradict_each_other(tmp_path: Path, args: tuple[str, ...]) -> None:
    result = show(tmp_path, *args)
    assert result.code == 2
    assert "contradict each other" in result.stderr
