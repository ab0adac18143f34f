"""The command `eps-serve`: a bundle as a service."""

from __future__ import annotations

import math
import os
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from eps_core import cli as console

if TYPE_CHECKING:
    from eps_deploy.bundle import Choice

_PATH = click.Path(path_type=Path)
_MIB = 1 << 20
_MEGA = 1_000_000


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
    help="Where to listen; 0.0.0.0: everywhere.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    metavar="PORT",
    help="0: any that is free.",
)
@click.option(
    "--grpc-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Listen for gRPC as well; 0: any that is free.",
)
@click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="ONNX Runtime execution provider; auto: cuda where it runs the network, else cpu.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1, 1_000_000),
    default=256,
    show_default=True,
    metavar="N",
    help="Images that may wait; beyond that the answer is 503.",
)
@click.option(
    "--max-delay-ms",
    type=click.FloatRange(0, 10_000),
    default=0.0,
    show_default=True,
    callback=_finite,
    metavar="X",
    help="Time that an image may wait for others while an engine is free.",
)
@click.option("--no-batching", is_flag=True, help="Run the images of each request by themselves.")
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="Engines, each with a thread of its own.",
)
@click.option(
    "--token-file",
    type=_PATH,
    metavar="FILE",
    help="Holds the token that clients must send: Authorization: Bearer TOKEN.",
)
@click.option(
    "--allow-load",
    is_flag=True,
    help="Let clients have BUNDLE read again: POST v2/repository/models/M/load.",
)
@click.option(
    "--engine-cache",
    type=_PATH,
    metavar="DIR",
    help="Keep the plan here that --defer-build left to this machine.",
)
@click.option(
    "--shadow",
    metavar="DIR|baseline",
    help="Run this bundle, or BUNDLE's unpruned network, beside it, and compare.",
)
@click.option(
    "--shadow-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.1,
    show_default=True,
    callback=_finite,
    metavar="X",
    help="Share of the batches that --shadow gets.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    metavar="MIB",
    help="Size of a request.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1, 150),
    default=50,
    show_default=True,
    metavar="MPX",
    help="Millions of pixels of a picture.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="Open at one time, on each port.",
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
    instances: int,
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
    """Serve the network in BUNDLE over HTTP: KServe v2, pictures, metrics, and a page at /.

    With --grpc-port also over gRPC, by the same protocol.

    SIGTERM and Ctrl-C: what was accepted is answered, then exit 0. Again: at once.
    """
    from eps_deploy.serving.batching import Batching
    from eps_deploy.serving.limits import Limits
    from eps_deploy.serving.server import Settings, run
    from eps_deploy.serving.service import Source
    from eps_deploy.serving.shadow import Shadowing

    # Pillow warns of pictures that are large or untidy, and reads them all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    batching = Batching(
        max_queue=max_queue,
        max_delay=max_delay_ms / 1000,
        merge=not no_batching,
        instances=instances,
    )
    shadowing = None
    if shadow is not None:
        other = Path(shadow) if shadow != "baseline" else None
        shadowing = Shadowing(path=other, share=shadow_share)
    limits = Limits(
        body=max_body * _MIB,
        memory=8 * max_body * _MIB,
        pixels=max_pixels * _MEGA,
        connections=max_connections,
    )
    run(
        Settings(
            source=Source(
                path=bundle,
                engine_cache=engine_cache,
                provider=provider,
                batching=batching,
                shadow=shadowing,
            ),
            host=host,
            port=port,
            grpc_port=grpc_port,
            limits=limits,
            token_file=token_file,
            allow_load=allow_load,
            log_requests=log_requests,
        )
    )


def main() -> NoReturn:
    # The first process of a container ignores SIGTERM until it handles it. Nothing has begun yet
    # that would have to end well; the server puts its own handler in place of this one.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    console.run(cli)
