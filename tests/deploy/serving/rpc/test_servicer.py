"""The gRPC server as a process: start, limits, shutdown."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as messages

from eps_deploy.cli.serve import main
from tests.commands import run
from tests.deploy.conftest import reseal
from tests.deploy.serving.rpc.blocked import blocked_server
from tests.deploy.serving.rpc.client import NAME, SERVICE, Caller, blank, caller, grpc_port, request
from tests.deploy.serving.rpc.http2 import begin
from tests.deploy.serving.running import Process, command, until

CODE = grpc.StatusCode
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"grpc", "open_inference"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
LOADING = """
import threading
from eps_deploy.serving import service
service.open_model = lambda *args, **options: threading.Event().wait()
"""
BROKEN = """
from eps_deploy.serving.rpc.servicer import RpcServer
async def wait(self):
    raise RuntimeError("grpcio is broken")
RpcServer.wait = wait
"""


@pytest.fixture(scope="module")
def process(deployed: Path) -> Iterator[Process]:
    with command(deployed / "bundle", "--grpc-port", "0", "--log-requests") as running:
        running.wait_ready()
        yield running
        assert running.stop() == 0


@pytest.fixture
def client(process: Process) -> Iterator[Caller]:
    with caller(grpc_port(process), **{"grpc.max_metadata_size": 1 << 25}) as connection:
        yield connection


def ready(client: Caller) -> bool:
    return bool(messages.ServerReadyResponse.FromString(client.send("ServerReady")).ready)


def test_a_message_that_is_too_large(client: Caller) -> None:
    error = client.refused(bytes(1 << 20))
    assert error.code() is CODE.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details()
    assert ready(client)


def test_a_compressed_message_that_is_too_large(process: Process, client: Caller) -> None:
    error = client.refused(bytes(1 << 26), compression=grpc.Compression.Gzip)
    assert error.code() is CODE.RESOURCE_EXHAUSTED
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    (peak,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 200 << 10  # KiB


def test_metadata_that_is_too_large(client: Caller) -> None:
    for size in (40_000, 10 << 20):
        error = client.refused(request(blank()), metadata=(("x", "y" * size),))
        assert error.code() is CODE.RESOURCE_EXHAUSTED
    assert client.infer(request(blank()), metadata=(("x", "y" * 20_000),)).outputs


def test_slow_clients_delay_no_other(process: Process, client: Caller) -> None:
    """Five hundred calls that have begun, on five connections, and send nothing."""
    path = f"/{SERVICE}/ModelInfer".encode()
    slow = [begin(grpc_port(process), path, 100) for _ in range(5)]
    until(lambda: held(process) > 499 * 65536)
    for _ in range(10):
        assert client.infer(request(blank())).outputs
    for connection in slow:
        connection.close()
    until(lambda: held(process) == 0)


def held(process: Process) -> float:
    """Bytes."""
    lines = process.get("/metrics").body.decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("eps_body_bytes "))


def test_calls_are_logged_with_their_identifiers(process: Process, client: Caller) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    given = (("x-request-id", "mine-1"), ("traceparent", trace))
    call = client.start(request(blank()), metadata=given)
    assert call.result()
    found = dict(call.trailing_metadata())
    assert (found["x-request-id"], found["traceparent"]) == ("mine-1", trace)

    def logged() -> list[dict[str, Any]]:
        return [entry for entry in process.logged if entry.get("x_request_id") == "mine-1"]

    until(logged)
    (entry,) = logged()
    assert (entry["method"], entry["status"]) == ("gRPC", "OK")
    assert entry["path"] == f"/{SERVICE}/ModelInfer"
    assert entry["traceparent"] == trace


def test_calls_are_counted_with_those_over_http(process: Process, client: Caller) -> None:
    def counts() -> tuple[int, int]:
        (told,) = process.get("/v2/models/stats").json["model_stats"]
        return told["inference_count"], told["inference_stats"]["success"]["count"]

    images, answers = counts()
    client.infer(request(blank(3)))
    assert counts() == (images + 3, answers + 1)


def test_a_port_that_is_taken(process: Process, deployed: Path) -> None:
    for port in (grpc_port(process), process.port):
        result = run("eps-serve", main, "bundle", "--port", "0", "--grpc-port", port, cwd=deployed)
        assert (result.code, result.stdout) == (1, "")
        assert f"--grpc-port {port}: Address already in use" in result.error


def test_a_token(deployed: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("correct-horse-battery\n")
    options = ("--token-file", tmp_path / "token", "--grpc-port", "0")
    right = (("authorization", "Bearer correct-horse-battery"),)
    with (
        command(deployed / "bundle", *options) as process,
        caller(grpc_port(process)) as client,
    ):
        process.wait_ready()
        assert ready(client)
        assert client.send("ServerLive")
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            error = client.refused(request(blank()), metadata=metadata)
            assert error.code() is CODE.UNAUTHENTICATED
            for method in ("ServerMetadata", "ModelMetadata", "ModelReady", "Other"):
                with pytest.raises(grpc.RpcError) as caught:
                    client.send(method, metadata=metadata)
                assert caught.value.code() is CODE.UNAUTHENTICATED
        assert client.infer(request(blank()), metadata=right).outputs
        assert client.send("ServerMetadata", metadata=right)
        assert not any("horse" in line for line in process.lines)


def test_a_model_that_is_still_being_loaded(deployed: Path) -> None:
    with (
        command(deployed / "bundle", "--grpc-port", "0", before=LOADING) as process,
        caller(grpc_port(process)) as client,
    ):
        assert messages.ServerLiveResponse.FromString(client.send("ServerLive")).live
        assert not ready(client)
        content = messages.ModelReadyRequest(name=NAME).SerializeToString()
        answer = messages.ModelReadyResponse.FromString(client.send("ModelReady", content))
        assert not answer.ready
        error = client.refused(request(blank()))
        assert error.code() is CODE.UNAVAILABLE
        assert error.details() == "the model is still being loaded"
        assert process.stop() == 0


def test_a_call_in_progress_is_answered_after_sigterm(deployed: Path) -> None:
    with blocked_server(deployed / "bundle") as server, caller(grpc_port(server)) as client:
        call = client.start(request(blank()))
        server.entered()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: any("stopping" in line for line in server.lines))
        server.go()
        assert call.result()
        assert server.wait() == 0


def test_a_second_signal_ends_it_at_once(deployed: Path) -> None:
    with blocked_server(deployed / "bundle") as server, caller(grpc_port(server)) as client:
        call = client.start(request(blank()))
        server.entered()
        server.process.send_signal(signal.SIGINT)
        until(lambda: any("stopping" in line for line in server.lines))
        assert server.stop() == 128 + signal.SIGTERM
        assert call.code() is CODE.UNAVAILABLE


class Load:
    """Clients that ask one after another without a pause, each on a connection of its own."""

    def __init__(self, port: int, clients: int) -> None:
        self.answers = 0
        self.errors: Counter[Any] = Counter()
        self._port = port
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with caller(self._port) as client:
            while not self._done.is_set():
                try:
                    client.infer(request(blank()))
                    self.answers += 1
                except grpc.RpcError as error:
                    closed = error.details().startswith("failed to connect")
                    self.errors["closed" if closed else error.details()] += 1
                    return

    def end(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


def test_no_call_is_lost_under_load(deployed: Path) -> None:
    """SIGTERM while eight clients ask: each finds the port closed, and has lost nothing before."""
    with command(deployed / "bundle", "--grpc-port", "0") as process:
        process.wait_ready()
        load = Load(grpc_port(process), 8)
        until(lambda: load.answers >= 100)
        assert process.stop() == 0
        load.end()
    assert load.errors == {"closed": 8}


def test_a_new_bundle_without_losing_a_call(bundle: Path) -> None:
    with command(bundle, "--allow-load", "--grpc-port", "0") as process:
        process.wait_ready()
        load = Load(grpc_port(process), 2)
        for _ in range(2):
            before = load.answers
            assert process.post(f"/v2/repository/models/{NAME}/load", b"{}").status == 200
            until(lambda before=before: load.answers > before + 10)
        load.end()
        assert not load.errors
        assert process.stop() == 0


def test_missing_packages(deployed: Path) -> None:
    """They are not imported unless they are needed, and missed in one line."""
    with command(deployed / "bundle", before=BLOCKED) as process:
        process.wait_ready()
        assert process.stop() == 0
    with command(deployed / "bundle", "--grpc-port", "0", before=BLOCKED) as process:
        assert process.wait() == 1
        told = "grpc is not installed; pip install 'eps-resnet[serve]'"
        assert process.lines == [f"eps-serve: error: {told}"]


def test_http_and_grpc_end_together(bundle: Path) -> None:
    with command(bundle, "--grpc-port", "0", before=BROKEN) as process:
        assert process.wait() == 1
        assert "grpcio is broken" in process.lines[-1]
    reseal(bundle, files={"model.onnx": b"no model"})
    with command(bundle, "--grpc-port", "0") as process:
        assert process.wait() == 1
        assert process.lines[-1].startswith("eps-serve: error: ")
