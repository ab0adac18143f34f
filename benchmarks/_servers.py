"""Server processes: start, wait until ready, measure CPU use, stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click

_PATIENCE = 120.0  # seconds until a server must be ready
_GRACE = 10.0  # seconds to wait for a server to end
_LOOK = 0.1
_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_LOG = "log"


@dataclass(frozen=True, kw_only=True, slots=True)
class Post:
    """A request that a load repeats."""

    path: str
    headers: Mapping[str, str]
    body: bytes


class Server:
    """A process that listens on a local port, with its child processes.

    Attributes:
        url: base URL, without a path.
        folder: working directory; wrk's files are written there too.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder
        self._process = process

    def wait_ready(self, path: str) -> None:
        """Wait until `path` returns 200. Raises ClickException with the end of the log."""
        end = time.monotonic() + _PATIENCE
        while True:
            if self._process.poll() is not None or time.monotonic() > end:
                raise click.ClickException(self.told("is not ready"))
            try:
                with urllib.request.urlopen(self.url + path, timeout=_GRACE):
                    return
            except OSError:  # includes HTTP errors
                time.sleep(_LOOK)

    def ask(self, post: Post) -> tuple[bytes, Mapping[str, str]]:
        """Body and headers of the response. Raises ClickException unless the status is 200."""
        asked = urllib.request.Request(self.url + post.path, post.body, dict(post.headers))
        try:
            with urllib.request.urlopen(asked, timeout=_GRACE) as answer:
                return answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            raise click.ClickException(f"{self.folder.name}: {error}: {told}") from None

    def told(self, what: str) -> str:
        """Error message: `what` went wrong, and the end of the log."""
        ended = self._process.poll()
        log = (self.folder / _LOG).read_text(errors="replace").splitlines()[-20:]
        state = "runs" if ended is None else f"has ended with status {ended}"
        return "\n".join([f"{self.folder.name} {what}; it {state}", *log])

    def processes(self) -> list[int]:
        """Process IDs of the server and its descendants."""
        children: dict[int, list[int]] = defaultdict(list)
        for pid, fields in _stats():
            children[int(fields[1])].append(pid)
        found = [self._process.pid]
        for pid in found:  # grows while it is iterated
            found += children[pid]
        return found

    def used(self) -> float:
        """CPU seconds used so far."""
        mine = set(self.processes())
        return sum(
            (int(fields[11]) + int(fields[12])) / _TICKS for pid, fields in _stats() if pid in mine
        )

    def waited(self) -> float:
        """Seconds that its threads, in total, were ready to run without a core."""
        return sum(
            int(text.split()[1]) / 1e9
            for pid in self.processes()
            for path in _PROC.glob(f"{pid}/task/*/schedstat")
            if (text := _text(path))
        )

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL to every process that is still running after a while."""
        everyone = self.processes()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in everyone[1:]:
            _signal(pid, signal.SIGKILL)


@contextmanager
def started(
    command: Sequence[str | Path], port: int, folder: Path, environment: Mapping[str, str]
) -> Iterator[Server]:
    """Run `command`, which listens on `port`, in the new folder `folder`."""
    folder.mkdir()
    # One intra-op thread for every server; by default some libraries use all cores.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with (folder / _LOG).open("wb") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env={**os.environ, **threads, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which stops the servers
        )
    server = Server(process, port, folder)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def held(servers: Iterable[Server]) -> Iterator[None]:
    """Suspend `servers` (SIGSTOP) in the block: some use a core even when idle."""
    processes = [pid for server in servers for pid in server.processes()]
    try:
        for pid in processes:
            _signal(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in processes:
            _signal(pid, signal.SIGCONT)


def free_port() -> int:
    """A free local port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _stats() -> Iterator[tuple[int, list[str]]]:
    """Yield PID and the fields of /proc/PID/stat after the name, which may contain spaces."""
    for path in _PROC.glob("[0-9]*/stat"):
        if text := _text(path):
            yield int(path.parent.name), text.rpartition(")")[2].split()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has just ended
        return ""


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # the process has just ended
        os.kill(pid, number)
