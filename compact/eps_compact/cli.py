"""`eps-compact`: take the dead blocks out of a trained network, and prove that nothing changed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from eps_compact.analysis.choice import PruneOptions, pareto_file, tuned_file
from eps_compact.outputs import Outputs, export_files, write
from eps_core import cli as console
from eps_core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from eps_compact.analysis.choice import Selection
    from eps_compact.compaction import Compaction
    from eps_train.data.dataset import Data
    from eps_train.training.checkpoint import Checkpoint


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
    wishes: PruneOptions
    exports: tuple[str, ...]
    force: bool

    @property
    def extras(self) -> dict[str, tuple[Path, ...]]:
        """Files to be written besides `outputs`, by what they are."""
        compact = self.outputs.compact
        found = {f"export_{kind}": export_files(compact, kind) for kind in self.exports}
        if self.wishes.sweeps:
            found["pareto"] = (pareto_file(compact),)
        if self.wishes.finetune_epochs:
            found["tuned"] = (tuned_file(compact),)
        return found


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
    "--importance", is_flag=True, help="Show what every live block costs, and what it is worth."
)
@click.option(
    "--sweep",
    is_flag=True,
    help="Show accuracy against size as live blocks go one by one; draws pareto.png.",
)
@click.option(
    "--target-parameters",
    metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Take out live blocks along the sweep until this share is left: not lossless.",
)
@click.option(
    "--target-flops",
    metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="The same for the floating-point operations.",
)
@click.option(
    "--max-accuracy-drop",
    metavar="POINTS",
    type=click.FloatRange(0, 100),
    help="Take out no more than costs this on held-out images; alone, as much as that allows.",
)
@click.option(
    "--finetune-epochs",
    type=click.IntRange(min=0),
    default=0,
    help="Train what is left on for so long; leaves tuned.pt.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Time for the ledger, and for the sweep.  [default: 60 and 120]",
)
@click.option(
    "--timer",
    type=click.Choice(("ort", "torch")),
    help="What runs the networks when they are timed: ONNX Runtime or PyTorch, on one thread."
    "  [default: ort where it is installed]",
)
@click.option(
    "--device",
    help="What ledger, sweep and --finetune-epochs compute on: auto, cpu, cuda, cuda:N or mps."
    "  [default: auto]",
)
@click.option(
    "--export",
    "exports",
    type=click.Choice(("pt2", "safetensors")),
    multiple=True,
    help="Write the network in this format too, beside the output; may be given twice.",
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
    wishes = PruneOptions(**{field.name: options.pop(field.name) for field in fields(PruneOptions)})
    request = Request(checkpoint=checkpoint, outputs=outputs, wishes=wishes, **options)
    _refuse(request)

    from eps_compact import summary
    from eps_compact.certificate import ProofError

    log = console.log()
    try:
        done, choice = _compact(request, log)
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
        written = _write(request, done, choice)
        log.print(f"written: {', '.join(written.values())}", markup=False)
    if as_json:
        console.emit_json(summary.to_dict(done, str(checkpoint), written))
    return 0


def main() -> NoReturn:
    console.run(cli)


def _refuse(request: Request) -> None:
    """Raise EpsError for what cannot or must not be done, before any work."""
    console.refuse_missing(request.checkpoint)
    if request.no_data and request.data_root is not None:
        raise ConfigError("--no-data: looks at no images; leave out --data-root")
    request.wishes.check(no_data=request.no_data)
    if not request.dry_run:
        request.outputs.check(request.checkpoint)
        extras = [file for files in request.extras.values() for file in files]
        for file in extras:
            if file.exists() and request.checkpoint.exists() and file.samefile(request.checkpoint):
                raise ConfigError(f"{file}: would overwrite the checkpoint; name another place, -o")
        console.refuse_existing([*request.outputs.all, *extras], request.force)


def _compact(request: Request, log: Console) -> tuple[Compaction, Selection]:
    from eps_compact.analysis.choice import Selection, choose
    from eps_compact.compaction import compact_checkpoint
    from eps_core.errors import FileFormatError
    from eps_train.training.checkpoint import Checkpoint
    from eps_train.training.forward import choose as choose_device

    def say(line: str) -> None:
        log.print(line, markup=False)

    device = choose_device(request.wishes.device or "auto")
    path = request.checkpoint
    checkpoint = Checkpoint.load(path)
    data = None if request.no_data else _data(checkpoint, request.data_root)
    timer = None
    if request.wishes.times:
        from eps_compact.analysis.importance import make_timer

        timer = make_timer(request.wishes.timer, checkpoint.data, say)
    choice = Selection(checkpoint=checkpoint)
    if data is not None:
        choice = choose(checkpoint, data, request.wishes, timer, device, say)
    if choice.tuned is not None:  # what the certificate is about has to be there to be checked
        path = tuned_file(request.outputs.compact)
        if not request.dry_run:
            choice.checkpoint.save(path)
    try:
        done = compact_checkpoint(
            choice.checkpoint,
            data.validation if data is not None else None,
            checkpoint_path=_relative(path, request.outputs.compact.parent),
            folding=not request.no_fold,
            closed_at_least=request.closed_at_least,
            also=choice.also,
            report=say,
        )
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    done.artifact.certificate |= choice.to_dict()
    if choice.sweep is not None:
        from eps_compact.analysis import sweep

        log.print(sweep.table(choice.sweep))
    if request.wishes.importance:
        assert data is not None
        from eps_compact.analysis import importance

        found = importance.measure_importance(
            choice.checkpoint,
            data.validation,
            live=done.live,
            seconds=request.wishes.seconds or importance.SECONDS,
            device=device,
            timer=timer,
            report=say,
        )
        log.print(importance.table(found))
        done.artifact.certificate["importance"] = found.to_dict()
    return done, choice


def _data(checkpoint: Checkpoint, root: Path | None) -> Data:
    from eps_core.errors import DataError
    from eps_train.data.dataset import load_again

    try:
        return load_again(checkpoint.data, root)
    except DataError as error:
        raise DataError(f"{error}; or add --no-data") from error


def _relative(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, with forward slashes; its bare name where there is no way."""
    import os

    try:
        return Path(os.path.relpath(path.parent.resolve() / path.name, folder.resolve())).as_posix()
    except ValueError:  # another drive on Windows
        return path.name


def _write(request: Request, done: Compaction, choice: Selection) -> dict[str, str]:
    """Write everything; returns the files by what they are."""
    from eps_compact import summary
    from eps_compact.plots import draw_blocks
    from eps_core.files import replace_file

    title = summary.title(done)
    # Drawn first: what fails here leaves nothing behind.
    write(done.artifact, draw_blocks(done.blocks, title), request.outputs)
    written = request.outputs.to_dict()
    for kind in request.exports:
        from eps_compact.exporting import export

        (target, *_) = export_files(request.outputs.compact, kind)
        export(done.artifact, target, kind, force=request.force)
    if choice.sweep is not None:
        from eps_compact import plots

        picture = plots.draw_pareto(choice.sweep, title, choice.point)
        replace_file(pareto_file(request.outputs.compact), picture)
    for what, files in request.extras.items():
        if all(file.exists() for file in files):  # tuned.pt is not where training on was no gain
            written[what] = str(files[0])
    return written
