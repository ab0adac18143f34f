"""Building and running images: with Docker, or without its daemon on a Debian base made here.

Without a daemon, podman builds in a chroot and runs with runc, as root; debootstrap makes the base
image once, from the mirror that apt uses. It is kept, with what was built, in the folder for
temporary files: removing `STORE` is all there is to clean up.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.meta.project import ROOT

STORE = Path(tempfile.gettempdir()) / "eps-resnet-image-test"
BASE = "localhost/python-base:bookworm"
PORT = 8000  # that the image's health check asks
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_LEFT_OUT = ("--exclude=./var/cache/apt/archives/*.deb", "--exclude=./var/lib/apt/lists/*")
_NEEDS = ("podman", "runc", "debootstrap", "nsenter")
_READ_ONLY = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


class NoBuilderError(Exception):
    """Neither Docker nor what stands in for it is here."""


@dataclass(frozen=True, slots=True)
class Tool:
    """`docker`, or `podman`, which has the same commands.

    Attributes:
        name: of the command.
        environment: that it runs in.
        building: options of `build`.
        running: options of `run`.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    building: tuple[str, ...] = ()
    running: tuple[str, ...] = ()

    def call(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.name, *arguments],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{self.name} {arguments[0]}: {done.stdout}{done.stderr}")
        return done

    def inspect(self, kind: str, name: str) -> dict[str, Any]:
        """What is known of an `image` or a `container`."""
        found: dict[str, Any] = json.loads(self.call("inspect", "--type", kind, name).stdout)[0]
        return found

    def build(self, target: str, tag: str, *options: str, context: Path = ROOT) -> str:
        """Build one target of the Dockerfile of `context`; its tag."""
        self.call("build", *self.building, "--target", target, "--tag", tag, *options, str(context))
        return tag

    def remove(self, tag: str) -> None:
        self.call("rmi", tag, check=False)

    @contextmanager
    def start(
        self, image: str, *arguments: str, options: Sequence[str] = ()
    ) -> Iterator[Container]:
        """A container with a read-only root and no privileges, removed in the end."""
        run = ("run", "--detach", *_READ_ONLY, *self.running, *options, image, *arguments)
        container = Container(self, self.call(*run).stdout.strip())
        try:
            yield container
        finally:
            self.call("rm", "--force", "--volumes", container.name, check=False)


@dataclass(frozen=True, slots=True)
class Container:
    tool: Tool
    name: str

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.tool.inspect("container", self.name)["State"]
        return state

    @property
    def logs(self) -> str:
        done = self.tool.call("logs", self.name, check=False)
        return done.stdout + done.stderr

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.tool.call("exec", self.name, *command, check=False)

    def healthy(self) -> bool:
        """What the image's own health check says now, whether or not anything runs it."""
        check = self.tool.inspect("container", self.name)["Config"]["Healthcheck"]["Test"]
        assert check[0] == "CMD", f"not in exec form: {check}"
        return self.execute(*check[1:]).returncode == 0

    def wait(self) -> None:
        """Until it is healthy; a failure, with what it said, if it ends before or in 200 asks."""
        for _ in range(200):
            if self.healthy():
                return
            if not self.state["Running"]:
                break
        raise AssertionError(f"never healthy: {self.state}\n{self.logs}")

    def ask(self, *command: str) -> str:
        """Standard output of a command of this machine that reaches the container.

        `ADDRESS` in it becomes the server's host and port.
        """
        address = f"127.0.0.1:{PORT}"
        prefix: tuple[str, ...] = ()
        if self.tool.name == "docker":
            address = self.tool.call("port", self.name, str(PORT)).stdout.splitlines()[0]
        else:
            prefix = ("nsenter", f"--net=/proc/{self.state['Pid']}/ns/net")
        words = [*prefix, *(address if word == "ADDRESS" else word for word in command)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + self.logs
        return done.stdout

    def stop(self, seconds: int) -> int:
        """The exit status after SIGTERM: 137 if it was killed because `seconds` had passed."""
        self.tool.call("stop", "-t", str(seconds), self.name)
        return int(self.state["ExitCode"])


def find() -> Tool:
    """What builds and runs images here. Raises NoBuilderError."""
    if shutil.which("docker") and Tool("docker").call("info", check=False).returncode == 0:
        return Tool("docker", running=("--publish", f"127.0.0.1::{PORT}"))
    missing = [name for name in _NEEDS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise NoBuilderError(
            f"no Docker daemon answers; without one, root needs {', '.join(missing or _NEEDS)}"
            " (apt-get install podman runc debootstrap util-linux)"
        )
    return _daemonless()


def prepare(tool: Tool) -> None:
    """Without a daemon: make the base image if it is not there yet, and forget old layers."""
    if tool.name != "podman":
        return
    if tool.call("image", "exists", BASE, check=False).returncode:
        _make_base(tool)
    tool.call("image", "prune", "--force", "--filter", "until=24h")


def _daemonless() -> Tool:
    STORE.mkdir(mode=0o700, exist_ok=True)
    if STORE.is_symlink() or STORE.stat().st_uid != os.geteuid():
        raise NoBuilderError(f"{STORE} belongs to somebody else: remove it")
    (STORE / "storage.conf").write_text(
        "[storage]\n"
        'driver = "overlay"\n'
        f'runroot = "{STORE / "run"}"\n'
        f'graphroot = "{STORE / "images"}"\n'
    )
    # More than this process may have itself, podman's own default among it, is refused to it.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    (STORE / "containers.conf").write_text(
        f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc=4096:4096"]\n'
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n'
    )
    certificates = f"{_CERTIFICATES}:{_CERTIFICATES}:ro"
    trusted = ("--volume", certificates) if _CERTIFICATES.exists() else ()
    return Tool(
        "podman",
        {
            "CONTAINERS_STORAGE_CONF": str(STORE / "storage.conf"),
            "CONTAINERS_CONF": str(STORE / "containers.conf"),
        },
        # Docker's own format: the other one has no health check.
        (
            *("--pull=never", "--isolation", "chroot", "--format", "docker"),
            *("--build-arg", f"BASE_IMAGE={BASE}"),
            *trusted,
        ),
        # No network but its own loopback: a server needs no other. No writable /tmp either.
        ("--network", "none", "--read-only-tmpfs=false"),
    )


def _make_base(tool: Tool) -> None:
    """A minimal Debian with Python, from the mirror that this machine's apt uses."""
    with tempfile.TemporaryDirectory(dir=STORE) as folder:
        root, archive = Path(folder) / "root", Path(folder) / "root.tar"
        packages = "ca-certificates,python3,python3-venv"
        debootstrap = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm"]
        for command in (
            [*debootstrap, str(root), _mirror()],
            ["tar", "-C", str(root), *_LEFT_OUT, "-cf", str(archive), "."],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        tool.call("import", "--quiet", str(archive), BASE)


def _mirror() -> str:
    """The first Debian mirror in apt's sources, of either form."""
    sources = Path("/etc/apt")
    for path in (*sources.glob("sources.list.d/*.sources"), sources / "sources.list"):
        for line in path.read_text().splitlines() if path.exists() else ():
            words = line.split()
            if len(words) > 1 and words[0] in ("URIs:", "deb"):
                return next(word for word in words if "://" in word)
    raise NoBuilderError("apt's sources name no Debian mirror to make a base image from")


if __name__ == "__main__":  # for scripts that ask whether images can be built here
    try:
        find()
    except NoBuilderError as error:
        sys.exit(str(error))
