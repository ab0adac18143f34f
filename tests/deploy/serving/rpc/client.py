"""Calls for tests: messages of tritonclient's, sent as bytes to a server of another process.

The server's own messages cannot be imported here: protobuf has each name once in a process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages

from eps_deploy.engines.base import Images
from tests.deploy.serving.running import Process

NAME = "eps_resnet"
SERVICE = "inference.GRPCInferenceService"
PATIENCE = 60.0  # seconds


def grpc_port(process: Process) -> int:
    """Where a server that was started with `--grpc-port 0` listens."""
    found = (re.search(r"grpc://127\.0\.0\.1:(\d+)", line) for line in process.lines)
    return next(int(match[1]) for match in found if match)


class Caller:
    """One connection; what was refused is raised as grpc.RpcError."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def send(self, method: str, content: bytes = b"", **options: Any) -> bytes:
        """The answer to any bytes."""
        call = self.channel.unary_unary(f"/{SERVICE}/{method}")
        answer: bytes = call(content, timeout=options.pop("timeout", PATIENCE), **options)
        return answer

    def start(self, message: Any, **options: Any) -> Any:
        """An infer call that is under way."""
        options = {"timeout": PATIENCE, **options}
        return self.channel.unary_unary(f"/{SERVICE}/ModelInfer").future(
            message.SerializeToString(), **options
        )

    def infer(self, message: Any, **options: Any) -> Any:
        content = self.send("ModelInfer", message.SerializeToString(), **options)
        return messages.ModelInferResponse.FromString(content)

    def refused(self, message: Any, **options: Any) -> Any:
        """The error to an infer request, or to bytes."""
        content = message if isinstance(message, bytes) else message.SerializeToString()
        try:
            self.send("ModelInfer", content, **options)
        except grpc.RpcError as error:
            return error
        raise AssertionError("it was answered")


@contextmanager
def caller(port: int, **options: int) -> Iterator[Caller]:
    arguments = [("grpc.use_local_subchannel_pool", 1)]
    arguments += options.items()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=arguments) as channel:
        yield Caller(channel)


def request(images: Images, *, raw: bool = True, **changes: Any) -> Any:
    """A right request for these images, but for `changes` of its one input."""
    message = messages.ModelInferRequest(model_name=NAME)
    given = {"name": "images", "datatype": "UINT8", "shape": images.shape, **changes}
    tensor = message.inputs.add(**given)
    if raw:
        message.raw_input_contents.append(images.tobytes())
    else:
        tensor.contents.uint_contents.extend(images.ravel().tolist())
    return message


def blank(count: int = 1) -> Images:
    return np.zeros((count, 1, 8, 8), dtype=np.uint8)
