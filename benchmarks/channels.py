"""Channels: the baseline's channels pruned by Torch-Pruning to a share of FLOPs, and fine-tuned.

An alternative of `alternatives.py`, which runs it; it needs the package `torch-pruning`. Channels
between the two convolutions of each block are removed, those with the smallest weights of the whole
network first; the channels between blocks stay, because Torch-Pruning does not follow a padded
shortcut. Fine-tuning is that of `eps-compact --finetune-epochs`: distilled from the baseline.

    python benchmarks/channels.py ckpt.pt --target-flops 0.5 --finetune-epochs 3 --data-root DATA
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch
import torch_pruning
from torch import nn

from eps_compact.analysis.importance import live_network
from eps_compact.analysis.selection import finetune
from eps_train.data import dataset
from eps_train.gating.costs import plain
from eps_train.models import stored
from eps_train.models.spec import NetworkSpec, cost
from eps_train.training.checkpoint import Checkpoint

STEPS = 200  # of one pruning: how finely the target is met


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--target-flops", type=float, required=True)
@click.option("--finetune-epochs", type=int, required=True)
@click.option("--data-root", type=click.Path(path_type=Path), default=Path())
@click.option("--device", default="cpu", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("tuned.pt"))
def main(
    checkpoint: Path,
    target_flops: float,
    finetune_epochs: int,
    data_root: Path,
    device: str,
    output: Path,
) -> None:
    """Prune the channels of CHECKPOINT, fine-tune it and write a checkpoint."""
    torch.set_num_threads(1)
    teacher = Checkpoint.load(checkpoint)
    shape = teacher.data.input_shape
    network = plain(live_network(teacher)).eval()
    whole = cost(network, shape).flops
    kinds = (nn.Conv2d, nn.Linear)
    layers = [each for each in network.named_modules() if isinstance(each[1], kinds)]
    pruner = torch_pruning.pruner.BasePruner(
        network,
        torch.zeros(1, *shape),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[layer for name, layer in layers if not name.endswith("conv1")],
    )
    while cost(network, shape).flops > target_flops * whole:
        if pruner.current_step == STEPS:
            raise click.ClickException(f"--target-flops {target_flops}: out of reach")
        pruner.step()
    pruned = replace(
        teacher,
        network=NetworkSpec(family=stored.FAMILY, arguments=stored.store(network)),
        state=network.state_dict(),
        gates=[],
        order=(),
    )
    height, width = shape[1:]
    data = dataset.load(teacher.data.name, data_root, image_size=(height, width))
    tuned = finetune(
        pruned, data, epochs=finetune_epochs, device=torch.device(device), teacher=teacher
    )
    tuned.checkpoint.save(output)


if __name__ == "__main__":
    main()
