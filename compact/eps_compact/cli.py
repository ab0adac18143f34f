"""`eps-compact`: take the dead blocks out of a trained network, and prove that nothing changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from eps_compact.outputs import Outputs, write
from eps_train import console
from eps_train.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from eps_compact.compaction import Compaction


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The options that decide what is done; names as on the command line."""

    checkpoint: Path
    outputs: Outputs
    dry_run: bool
    data_root: Path | None
    no_data: bool
    no_fold: bool
    closed_at_least: float
    force: bool


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write; beside it the certificate as .json and the block map as .png."
    "  [default: compact.pt beside CKPT]",
)
@click.option("--dry-run", is_flag=True, help="Prove and show everything, write nothing.")
@click.option("--no-fold", is_flag=True, help="Leave batch norms beside their convolutions.")
@click.option(
    "--closed-at-least",
    metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Below 1, take out live blocks too that were closed on this share of the last epoch's"
    " training steps: not lossless.",
)
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder with the data set's files; digits needs none.",
)
@click.option(
    "--no-data",
    is_flag=True,
    help="Do without held-out images: the training record is the evidence, random images the"
    " proof.",
)
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def cli(checkpoint: Path, output: Path | None, as_json: bool, **options: Any) -> int:
    """Take the dead blocks out of CKPT (ckpt.pt or last.pt of eps-train).

    Dead blocks leave their shortcut, live gates become plain additions, the side head goes. The
    logits must then equal those of the gated network to the last bit, on held-out and on random
    images. Batch norms are folded into the convolutions before them, which moves logits by rounding
    alone: at most 1e-5 of the largest. Otherwise nothing is written and the exit status is 3.
    """
    outputs = Outputs(output or checkpoint.parent / "compact.pt")
    request = Request(checkpoint=checkpoint, outputs=outputs, **options)
    _refuse(request)

    from eps_compact import summary
    from eps_compact.certificate import ProofError

    log = console.log()
    try:
        done = _compact(request, log)
    except ProofError as error:
        click.echo(f"eps-compact: proof failed: {error}; nothing was written", err=True)
        if as_json:
            console.emit_json({"passed": False, "error": str(error), "written": None})
        return console.CHECK_FAILED
    summary.show(done, log)
    written = None
    if request.dry_run:
        log.print("dry run: nothing was written")
    else:
        _write(done, outputs)
        written = outputs.to_dict()
        names = "{}, {} and {}".format(*outputs.all)
        log.print(f"written: {names}", markup=False)
    if as_json:
        console.emit_json(summary.to_dict(done, str(checkpoint), written))
    return 0


def main() -> NoReturn:
    console.run(cli)


def _refuse(request: Request) -> None:
    """Raise ConfigError for what cannot or must not be done, before any work."""
    if request.no_data and request.data_root is not None:
        raise ConfigError("--no-data: looks at no images; leave out --data-root")
    if not request.dry_run:
        request.outputs.check(request.checkpoint)
        console.refuse_existing(request.outputs.all, request.force)


def _compact(request: Request, log: Console) -> Compaction:
    from eps_compact.compaction import compact_checkpoint
    from eps_train.checkpoint import Checkpoint
    from eps_train.data import load_again
    from eps_train.errors import DataError, FileFormatError

    path = request.checkpoint
    checkpoint = Checkpoint.load(path)
    heldout = None
    if not request.no_data:
        try:
            heldout = load_again(checkpoint.data, request.data_root).validation
        except DataError as error:
            raise DataError(f"{error}; or add --no-data") from error
    try:
        return compact_checkpoint(
            checkpoint,
            heldout,
            checkpoint_path=_relative(path, request.outputs.compact.parent),
            folding=not request.no_fold,
            closed_at_least=request.closed_at_least,
            report=lambda line: log.print(line, markup=False),
        )
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _relative(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, with forward slashes; its bare name where there is no way."""
    import os

    try:
        return Path(os.path.relpath(path.parent.resolve() / path.name, folder.resolve())).as_posix()
    except ValueError:  # another drive on Windows
        return path.name


def _write(done: Compaction, outputs: Outputs) -> None:
    from eps_compact import summary
    from eps_compact.picture import draw

    # Drawn first: what fails here leaves nothing behind.
    picture = draw(done.blocks, summary.title(done))
    write(done.artifact, picture, outputs)
