"""Recipes: named functions that return a complete training configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from eps_core.errors import ConfigError
from eps_train.config import TrainingConfig
from eps_train.schedule import CosineDecay


def digits() -> TrainingConfig:
    """Depth 110 on scikit-learn's digits: minutes on a CPU.

    The weight decay is 25 times the paper's because a dead branch shrinks by about
    `exp(-lr * decay * steps / (1 - momentum))`, and this run has 1,200 steps, not 390,000. The
    learning rate does not restart: 36 epochs at the high one are enough.
    """
    return TrainingConfig(
        recipe="digits",
        dataset="digits",
        model="cifar:110x16",
        epochs=60,
        batch_size=64,
        epsilon=2.5,
        lr_schedule=((0, 0.1),),
        final_decay=((0.6, 0.01), (0.8, 0.001)),
        weight_decay=5e-3,
        shift=1,
        # The tensors are too small for more: a second thread gains a fifth on an idle machine; on a
        # busy one, the two wait for each other many times longer than they work.
        cpu_threads=1,
    )


def fashion_mnist() -> TrainingConfig:
    """Depth 56, width 8, on Fashion-MNIST at 14x14: 15 minutes on one core.

    docs/results.md has the results.
    """
    return TrainingConfig(
        recipe="fashion-mnist",
        dataset="fashion-mnist",
        image_size=(14, 14),
        model="cifar:56x8",
        epochs=16,
        batch_size=128,
        epsilon=2.5,
        # A narrow network starts with responses near 2.5, so that epsilon would remove blocks
        # before they have learned anything.
        epsilon_warmup=3,
        lr_schedule=((0, 0.1),),
        final_decay=((0.6, 0.01), (0.85, 0.001)),
        weight_decay=1e-3,
        shift=1,
        flip=True,
        cpu_threads=1,
    )


def images() -> TrainingConfig:
    """Train on a folder of photographs from scratch, and prune to half the parameters.

    docs/training.md has the study of few images that these settings come from.
    """
    return TrainingConfig(
        recipe="images",
        dataset="folder:images",
        model="torchvision:resnet18",
        epochs=60,
        batch_size=64,
        epsilon=None,
        epsilon_warmup=6,
        target_parameters=0.5,
        lr_schedule=CosineDecay(0.1),
        final_decay=(),
        weight_decay=5e-3,
        aux_loss_weight=0.0,
        shift=4,
        flip=True,
    )


def finetune() -> TrainingConfig:
    """Fine-tune pretrained weights and prune to half the latency.

    The last layer is trained alone for an epoch; pruning begins after a tenth of the run. The
    network is not distilled from what it was before that: after two epochs it is a poor teacher.
    docs/training.md has the results.
    """
    return TrainingConfig(
        recipe="finetune",
        dataset="folder:images",
        image_size=(224, 224),
        model="torchvision:resnet18",
        epochs=20,
        batch_size=64,
        epsilon=None,
        epsilon_warmup=2,
        target_speedup=2.0,
        head_epochs=1,
        lr_schedule=CosineDecay(0.02),
        final_decay=(),
        weight_decay=1e-4,
        # A side head is new, and its gradient would change the layers below it for the worse.
        aux_loss_weight=0.0,
        normalization="pretrained",
        flip=True,
    )


def cifar(name: str, *, dataset: str, depth: int) -> TrainingConfig:
    """The paper's run on CIFAR-10 or CIFAR-100 (its section 4.1 and the authors' code).

    Differences: a final decay that no restart interrupts, and a validation part held out of the
    training data.
    """
    return TrainingConfig(
        recipe=name,
        dataset=dataset,
        model=f"cifar:{depth}x16",
        epochs=1000,
        batch_size=128,
        epsilon=2.5,
        lr_schedule=((0, 0.1), (82, 0.01), (123, 0.001), (300, 0.0002)),
        lr_restart=((0, 0.1), (41, 0.01), (61, 0.001), (150, 0.0002)),
        final_decay=((0.88, 0.01), (0.94, 0.001), (0.97, 0.0002)),
        weight_decay=2e-4,
        normalization="pixel",
        shift=4,
        flip=True,
    )


def cifar10_fast() -> TrainingConfig:
    """Depth 110 on CIFAR-10 with half its FLOPs, in 150 epochs on one GPU; not run to the end.

    The learning rate is that of the paper's 128 images, scaled with the batch.
    """
    return TrainingConfig(
        recipe="cifar10-fast",
        dataset="cifar10",
        model="cifar:110x16",
        epochs=150,
        batch_size=512,
        epsilon=None,
        epsilon_warmup=15,
        target_flops=0.5,
        lr_schedule=CosineDecay(0.4),
        lr_warmup=5,
        final_decay=(),
        nesterov=True,
        weight_decay=5e-4,
        label_smoothing=0.1,
        shift=4,
        flip=True,
        random_erasing=0.25,
        precision="bf16",
    )


def svhn(name: str, *, depth: int) -> TrainingConfig:
    """The paper's run on SVHN, its train and extra parts mixed.

    Differences: those of :func:`cifar`, and a constant weight decay; the authors' falls to a fifth
    after 480,000 steps, about half-way.
    """
    return TrainingConfig(
        recipe=name,
        dataset="svhn",
        model=f"cifar:{depth}x16",
        epochs=200,
        batch_size=128,
        epsilon=1.5,
        lr_schedule=((0, 0.1), (20, 0.01), (28, 0.001), (50, 0.0001)),
        lr_restart=((0, 0.1), (10, 0.01), (14, 0.001), (25, 0.0001)),
        final_decay=((0.88, 0.01), (0.93, 0.001), (0.97, 0.0001)),
        weight_decay=2e-4,
        normalization="pixel",
        augmentation="svhn",
        shift=4,
    )


def imagenet(name: str, *, depth: int, epsilon: float) -> TrainingConfig:
    """The paper's run on ImageNet (its section 4.2 and the authors' code), without restarts.

    Differences: an epoch is a pass over the training part, not 5,000 steps of 256 images (4,965
    with 10 images per class held out for validation). The paper's validation set is our test part.
    """
    return TrainingConfig(
        recipe=name,
        dataset="imagenet",
        model=f"imagenet:{depth}",
        epochs=110,
        batch_size=256,
        epsilon=epsilon,
        lr_schedule=((0, 0.1), (30, 0.01), (60, 1e-3), (85, 1e-4), (95, 1e-5)),
        final_decay=(),
        nesterov=True,
        weight_decay=1e-4,
        augmentation="imagenet",
        flip=True,
    )


_CIFAR = {
    f"{dataset}-{depth}": partial(cifar, f"{dataset}-{depth}", dataset=dataset, depth=depth)
    for dataset in ("cifar10", "cifar100")
    for depth in (110, 200, 500, 752)
}
_SVHN = {f"svhn-{depth}": partial(svhn, f"svhn-{depth}", depth=depth) for depth in (110, 200)}
_IMAGENET = {
    f"imagenet-{depth}": partial(imagenet, f"imagenet-{depth}", depth=depth, epsilon=epsilon)
    for depth, epsilon in ((101, 2.0), (152, 1.8))
}

RECIPES: dict[str, Callable[[], TrainingConfig]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "images": images,
    "finetune": finetune,
    "cifar10-fast": cifar10_fast,
    **_CIFAR,
    **_SVHN,
    **_IMAGENET,
}


def describe() -> list[str]:
    """One line per recipe: its name, data set, model, epsilon and epochs."""
    return [
        f"{name:14} {made.dataset}, {made.model}, {_threshold(made)}, {made.epochs} epochs"
        for name, made in ((name, make()) for name, make in RECIPES.items())
    ]


def _threshold(made: TrainingConfig) -> str:
    if made.target is not None:
        return f"target {made.target.share:.0%} of the {made.target.unit}"
    return f"epsilon {made.epsilon or 0:g}"


def default(dataset: str | None, *, pretrained: bool) -> str:
    """The name of the recipe for a run that names none; `dataset` is the value of `--dataset`."""
    if dataset is None or dataset.partition(":")[0] not in ("folder", "csv", "hf"):
        return "digits"
    return "finetune" if pretrained else "images"


def recipe(name: str) -> TrainingConfig:
    """The named recipe's configuration. Raises ConfigError for an unknown name."""
    if name not in RECIPES:
        raise ConfigError(f"--recipe {name}: unknown; the recipes are: {', '.join(RECIPES)}")
    return RECIPES[name]()
