"""The `eps-deploy` command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from eps_core import cli as console
from eps_deploy.engines.trt.build import BuildOptions
from eps_deploy.pipeline.options import Options
from eps_deploy.precision import PRECISIONS, Precision

_FILE = click.Path(path_type=Path)
_MIB = 2**20
_PRECISION_FLAGS = {
    "fp32": "float32 precision without TF32 (the default).",
    "tf32": "float32 precision with TF32 products (NVIDIA GPUs).",
    "fp16": "float16 precision.",
    "bf16": "bfloat16 precision (TensorRT).",
    "int8": "int8 convolutions and linear layers, calibrated on training images. Everything else is"
    " float16 with --fp16 or TensorRT, otherwise float32.",
}
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


def _parameters() -> Iterator[click.Parameter]:
    """The command's parameters, from the fields of `Options` in their order."""
    yield click.Argument(["model"], type=_FILE, default="compact.pt")
    for field in fields(Options):
        if field.name == "precision":
            for name, text in _PRECISION_FLAGS.items():
                yield click.Option([f"--{name}"], is_flag=True, help=text)
        elif field.name == "plan":
            yield from (_option(BuildOptions, inner) for inner in fields(BuildOptions))
        elif field.metadata:
            yield _option(Options, field)
    text = "Check options and files, list the steps, and stop."
    yield click.Option(["--dry-run"], is_flag=True, help=text)
    text = "Print the report as one JSON object on stdout."
    yield click.Option(["--json", "as_json"], is_flag=True, help=text)


def _option(record: type, field: Field[Any]) -> click.Option:
    kind = get_type_hints(record)[field.name]
    flags = [f"--{field.name.replace('_', '-')}"]
    if field.name == "output":
        flags.insert(0, "-o")
    settings = {"help": field.metadata["help"], "metavar": field.metadata["metavar"]}
    if kind is bool:
        return click.Option(flags, is_flag=True, help=settings["help"])
    if get_origin(kind) is Literal:
        settings["type"] = click.Choice(get_args(kind))
    elif Path in (kind, *get_args(kind)):
        settings["type"] = _FILE
    elif field.metadata["limits"]:
        settings["type"] = click.IntRange(*field.metadata["limits"])
    else:
        settings["type"] = float if float in get_args(kind) else kind
    if field.name == "engine":
        return click.Option(flags, required=True, **settings)
    show = field.default is not None
    return click.Option(flags, default=field.default, show_default=show, **settings)


@click.command(params=[*_parameters()])
@click.pass_context
def cli(context: click.Context, /, dry_run: bool, as_json: bool, **given: Any) -> int:
    """Deploy MODEL (a compact.pt) as a bundle: ONNX files, engine, checks, and a report.

    Exit code 3 means that a check failed; the bundle is still written, and its report.md names the
    check.
    """
    options = _options(context, dict(given))
    from eps_deploy.pipeline.pipeline import deploy_files
    from eps_deploy.pipeline.pipeline import dry_run as list_steps

    log = console.log()
    if dry_run:
        steps = list_steps(options)
        for step in steps:
            log.print(step)
        if as_json:
            console.emit_json({"dry_run": True, "steps": steps})
        return 0
    report = deploy_files(options, log.print)
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
    flags = [name for name in _PRECISION_FLAGS if given.pop(name)]
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
    log.print(f"Verdict: {verdict_line(report)}")
    log.print(f"Bundle:  {output} (read {output / 'report.html'})")


def main() -> NoReturn:
    console.run(cli)
