"""Images as a user's own loop feeds them to a network: normalised, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eps_core.errors import ConfigError, DataError
from eps_core.preprocessing import FITS, Preprocessing
from eps_train.data.dataset import SPLIT_SEED, DataIdentity
from eps_train.data.images import ImageSet

Batch = Tensor | Sequence[Tensor]
"""Normalised inputs `[N, ...]`; or inputs, labels int64 `[N]`, and anything else."""

PIXELS = 255.0  # the largest value of a pixel


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInputs:
    """What the inputs of a network are: images `[C, H, W]`.

    Attributes:
        mean, std: normalisation of pixels 0 to 1, one value per channel.
        classes: names of the classes; None: their numbers.
        fit: how images of another aspect ratio are made to fit: `crop` or `letterbox`.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None
    fit: str = "crop"

    @classmethod
    def of(
        cls,
        example: Tensor,
        *,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        classes: Sequence[str] | None,
        fit: str,
    ) -> ImageInputs:
        """The inputs that are like `example`, a batch. Raises ConfigError."""
        if fit not in FITS:
            raise ConfigError(f"fit={fit!r}: choose one of {', '.join(FITS)}")
        if example.dim() != 4 or not example.is_floating_point():
            raise ConfigError(
                "example=: must be a batch of normalised images [N, C, H, W], not"
                f" {example.dtype} of shape {tuple(example.shape)}"
            )
        _, channels, height, width = example.shape
        return cls(
            shape=(channels, height, width),
            mean=_each("mean", mean, channels),
            std=_each("std", std, channels),
            classes=None if classes is None else tuple(map(str, classes)),
            fit=fit,
        )

    def identity(self, count: int) -> DataIdentity:
        """Describe these images as a data set without name and files, for `count` classes.

        Raises ConfigError for images that are neither grey nor RGB, and for another number of
        class names.
        """
        channels, height, width = self.shape
        if channels not in (1, 3):
            raise ConfigError(f"files hold networks of grey or RGB images, not {channels} channels")
        classes = self.classes or tuple(map(str, range(count)))
        if len(classes) != count:
            raise ConfigError(f"classes=: {len(classes)} names for {count} logits of the network")
        return DataIdentity(
            name="",
            classes=classes,
            mean=tuple(PIXELS * value for value in self.mean),
            std=tuple(PIXELS * value for value in self.std),
            preprocessing=Preprocessing(
                resize=(height, width),
                crop=(height, width),
                color="grey" if channels == 1 else "rgb",
                fit=self.fit,
            ),
            split_seed=SPLIT_SEED,
            sizes={"train": 0, "validation": 0, "test": 0},
            sha256="",
        )


def _each(name: str, values: float | Sequence[float], channels: int) -> tuple[float, ...]:
    each = (values,) * channels if isinstance(values, (int, float)) else tuple(values)
    if len(each) not in (1, channels):
        raise ConfigError(f"{name}=: has {len(each)} values, the images {channels} channels")
    return each * channels if len(each) < channels else each


def pixels(
    batches: Iterable[Batch], identity: DataIdentity, *, name: str = "heldout"
) -> ImageSet | Tensor:
    """Return batches normalised as `identity` says as the images that they were: uint8, on the CPU.

    With their labels, if they have any. Bundles and proofs take such images, and normalise them
    themselves. Raises DataError that names the argument `name` if there is no batch, or if its
    values are not those of images so normalised.
    """
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (identity.mean, identity.std))
    images, labels = [], []
    for batch in batches:
        inputs, *rest = [batch] if isinstance(batch, Tensor) else batch
        raw = inputs.detach().cpu().float() * std + mean
        low, high = (value.item() / PIXELS for value in raw.aminmax())
        if not (low > -0.01 and high < 1.01):
            raise DataError(
                f"{name}: its pixels are {low:.2f} to {high:.2f}, not 0 to 1, when the"
                " normalisation is undone; give BlockPruner the mean= and std= of your transform"
            )
        images.append(raw.round().clamp(0, PIXELS).to(torch.uint8))
        labels += [label.detach().cpu() for label in rest[:1]]
    if not images:
        raise DataError(f"{name}: yields no batch; give it images to prove and measure with")
    found = torch.cat(images)
    return ImageSet(found, torch.cat(labels)) if labels else found
