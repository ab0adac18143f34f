"""`eps-predict`: label images with the network of a bundle, without a server and without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from eps_core import cli as console
from eps_core.errors import DataError

if TYPE_CHECKING:
    from eps_deploy.bundle import Bundle
    from eps_deploy.engines.base import Engine

_FILE = click.Path(path_type=Path)
_BATCH = 32


@click.command()
@click.argument("bundle", type=_FILE)
@click.argument("images", type=_FILE, nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="Number of labels to print for each image, most probable first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def cli(bundle: Path, images: tuple[Path, ...], top: int, as_json: bool) -> int:
    """Label each IMAGE with the network in BUNDLE.

    An image that cannot be read, or for which the network's logits are not finite, is reported on
    stderr; the other images are labelled, and the exit code is 1.
    """
    from eps_deploy.bundle import load_bundle, open_engine

    loaded = load_bundle(bundle)
    predictions, errors = [], []
    with open_engine(loaded) as engine:
        for answer in predict(loaded, engine, images, top):
            if "error" in answer:
                errors.append(answer)
                click.echo(f"eps-predict: error: {answer['error']}", err=True)
                continue
            predictions.append(answer)
            if not as_json:
                pairs = [f"{entry['label']}  {entry['probability']:.4f}" for entry in answer["top"]]
                click.echo("  ".join((f"{answer['image']}:", *pairs)))
    if as_json:
        console.emit_json({"predictions": predictions, "errors": errors})
    return 1 if errors else 0


def main() -> NoReturn:
    console.run(cli)


def predict(
    bundle: Bundle, engine: Engine, paths: Sequence[Path], top: int
) -> Iterator[dict[str, Any]]:
    """Label the images at `paths`, in order.

    Yields `{image, top: [{label, probability}, ...]}`, most probable first, or `{image, error}`.
    """
    import numpy as np

    from eps_deploy.engines.base import finite_rows

    batch = min(_BATCH, engine.max_batch)
    for start in range(0, len(paths), batch):
        answers: list[dict[str, Any]] = []
        read: list[dict[str, Any]] = []
        pixels = []
        for path in paths[start : start + batch]:
            answers.append({"image": str(path)})
            try:
                pixels.append(bundle.preprocessing.read(path))
                read.append(answers[-1])
            except DataError as error:
                answers[-1]["error"] = str(error)
        logits = engine.infer(np.stack(pixels)) if pixels else np.empty((0, 1), np.float32)
        for answer, row, finite in zip(read, logits, finite_rows(logits), strict=True):
            if finite:
                answer["top"] = best(row, bundle.labels, top)
            else:
                problem = "the network's logits are not finite for this image"
                answer["error"] = f"{answer['image']}: {problem}"
        yield from answers


def best(logits: Any, labels: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The `top` most probable labels of one image's logits `[classes]`, by softmax."""
    import numpy as np

    shifted = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = shifted / shifted.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [{"label": labels[i], "probability": float(probabilities[i])} for i in order.tolist()]
