"""The command `eps-deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import click

from eps_train import console
from eps_train.errors import ConfigError

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", type=_FILE, default="compact.pt")
@click.option(
    "--engine", type=click.Choice(["ort", "trt"]), required=True, help="ONNX Runtime or TensorRT."
)
@click.option("--fp32", is_flag=True, help="Precision float32 (the default).")
@click.option("--fp16", is_flag=True, hidden=True)
@click.option(
    "--baseline",
    type=_FILE,
    metavar="CKPT",
    help="Plain network to compare with; default: baseline.pt beside MODEL or its checkpoint.",
)
@click.option(
    "--checkpoint",
    type=_FILE,
    metavar="CKPT",
    help="Checkpoint that MODEL was made from, if it was moved.",
)
@click.option("--data-root", type=_FILE, metavar="DIR", help="Where the data set lies.")
@click.option(
    "-o",
    "--output",
    type=_FILE,
    default="bundle",
    show_default=True,
    metavar="DIR",
    help="Folder to write.",
)
@click.option(
    "--max-accuracy-drop",
    type=float,
    default=0.5,
    show_default=True,
    metavar="POINTS",
    help="Check: largest drop against the baseline, in percentage points.",
)
@click.option(
    "--min-speedup",
    type=float,
    default=1.0,
    show_default=True,
    metavar="X",
    help="Check: what the lower end of the speed-up's interval at batch 1 must reach.",
)
@click.option(
    "--latency-budget",
    type=float,
    default=20.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for all latency measurements together.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the report as one JSON object on stdout."
)
def cli(
    model: Path, engine: str, fp32: bool, fp16: bool, output: Path, as_json: bool, **limits: Any
) -> int:
    """Turn MODEL (a compact.pt) into a bundle: ONNX, engine, checks, and a report with a verdict.

    Exit code 3 says that a check failed; the bundle is written all the same, and its report.md says
    which one.
    """
    if fp32 and fp16:
        raise click.UsageError("--fp32 and --fp16: choose one.")
    if engine == "trt" or fp16:
        unsupported = "--engine trt" if engine == "trt" else "--fp16"
        raise ConfigError(
            f"{unsupported}: this version of eps-resnet has only ONNX Runtime in float32;"
            " use --engine ort without --fp16"
        )
    from eps_deploy.pipeline import Options, deploy

    log = console.log()
    report = deploy(
        Options(model=model, output=output, **limits), lambda line: log.print(line, markup=False)
    )
    show_summary(report, output)
    if as_json:
        console.emit_json({**report, "bundle": str(output)})
    return 0 if report["passed"] else console.CHECK_FAILED


def show_summary(report: dict[str, Any], output: Path) -> None:
    """Table of checks, the verdict, and where the bundle is."""
    from eps_deploy.report_markdown import verdict_line

    rows = [
        (check["name"], "passed" if check["passed"] else "FAILED", check["text"])
        for check in report["checks"]
    ]
    table = console.table("Checks", ("check", "outcome", "measured"), rows)
    for column in table.columns:
        column.justify = "left"
    log = console.log()
    log.print(table)
    log.print(f"Verdict: {verdict_line(report)}", markup=False)
    log.print(f"Bundle:  {output} (read {output / 'report.md'})", markup=False)


def main() -> NoReturn:
    console.run(cli)
