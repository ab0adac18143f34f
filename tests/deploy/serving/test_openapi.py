"""The OpenAPI document matches the server's routes, answers and errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from eps_deploy.serving.app import Api, openapi
from eps_deploy.serving.limits import Limits, Memory
from eps_deploy.serving.protocol import Signature
from eps_deploy.serving.service import Service
from tests.deploy.serving.blocked import ONE, filled, read_one
from tests.deploy.serving.running import MODEL, Answer, Client, Process, command, until

TOKEN = "0123456789abcdef"
VERSIONED = f"{MODEL}/versions/{{version}}"
LOAD = "/v2/repository/models/eps_resnet/load"
SPECIAL = ("retry-after", "www-authenticate", "allow", "accept-encoding")
HEADER = "Inference_Header_Content_Length"


class Document:
    """An OpenAPI document, against which answers are held."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        resource = DRAFT202012.create_resource(document)
        self._registry: Registry[Any] = Registry().with_resource("urn:api", resource)

    def schema_errors(self, value: Any, *at: str) -> list[str]:
        pointer = "/".join(part.replace("~", "~0").replace("/", "~1") for part in at)
        validator = Draft202012Validator({"$ref": f"urn:api#/{pointer}"}, registry=self._registry)
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]

    def hold(self, answer: Answer, method: str, path: str) -> None:
        """Raise AssertionError where an answer is not as it should be."""
        code = str(answer.status)
        at = ["paths", path, method, "responses", code]
        responses = self.document["paths"][path][method]["responses"]
        assert code in responses, (method, path, code, answer.body)
        if "$ref" in responses[code]:
            at = responses[code]["$ref"].split("/")[1:]
        response = self.document
        for part in at:
            response = response[part]
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in response["content"], (path, code, kind)
        if kind == "application/json":
            found = self.schema_errors(answer.json, *at, "content", kind, "schema")
            assert not found, (method, path, code, found)
        told = {name.lower() for name in response["headers"]}
        assert {name for name in SPECIAL if name in answer.headers} <= told, (path, code)


def document_of(client: Client, **headers: str) -> Document:
    return Document(client.get("/openapi.json", **headers).json)


def infer(**changes: Any) -> bytes:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 8, 8], "data": [3] * 64}
    return json.dumps(
        {"id": "one", "inputs": [tensor | changes.pop("tensor", {})], **changes}
    ).encode()


@pytest.fixture(scope="module")
def served(deployed: Path) -> Iterator[Process]:
    """With a shadow that runs all, and small bodies."""
    options = ("--shadow", "baseline", "--shadow-share", 1, "--max-body", 1, "--allow-load")
    with command(deployed / "bundle", *options) as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0


@pytest.fixture(scope="module")
def document(served: Process) -> Document:
    return document_of(served)


def test_the_document_is_valid(document: Document) -> None:
    """Schemas are schemas, and what is referred to is there."""
    assert urljoin("https://host/prefix/openapi.json", document.document["servers"][0]["url"]) == (
        "https://host/prefix/"
    )
    assert document.document["openapi"].startswith("3.1.")
    for schema in document.document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    names = [document.document]
    while names:
        part = names.pop()
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                found: Any = document.document
                for name in part["$ref"].removeprefix("#/").split("/"):
                    found = found[name]
            names += part.values()
        elif isinstance(part, list):
            names += part


def test_every_route_is_documented(document: Document) -> None:
    nothing: Any = None
    api = Api(nothing, nothing, limits=Limits(), memory=Memory(0), allow_load=True)
    routes = {
        (path.replace("{model}", "eps_resnet"), method.lower()) for path, method, *_ in api.routes()
    }
    documented = {
        (path, method)
        for path, item in document.document["paths"].items()
        for method in item.keys() - {"parameters"}
    }
    assert documented == routes - {("/favicon.ico", "get")}
    # Routes are compared in order, for every request: those of inference come first.
    assert all(path.endswith("/infer") for path, *_ in api.routes()[:2])


@pytest.mark.parametrize("most", [None, 1, 3])
def test_no_placeholder_is_left(most: int | None) -> None:
    """With a model and without; `{version}` is a parameter of paths."""
    signature = None
    if most is not None:
        signature = Signature(
            name="m", version="1", input_shape=(3, 8, 9), labels=("a",), max_images=most
        )
    found = openapi("m", signature)
    assert set(re.findall(r"\{[a-z_]+\}", json.dumps(found))) == {"{version}"}
    tensors = found["components"]["schemas"]["InferRequest"]["properties"]["inputs"]["items"]
    assert len(tensors["anyOf"]) == (2 if most == 3 else 1)


def test_the_document_before_the_model_is_loaded() -> None:
    nothing = Document(openapi("eps_resnet", None))
    assert not nothing.schema_errors(json.loads(infer()), "components", "schemas", "InferRequest")


def test_every_get(served: Process, document: Document) -> None:
    """Before the network was asked for anything, and after."""
    read = [path for path, item in document.document["paths"].items() if "get" in item]
    assert len(read) >= 17
    for _ in range(2):
        for path in read:
            answer = served.get(path.format(version="1"))
            assert answer.status == 200, path
            document.hold(answer, "get", path)
        assert served.post(f"{MODEL}/infer", b"{").status == 400
        assert served.post(f"{MODEL}/infer", infer()).status == 200
        until(lambda: served.get("/v1/figures").json["shadow"]["images"] > 0)


def test_every_post(served: Process, document: Document, deployed: Path) -> None:
    image = next((deployed / "bundle" / "examples").glob("*.png")).read_bytes()
    best = {"name": "logits", "parameters": {"classification": 3}}
    raw = {"name": "logits", "parameters": {"binary_data": True}}
    for path, body, headers in (
        ("/v2/repository/index", b"", {}),
        (LOAD, b"{}", {}),
        (LOAD, b'{"parameters": {"config": null}}', {}),
        ("/v1/classify", image, {}),
        (f"{MODEL}/infer", infer(), {}),
        (f"{MODEL}/infer", infer(outputs=[best]), {}),
        (f"{MODEL}/infer", infer(outputs=[raw]), {}),
        (f"{MODEL}/infer", bytes(64), {HEADER: "0"}),
        (f"{VERSIONED}/infer", infer(), {}),
    ):
        answer = served.post(path.format(version="1"), body, **headers)
        assert answer.status == 200, (path, answer.body)
        document.hold(answer, "post", path)
        told = answer.headers.get("inference-header-content-length")
        if told is not None:  # raw bytes, and what stands before them is described too
            head = json.loads(answer.body[: int(told)])
            assert not document.schema_errors(head, "components", "schemas", "InferAnswer")


@pytest.mark.parametrize(
    ("body", "right"),
    [
        (infer(), True),
        (infer(tensor={"data": [[[[0] * 8] * 8]]}), True),
        (infer(tensor={"shape": [2, 1, 8, 8], "data": [0] * 128}), True),
        (infer(tensor={"shape": [2, 1, 8, 8], "data": [[[[0] * 8] * 8]] * 2}), True),
        (infer(outputs=None, parameters=None), True),
        (infer(outputs=[], parameters={"timeout": 60_000_000, "other": 1}), True),
        (infer(id=None), True),
        (infer(parameters={"timeout": None, "binary_data_output": None}), True),
        (infer(tensor={"parameters": {"binary_data_size": None}}), True),
        (infer(tensor={"parameters": {"shared_memory_region": None}}), True),
        (
            infer(
                outputs=[
                    {
                        "name": "logits",
                        "parameters": {
                            "binary_data": None,
                            "classification": None,
                            "shared_memory_region": None,
                        },
                    }
                ]
            ),
            True,
        ),
        (infer(tensor={"data": [0] * 63}), False),
        (infer(tensor={"data": [0] * 63 + [256]}), False),
        (infer(tensor={"data": [0] * 63 + [-1]}), False),
        (infer(tensor={"data": [0] * 63 + [0.5]}), False),
        (infer(tensor={"shape": [1, 1, 8, 9]}), False),
        (infer(tensor={"shape": [1, 64]}), False),
        (infer(tensor={"shape": [257, 1, 8, 8]}), False),
        (infer(tensor={"datatype": "FP32"}), False),
        (infer(tensor={"name": "image"}), False),
        (infer(tensor={"parameters": {"shared_memory_region": "x"}}), False),
        (infer(id="x" * 257), False),
        (infer(inputs=[]), False),
        (infer(outputs=[{"name": "probabilities"}]), False),
        (infer(outputs=[{"name": "logits", "parameters": {"classification": -1}}]), False),
        (infer(parameters={"timeout": -1}), False),
        (infer(parameters={"binary_data_output": 1}), False),
        (b"[]", False),
    ],
    ids=lambda value: str(value)[:1] if isinstance(value, bool) else "",
)
def test_the_request_schema_and_the_server_agree(
    served: Process, document: Document, body: bytes, right: bool
) -> None:
    answer = served.post(f"{MODEL}/infer", body)
    assert answer.status == (200 if right else 400), answer.body
    found = document.schema_errors(json.loads(body), "components", "schemas", "InferRequest")
    assert bool(found) is not right
    document.hold(answer, "post", f"{MODEL}/infer")


def test_errors(served: Process, document: Document) -> None:
    large = bytes(1 << 20) + b"x"
    for status, method, path, body, headers in (
        (400, "POST", f"{MODEL}/infer", b"{", {}),
        (400, "POST", f"{MODEL}/infer", bytes(64), {HEADER: "65"}),
        (400, "POST", f"{MODEL}/infer", bytes(64), {HEADER: "99999999999"}),
        (400, "POST", "/v1/classify", b"no image", {}),
        (400, "POST", "/v1/classify?top=0", b"no image", {}),
        (400, "POST", "/v1/classify?top=", b"no image", {}),
        (400, "POST", LOAD, b'{"parameters": {"config": ""}}', {}),
        (404, "POST", f"{VERSIONED}/infer", infer(), {}),
        (404, "GET", f"{VERSIONED}/stats", None, {}),
        (405, "GET", f"{MODEL}/infer", None, {}),
        (405, "POST", "/v1/figures", b"", {}),
        (413, "POST", "/v1/classify", large, {}),
        (413, "POST", LOAD, large, {}),
        (415, "POST", f"{MODEL}/infer", infer(), {"Content_Encoding": "gzip"}),
    ):
        answer = served.ask(method, path.format(version="2"), body, **headers)
        assert answer.status == status, (path, answer.body)
        path = path.partition("?")[0]
        documented = next(iter(document.document["paths"][path].keys() - {"parameters"}))
        document.hold(answer, documented, path)
        assert answer.error
        assert ("--max-body" in answer.error) == (status == 413 and path != LOAD)


def test_errors_of_a_server_with_a_token(deployed: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    given = {"Authorization": f"Bearer {TOKEN}"}
    with command(deployed / "bundle", "--token-file", tmp_path / "token") as process:
        process.wait_ready()
        document = document_of(process, **given)
        for path, item in document.document["paths"].items():
            method = next(iter(item.keys() - {"parameters"}))
            answer = process.ask(method.upper(), path.format(version="1"))
            public = item[method].get("security") == [{}]
            assert answer.status == (200 if public else 401), path
            document.hold(answer, method, path)
        answer = process.ask("POST", LOAD, b"", **given)
        assert answer.status == 403
        document.hold(answer, "post", LOAD)


def test_a_busy_server(monkeypatch: pytest.MonkeyPatch, deployed: Path) -> None:
    with filled(monkeypatch, deployed) as full:
        document = document_of(full.client)
        with full.client.open() as connection:
            connection.sendall(ONE)
            answer = Answer(*read_one(connection))
        assert answer.status == 503
        document.hold(answer, "post", f"{MODEL}/infer")
        late = full.client.post(f"{VERSIONED}/infer".format(version="1"), infer())
        assert late.status == 503
        document.hold(late, "post", f"{VERSIONED}/infer")


def test_a_server_that_is_not_ready(monkeypatch: pytest.MonkeyPatch, deployed: Path) -> None:
    """Which says so while its last answer is on its way."""
    with filled(monkeypatch, deployed) as full:
        document = document_of(full.client)
        monkeypatch.setattr(Service, "ready", False)
        for path in ("/v2/health/ready", f"{MODEL}/ready"):
            answer = full.client.get(path)
            assert answer.status == 503
            document.hold(answer, "get", path)
        assert full.client.get("/openapi.json").status == 200


def test_errors_before_the_path_is_known(served: Process, document: Document) -> None:
    for status, data in (
        (400, b"GET\r\n\r\n"),
        (431, b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000 + b"\r\n\r\n"),
    ):
        head, _, body = served.raw(data).partition(b"\r\n\r\n")
        first, *lines = head.decode().lower().split("\r\n")
        assert first.split()[1] == str(status)
        answer = Answer(status, dict(line.split(": ", 1) for line in lines), body)
        document.hold(answer, "get", "/")


@pytest.mark.slow
def test_schemathesis(deployed: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """All its checks, with requests that are right and requests that are wrong by our OpenAPI."""
    with command(deployed / "bundle", "--shadow", "baseline", "--allow-load") as process:
        process.wait_ready()
        url = f"http://127.0.0.1:{process.port}/openapi.json"
        program = "from schemathesis.cli import schemathesis; schemathesis()"
        arguments = ("--checks=all", "--phases=examples,coverage,fuzzing", "--seed=0", "-n", "300")
        environment = {
            "PYTHONPATH": str(pytestconfig.rootpath),
            "SCHEMATHESIS_HOOKS": "tests.deploy.serving.schema_hooks",
        }
        done = subprocess.run(
            [sys.executable, "-c", program, "run", url, *arguments, "--continue-on-failure"],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-20_000:]
        assert not any("must not happen" in line for line in process.lines)
        figures = process.get("/v1/figures").json
        assert not {"internal", "engine"}.intersection(figures["refused"])
        assert process.stop() == 0
