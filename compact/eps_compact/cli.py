"""`eps-compact`: take the dead blocks out of a trained network, and prove that nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from eps_train import console
from eps_train.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from eps_compact.compaction import Compaction

NEAREST = 5  # live blocks that the table names


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write, its block map beside it as .png.  [default: compact.pt beside CKPT]",
)
@click.option("--dry-run", is_flag=True, help="Prove and show everything, write nothing.")
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder with the data set's files; digits needs none.",
)
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def cli(
    checkpoint: Path,
    output: Path | None,
    dry_run: bool,
    data_root: Path | None,
    force: bool,
    as_json: bool,
) -> int:
    """Take the dead blocks out of CKPT (ckpt.pt or last.pt of eps-train).

    Dead blocks leave their shortcut, live gates become plain additions, the side head goes. The
    logits must then equal those of the gated network to the last bit, on held-out and on random
    images; otherwise nothing is written and the exit status is 3.
    """
    output = output or checkpoint.parent / "compact.pt"
    picture = output.with_suffix(".png")
    if not dry_run:
        _refuse(checkpoint, output, picture, force)

    from eps_compact.certificate import ProofError

    log = console.log()
    try:
        done = _compact(checkpoint, output, data_root, log)
    except ProofError as error:
        click.echo(f"eps-compact: proof failed: {error}; nothing was written", err=True)
        if as_json:
            console.emit_json({"passed": False, "error": str(error), "written": None})
        return console.CHECK_FAILED
    _show(done, log)
    written = None
    if not dry_run:
        _write(done, output, picture)
        written = {"compact": str(output), "picture": str(picture)}
        log.print(f"written: {output} and {picture}", markup=False)
    else:
        log.print("dry run: nothing was written")
    if as_json:
        console.emit_json(_summary(done, checkpoint, written))
    return 0


def main() -> NoReturn:
    console.run(cli)


def _refuse(checkpoint: Path, output: Path, picture: Path, force: bool) -> None:
    """Raise ConfigError for an output that cannot or must not be written, before any work."""
    if output == picture:
        raise ConfigError(f"-o {output}: .png is the block map's name; end it in .pt")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ConfigError(f"-o {output}: {folder} is a file, not a folder")
    for path in (output, picture):
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name a file with -o")
        if path.exists() and checkpoint.exists() and path.samefile(checkpoint):
            raise ConfigError(f"-o {output}: would overwrite the checkpoint; name another file")
    console.refuse_existing((output, picture), force)


def _compact(path: Path, output: Path, data_root: Path | None, log: Console) -> Compaction:
    from eps_compact.compaction import compact_checkpoint
    from eps_train.checkpoint import Checkpoint
    from eps_train.data import load_again
    from eps_train.errors import FileFormatError

    checkpoint = Checkpoint.load(path)
    data = load_again(checkpoint.data, data_root)
    try:
        return compact_checkpoint(
            checkpoint,
            data.validation.images,
            checkpoint_path=_relative(path, output.parent),
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


def _write(done: Compaction, output: Path, picture: Path) -> None:
    from eps_compact.picture import draw
    from eps_train.sealed import replace_file

    # The picture first, and not without its network: what fails here leaves nothing behind.
    replace_file(picture, draw(done.blocks, _title(done)))
    try:
        done.artifact.save(output)
    except BaseException:
        picture.unlink(missing_ok=True)
        raise


def _title(done: Compaction) -> str:
    parameters, blocks = done.counts["parameters"], done.counts["blocks"]
    if not done.removed:
        return f"{blocks['before']} blocks, none removed: {parameters['before']:,} parameters"
    return (
        f"{parameters['before']:,} → {parameters['after']:,} parameters ({_left(parameters)}),"
        f" {blocks['before']} → {blocks['after']} blocks"
    )


def _show(done: Compaction, log: Console) -> None:
    from eps_compact.blocks import LEGEND, strip

    if not done.removed:
        log.print("no block is dead: the network stays as it is, less gates and side head")
    names = {"blocks": "blocks", "parameters": "parameters", "flops": "FLOPs an image"}
    rows = [
        (name, f"{counts['before']:,}", f"{counts['after']:,}", _left(counts))
        for name, counts in ((names[key], done.counts[key]) for key in names)
    ]
    log.print(console.table("Compacted", ("", "before", "after", "left"), rows))
    log.print(f"block map: {LEGEND}\n{strip(done.blocks)}", markup=False)
    _show_nearest(done, log)
    images = sum(proof.images for proof in done.proofs)
    batches = ", ".join(str(size) for size in dict.fromkeys(p.batch for p in done.proofs))
    log.print(
        f"proof: all logits equal (torch.equal, float32) those of the gated network on {images}"
        f" held-out and random images at batches {batches}"
    )


def _show_nearest(done: Compaction, log: Console) -> None:
    ranked = sorted(
        ((block.ratio, block) for block in done.live if block.ratio is not None),
        key=lambda pair: pair[0],
    )
    if not ranked:
        return
    rows = [
        (
            block.block,
            f"{ratio:.2f} ε",
            f"{block.quiet:.0%}",
            "held open" if block.closed is None else f"{block.closed:.0%}",
        )
        for ratio, block in ranked[:NEAREST]
    ]
    columns = ("block", "largest |F|", "images under ε", "steps closed, last epoch")
    samples = done.live[0].samples
    title = f"Live blocks nearest to dying ({samples:,} held-out images)"
    log.print(console.table(title, columns, rows))


def _left(counts: dict[str, int]) -> str:
    return f"{counts['after'] / counts['before']:.1%}"


def _summary(done: Compaction, checkpoint: Path, written: dict[str, str] | None) -> dict[str, Any]:
    certificate = done.artifact.certificate
    return {
        "passed": True,
        "checkpoint": str(checkpoint),
        "written": written,
        **certificate["counts"],
        "removed": list(done.removed),
        "live": certificate["live"],
        "proof": certificate["proof"],
    }
