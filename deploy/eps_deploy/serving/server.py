"""The server process: sockets, signals, start and graceful shutdown.

On SIGTERM or SIGINT it accepts nothing new, answers what was accepted and exits with 0; a second
signal exits immediately.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from eps_core.errors import ConfigError
from eps_deploy.bundle import Bundle
from eps_deploy.serving import middleware
from eps_deploy.serving.app import Api
from eps_deploy.serving.connections import LimitedProtocol, LoadShedder
from eps_deploy.serving.limits import Limits, Memory
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.middleware import Access, HttpMiddleware
from eps_deploy.serving.model import ModelSource, read_bundle, read_shadow
from eps_deploy.serving.service import Service

if TYPE_CHECKING:
    from eps_deploy.serving.rpc.servicer import RpcServer

# -- Sockets and the limit of open files

_BACKLOG = 1024
_SPARE_FILES = 64  # beside connections: models, libraries, logs


def listen(host: str, port: int, option: str = "--port") -> socket.socket:
    """Return a listening socket. Raises ConfigError: no such address, or the port is taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: {_reason(error)}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {host} {option} {port}: {_reason(error)}; choose another"
        ) from None
    return listener


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def accepted(listener: socket.socket) -> list[socket.socket]:
    """Close the listener, and return the connections that clients believe to be open already.

    The kernel resets connections that come between the last `accept` and `close`.
    """
    connections = []
    with contextlib.suppress(BlockingIOError):
        while True:
            connections.append(listener.accept()[0])
    listener.close()
    return connections


def allow_files(connections: int) -> None:
    """Raise the limit of open files to that of connections. Raises ConfigError: not allowed."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ConfigError(
                f"{connections} connections need {wanted} open files, and this process may have"
                f" {hard}; raise the limit (ulimit -n {wanted})"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# -- The process

_DRAIN = 25  # seconds for the last answers; Kubernetes kills after 30
_MIN_TOKEN = 16  # bytes; shorter ones can be guessed


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Options of `eps-serve`.

    Port 0 picks a free one; without `grpc_port` there is no gRPC, without `token_file` clients need
    no token. `allow_load`: clients may reload the bundle.
    """

    source: ModelSource
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    limits: Limits = field(default_factory=Limits)
    token_file: Path | None = None
    allow_load: bool = False
    log_requests: bool = False


def run(settings: Settings) -> None:
    """Serve until a signal comes. Raises EpsError or OSError for what cannot be served."""
    source = settings.source
    bundle = read_bundle(source.path, source.engine_cache)
    if source.shadow is not None:
        read_shadow(bundle, source.shadow, source.engine_cache)
    token = read_token(settings.token_file) if settings.token_file is not None else None
    with contextlib.closing(listen(settings.host, settings.port)) as listener:
        ports = 1
        if settings.grpc_port is not None:
            # grpcio, which will listen there, does not tell why it cannot.
            listen(settings.host, settings.grpc_port, "--grpc-port").close()
            ports = 2
        allow_files(ports * settings.limits.connections)
        middleware.configure_logging()
        finished = asyncio.run(serve(settings, bundle, token, listener))
    if not finished:  # a thread is in the middle of something that cannot be interrupted
        sys.stderr.flush()
        os._exit(0)


async def serve(
    settings: Settings,
    bundle: Bundle,
    token: bytes | None,
    listener: socket.socket,
    *,
    started: Callable[[uvicorn.Server], None] = lambda server: None,
) -> bool:
    """Serve until the server is stopped; False when a thread is still busy by then.

    `started` is called with the server; setting its `should_exit` stops it, as a signal does.
    """
    limits = settings.limits
    memory = Memory(limits.memory)
    metrics = Metrics(
        queued=lambda: service.queued,
        connections=lambda: len(server.server_state.connections),
        ready=lambda: service.ready,
        held=lambda: memory.used,
        shadow=settings.source.shadow is not None,
    )
    service = Service(
        settings.source,
        name=bundle.name,
        log=middleware.log,
        observe=metrics.ran,
        compared=metrics.compared,
    )
    access = Access(metrics, token=token, log_requests=settings.log_requests)
    api = Api(service, metrics, limits=limits, memory=memory, allow_load=settings.allow_load)
    protocol: Any = partial(LimitedProtocol, limits, LoadShedder(service, access).answer)
    config = uvicorn.Config(
        HttpMiddleware(api.router(), access),
        http=protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=_DRAIN,
    )
    server = _UvicornServer(config, service, listener)
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    if settings.grpc_port is not None:
        from eps_deploy.serving.rpc.servicer import RpcServer

        # grpcio cannot change the size later: a bundle with larger images needs a new process.
        images = (settings.source.batching.max_queue, *bundle.input_shape)
        server.rpc = RpcServer(
            service, metrics, access, limits=limits, memory=memory, images=images
        )
        rpc_port = await server.rpc.start(where, settings.grpc_port)
        middleware.log(f"listening on grpc://{where}:{rpc_port}")
    loading = asyncio.create_task(_load(service, bundle, server))
    middleware.log(f"listening on http://{where}:{port}")
    started(server)
    try:
        await _run_both(server, listener)
    except Exception:
        # The process would be aborted if it ended while the loading thread is inside C++ code.
        service.drain()
        await asyncio.wait([loading], timeout=_DRAIN)
        raise
    if not loading.done():
        loading.cancel()
        return False
    await loading  # raises why the model could not be loaded
    finished = await service.close()
    middleware.log("stopped")
    return finished


async def _run_both(server: _UvicornServer, listener: socket.socket) -> None:
    """Serve HTTP, and gRPC if it is enabled; when one ends, the other ends too."""
    rpc = server.rpc
    if rpc is None:
        await server.serve(sockets=[listener.dup()])
        return

    def end(_: asyncio.Task[None]) -> None:
        server.should_exit = True

    watching = asyncio.create_task(rpc.wait())
    watching.add_done_callback(end)
    try:
        await server.serve(sockets=[listener.dup()])
    finally:
        await rpc.stop(_DRAIN)
    await watching


async def _load(service: Service, bundle: Bundle, server: _UvicornServer) -> None:
    try:
        await service.load(bundle)
    except Exception:
        if server.should_exit:
            return  # cancelled by the end of the server
        server.should_exit = True
        raise
    engine = service.current.model.engines[0].describe()
    keys = ("runtime", "version", "provider", "device")
    facts = {key: engine[key] for key in keys if key in engine}
    middleware.log("ready", model=service.name, **facts)


class _UvicornServer(uvicorn.Server):
    """Uvicorn's server, which exits with 0: uvicorn raises the signals that its handler noted."""

    def __init__(self, config: uvicorn.Config, service: Service, listener: socket.socket) -> None:
        super().__init__(config)
        self.rpc: RpcServer | None = None
        self._service = service
        self._listener = listener

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain()
        middleware.log("stopping: answering what was accepted")
        for server in self.servers:
            server.close()  # a copy of the listener; the kernel accepts while another one is open
        for connection in accepted(self._listener):
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        ending = [super().shutdown(sockets)]
        if self.rpc is not None:
            ending.append(self.rpc.stop(_DRAIN))
        await asyncio.gather(*ending)

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state={}
        )
        return made


def read_token(path: Path) -> bytes:
    """Read the token in a file, without surrounding white space. Raises ConfigError."""
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--token-file {path}: cannot be read: {error.strerror}") from None
    if len(token) < _MIN_TOKEN or not all(0x21 <= byte <= 0x7E for byte in token):
        raise ConfigError(
            f"--token-file {path}: must hold one token of at least {_MIN_TOKEN} visible ASCII"
            " characters, such as `openssl rand -hex 32` prints"
        )
    return token
