"""`eps-compact`: remove the dead blocks of a trained network, prove that its logits are equal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console

from eps_core import cli as console
from eps_core.errors import ConfigError, DataError, FileFormatError, naming
from eps_train.gating.targets import TARGETS

if TYPE_CHECKING:
    from eps_compact.analysis.selection import Selection
    from eps_compact.compaction import Compaction

SAMPLES = 1000  # default of --samples
NEAREST = 5  # live blocks in the table of those nearest to being pruned


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The command line: names as there."""

    checkpoint: Path
    output: Path
    dry_run: bool
    data_root: Path | None
    no_data: bool
    no_fold: bool
    closed_at_least: float
    importance: bool
    sweep: bool
    target_parameters: float | None
    target_flops: float | None
    target_latency: float | None
    target_speedup: float | None
    max_accuracy_drop: float | None
    finetune_epochs: int
    samples: int | None
    timer: str | None
    device: str | None
    exports: tuple[str, ...]
    force: bool

    @property
    def goal(self) -> dict[str, float]:
        """The options that select a network of the sweep, by the fields of `Goal`."""
        values = {name: getattr(self, name) for name in (*TARGETS, "max_accuracy_drop")}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def sweeps(self) -> bool:
        return self.sweep or bool(self.goal)

    @property
    def measures(self) -> bool:
        """Whether live blocks are left out and timed."""
        return self.importance or self.sweeps

    @property
    def files(self) -> dict[str, Path]:
        """Files to write, by their names in the JSON summary: `output`, and others beside it."""
        files = {
            "compact": self.output,
            "certificate": self.output.with_suffix(".json"),
            "picture": self.output.with_suffix(".png"),
        }
        files |= {f"export_{kind}": self.output.with_suffix(f".{kind}") for kind in self.exports}
        if self.sweeps:
            files["pareto"] = self.output.with_name("pareto.png")
        if self.finetune_epochs:
            files["tuned"] = self.output.with_name("tuned.pt")
        if self.goal:
            files["cut"] = self.output.with_name("cut.pt")
        return files

    def check(self) -> None:
        """Raise EpsError for what is impossible or refused, before any work."""
        console.refuse_missing(self.checkpoint)
        self._check_options()
        if not self.dry_run:
            self._check_files()

    def _check_options(self) -> None:
        if self.no_data and self.data_root is not None:
            raise ConfigError("--no-data: looks at no images; leave out --data-root")
        given = [name for name in ("importance", "sweep") if getattr(self, name)]
        given += [*self.goal, *(["finetune_epochs"] if self.finetune_epochs else [])]
        if self.no_data and given:
            option = given[0].replace("_", "-")
            raise ConfigError(f"--no-data: --{option} needs the held-out images; leave one out")
        if self.target_latency is not None and self.target_speedup is not None:
            raise ConfigError(
                "--target-latency and --target-speedup contradict each other: both set the latency;"
                " leave one of them out"
            )
        for option in ("samples", "timer"):
            if getattr(self, option) is not None and not self.measures:
                raise ConfigError(
                    f"--{option}: only applies to --importance and --sweep; give one of them too"
                )
        if self.device is not None and not given:
            raise ConfigError(
                "--device: only applies to --importance, --sweep and --finetune-epochs; give one"
                " of them too"
            )

    def _check_files(self) -> None:
        files = self.files
        for name, what in (("certificate", "certificate"), ("picture", "block map")):
            if self.output == files[name]:
                raise ConfigError(
                    f"-o {self.output}: {self.output.suffix} is the {what}'s name; end it in .pt"
                )
        folder = next(parent for parent in self.output.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise ConfigError(f"-o {self.output}: {folder} is a file, not a folder")
        paths = list(files.values())
        for path in paths:
            if paths.count(path) > 1:
                raise ConfigError(f"-o {self.output}: {path} would be written twice; name another")
            if path.is_dir():
                raise ConfigError(f"{path}: is a folder; name a file with -o")
            if path.exists() and path.samefile(self.checkpoint):
                raise ConfigError(
                    f"{path}: would overwrite the checkpoint; name another file with -o"
                )
        console.refuse_existing(paths, self.force)


def _target(option: str, kept: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    share = click.FloatRange(0, 1, min_open=True, max_open=True)
    text = f"Prune live blocks along the sweep to this share of the {kept}: not lossless."
    return click.option(option, metavar="SHARE", type=share, help=text)


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write; the certificate (.json) and the block map (.png) are written beside it."
    "  [default: compact.pt beside CKPT]",
)
@click.option("--dry-run", is_flag=True, help="Prove and report, but write nothing.")
@click.option("--no-fold", is_flag=True, help="Do not fold batch norms into convolutions.")
@click.option(
    "--closed-at-least",
    metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Below 1, also remove live blocks whose gate was closed on at least this share of the last"
    " epoch's training steps: not lossless.",
)
@click.option(
    "--importance",
    is_flag=True,
    help="Report the cost of every live block and the accuracy lost without it.",
)
@click.option(
    "--sweep",
    is_flag=True,
    help="Report accuracy against size as live blocks are removed one by one; draws pareto.png.",
)
@_target("--target-parameters", "parameters")
@_target("--target-flops", "floating-point operations")
@_target("--target-latency", "measured latency")
@click.option(
    "--target-speedup",
    metavar="FACTOR",
    type=click.FloatRange(1, min_open=True),
    help="Prune live blocks along the sweep to 1/FACTOR of the measured latency: not lossless.",
)
@click.option(
    "--max-accuracy-drop",
    metavar="POINTS",
    type=click.FloatRange(0, 100),
    help="Prune only while held-out accuracy drops by at most POINTS; without a target, as far as"
    " that allows.",
)
@click.option(
    "--finetune-epochs",
    type=click.IntRange(min=0),
    default=0,
    help="Fine-tune the pruned network for this many epochs; writes tuned.pt.",
)
@click.option(
    "--samples",
    metavar="N",
    type=click.IntRange(min=2),
    help="Held-out images for --importance and the sweep; one half of them chooses the blocks of"
    f" the sweep, the other measures the accuracy.  [default: {SAMPLES}]",
)
@click.option(
    "--timer",
    type=click.Choice(("ort", "torch")),
    help="Runtime that networks are timed in, on one thread: ONNX Runtime or PyTorch."
    "  [default: ort where it is installed]",
)
@click.option(
    "--device",
    help="Device for --importance, the sweep and --finetune-epochs: auto, cpu, cuda, cuda:N or mps."
    "  [default: auto]",
)
@click.option(
    "--export",
    "exports",
    type=click.Choice(("pt2", "safetensors")),
    multiple=True,
    help="Also write the network in this format, beside the output; may be given twice.",
)
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder with the data set's files; digits needs none.",
)
@click.option(
    "--no-data",
    is_flag=True,
    help="Use no held-out images: the evidence is the training record, the proof uses random"
    " images.",
)
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def cli(checkpoint: Path, output: Path | None, as_json: bool, **options: Any) -> int:
    """Remove the dead blocks of CKPT (ckpt.pt or last.pt of eps-train).

    Dead blocks leave their shortcut, live gates become plain additions, the side head is dropped.
    The logits must then equal those of the gated network to the last bit, on held-out and on random
    images. Batch norms are folded into the convolutions before them, which changes logits by
    rounding only: at most 1e-5 of the largest. Otherwise nothing is written and the exit status
    is 3.
    """
    request = Request(
        checkpoint=checkpoint, output=output or checkpoint.parent / "compact.pt", **options
    )
    request.check()

    from eps_compact.certificate import ProofError

    log, written = console.log(), None
    try:
        done, selection = _compact(request, log)
        _show(done, log)
        if request.dry_run:
            log.print("dry run: nothing was written")
        else:
            written = _write(request, done, selection)
            log.print(f"written: {', '.join(written.values())}")
    except ProofError as error:
        click.echo(f"eps-compact: proof failed: {error}; nothing was written", err=True)
        if as_json:
            console.emit_json({"passed": False, "error": str(error), "written": None})
        return console.CHECK_FAILED
    finally:
        for path in () if request.dry_run else request.files.values():
            _aside(path).unlink(missing_ok=True)
    if as_json:
        parts = ("lossless", "evidence", "removed_live", "accuracy", "flicker", "live", "proof")
        summary = {
            "passed": True,
            "checkpoint": str(checkpoint),
            "written": written,
            **done.counts,
            "removed": list(done.removed),
            **{name: done.certificate[name] for name in (*parts, "folding")},
        }
        console.emit_json(summary)
    return 0


def main() -> NoReturn:
    console.run(cli)


def _compact(request: Request, log: Console) -> tuple[Compaction, Selection]:
    """Select, compact and measure; shows the tables of importance and sweep."""
    from eps_compact.analysis import importance, sweep
    from eps_compact.analysis.selection import Selection, select, tune
    from eps_compact.certificate import as_json
    from eps_compact.compaction import compact_checkpoint
    from eps_train.data.dataset import load_again
    from eps_train.gating.costs import make_timer
    from eps_train.training import forward
    from eps_train.training.checkpoint import Checkpoint

    report = log.print
    device = forward.choose(request.device or "auto")
    path, samples = request.checkpoint, request.samples or SAMPLES
    checkpoint = Checkpoint.load(path)
    selection = Selection(checkpoint=checkpoint)
    data = timer = None
    if not request.no_data:
        try:
            data = load_again(checkpoint.data, request.data_root)
        except DataError as error:
            raise DataError(f"{error}; or add --no-data") from error
        if request.measures:
            timer = make_timer(request.timer, checkpoint.data, report)
        if request.sweeps and timer is not None:
            goal = sweep.Goal(**request.goal) if request.goal else None
            selection = select(
                checkpoint, data, goal, samples=samples, timer=timer, device=device, report=report
            )
        if epochs := request.finetune_epochs:
            selection = tune(
                selection, data, epochs=epochs, teacher=checkpoint, device=device, report=report
            )
    if selection.made is not None:  # the certificate names it, by its digest
        path = request.files[selection.made]
        if not request.dry_run:
            with naming(path):
                selection.checkpoint.save(_aside(path))
    try:
        done = compact_checkpoint(
            selection.checkpoint,
            data.validation if data is not None else None,
            checkpoint_path=_relative(path, request.output.parent),
            folding=not request.no_fold,
            closed_at_least=request.closed_at_least,
            also=selection.also,
            report=report,
        )
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    done.artifact.certificate |= selection.to_dict()
    if selection.sweep is not None:
        log.print(sweep.table(selection.sweep))
        log.print(sweep.class_table(selection.sweep))
    if request.importance and data is not None and timer is not None:
        found = importance.measure_importance(
            selection.checkpoint,
            data.validation,
            samples=samples,
            timer=timer,
            live=done.live,
            device=device,
            report=report,
        )
        log.print(importance.table(found))
        done.artifact.certificate["importance"] = as_json(found)
    return done, selection


def _relative(path: Path, folder: Path) -> str:
    """Return `path` relative to `folder`, with forward slashes; its bare name where impossible."""
    try:
        return Path(os.path.relpath(path.parent.resolve() / path.name, folder.resolve())).as_posix()
    except ValueError:  # another drive on Windows
        return path.name


def _write(request: Request, done: Compaction, selection: Selection) -> dict[str, str]:
    """Write all files; returns them by their names in the JSON summary.

    Artifact, certificate and block map are first written aside, as the checkpoint that was cut or
    fine-tuned has been, then renamed into place: a failure leaves the folder as it was, earlier
    files too.
    """
    from eps_compact import plots
    from eps_compact.exporting import export
    from eps_core.files import replace_file

    files, title = request.files, _title(done)
    for name in {"cut", "tuned"} - {selection.made}:  # not asked for, or discarded
        files.pop(name, None)
    image = plots.draw_blocks(done.blocks, title)

    def write_certificate(path: Path) -> None:
        content = json.dumps(done.artifact.certificate_file(), indent=2, allow_nan=False) + "\n"
        replace_file(path, content.encode())

    writers: dict[Path, Callable[[Path], object]] = {
        files["compact"]: done.artifact.save,
        files["certificate"]: write_certificate,  # after the artifact, whose digest it has
        files["picture"]: lambda path: replace_file(path, image),
    }
    for path, write in writers.items():
        with naming(path):
            write(_aside(path))
    saved = [] if selection.made is None else [files[selection.made]]
    placed = []
    try:
        for path in (*saved, *writers):
            new = not path.exists()
            with naming(path):
                _aside(path).replace(path)
            if new:
                placed.append(path)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
    for kind in request.exports:
        export(done.artifact, files[f"export_{kind}"], kind, force=request.force)
    if selection.sweep is not None:
        replace_file(files["pareto"], plots.draw_pareto(selection.sweep, title, selection.point))
    return {what: str(path) for what, path in files.items()}


def _aside(path: Path) -> Path:
    """Where a file is written until all that belong together are complete."""
    return path.with_name(f".{path.name}.new")


# -- The report of a compaction: tables and lines


def _title(done: Compaction) -> str:
    """Return the heading of the plots."""
    parameters, blocks = done.counts["parameters"], done.counts["blocks"]
    if not done.removed:
        return f"{blocks['before']} blocks, none removed: {parameters['before']:,} parameters"
    exact = done.certificate["lossless"] and "finetune" not in done.certificate
    lossy = "" if exact else ", not lossless"
    return (
        f"{parameters['before']:,} → {parameters['after']:,} parameters ({_left(parameters)}),"
        f" {blocks['before']} → {blocks['after']} blocks{lossy}"
    )


def _show(done: Compaction, log: Console) -> None:
    from eps_compact.plots import LEGEND, strip

    if not done.removed:
        log.print("no block is dead: only gates and side head are removed")
    names = {"blocks": "blocks", "parameters": "parameters", "flops": "FLOPs an image"}
    rows = [
        (names[key], f"{counts['before']:,}", f"{counts['after']:,}", _left(counts))
        for key, counts in done.counts.items()
    ]
    log.print(console.table("Compacted", ("", "before", "after", "left"), rows))
    log.print(f"block map: {LEGEND}\n{strip(done.blocks)}")
    measured = [block for block in done.live if block.ratio is not None]
    if nearest := sorted(measured, key=lambda block: block.ratio or 0.0)[:NEAREST]:
        rows = [
            (block.block, f"{block.ratio:.2f} ε", f"{block.quiet or 0:.0%}", _closed(block.closed))
            for block in nearest
        ]
        columns = ("block", "largest |F|", "images under ε", "steps closed, last epoch")
        title = f"Live blocks nearest to being pruned ({nearest[0].samples:,} held-out images)"
        log.print(console.table(title, columns, rows))
    for line in _statements(done.certificate):
        log.print(line)


def _statements(certificate: dict[str, Any]) -> Iterator[str]:
    """Yield what the certificate states, a line each: losses, live gates, proofs."""
    # What was removed although it is not dead, and what that costs.
    if nested := certificate.get("nested"):
        accuracy = f"accuracy on {nested['samples']:,} held-out images: {nested['whole']:.2%} whole"
        yield (
            f"cut from a nested run: {len(nested['removed'])} blocks removed, batch norms estimated"
            f" again; {accuracy}, {nested['cut']:.2%} cut;"
            f" {nested['test']['accuracy']:.2%} of {nested['test']['samples']:,} test images"
        )
    if tuned := certificate.get("finetune"):
        yield (
            f"NOT lossless: fine-tuned for {tuned['epochs']} epochs; live blocks removed:"
            f" {', '.join(tuned['removed']) or 'none'}"
        )
        yield (
            f"accuracy on {tuned['samples']:,} held-out images: {tuned['whole']:.2%} with them,"
            f" {tuned['before']:.2%} without, {tuned['after']:.2%} fine-tuned;"
            f" {tuned['test']['accuracy']:.2%} of {tuned['test']['samples']:,} test images"
        )
    elif not certificate["lossless"]:
        removed = certificate["removed_live"]
        names = ", ".join(f"{entry['block']} ({_closed(entry['closed'])})" for entry in removed)
        blocks = "1 live block" if len(removed) == 1 else f"{len(removed)} live blocks"
        yield f"NOT lossless: {blocks} removed: {names}"
        if accuracy := certificate["accuracy"]:
            yield (
                f"accuracy on {accuracy['samples']:,} held-out images: {accuracy['before']:.2%}"
                f" before, {accuracy['after']:.2%} after"
            )
        else:
            yield "the loss of accuracy was not measured: no held-out images"
    if gap := certificate["flicker"]:
        count, tail = len(gap["blocks"]), ""
        if accuracy := gap["accuracy"]:
            shipped, judged = f"{accuracy['addition']:.2%}", f"{accuracy['gate']:.2%}"
            tail = f"; accuracy {shipped} as shipped, {judged} with those gates"
        yield (
            f"{count} live gate{'' if count == 1 else 's'} closed on steps of the last epoch: kept"
            f" as plain additions. Judging each of {gap['samples']:,} held-out images by itself,"
            f" such gates would close on {gap['differ']:.1%} and change the class of"
            f" {gap['top1_differ']:.1%}{tail}"
        )
    # The proofs.
    proofs, heldout = certificate["proof"], certificate["heldout"]
    if not heldout:
        yield "no held-out images: the evidence is the training record alone"
    images = sum(proof["images"] for proof in proofs)
    batches = ", ".join(str(size) for size in dict.fromkeys(proof["batch"] for proof in proofs))
    yield (
        "proof: all logits equal (torch.equal, float32) those of the gated network"
        f"{'' if certificate['lossless'] else ' with the same gates closed'} on {images}"
        f" {'held-out and random' if heldout else 'random'} images at batches {batches}"
    )
    if folding := certificate["folding"]:
        worst = max(proof["relative"] for proof in folding["proof"])
        yield (
            f"folded: {folding['pairs']} batch norms into convolutions; on the same images logits"
            f" change by at most {worst:.1e} of the largest (limit {folding['bound']:g})"
        )


def _closed(share: float | None) -> str:
    return "held open" if share is None else f"{share:.0%}"


def _left(counts: dict[str, int]) -> str:
    return f"{counts['after'] / counts['before']:.1%}"
