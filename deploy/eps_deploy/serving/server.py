"""The process: from the socket to the last answer.

SIGTERM and SIGINT: nothing new is accepted, what was accepted is answered, exit 0. The second
signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from eps_core.errors import ConfigError
from eps_deploy.bundle import Bundle
from eps_deploy.serving import middleware
from eps_deploy.serving.app import Api
from eps_deploy.serving.connections import Shedder, limited
from eps_deploy.serving.limits import Limits, Memory
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.middleware import Frame
from eps_deploy.serving.model import read_bundle
from eps_deploy.serving.service import Service, Source
from eps_deploy.serving.shadow import read_shadow

if TYPE_CHECKING:
    from eps_deploy.serving.rpc.server import RpcServer

# -- Sockets that listen, and how many files a process may have open

_BACKLOG = 1024
_SPARE_FILES = 64  # beside connections: models, libraries, logs


def listen(host: str, port: int, option: str = "--port") -> socket.socket:
    """A listening socket. Raises ConfigError: no such address, or somebody else has the port.

    `option` is what the port was given with.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: {_told(error)}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        told = f"--host {host} {option} {port}: {_told(error)}; choose another"
        raise ConfigError(told) from None
    return listener


def _told(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def accepted(listener: socket.socket) -> list[socket.socket]:
    """Close the listener, and return the connections that clients believe to be open already.

    The kernel resets those that come between the last `accept` and `close`: nothing stands there.
    """
    connections = []
    with contextlib.suppress(BlockingIOError):
        while True:
            connections.append(listener.accept()[0])
    listener.close()
    return connections


def allow_files(connections: int) -> None:
    """Have as many files open as there may be connections. Raises ConfigError."""
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


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DRAIN = 25  # seconds for the last answers; Kubernetes kills after 30
_LEAST_TOKEN = 16  # bytes; shorter ones can be guessed


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What `eps-serve` was asked for.

    Attributes:
        source: the model, and how it is run.
        host, port: where to listen; port 0: any that is free.
        grpc_port: for gRPC; None: there is none.
        limits: of what clients send.
        token_file: holds the token that clients must send; None: they need none.
        allow_load: whether clients may have the bundle loaded again.
        log_requests: log every request.
    """

    source: Source
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
        wires = 1
        if settings.grpc_port is not None:
            # grpcio, which will listen there, does not say what is wrong.
            listen(settings.host, settings.grpc_port, "--grpc-port").close()
            wires = 2
        allow_files(wires * settings.limits.connections)
        middleware.set_up()
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
    """Serve until the server is told to end; False when a thread is still busy by then.

    `started` is told of the server, whose `should_exit` ends it, for who has no signals to send.
    """
    limits = settings.limits
    memory = Memory(limits.memory)
    service = Service(
        settings.source,
        name=bundle.name,
        say=middleware.say,
        observe=lambda ran: metrics.ran(ran),
        compared=lambda batch: metrics.compared(batch),
    )
    metrics = Metrics(
        queued=lambda: service.queued,
        connections=lambda: len(server.server_state.connections),
        ready=lambda: service.ready,
        held=lambda: memory.used,
        shadow=settings.source.shadow is not None,
    )
    api = Api(service, metrics, limits=limits, memory=memory, allow_load=settings.allow_load)
    frame = Frame(api.router(), metrics, token=token, log_requests=settings.log_requests)
    shedder = Shedder(service, metrics, token=token, log_requests=settings.log_requests)
    server = _Server(_config(frame, limits, shedder), service, listener)
    host, port = listener.getsockname()[:2]
    if settings.grpc_port is not None:
        server.rpc = _rpc_server(settings, bundle, service, metrics, memory, token)
        await server.rpc.start(host, settings.grpc_port)
        middleware.say(f"listening on grpc://{_in_url(host)}:{server.rpc.port}")
    loading = asyncio.create_task(_load(service, bundle, server))
    middleware.say(f"listening on http://{_in_url(host)}:{port}")
    started(server)
    await _run_both(server, listener)
    if not loading.done():
        loading.cancel()
        return False
    await loading  # raises why the model could not be loaded
    finished = await service.close()
    middleware.say("stopped")
    return finished


def _rpc_server(
    settings: Settings,
    bundle: Bundle,
    service: Service,
    metrics: Metrics,
    memory: Memory,
    token: bytes | None,
) -> RpcServer:
    from eps_deploy.serving.rpc.server import RpcServer

    return RpcServer(
        service,
        metrics,
        limits=settings.limits,
        memory=memory,
        # grpcio cannot change it later: a bundle with larger images needs a new process.
        images=(settings.source.batching.max_queue, *bundle.input_shape),
        token=token,
        log_requests=settings.log_requests,
    )


async def _run_both(server: _Server, listener: socket.socket) -> None:
    """HTTP, and gRPC if it is wanted: they end together, whichever is the first."""
    if server.rpc is None:
        await server.serve(sockets=[listener.dup()])
        return
    watching = asyncio.create_task(_watch(server.rpc, server))
    try:
        await server.serve(sockets=[listener.dup()])
    finally:
        await server.rpc.stop(_DRAIN)
    await watching


async def _watch(rpc: RpcServer, server: _Server) -> None:
    try:
        await rpc.wait()
    finally:
        server.should_exit = True


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _config(frame: Frame, limits: Limits, shedder: Shedder) -> uvicorn.Config:
    return uvicorn.Config(
        frame,
        http=limited(limits, shedder.answer),
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


async def _load(service: Service, bundle: Bundle, server: _Server) -> None:
    try:
        await service.load(bundle)
    except Exception:
        if server.should_exit:
            return  # called off, because the server was told to end
        server.should_exit = True
        raise
    model = service.current.model
    told = model.engines[0].describe()
    facts = {key: told[key] for key in ("runtime", "version", "provider", "device") if key in told}
    middleware.say("ready", model=service.name, **facts)


class _Server(uvicorn.Server):
    """Uvicorn's server with our signals: its own re-raises them, so that the exit code is not 0."""

    def __init__(self, config: uvicorn.Config, service: Service, listener: socket.socket) -> None:
        super().__init__(config)
        self.rpc: RpcServer | None = None
        self._service = service
        self._listener = listener

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain()
        middleware.say("stopping: answering what was accepted")
        for server in self.servers:
            server.close()  # a copy of the listener; the kernel goes on as long as there is one
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
    """The token in a file, without space around it. Raises ConfigError."""
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--token-file {path}: cannot be read: {error.strerror}") from None
    if len(token) < _LEAST_TOKEN or not all(0x21 <= byte <= 0x7E for byte in token):
        raise ConfigError(
            f"--token-file {path}: must hold one token of at least {_LEAST_TOKEN} visible ASCII"
            " characters, such as `openssl rand -hex 32` gives"
        )
    return token
