"""Serving benchmark: throughput of `eps-serve`, the bare network and other servers under load.

Every server has the same ONNX file, written by `eps-deploy`; wrk sends requests of one image over
1, 16 and 64 connections from one thread. All servers are started once and loaded in turn, one
second for warm-up and then the measured time; servers that use a core when idle are suspended
(SIGSTOP) between their turns. Right before each turn, the same file runs in this process at its
best batch size (with one connection: at batch 1), from pixels to logits: the floor. Everything uses
one ONNX Runtime thread.

`eps-serve` runs with its defaults and receives KServe v2 requests with binary tensors. The others
run in their own environments in the folder of `--peers`, in the best settings found:

    python benchmarks/serving.py --peers DIR --install-peers

Servers that are not installed are listed under `not_run`. Needs Linux and wrk. The last line
printed is one JSON object.

    python benchmarks/serving.py [--peers DIR] [--seconds S] [--repeats N]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import _peers
import _wires
import click
import numpy as np
import torch
from _peers import PEERS, Side
from _rounds import machine, say
from _served import SIZE, make_bundle, script
from _servers import free_port, started
from _standings import OURS, judge, row, table
from _turns import Contender, Floor, in_turns, watch_idle
from _wrk import need_wrk

from eps_deploy.bundle import ONNX
from eps_deploy.engines.base import Images, Logits
from eps_deploy.engines.ort import OrtEngine

BATCHES = (1, 2, 4, 8, 16)  # batch sizes of the floor
SAME = 1e-4  # largest allowed difference of a server's logits, relative to the largest logit
_SIDE = Side(
    wire="KServe v2, binary",
    ready="/v2/health/ready",
    post=partial(_wires.v2_binary, "eps_resnet"),
    logits=_wires.from_v2_binary,
)


def measure(
    bundle: Path,
    peers: Path | None,
    folder: Path,
    *,
    counts: Sequence[int],
    seconds: int,
    repeats: int,
) -> dict[str, Any]:
    """Measure all servers with the bundle's `model.onnx`, working in `folder`."""
    image = np.random.default_rng(0).integers(0, 256, size=(1, 3, SIZE, SIZE), dtype=np.uint8)
    with ExitStack() as stack:
        engine = stack.enter_context(OrtEngine((bundle / ONNX).read_bytes()))
        floor = Floor(engine, image, BATCHES)
        rates = {batch: median(floor.rate(batch) for _ in range(3)) for batch in BATCHES}
        best = max(rates, key=lambda batch: rates[batch])
        milliseconds = 1000 / rates[1]
        say(f"the network: {milliseconds:.2f} ms an image, best in batches of {best}")
        contenders, versions, absent = start_all(stack, bundle, peers, folder)
        check(contenders, image, engine.infer(image)[0])
        rows = []
        for count in counts:
            batches = {1} if count == 1 else {1, best}
            turns = in_turns(
                contenders,
                lambda batches=batches: max(map(floor.rate, batches)),  # type: ignore[misc]
                image,
                connections=count,
                seconds=seconds,
                repeats=repeats,
            )
            rows.append(row(count, turns))
            say(table(rows[-1]))
    return {
        "network": {"images_per_second_by_batch": rates, "milliseconds": milliseconds},
        "versions": {"onnxruntime": engine.describe()["version"], **versions},
        "wires": {name: contender.side.wire for name, contender in contenders.items()},
        "idle_cores": {name: contender.idle_cores for name, contender in contenders.items()},
        "seconds": seconds,
        "repeats": repeats,
        "rows": rows,
        "verdict": judge(rows, milliseconds),
        "not_run": absent,
    }


def start_all(
    stack: ExitStack, bundle: Path, peers: Path | None, folder: Path
) -> tuple[dict[str, Contender], dict[str, Any], list[dict[str, str]]]:
    """Start all servers; returns them, the peers' versions, and why some did not start."""
    port = free_port()
    ours = (script("eps-serve"), bundle, "--port", str(port))
    servers = {OURS: stack.enter_context(started(ours, port, folder / OURS, {}))}
    sides, versions, absent = {OURS: _SIDE}, {}, []
    for name, peer in PEERS.items():
        found = None if peers is None else _peers.versions(peers, name)
        if peers is None or found is None:
            why = "not installed in these versions: add --peers DIR --install-peers"
            absent.append({"what": name, "why": why})
            say(f"{name}: not run: {why}")
            continue
        python = _peers.interpreter(peers, name)
        starting = peer.start(python, bundle / ONNX, folder / name)
        servers[name], sides[name] = stack.enter_context(starting), peer.side
        versions[name] = found
    for name, server in servers.items():
        server.wait_ready(sides[name].ready)
        say(f"{name}: ready")
    contenders = watch_idle({name: (servers[name], sides[name]) for name in servers})
    return contenders, versions, absent


def check(contenders: Mapping[str, Contender], image: Images, expected: Logits) -> None:
    """Raise ClickException if a server's logits differ from those computed in this process."""
    for name, contender in contenders.items():
        answer = contender.server.ask(contender.side.post(image))
        logits = contender.side.logits(*answer).ravel()
        if logits.shape != expected.shape or _differ(logits, expected):
            raise click.ClickException(f"{name} answers {logits}, and {expected} is right")


def _differ(logits: Logits, expected: Logits) -> bool:
    return bool(np.abs(logits - expected).max() > SAME * np.abs(expected).max())


def _counts(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(count) for count in value.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise click.BadParameter("give numbers such as 1,16,64")
    return counts


_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--peers", type=_FOLDER, help="Folder of the other servers' environments.")
@click.option("--install-peers", is_flag=True, help="Make them first.")
@click.option("--connections", default="1,16,64", show_default=True, callback=_counts)
@click.option("--seconds", default=4, show_default=True, type=click.IntRange(1), help="Of a turn.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Turns each.")
@click.option("--depth", default=56, show_default=True, help="Of the network, 6n + 2.")
def main(
    peers: Path | None,
    install_peers: bool,
    connections: tuple[int, ...],
    seconds: int,
    repeats: int,
    depth: int,
) -> None:
    """Measure eps-serve against the bare network and other servers, under load."""
    if install_peers and peers is None:
        raise click.UsageError("--install-peers needs --peers DIR")
    need_wrk()
    here = None if peers is None else peers.absolute()
    if install_peers and here is not None:
        _peers.install(here)
    conditions = machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("making a bundle")
        bundle = make_bundle(folder, depth)
        found = measure(bundle, here, folder, counts=connections, seconds=seconds, repeats=repeats)
    network = {"model": f"cifar:{depth}x16", "image": [3, SIZE, SIZE], **found.pop("network")}
    print(json.dumps({"machine": {**conditions, "threads": 1}, "network": network, **found}))


if __name__ == "__main__":
    main()
