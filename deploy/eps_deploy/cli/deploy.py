"""The `eps-deploy` command."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from eps_core import cli as console
from eps_deploy.bundle import NAME
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.pipeline.options import Options
from eps_deploy.precision import PRECISIONS, Precision

_FILE = click.Path(path_type=Path)
_MIB = 2**20
_BATCH = click.IntRange(1, 4096)
# Options that apply to one engine only.
_ONLY = {
    "ort": ("provider", "threads"),
    "trt": (
        "workspace",
        "optimization_level",
        "timing_cache",
        "version_compatible",
        "hardware_compatibility",
        "defer_build",
        "device",
    ),
}
_NOT_REPEATED = ("data_root", "output", "timing_cache", "force", "dry_run", "as_json")
_CALIBRATION = ("calibration_samples", "calibration_method")


@click.command()
@click.argument("model", type=_FILE, default="compact.pt")
@click.option(
    "--engine", type=click.Choice(["ort", "trt"]), required=True, help="ONNX Runtime or TensorRT."
)
@click.option("--fp32", is_flag=True, help="float32 precision without TF32 (the default).")
@click.option("--tf32", is_flag=True, help="float32 precision with TF32 products (NVIDIA GPUs).")
@click.option("--fp16", is_flag=True, help="float16 precision.")
@click.option("--bf16", is_flag=True, help="bfloat16 precision (TensorRT).")
@click.option(
    "--int8",
    is_flag=True,
    help="int8 convolutions and linear layers, calibrated on training images. Everything else is"
    " float16 with --fp16 or TensorRT, otherwise float32.",
)
@click.option(
    "--calibration-samples",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="N",
    help="Number of training images for int8 calibration.",
)
@click.option(
    "--calibration-method",
    type=click.Choice(["minmax", "entropy", "percentile"]),
    default="minmax",
    show_default=True,
    help="int8 calibration method.",
)
@click.option(
    "--repair",
    is_flag=True,
    help="If the accuracy check fails, keep the most sensitive blocks in higher precision.",
)
@click.option(
    "--baseline",
    type=_FILE,
    metavar="CKPT",
    help="Baseline checkpoint to compare with.  [default: baseline.pt beside MODEL or its"
    " checkpoint]",
)
@click.option(
    "--checkpoint",
    type=_FILE,
    metavar="CKPT",
    help="Checkpoint that MODEL was made from, if it has moved.",
)
@click.option("--data-root", type=_FILE, metavar="DIR", help="Data set folder.")
@click.option(
    "-o",
    "--output",
    type=_FILE,
    default="bundle",
    show_default=True,
    metavar="DIR",
    help="Bundle folder to write.",
)
@click.option(
    "--name",
    default=NAME,
    show_default=True,
    metavar="NAME",
    help="Model name for clients, and folder name in the Triton repository.",
)
@click.option(
    "--max-accuracy-drop",
    type=float,
    default=0.5,
    show_default=True,
    metavar="POINTS",
    help="Accuracy check: largest drop from the baseline, in percentage points.",
)
@click.option(
    "--min-speedup",
    type=float,
    default=1.0,
    show_default=True,
    metavar="X",
    help="Latency check: smallest lower end of the speed-up's 95 % interval at batch 1.",
)
@click.option(
    "--time-budget",
    type=float,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time limit of the latency measurement at each batch size.",
)
@click.option(
    "--opt-batch",
    type=_BATCH,
    default=16,
    show_default=True,
    metavar="N",
    help="Batch size that TensorRT optimizes for.",
)
@click.option(
    "--max-batch",
    type=_BATCH,
    default=32,
    show_default=True,
    metavar="N",
    help="Largest batch size of the engine.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="ONNX Runtime execution provider.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="ONNX Runtime intra-operator threads.",
)
@click.option(
    "--workspace",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="TensorRT workspace memory per layer.  [default: all GPU memory]",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="TensorRT builder optimization level: 0 builds fastest, 5 searches longest.",
)
@click.option(
    "--timing-cache",
    type=_FILE,
    metavar="DIR",
    help="TensorRT timing cache folder, shared by builds.  [default: ~/.cache/eps-resnet/tensorrt]",
)
@click.option(
    "--version-compatible",
    is_flag=True,
    help="Build a TensorRT plan that later TensorRT versions can load.",
)
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["none", "ampere-plus", "same-compute-capability"]),
    default="none",
    show_default=True,
    help="Other GPUs that can load the TensorRT plan.",
)
@click.option(
    "--defer-build",
    is_flag=True,
    help="With --engine trt: leave building the plan to the machine that serves the bundle.",
)
@click.option(
    "--device",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="INDEX",
    help="GPU index for --engine trt.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--dry-run", is_flag=True, help="Check options and files, list the steps, and stop.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the report as one JSON object on stdout."
)
@click.pass_context
def cli(context: click.Context, /, dry_run: bool, as_json: bool, **given: Any) -> int:
    """Deploy MODEL (a compact.pt) as a bundle: ONNX files, engine, checks, and a report.

    Exit code 3 means that a check failed; the bundle is still written, and its report.md names the
    check.
    """
    options = _options(context, dict(given))
    from eps_deploy.pipeline.pipeline import deploy
    from eps_deploy.pipeline.pipeline import dry_run as list_steps

    log = console.log()

    def print_line(line: str) -> None:
        log.print(line, markup=False)

    if dry_run:
        steps = list_steps(options)
        for step in steps:
            print_line(step)
        if as_json:
            console.emit_json({"dry_run": True, "steps": steps})
        return 0
    report = deploy(options, print_line)
    show_summary(report, options.output)
    if as_json:
        console.emit_json({**report, "bundle": str(options.output)})
    return console.CHECK_FAILED if report["passed"] is False else 0


def _options(context: click.Context, given: dict[str, Any]) -> Options:
    precision = _precision(given)
    _refuse_unused(context, given["engine"], precision)
    if given["workspace"] is not None:
        given["workspace"] *= _MIB
    plan = BuildOptions(**{field.name: given.pop(field.name) for field in fields(BuildOptions)})
    return Options(precision=precision, plan=plan, command=_command(context), **given)


def _command(context: click.Context) -> str:
    """The command line, without options of one machine or one run such as folders or --force."""
    words = [str(context.info_name)]
    for parameter in context.command.params:
        value = context.params[str(parameter.name)]
        given = context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
        if not given or parameter.name in _NOT_REPEATED:
            continue
        if isinstance(parameter, click.Option):
            words.append(parameter.opts[-1])
        if value is not True:
            words.append(value.name if isinstance(value, Path) else str(value))
    return shlex.join(words)


def _precision(given: dict[str, Any]) -> Precision:
    """The precision that the flags name; removes them from `given`."""
    flags = [name for name in ("fp32", "tf32", "fp16", "bf16", "int8") if given.pop(name)]
    if flags == ["fp16", "int8"] or (flags == ["int8"] and given["engine"] == "trt"):
        return PRECISIONS["int8-fp16"]
    if len(flags) > 1:
        named = " and ".join(f"--{name}" for name in flags)
        raise click.UsageError(f"{named}: choose one (only --fp16 --int8 go together).")
    return PRECISIONS[flags[0] if flags else "fp32"]


def _refuse_unused(context: click.Context, engine: str, precision: Precision) -> None:
    """Raise UsageError for an option that has no effect with the other options."""
    unused = {
        name: f"--engine {other}"
        for other, names in _ONLY.items()
        if other != engine
        for name in names
    }
    if not precision.quantized:
        unused |= dict.fromkeys(_CALIBRATION, "--int8")
    for name, wanted in unused.items():
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag}: only applies to {wanted}.")


def show_summary(report: dict[str, Any], output: Path) -> None:
    """Print the table of checks, the verdict, and the path of the bundle."""
    from eps_deploy.report.render import verdict_line

    words = {True: "passed", False: "FAILED", None: "not run"}
    rows = [(check["name"], words[check["passed"]], check["text"]) for check in report["checks"]]
    table = console.table("Checks", ("check", "outcome", "measured"), rows)
    for column in table.columns:
        column.justify = "left"
    log = console.log()
    log.print(table)
    log.print(f"Verdict: {verdict_line(report)}", markup=False)
    log.print(f"Bundle:  {output} (read {output / 'report.html'})", markup=False)


def main() -> NoReturn:
    console.run(cli)
