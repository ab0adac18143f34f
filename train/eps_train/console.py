"""What all commands share: how they end, how they speak, how they refuse.

Exit codes: 0 done and all checks passed, 1 a clear error, 2 usage, 3 a check failed, 130
interrupted.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from eps_train.errors import ConfigError, EpsError

CHECK_FAILED = 3
INTERRUPTED = 130


def run(command: click.Command) -> NoReturn:
    """Run a click command as a program: one line for what the user can repair, and an exit code.

    A command returns its exit code; None counts as 0.
    """
    name = Path(sys.argv[0]).stem
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(name, error.format_message())
    except (click.Abort, KeyboardInterrupt):
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except EpsError as error:
        _fail(name, str(error))
    except BrokenPipeError:
        # The reader went away (`| head`); stdout is closed so that exit does not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(name, f"{where}{error.strerror or error}")
    except ModuleNotFoundError as error:
        _fail(name, missing_package(error))
    sys.exit(code or 0)


def missing_package(error: ModuleNotFoundError) -> str:
    """One line that names the extra which brings the package that could not be imported."""
    package = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    if extra is None:
        raise error  # our own mistake, not the user's surroundings
    return f"{package} is not installed; pip install 'eps-resnet[{extra}]'"


_EXTRAS = {
    "torch": "train",
    "sklearn": "train",
    "matplotlib": "train",
    "tensorboard": "train",
    "onnx": "deploy",
    "onnxscript": "deploy",
    "jinja2": "deploy",
    "onnxruntime": "ort",
    "PIL": "ort",
    "tensorrt": "trt",
    "pycuda": "trt",
}


def refuse_existing(paths: Iterable[Path], force: bool) -> None:
    """Raise ConfigError when one of `paths` exists and `--force` was not given."""
    for path in paths:
        if not force and (path.exists() or path.is_symlink()):
            raise ConfigError(f"{path}: exists already; choose another place or add --force")


def log() -> Console:
    """Where progress and tables go: stderr; a file or pipe gets lines of up to 120 characters."""
    terminal = sys.stderr.isatty()
    return Console(
        stderr=True, highlight=False, soft_wrap=not terminal, width=None if terminal else 120
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A summary table: first column names, the others right-aligned."""
    result = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        # Folded, never cut: a figure without its end is worse than an ugly table.
        result.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def emit_json(summary: dict[str, Any]) -> None:
    """Print the summary as one JSON object on stdout, the last thing that `--json` prints."""
    print(json.dumps(summary, allow_nan=False))


def _fail(name: str, message: str) -> NoReturn:
    line = " ".join(message.split())
    print(f"{name}: error: {line}", file=sys.stderr)
    sys.exit(1)
