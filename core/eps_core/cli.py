"""Shared CLI helpers: exit codes, output, error formatting, the torchrun environment.

Exit codes: 0 success and all checks passed, 1 error, 2 usage, 3 a check failed, 130 interrupted.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from eps_core.errors import (
    ConfigError,
    EpsError,
    FileFormatError,
    Interrupted,
    PeerError,
    reader_death,
)

CHECK_FAILED = 3
INTERRUPTED = 130

Log = Callable[[str], None]
"""Receives the progress of a long operation, one line per call."""

# The extras of eps-resnet, and the packages that they install and that an import may lack.
_EXTRAS = {
    "hf": ("datasets",),
    "train": ("torch", "sklearn", "matplotlib", "tensorboard"),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "deploy": ("onnx", "onnxscript", "jinja2"),
    "ort": ("onnxruntime", "PIL"),
    "trt": ("tensorrt", "pycuda", "cuda"),
    "serve": ("grpc", "open_inference", "starlette", "uvicorn", "httptools", "prometheus_client"),
}
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or choose another place"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "choose another place, or change who may write there"
    ),
    errno.EROFS: "choose another place",
}
_MEMORY_OPTIONS = ("--image-size", "--batch-size", "--model")  # they decide how much is used


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Rank of this process in the run; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def restarts() -> int:
    """How often torchrun has restarted the processes because one had ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if launched() else 0


def on_one_machine() -> bool:
    """Whether all processes of the run are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def run(command: click.Command) -> NoReturn:
    """Run a click command as a program: exit with its code, and with one line for an error.

    The command's function returns the exit code; None counts as 0. Errors that the user cannot
    repair keep their traceback.
    """
    name = Path(sys.argv[0]).stem
    _prepare_streams()
    # Pillow warns of images that are large or malformed, and reads them all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        try:
            Path.cwd()
        except FileNotFoundError:
            raise ConfigError("the current folder was deleted; cd to one that exists") from None
        code = command.main(prog_name=name, standalone_mode=False)
        sys.stdout.flush()  # a BrokenPipeError is handled here, but not at exit
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(name, error.format_message())
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):
            raise  # click turns any EOFError into Abort; no command here reads input from the user
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Interrupted as error:
        if not rank():
            print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(128 + error.signal)
    except PeerError:
        sys.exit(1)
    except EpsError as error:
        _fail(name, str(error))
    except BrokenPipeError:  # `| head` has ended; exit must not write to it again
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(null, stream.fileno())
        sys.exit(1)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        _fail(name, os_error_line(error) + (f"; {remedy}" if remedy else ""))
    except ModuleNotFoundError as error:
        _fail(name, missing_package(error))
    except (MemoryError, RuntimeError) as error:
        if (death := reader_death(error)) is not None:
            _fail(name, death)
        text = str(error)  # of torch, on the CPU or on a GPU
        signs = ("out of memory", "allocate memory", "not enough memory")
        if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
            raise  # a bug, with its traceback
        known = {option for item in command.params for option in item.opts}
        smaller = ", ".join(option for option in _MEMORY_OPTIONS if option in known)
        take = f"take a smaller {smaller}, or" if smaller else "take"
        _fail(name, f"out of memory; {take} a machine with more")
    sys.exit(code or 0)


def _prepare_streams() -> None:
    """Make printing safe whatever the streams are.

    A closed stream becomes the null device: otherwise the next file to be opened would get its
    number. Characters that the encoding lacks are written as escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def os_error_line(error: OSError) -> str:
    """The file that the error is about, if it has one, and what happened."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def missing_package(error: ModuleNotFoundError) -> str:
    """One line that names the extra to install; re-raises `error` for packages without one."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in _EXTRAS.items():
        if package in packages:
            return f"{package} is not installed; pip install 'eps-resnet[{extra}]'"
    raise error  # a bug, not the user's environment


def refuse_missing(*paths: Path | None) -> None:
    """Raise FileFormatError unless every input file exists; None stands for an option not given.

    Call it before :func:`refuse_existing`, so that a mistyped input is reported first.
    """
    for path in paths:
        if path is not None and path.is_dir():
            raise FileFormatError(f"{path}: is a folder, not a file")
        if path is not None and not path.exists():
            raise FileFormatError(f"{path}: no such file")


def refuse_existing(paths: Iterable[Path], force: bool) -> None:
    """Raise ConfigError if one of `paths` exists and `--force` was not given."""
    for path in paths:
        if not force and (path.exists() or path.is_symlink()):
            raise ConfigError(f"{path}: exists already; choose another place or add --force")


def log() -> Console:
    """Console for progress and tables, on stderr; tables are 120 characters wide in a file or pipe.

    Markup is off, so that paths with square brackets or colons are printed unchanged.
    """
    terminal = sys.stderr.isatty()
    return Console(
        stderr=True,
        highlight=False,
        markup=False,
        emoji=False,
        quiet=rank() > 0,  # only one of several processes prints
        soft_wrap=not terminal,
        width=None if terminal else 120,
    )


def milliseconds(value: float) -> str:
    """Format a time: three decimals below 10 ms, two below 100 ms, one above."""
    if value < 10:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 100 else f"{value:,.1f}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Table with a left-aligned first column, the others right-aligned."""
    result = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        # Fold, never truncate: a number without its end would be wrong.
        result.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def emit_json(summary: dict[str, Any]) -> None:
    """Print `summary` as one JSON object on stdout."""
    if not rank():
        print(json.dumps(summary, allow_nan=False))


def _fail(name: str, message: str) -> NoReturn:
    line = " ".join(message.split())
    print(f"{name}: error: {line}", file=sys.stderr)
    sys.exit(1)
