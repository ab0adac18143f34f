"""Other model servers for the same ONNX file, each in its own environment and its best settings.

All use the same version of ONNX Runtime, one intra-op thread, one worker that runs the network,
batches of up to 16, and no request log. The scripts in `peers/` have the fastest settings found.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import _wires
import click
from _servers import Post, Server, free_port, started

from eps_deploy.engines.base import Images, Logits

SCRIPTS = Path(__file__).resolve().parent / "peers"
_MODEL = "network"
_LISTED = """
import importlib.metadata, platform, sys
print("python", platform.python_version())
for name in sys.argv[1:]:
    print(name, importlib.metadata.version(name))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """How to query a server.

    Attributes:
        wire: description of the request format.
        ready: path that returns 200 once the server is ready.
        post: converts images uint8 `[N, C, H, W]` to a request.
        logits: reads the logits, in any shape, from a response's body and headers.
    """

    wire: str
    ready: str
    post: Callable[[Images], Post]
    logits: Callable[[bytes, Mapping[str, str]], Logits]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A model server to compare with.

    Attributes:
        package: name on the package index, and version.
        arguments: for its Python; MODEL and PORT are replaced.
        side: how to query it.
        python: interpreter that creates its environment.
        environment: environment variables.
    """

    package: tuple[str, str]
    arguments: tuple[str, ...]
    side: Side
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def pins(self) -> dict[str, str]:
        return dict([self.package, ("onnxruntime", version("onnxruntime"))])

    def start(self, python: Path, model: Path, folder: Path) -> AbstractContextManager[Server]:
        """Start it with its environment's `python`, in the new folder `folder`."""
        port = free_port()
        meant = {"MODEL": str(model), "PORT": str(port)}
        arguments = [meant.get(word, word) for word in self.arguments]
        return started([python, *arguments], port, folder, {**self.environment, **meant})


PEERS: dict[str, Peer] = {
    "pytriton": Peer(
        package=("nvidia-pytriton", "0.7.0"),
        # Its Triton contains Debian's libpython 3.11.2, which fails on modules of a later one.
        python="/usr/bin/python3",
        arguments=(str(SCRIPTS / "pytriton_server.py"), "MODEL", "PORT"),
        environment={"PYTRITON_HOME": "."},
        side=Side(
            wire="KServe v2, binary",
            ready=f"/v2/models/{_MODEL}/ready",
            post=partial(_wires.v2_binary, _MODEL),
            logits=_wires.from_v2_binary,
        ),
    ),
    "mlserver": Peer(
        package=("mlserver", "1.7.1"),
        arguments=(str(SCRIPTS / "mlserver_server.py"), "MODEL", "PORT"),
        side=Side(
            wire="KServe v2, base64 in JSON",
            ready=f"/v2/models/{_MODEL}/ready",
            post=partial(_wires.v2_base64, _MODEL),
            logits=_wires.from_v2_json,
        ),
    ),
    "litserve": Peer(
        package=("litserve", "0.2.19"),
        arguments=(str(SCRIPTS / "litserve_server.py"), "MODEL", "PORT"),
        side=Side(
            wire="raw bytes",
            ready="/health",
            post=partial(_wires.raw, "/predict"),
            logits=_wires.from_raw,
        ),
    ),
    "bentoml": Peer(
        package=("bentoml", "1.4.39"),
        arguments=(
            *("-m", "bentoml", "serve", "bentoml_service:Network"),
            *("--working-dir", str(SCRIPTS), "--host", "127.0.0.1", "--port", "PORT"),
        ),
        environment={"BENTOML_HOME": ".", "BENTOML_DO_NOT_TRACK": "true"},
        side=Side(
            wire="raw bytes",
            ready="/readyz",
            post=partial(_wires.raw, "/predict/"),
            logits=_wires.from_raw,
        ),
    ),
}


def install(folder: Path) -> None:
    """Create the environment of every peer in `folder`, with pip."""
    for name, peer in PEERS.items():
        python = interpreter(folder, name)
        pins = [f"{package}=={wanted}" for package, wanted in peer.pins.items()]
        if not python.exists():
            _run(peer.python, "-m", "venv", str(folder / name))
        _run(str(python), "-m", "pip", "install", "--quiet", *pins)


def interpreter(folder: Path, name: str) -> Path:
    return folder / name / "bin" / "python"


def versions(folder: Path, name: str) -> dict[str, str] | None:
    """Installed versions of Python, a peer and ONNX Runtime; None if one is missing or differs."""
    python, wanted = interpreter(folder, name), PEERS[name].pins
    if not python.exists():
        return None
    done = subprocess.run(
        [python, "-c", _LISTED, *wanted], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None
    found = dict(line.split() for line in done.stdout.splitlines())
    return found if found.items() >= wanted.items() else None


def _run(*command: str) -> None:
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise click.ClickException(f"failed: {' '.join(command)}")
