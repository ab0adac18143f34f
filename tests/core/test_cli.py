"""Exit codes, error lines and output streams of all commands."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from eps_core import cli as console
from eps_core.errors import DataError
from tests.commands import Result, run


def end(tmp_path: Path, error: BaseException | None = None, code: int | None = None) -> Result:
    """Run a command that raises `error`, or returns `code`."""

    @click.command()
    def cli() -> int | None:
        if error is not None:
            raise error
        return code

    return run("eps-made-up", lambda: console.run(cli), cwd=tmp_path)


def test_out_of_memory_names_the_options_that_reduce_it(tmp_path: Path) -> None:
    @click.command()
    @click.option("--model")
    @click.option("--image-size")
    def cli(**_: object) -> None:
        raise MemoryError

    result = run("eps-made-up", lambda: console.run(cli), cwd=tmp_path)
    assert result.error == (
        "eps-made-up: error: out of memory; take a smaller --image-size, --model, or a machine with"
        " more"
    )


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_a_command_returns_its_exit_code(tmp_path: Path, returned: int | None, code: int) -> None:
    assert end(tmp_path, code=returned) == Result(code, "", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("a.pt: broken;\n mend it"), "a.pt: broken; mend it"),
        (click.ClickException("bad file"), "bad file"),
        (OSError(errno.EIO, "Input/output error", "a.pt"), "a.pt: Input/output error"),
        (OSError("odd"), "odd"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.pt"),
            "a.pt: No space left on device; free some space, or choose another place",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.pt"),
            "a.pt: Permission denied; choose another place, or change who may write there",
        ),
        (
            ModuleNotFoundError("No module named 'onnx.helper'", name="onnx.helper"),
            "onnx is not installed; pip install 'eps-resnet[deploy]'",
        ),
        (MemoryError(), "out of memory; take a machine with more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 36 bytes."),
            "out of memory; take a machine with more",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "out of memory; take a machine with more",
        ),
    ],
)
def test_errors_that_the_user_can_repair_are_one_line_and_exit_1(
    tmp_path: Path, error: Exception, line: str
) -> None:
    assert end(tmp_path, error) == Result(1, "", f"eps-made-up: error: {line}\n")


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    result = end(tmp_path, click.UsageError("--a and --b contradict each other"))
    assert result.code == 2
    assert result.error == "Error: --a and --b contradict each other"


def test_ctrl_c_exits_with_130(tmp_path: Path) -> None:
    result = end(tmp_path, KeyboardInterrupt())
    assert result.code == 130
    assert result.error == "eps-made-up: interrupted"


@pytest.mark.parametrize(
    "error",
    [ValueError("ours"), RuntimeError("ours"), ModuleNotFoundError("ours", name="eps_train.x")],
)
def test_bugs_keep_their_traceback(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match="ours"):
        end(tmp_path, error)


def test_an_eof_error_is_not_taken_for_ctrl_c(tmp_path: Path) -> None:
    with pytest.raises(click.Abort):
        end(tmp_path, EOFError("a decoder's"))


COMMAND = """
import sys
import click
from eps_core import cli as console

@click.command()
@click.argument("text")
def cli(text):
    console.log().print(text)
    console.log().print(console.table(text, ("name",), [(text,)]))
    with open("made", "w") as file:
        file.write("content")
        click.echo(text)
    click.echo("x" * 100_000)

console.run(cli)
"""


def shell(tmp_path: Path, redirect: str, text: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command that prints `text` on both streams, in a shell with `redirect` after it."""
    (tmp_path / "command.py").write_text(COMMAND)
    return subprocess.run(
        ["sh", "-c", f'"$0" command.py "$1" {redirect}', sys.executable, text],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    done = shell(tmp_path, "| cat", "ε ░", PYTHONIOENCODING="ascii")
    assert done.stderr.startswith("\\u03b5 \\u2591\n")
    assert done.stdout.endswith("x\n")


def test_file_names_that_are_not_unicode_are_escaped(tmp_path: Path) -> None:
    done = shell(tmp_path, "", os.fsdecode(b"caf\xe9"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("caf\\udce9\n")


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(tmp_path: Path, redirect: str) -> None:
    assert shell(tmp_path, redirect, "text").returncode == 0
    assert (tmp_path / "made").read_text() == "content"


@pytest.mark.parametrize("redirect", ["| head -c 1", "2>&1 | head -c 1"])
def test_a_closed_pipe_prints_no_error(tmp_path: Path, redirect: str) -> None:
    assert shell(tmp_path, redirect, "text").stderr.count("Error") == 0


def test_square_brackets_and_colons_are_printed_unchanged(tmp_path: Path) -> None:
    text = "[red]x[/] [/b] :smile:"
    done = shell(tmp_path, "", text)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(text) == 3  # the line, the table's title, its cell


def test_a_deleted_working_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", 'rmdir ../gone; "$0" "$1" text', sys.executable, tmp_path / "command.py"],
        cwd=tmp_path / "gone",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "command: error: the current folder was deleted; cd to one that exists\n"
    )
