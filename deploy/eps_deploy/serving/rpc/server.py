"""The gRPC server beside the HTTP server: options, start and end."""

from __future__ import annotations

import asyncio

from eps_core.errors import ConfigError
from eps_deploy.serving.limits import Limits, Memory
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.rpc.arrivals import Arrivals, largest
from eps_deploy.serving.rpc.calls import Calls
from eps_deploy.serving.rpc.core import Server
from eps_deploy.serving.rpc.frame import SERVICE, Frame
from eps_deploy.serving.service import Service

_LAST_CHANCE = 0.2  # seconds for calls that are on their way when the server is told to end
_AGE = 600  # seconds; then a client connects anew, and perhaps to a server that is new
_AGE_GRACE = 60
_PING = 60  # seconds after which a silent client with a call is asked whether it is there
_LEAST_PING = 10  # seconds between the pings of a client, who may send them without any call
_MILLI = 1000


class RpcServer:
    """Make, use and end it on the event loop.

    Args:
        service: what answers.
        metrics: counts.
        limits: see there.
        memory: counts the messages that are held.
        images: shape `[N, C, H, W]` of the most images that one request may hold.
        token, log_requests: as `Frame` has them.
    """

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        *,
        limits: Limits,
        memory: Memory,
        images: tuple[int, ...],
        token: bytes | None,
        log_requests: bool,
    ) -> None:
        size = largest(limits, images)
        calls = Calls(service, metrics, limits=limits, arrivals=Arrivals(limits, memory, size))
        self._frame = Frame(
            metrics, token=token, log_requests=log_requests, most=limits.connections
        )
        handler = self._frame.handler
        methods = {
            "ServerLive": handler("ServerLive", calls.server_live, open=True),
            "ServerReady": handler("ServerReady", calls.server_ready, open=True),
            "ServerMetadata": handler("ServerMetadata", calls.server_metadata),
            "ModelReady": handler("ModelReady", calls.model_ready),
            "ModelMetadata": handler("ModelMetadata", calls.model_metadata),
            "ModelInfer": handler("ModelInfer", calls.model_infer),
        }
        self.port = 0
        self._stopping: asyncio.Task[None] | None = None
        self._server = Server(SERVICE, methods, self._frame.refuse, _options(limits, size))

    async def start(self, address: str, port: int) -> None:
        """Listen; `port` says where. Raises ConfigError: somebody else has the port.

        Args:
            address: as a number; grpcio would take several for one name.
            port: 0: any that is free.
        """
        where = f"[{address}]" if ":" in address else address
        try:
            self.port = self._server.add_insecure_port(f"{where}:{port}")
        except RuntimeError:
            raise ConfigError(
                f"--grpc-port {port}: cannot be listened on; choose another"
            ) from None
        await self._server.start()

    async def wait(self) -> None:
        """Until it has ended. Raises what ended it, if not :meth:`stop`."""
        await self._server.wait_for_termination()

    async def stop(self, grace: float) -> None:
        """Accept nothing any more, and answer what was accepted, within `grace` seconds.

        gRPC's core drops calls that have arrived and are not accepted yet in the moment in which it
        is told to end, and those that come until its clients know. So for a moment all answers are
        kept back: a client that waits for one sends nothing else, and finds with it that this
        connection ends.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace))
        await self._stopping

    async def _stop(self, grace: float) -> None:
        self._frame.hold()
        await asyncio.sleep(_LAST_CHANCE)
        stopping = asyncio.create_task(self._server.stop(grace))
        await asyncio.sleep(0)  # now every client is being told
        self._frame.release()
        await stopping


def _options(limits: Limits, size: int) -> list[tuple[str, int]]:
    """Channel arguments, by the names in gRPC's `channel_arg_names.h`."""
    return [
        ("grpc.so_reuseport", 0),  # otherwise two servers would share a port
        ("grpc.max_receive_message_length", size),  # compressed, and unpacked
        ("grpc.max_metadata_size", limits.header),
        ("grpc.absolute_max_metadata_size", limits.header),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_concurrent_streams", limits.connections),
        ("grpc.server_handshake_timeout_ms", int(limits.header_seconds * _MILLI)),
        ("grpc.max_connection_idle_ms", limits.idle_seconds * _MILLI),
        ("grpc.max_connection_age_ms", _AGE * _MILLI),
        ("grpc.max_connection_age_grace_ms", _AGE_GRACE * _MILLI),
        ("grpc.keepalive_time_ms", _PING * _MILLI),
        ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING * _MILLI),
    ]
