"""What all commands share: how they end, how they speak, how they refuse.

Exit codes: 0 done and all checks passed, 1 a clear error, 2 usage, 3 a check failed, 130
interrupted.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
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

# -- What torchrun tells a process about itself, in environment variables


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Its number among the processes of the run; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def restarts() -> int:
    """How often torchrun has started the processes again because one had ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if launched() else 0


def on_one_machine() -> bool:
    """Whether all processes of the run are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


CHECK_FAILED = 3
INTERRUPTED = 130


def run(command: click.Command) -> NoReturn:
    """Run a click command as a program: one line for what the user can repair, and an exit code.

    A command returns its exit code; None counts as 0.
    """
    name = Path(sys.argv[0]).stem
    _prepare_streams()
    # Pillow warns of images that are large or untidy, and reads them all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        _refuse_deleted_folder()
        code = command.main(prog_name=name, standalone_mode=False)
        sys.stdout.flush()  # here a reader that went away is no surprise yet
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(name, error.format_message())
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):
            raise  # click takes any EOFError for the user's; nothing here asks the user for input
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
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except OSError as error:
        _fail(name, _os_error(error))
    except ModuleNotFoundError as error:
        _fail(name, missing_package(error))
    except (MemoryError, RuntimeError) as error:
        if (death := reader_death(error)) is not None:
            _fail(name, death)
        if not _out_of_memory(error):
            raise  # our own mistake, with its traceback
        smaller = ", ".join(_memory_options(command))
        take = f"take a smaller {smaller}, or" if smaller else "take"
        _fail(name, f"out of memory; {take} a machine with more")
    sys.exit(code or 0)


def _prepare_streams() -> None:
    """Whatever the surroundings, what is printed can neither fail nor land in another file.

    A stream that was closed becomes the null device: otherwise the next file to be opened would
    take its number. Characters that the encoding lacks are written as escapes.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(getattr(sys, stream), io.TextIOWrapper):
            getattr(sys, stream).reconfigure(errors="backslashreplace")


def _refuse_deleted_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder was deleted; cd to one that exists") from None


def _drop_output() -> None:
    """After a reader went away (`| head`): nothing more is written, and exit does not complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(null, stream.fileno())


def _os_error(error: OSError) -> str:
    """What the system said, about which file, and what helps against it."""
    where = f"{error.filename}: " if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror or error}" + (f"; {remedy}" if remedy else "")


_ELSEWHERE = "choose another place, or change who may write there"
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EROFS: "choose another place",
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
}


def _memory_options(command: click.Command) -> list[str]:
    """The options of a command that decide how much memory it takes."""
    known = {option for item in command.params for option in item.opts}
    return [option for option in ("--image-size", "--batch-size", "--model") if option in known]


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, in Python or in torch, on the CPU or on a GPU."""
    text = str(error)
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("out of memory", "allocate memory", "not enough memory")
    )


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
    "cuda": "trt",
    "grpc": "serve",
    "open_inference": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "httptools": "serve",
    "prometheus_client": "serve",
}


def refuse_missing(*paths: Path | None) -> None:
    """Raise FileFormatError when a file to be read is not there; None was not given.

    Inputs are looked at before outputs: of a name that was mistyped, nothing else is to be said.
    """
    for path in paths:
        if path is not None and path.is_dir():
            raise FileFormatError(f"{path}: is a folder, not a file")
        if path is not None and not path.exists():
            raise FileFormatError(f"{path}: no such file")


def refuse_existing(paths: Iterable[Path], force: bool) -> None:
    """Raise ConfigError when one of `paths` exists and `--force` was not given."""
    for path in paths:
        if not force and (path.exists() or path.is_symlink()):
            raise ConfigError(f"{path}: exists already; choose another place or add --force")


def log() -> Console:
    """Where progress and tables go: stderr; a file or pipe gets lines of up to 120 characters.

    Markup is off: a path with square brackets or colons in it is printed as it is.
    """
    terminal = sys.stderr.isatty()
    return Console(
        stderr=True,
        highlight=False,
        markup=False,
        emoji=False,
        quiet=rank() > 0,  # of several processes one speaks; an error says who has it
        soft_wrap=not terminal,
        width=None if terminal else 120,
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
    if not rank():
        print(json.dumps(summary, allow_nan=False))


def _fail(name: str, message: str) -> NoReturn:
    line = " ".join(message.split())
    print(f"{name}: error: {line}", file=sys.stderr)
    sys.exit(1)
