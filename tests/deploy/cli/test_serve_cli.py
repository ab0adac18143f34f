"""`eps-serve` as its users meet it: the real command, real clients, real signals."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio

from eps_deploy.bundle import load_bundle, open_engine
from eps_deploy.cli.serve import main
from eps_deploy.engines.base import Images, Logits
from tests.commands import run
from tests.deploy.conftest import reseal
from tests.deploy.serving.documented import document, run_client
from tests.deploy.serving.running import COMMAND, MODEL, Process, command, read_all, until

NAME = "eps_resnet"


@pytest.fixture(scope="module")
def served(deployed: Path) -> Iterator[Process]:
    """One server for all tests that do not end it; each request is run by itself."""
    with command(deployed / "bundle", "--no-batching", "--log-requests") as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0


@pytest.fixture(scope="module")
def loading(deployed: Path) -> Iterator[Process]:
    with command(deployed / "bundle", "--allow-load") as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def samples(deployed: Path) -> tuple[Images, Logits]:
    """Real images, and what the engine itself answers for all of them in one batch."""
    bundle = load_bundle(deployed / "bundle")
    with np.load(deployed / "bundle" / "samples.npz") as stored:
        images = stored["images"][:7]
    with open_engine(bundle) as engine:
        return images, engine.infer(images)


def asked(module: Any, images: Images, *, binary: bool = True) -> Any:
    given = module.InferInput("images", list(images.shape), "UINT8")
    given.set_data_from_numpy(images, binary_data=binary)
    return [given]


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_tritonclient(served: Process, samples: tuple[Images, Logits], binary: bool) -> None:
    """NVIDIA's own client, unchanged: the engine's logits bit for bit."""
    images, logits = samples
    module = tritonclient.http
    with module.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        wanted = [module.InferRequestedOutput("logits", binary_data=binary)]
        inputs = asked(module, images, binary=binary)
        result = client.infer(NAME, inputs, outputs=wanted, request_id="7", timeout=10**7)
        np.testing.assert_array_equal(result.as_numpy("logits"), logits)
        assert result.get_response()["id"] == "7"
        if binary:
            result = client.infer(NAME, inputs)  # it asks for all outputs as bytes then
            np.testing.assert_array_equal(result.as_numpy("logits"), logits)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_tritonclient_aio(served: Process, samples: tuple[Images, Logits], binary: bool) -> None:
    images, logits = samples
    module = tritonclient.http.aio

    async def ask() -> list[Any]:
        async with module.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
            wanted = [module.InferRequestedOutput("logits", binary_data=binary)]
            every = (
                client.infer(NAME, asked(module, images, binary=binary), outputs=wanted)
                for _ in range(8)
            )
            return await asyncio.gather(*every)

    for result in asyncio.run(ask()):
        np.testing.assert_array_equal(result.as_numpy("logits"), logits)


def test_tritonclient_asks_about_the_server(served: Process) -> None:
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(NAME)
        assert client.is_model_ready(NAME, "1")
        assert not client.is_model_ready("other")
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        told = client.get_model_metadata(NAME)
        assert told["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 1, 8, 8]}]
        assert told["outputs"][0]["shape"] == [-1, 10]
        assert client.get_model_config(NAME)["max_batch_size"] == 32
        assert client.get_model_repository_index()[0]["state"] == "READY"
        (statistics,) = client.get_inference_statistics(NAME)["model_stats"]
        assert statistics["inference_count"] >= statistics["execution_count"]


def test_tritonclient_gets_labels(served: Process, samples: tuple[Images, Logits]) -> None:
    images, logits = samples
    module = tritonclient.http
    with module.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        wanted = [module.InferRequestedOutput("logits", class_count=3)]
        words = client.infer(NAME, asked(module, images), outputs=wanted).as_numpy("logits")
    assert words.shape == (7, 3)
    for row, (word, *_) in zip(logits, words, strict=True):
        _, index, label = word.decode().split(":")
        assert int(index) == row.argmax() == int(label)


def test_a_refusal_reaches_tritonclient(served: Process) -> None:
    module = tritonclient.http
    with module.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        wrong = np.zeros((1, 1, 9, 9), np.uint8)
        with pytest.raises(module.InferenceServerException, match=r"shape of 'images' is \[N, 1"):
            client.infer(NAME, asked(module, wrong))
        with pytest.raises(module.InferenceServerException, match="unknown model"):
            client.infer("other", asked(module, np.zeros((1, 1, 8, 8), np.uint8)))


def test_pictures(served: Process, deployed: Path) -> None:
    """The labels that eps-predict gives."""
    from eps_deploy.cli.predict import main as predict

    paths = sorted((deployed / "bundle" / "examples").glob("*.png"))
    said = run("eps-predict", predict, "bundle", *paths, "--top", "3", "--json", cwd=deployed)
    for path, wanted in zip(paths, json.loads(said.stdout)["predictions"], strict=True):
        answer = served.post("/v1/classify?top=3", path.read_bytes())
        assert answer.status == 200
        assert answer.json["predictions"] == wanted["top"]
        assert answer.json["model_name"] == NAME


def test_the_documented_curl(served: Process, deployed: Path) -> None:
    (line,) = re.findall(r"^curl --data-binary .*$", document(), re.MULTILINE)
    picture = sorted((deployed / "bundle" / "examples").glob("label-3-*.png"))[0]
    line = re.sub(r"@\S+", f"@{picture}", line).replace(":8000", f":{served.port}")
    done = subprocess.run(["sh", "-c", f"{line} --silent"], capture_output=True, check=True)
    assert len(json.loads(done.stdout)["predictions"]) == 2


def test_the_documented_client(served: Process) -> None:
    assert run_client("tritonclient.http", 8000, served.port) == "(3, 10) float32\n"


def test_the_openapi_document_names_paths_that_are_there(served: Process) -> None:
    told = served.get("/openapi.json").json
    for path, operations in told["paths"].items():
        (method,) = operations.keys() - {"parameters"}
        answer = served.ask(method.upper(), path.format(version=1), b"")
        assert answer.status not in (404, 405), path
        if answer.status != 200:
            assert answer.error
    assert f"{MODEL}/infer" in told["paths"]


def test_what_the_server_says_of_itself_names_no_path(served: Process, deployed: Path) -> None:
    for path in ("/v2", MODEL, f"{MODEL}/config", f"{MODEL}/stats", "/v1/card", "/v1/figures"):
        answer = served.get(path)
        assert answer.status == 200, path
        assert answer.json
        assert str(deployed).encode() not in answer.body, path
    card = served.get("/v1/card").json
    assert card["blocks"] == {"baseline": 6, "compact": 3}
    assert card["passed"] is True
    assert "eps_requests_total" in served.get("/metrics").body.decode()
    assert served.get("/").headers["content-type"] == "text/html; charset=utf-8"


def test_requests_are_logged_with_their_identifiers(served: Process) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    answer = served.get("/v2", X_Request_ID="mine-1", traceparent=trace)
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["traceparent"] == trace

    def logged() -> list[dict[str, Any]]:
        return [entry for entry in served.logged if entry.get("x_request_id") == "mine-1"]

    until(logged)
    entries = logged()
    assert [(entry["path"], entry["status"]) for entry in entries] == [("/v2", 200)]
    assert entries[0]["traceparent"] == trace


def test_a_token(deployed: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("correct-horse-battery\n")
    with command(deployed / "bundle", "--token-file", tmp_path / "token") as process:
        process.wait_ready()  # probes need none
        assert process.get("/").status == 200
        for headers in (
            {},
            {"Authorization": "correct-horse-battery"},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer correct-horse-batter"},
            {"Authorization": "Basic correct-horse-battery"},
        ):
            for path in ("/v2", "/metrics", "/v1/card", "/nowhere"):
                answer = process.get(path, **headers)
                assert answer.status == 401, (path, headers)
                assert "token" in answer.error
                assert answer.headers["www-authenticate"] == "Bearer"
        assert process.get("/v2", Authorization="Bearer correct-horse-battery").status == 200
        assert not any("horse" in line for line in process.lines)


def test_a_request_that_runs_is_answered_after_sigterm(deployed: Path) -> None:
    """A body that is still on its way when the signal comes."""
    with command(deployed / "bundle") as process:
        process.wait_ready()
        picture = next((deployed / "bundle" / "examples").glob("*.png")).read_bytes()
        head = f"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-length: {len(picture)}\r\n\r\n"
        with process.open() as connection:
            connection.sendall(head.encode() + picture[:20])
            assert process.get("/v2/health/live").status == 200  # the head has been read by then
            process.process.send_signal(signal.SIGTERM)
            until(lambda: any("stopping" in line for line in process.lines))
            connection.sendall(picture[20:])
            received = read_all(connection)
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b"predictions" in received
        assert process.wait() == 0


def test_every_accepted_request_is_answered_under_load(deployed: Path) -> None:
    """SIGTERM while eight clients ask without a pause, each on one connection that is kept."""
    body = json.dumps(
        {
            "inputs": [
                {"name": "images", "datatype": "UINT8", "shape": [1, 1, 8, 8], "data": [0] * 64}
            ]
        }
    ).encode()
    answers: list[int] = []
    lost: list[BaseException] = []
    with command(deployed / "bundle") as process:
        process.wait_ready()

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", process.port)
            try:
                while True:
                    connection.request("POST", f"{MODEL}/infer", body)
                    with connection.getresponse() as response:
                        response.read()
                        answers.append(response.status)
            except ConnectionRefusedError:
                pass  # the answer before said that the server closes the connection
            except (OSError, http.client.HTTPException) as error:
                lost.append(error)
            finally:
                connection.close()

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) >= 100)
        assert process.stop() == 0
        for thread in threads:
            thread.join()
    assert set(answers) == {200}
    assert lost == []


def test_a_second_signal_ends_it_at_once(deployed: Path) -> None:
    with command(deployed / "bundle") as process:
        process.wait_ready()
        with process.open() as connection:
            connection.sendall(b"POST /v1/classify HTTP/1.1\r\ncontent-length: 9\r\n\r\n")
            process.get("/v2/health/live")
            process.process.send_signal(signal.SIGINT)
            until(lambda: any("stopping" in line for line in process.lines))
            assert process.stop() == 128 + signal.SIGTERM


def test_a_new_bundle_without_losing_a_request(
    deployed: Path, bundle: Path, samples: tuple[Images, Logits]
) -> None:
    images, logits = samples
    module = tritonclient.http
    with command(bundle, "--allow-load", "--no-batching") as process:
        process.wait_ready()
        url = f"127.0.0.1:{process.port}"
        done = threading.Event()
        answers: list[bool] = []

        def ask() -> None:
            with module.InferenceServerClient(url) as client:
                while not done.is_set():
                    result = client.infer(NAME, asked(module, images)).as_numpy("logits")
                    answers.append(np.array_equal(result, logits))

        thread = threading.Thread(target=ask)
        thread.start()
        with module.InferenceServerClient(url) as client:
            client.load_model(NAME)
            before = len(answers)
            client.load_model(NAME)
            until(lambda: len(answers) > before)
            # A bundle that is damaged is not loaded, and the one before goes on.
            content = (bundle / "model.onnx").read_bytes()
            (bundle / "model.onnx").write_bytes(content[:-1])
            with pytest.raises(module.InferenceServerException, match="served on") as caught:
                client.load_model(NAME)
            assert str(bundle) not in str(caught.value)
            with pytest.raises(module.InferenceServerException, match="no parameters"):
                client.load_model(NAME, config="{}")
        done.set()
        thread.join()
        assert answers
        assert all(answers)
        until(lambda: any("model.onnx: " in line for line in process.lines))
        assert process.stop() == 0


def test_loading_is_off_unless_asked_for(served: Process) -> None:
    answer = served.post(f"/v2/repository/models/{NAME}/load")
    assert answer.status == 403
    assert "--allow-load" in answer.error


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 403),
        ({"Content-Type": "Application/X-WWW-Form-Urlencoded; charset=utf-8"}, 403),
        ({"Content-Type": "multipart/form-data"}, 403),
        ({"Origin": "https://example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "https://example.org", "Content-Type": "application/json"}, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({}, 200),  # NVIDIA's client
    ],
)
def test_no_web_page_can_have_the_bundle_loaded(
    loading: Process, headers: dict[str, str], status: int
) -> None:
    """What a browser sends for any page without asking this server first (CORS: simple)."""
    answer = loading.post(f"/v2/repository/models/{NAME}/load", b"{}", **headers)
    assert answer.status == status
    if status == 403:
        assert "application/json" in answer.error
        # What a page sends otherwise the browser asks for first, and it is told no.
        assert loading.ask("OPTIONS", f"/v2/repository/models/{NAME}/load").status == 405


def refused(deployed: Path, *args: object) -> str:
    """The one line with which the command refuses, before it serves anything."""
    result = run("eps-serve", main, *args, cwd=deployed)
    assert (result.code, result.stdout) == (1, ""), result.stderr
    assert result.error.startswith("eps-serve: error: ")
    return result.error


def test_what_is_no_bundle(deployed: Path, bundle: Path) -> None:
    assert "no such folder" in refused(deployed, "nowhere")
    (bundle / "model.onnx").write_bytes(b"x")
    assert "model.onnx" in refused(deployed, bundle)


def test_a_port_that_is_taken(deployed: Path, served: Process) -> None:
    error = refused(deployed, "bundle", "--port", served.port)
    assert f"--port {served.port}: Address already in use" in error


def test_an_address_that_is_none(deployed: Path) -> None:
    assert "--host 256.1.1.1" in refused(deployed, "bundle", "--host", "256.1.1.1")


@pytest.mark.parametrize("token", ["", "short", "two words of a token"])
def test_a_token_that_is_none(deployed: Path, tmp_path: Path, token: str) -> None:
    (tmp_path / "token").write_text(token)
    assert "--token-file" in refused(deployed, "bundle", "--token-file", tmp_path / "token")
    assert "cannot be read" in refused(deployed, "bundle", "--token-file", tmp_path / "missing")


NO_CUDA = """
import onnxruntime
onnxruntime.get_available_providers = lambda: ["CPUExecutionProvider"]
"""
# Stands in for a GPU: what is asked to run on CUDA runs on the CPU, and says CUDA.
WITH_CUDA = """
from eps_deploy.engines import ort
session = ort.open_session
ort.open_session = lambda model, **options: session(model, **{**options, "provider": "cpu"})
class OnCpu(ort.CudaSession):
    def infer(self, images):
        return self.session.run([ort.OUTPUT_NAME], {ort.INPUT_NAME: images})[0]
ort.CudaSession = OnCpu
"""


def test_a_provider_that_is_not_there_ends_the_server(deployed: Path) -> None:
    """It listens by then, so that probes see that it is alive; it must not stay like this."""
    with command(deployed / "bundle", "--provider", "cuda", before=NO_CUDA) as process:
        assert process.wait() == 1
        assert process.lines[-1].startswith("eps-serve: error: ")
        assert "CUDA" in process.lines[-1]
        assert "--provider cpu" in process.lines[-1]


@pytest.mark.parametrize(
    ("options", "before", "granted"),
    [
        ([], NO_CUDA, "CPUExecutionProvider"),
        ([], WITH_CUDA, "CUDAExecutionProvider"),
        (["--provider", "cpu"], WITH_CUDA, "CPUExecutionProvider"),
        (["--provider", "cuda"], WITH_CUDA, "CUDAExecutionProvider"),
    ],
)
def test_the_provider_is_chosen_and_told(
    deployed: Path, options: list[str], before: str, granted: str
) -> None:
    """The ready line, the card and Triton's configuration name what really runs."""
    with command(deployed / "bundle", *options, before=before) as process:
        process.wait_ready()
        until(lambda: any(entry["message"] == "ready" for entry in process.logged))
        (ready,) = (entry for entry in process.logged if entry["message"] == "ready")
        assert (ready["provider"], ready["runtime"]) == (granted, "onnxruntime")
        assert process.get("/v1/card").json["engine"]["provider"] == granted
        config = process.get(f"{MODEL}/config").json
        assert config["parameters"]["execution_provider"] == {"string_value": granted}
        kind = "KIND_CPU" if granted.startswith("CPU") else "KIND_GPU"
        assert config["instance_group"] == [{"count": 1, "kind": kind}]


def test_a_bundle_made_on_a_gpu_is_served_without_one_and_says_so(bundle: Path) -> None:
    reseal(bundle, lambda fields: fields["engine"].update(provider="CUDAExecutionProvider"))
    with command(bundle, before=NO_CUDA) as process:
        process.wait_ready()
        until(lambda: any("not served by CUDAExecutionProvider" in line for line in process.lines))


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_provider_for_a_tensorrt_bundle(bundle: Path, tmp_path: Path, provider: str) -> None:
    reseal(bundle, lambda fields: fields["engine"].update(name="trt", deferred=True))
    options = ("--engine-cache", tmp_path / "cache", "--provider", provider)
    with command(bundle, *options) as process:
        assert process.wait() == 1
        assert f"--provider {provider}: only applies to ONNX Runtime" in process.lines[-1]


@pytest.mark.parametrize(
    "option", [["--max-queue", 0], ["--instances", 0], ["--port", 70000], ["--max-delay-ms", "nan"]]
)
def test_usage(deployed: Path, option: list[object]) -> None:
    assert run("eps-serve", main, "bundle", *option, cwd=deployed).code == 2


def test_no_torch_is_needed(deployed: Path) -> None:
    """In a process in which torch and everything for training cannot be imported."""
    blocked = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "onnx", "sklearn", "matplotlib"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""
    arguments = [str(deployed / "bundle"), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", blocked + COMMAND, *arguments], stderr=subprocess.PIPE, text=True
    )
    server = Process(process)
    server.wait_ready()
    assert server.stop() == 0
    assert process.stderr is not None
    process.stderr.close()
