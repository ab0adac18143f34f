"""gRPC server of the Open Inference Protocol: messages, methods, start and stop.

Source: the protocol's `open_inference_grpc.proto`, of which Triton's messages are a superset.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from open_inference.grpc import protocol

from eps_core.errors import ConfigError
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, Logits
from eps_deploy.serving.limits import Limits, Memory
from eps_deploy.serving.metrics import Metrics
from eps_deploy.serving.middleware import Access
from eps_deploy.serving.protocol import (
    ApiError,
    InferRequest,
    InputTensor,
    Shape,
    Signature,
    output_tensor,
    parse_request,
    pixels_from_bytes,
    pixels_from_integers,
    server_metadata,
    too_large,
    validate,
)
from eps_deploy.serving.rpc.core import RegisteredServer, RpcInterceptor
from eps_deploy.serving.rpc.flow_control import (
    MessageReceiver,
    max_message_size,
    split_raw_tensors,
)
from eps_deploy.serving.service import Service

# -- Messages

_MAX_AXES = 40  # of a shape that are read: more are wrong, and there may be millions

M = TypeVar("M", bound=Message)


def read_infer(rest: bytes, raw: Sequence[memoryview], model: Signature) -> InferRequest:
    """Parse and validate a ModelInferRequest.

    `rest` is the message without `raw`, its field `raw_input_contents`. Raises ApiError: not a
    request for this model; the message says what is wrong and where.
    """
    message = _parse(protocol.ModelInferRequest, rest)
    model.check(message.model_name, message.model_version or model.version)
    document = {
        "id": message.id,
        "parameters": _parameters(message.parameters),
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape[:_MAX_AXES]),
                "parameters": _parameters(tensor.parameters),
            }
            for tensor in message.inputs
        ],
        "outputs": [
            {"name": tensor.name, "parameters": _parameters(tensor.parameters)}
            for tensor in message.outputs
        ],
    }

    def read_pixels(_: InputTensor, shape: Shape) -> Images:
        contents = message.inputs[0].contents
        given = [field.name for field, _ in contents.ListFields()]
        if raw:
            if given:
                raise ApiError(f"{INPUT_NAME!r} has both contents and raw_input_contents")
            if len(raw) != 1:
                raise ApiError(f"raw_input_contents holds {len(raw)} tensors, and inputs one")
            return pixels_from_bytes(raw[0], shape)
        if given != ["uint_contents"]:
            raise ApiError(
                f"{INPUT_NAME!r} needs its pixels in raw_input_contents, or in"
                " contents.uint_contents"
            )
        return pixels_from_integers(contents.uint_contents, shape)

    request = validate(document, read_pixels, model)
    # The answer has the form of the request: Triton always answers in raw bytes, KServe and
    # MLServer like this, and who sends numbers may have no code for bytes.
    return replace(request, binary=bool(raw))


def _parameters(given: Mapping[str, protocol.InferParameter]) -> dict[str, Any]:
    return {
        name: getattr(parameter, kind)
        for name, parameter in given.items()
        if (kind := parameter.WhichOneof("parameter_choice")) is not None
    }


def write_infer(request: InferRequest, logits: Logits, model: Signature) -> bytes:
    """Encode a ModelInferResponse."""
    output = output_tensor(request, logits, model)
    response = protocol.ModelInferResponse(
        model_name=model.name, model_version=model.version, id=request.id
    )
    tensor = response.outputs.add(name=OUTPUT_NAME, datatype=output.datatype, shape=output.shape)
    if request.binary:
        response.raw_output_contents.append(output.raw())
    elif output.classes is not None:
        tensor.contents.bytes_contents.extend(output.classes)
    else:
        tensor.contents.fp32_contents.extend(logits.ravel().tolist())
    return _encode(response)


def _parse(kind: type[M], content: bytes) -> M:
    try:
        message: M = kind.FromString(content)
    except DecodeError:
        raise ApiError(
            f"the message is no {kind.__name__} of the Open Inference Protocol"
        ) from None
    return message


def _encode(message: Message) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded


# -- The server

_PARSER_THREADS = 2
_MAX_NAME_MESSAGE = 64 << 10  # bytes of a message that only names a model
_DRAIN_PAUSE = 0.2  # seconds for calls that are on their way when the server is stopped


class RpcServer:
    """The gRPC server; make, use and stop it on the event loop.

    `images` is the shape `[N, C, H, W]` of the most images that one request may hold.
    """

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        access: Access,
        *,
        limits: Limits,
        memory: Memory,
        images: tuple[int, ...],
    ) -> None:
        self._service = service
        self._metrics = metrics
        size = max_message_size(limits, images)
        self._receiver = MessageReceiver(limits, memory, size)
        self._max_parsed = limits.json
        self._workers = ThreadPoolExecutor(_PARSER_THREADS, thread_name_prefix="eps-rpc-parse")
        self._interceptor = RpcInterceptor(access, max_calls=limits.connections)
        handlers = {
            name: self._interceptor.handler(name, method, open=open)
            for name, method, open in (
                ("ServerLive", self._server_live, True),
                ("ServerReady", self._server_ready, True),
                ("ServerMetadata", self._server_metadata, False),
                ("ModelReady", self._model_ready, False),
                ("ModelMetadata", self._model_metadata, False),
                ("ModelInfer", self._model_infer, False),
            )
        }
        self._stopping: asyncio.Task[None] | None = None
        self._server = RegisteredServer(
            handlers, self._interceptor.reject_unknown, _channel_options(limits, size)
        )

    async def start(self, address: str, port: int) -> int:
        """Listen, and return the port: for 0 a free one. Raises ConfigError: it is taken.

        `address`: as in a URL; an IP address, because grpcio would listen on several for one name.
        """
        try:
            found: int = self._server.add_insecure_port(f"{address}:{port}")
        except RuntimeError:
            raise ConfigError(
                f"--grpc-port {port}: cannot be listened on; choose another"
            ) from None
        await self._server.start()
        return found

    async def wait(self) -> None:
        """Wait until the server has ended. Raises what ended it, if not :meth:`stop`."""
        await self._server.wait_for_termination()

    async def stop(self, grace: float) -> None:
        """Accept no more calls, and answer accepted ones within `grace` seconds.

        When it is stopped, gRPC's core drops calls that have arrived and are not accepted yet, and
        those that come until its clients know. So all answers are held back for a moment: a client
        that waits for one sends nothing else, and learns with it that this connection ends.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace))
        await self._stopping

    async def _stop(self, grace: float) -> None:
        self._interceptor.released.clear()
        await asyncio.sleep(_DRAIN_PAUSE)
        stopping = asyncio.create_task(self._server.stop(grace))
        await asyncio.sleep(0)  # now every client is being told
        self._interceptor.released.set()
        await stopping

    # -- Methods

    async def _server_live(self, context: Any) -> bytes:
        return _encode(protocol.ServerLiveResponse(live=self._service.live))

    async def _server_ready(self, context: Any) -> bytes:
        return _encode(protocol.ServerReadyResponse(ready=self._service.ready))

    async def _server_metadata(self, context: Any) -> bytes:
        return _encode(protocol.ServerMetadataResponse(**server_metadata("classification")))

    async def _model_ready(self, context: Any) -> bytes:
        """False, like Triton, also for a model that does not exist or is not loaded."""
        message = await self._read_model(context)
        try:
            _check(message, self._service.current.signature)
            ready = self._service.ready
        except ApiError:
            ready = False
        return _encode(protocol.ModelReadyResponse(ready=ready))

    async def _model_metadata(self, context: Any) -> bytes:
        message = await self._read_model(context)
        model = self._service.current.model
        _check(message, model.signature)
        return _encode(protocol.ModelMetadataResponse(**model.metadata()))

    async def _model_infer(self, context: Any) -> bytes:
        began = time.perf_counter()
        with self._service.current.used() as served:
            if self._service.room < 1:  # known before a byte of its message is received
                raise served.batcher.queue_full()
            async with self._receiver.message(context) as content:
                rest, raw = split_raw_tensors(content)
                work = partial(read_infer, rest, raw, served.signature)
                request = await parse_request(
                    work,
                    len(rest),
                    limit=self._max_parsed,
                    workers=self._workers,
                    told=("beside raw_input_contents", "there"),
                )
                # Within the request's own timeout and the client's deadline. When the client goes
                # away grpcio cancels this, and the images leave the queue.
                timeouts = (request.timeout, context.time_remaining())
                timeout = min((each for each in timeouts if each is not None), default=None)
                job = served.batcher.submit(request.images)
                logits = await served.batcher.infer(job, timeout)
            answer = write_infer(request, logits, served.signature)
        self._metrics.inferred(time.perf_counter() - began, len(logits))
        return answer

    async def _read_model(self, context: Any) -> protocol.ModelMetadataRequest:
        """Receive a ModelMetadataRequest, or a ModelReadyRequest, which looks the same."""
        async with self._receiver.message(context) as content:
            if len(content) > _MAX_NAME_MESSAGE:
                raise too_large(
                    f"the message is larger than the {_MAX_NAME_MESSAGE} bytes that are accepted"
                )
            return _parse(protocol.ModelMetadataRequest, content)


def _check(message: protocol.ModelMetadataRequest, model: Signature) -> None:
    model.check(message.name, message.version or model.version)


def _channel_options(limits: Limits, size: int) -> list[tuple[str, int]]:
    """Channel arguments, by the names in gRPC's `channel_arg_names.h`."""
    return [
        ("grpc.so_reuseport", 0),  # otherwise two servers would share a port
        ("grpc.max_receive_message_length", size),  # compressed, and unpacked
        ("grpc.max_metadata_size", limits.header),
        ("grpc.absolute_max_metadata_size", limits.header),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_concurrent_streams", limits.connections),
        ("grpc.server_handshake_timeout_ms", int(limits.header_seconds * 1000)),
        ("grpc.max_connection_idle_ms", limits.idle_seconds * 1000),
        ("grpc.max_connection_age_ms", 600_000),  # then a client reconnects, perhaps elsewhere
        ("grpc.max_connection_age_grace_ms", 60_000),
        ("grpc.keepalive_time_ms", 60_000),  # then a silent client with a call is pinged
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # of a client without a call
    ]
