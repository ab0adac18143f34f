"""The command `eps-serve`: serve a bundle over HTTP and gRPC."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from eps_core import cli as console

if TYPE_CHECKING:
    from eps_deploy.bundle import Choice

_PATH = click.Path(path_type=Path)


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter("give a finite number")
    return value


@click.command()
@click.argument("bundle", type=_PATH)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on; 0.0.0.0 listens on all interfaces.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    metavar="PORT",
    help="Port to listen on; 0 picks a free one.",
)
@click.option(
    "--grpc-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Also serve gRPC on this port; 0 picks a free one.",
)
@click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="ONNX Runtime execution provider; auto uses CUDA where it runs the network, else the CPU.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1, 1_000_000),
    default=256,
    show_default=True,
    metavar="N",
    help="Maximum number of images that wait; further requests are answered with 503.",
)
@click.option(
    "--max-delay-ms",
    type=click.FloatRange(0, 10_000),
    default=0.0,
    show_default=True,
    callback=_finite,
    metavar="X",
    help="Maximum time in ms that an image waits for a larger batch while an engine is free.",
)
@click.option("--no-batching", is_flag=True, help="Run each request's images in their own batches.")
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Engines, each with a thread of its own.  [default: 2 for TensorRT, 1 otherwise]",
)
@click.option(
    "--token-file",
    type=_PATH,
    metavar="FILE",
    help="File with the token that clients must send (Authorization: Bearer TOKEN).",
)
@click.option(
    "--allow-load",
    is_flag=True,
    help="Allow clients to reload BUNDLE (POST v2/repository/models/M/load).",
)
@click.option(
    "--engine-cache",
    type=_PATH,
    metavar="DIR",
    help="Folder to keep TensorRT plans in that are built here (eps-deploy --defer-build).",
)
@click.option(
    "--shadow",
    metavar="DIR|baseline",
    help="Run this bundle, or BUNDLE's baseline, on a share of the batches, and compare.",
)
@click.option(
    "--shadow-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.1,
    show_default=True,
    callback=_finite,
    metavar="X",
    help="Fraction of the batches that --shadow runs.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    metavar="MIB",
    help="Maximum size of a request in MiB.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1, 150),
    default=50,
    show_default=True,
    metavar="MPX",
    help="Maximum size of an image in megapixels.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="Maximum number of open connections on each port.",
)
@click.option("--log-requests", is_flag=True, help="Log every request.")
def cli(
    bundle: Path,
    host: str,
    port: int,
    grpc_port: int | None,
    provider: Choice,
    max_queue: int,
    max_delay_ms: float,
    no_batching: bool,
    instances: int | None,
    token_file: Path | None,
    allow_load: bool,
    engine_cache: Path | None,
    shadow: str | None,
    shadow_share: float,
    max_body: int,
    max_pixels: int,
    max_connections: int,
    log_requests: bool,
) -> None:
    """Serve the network in BUNDLE over HTTP: KServe v2, image classification, metrics, a page at /.

    With --grpc-port, KServe v2 is also served over gRPC.

    On SIGTERM or Ctrl-C, finish in-flight requests and exit 0; a second signal exits immediately.
    """
    from eps_deploy.serving.batching import Batching
    from eps_deploy.serving.limits import MIB, Limits
    from eps_deploy.serving.model import ModelSource
    from eps_deploy.serving.server import Settings, run

    batching = Batching(
        max_queue=max_queue,
        max_delay=max_delay_ms / 1000,
        merge=not no_batching,
        instances=instances,
    )
    source = ModelSource(
        path=bundle,
        engine_cache=engine_cache,
        provider=provider,
        batching=batching,
        shadow=shadow,
        shadow_share=shadow_share,
    )
    limits = Limits(
        body=max_body * MIB,
        memory=8 * max_body * MIB,
        pixels=max_pixels * 1_000_000,
        connections=max_connections,
    )
    settings = Settings(
        source=source,
        host=host,
        port=port,
        grpc_port=grpc_port,
        limits=limits,
        token_file=token_file,
        allow_load=allow_load,
        log_requests=log_requests,
    )
    run(settings)


def main() -> NoReturn:
    # The first process of a container ignores SIGTERM until it has a handler. Nothing needs to be
    # shut down yet; the server replaces this handler by its own.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    console.run(cli)
