"""`eps-deploy --name`: the model's name for clients and Triton."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton_pb

from eps_core.errors import FileFormatError
from eps_deploy.bundle import load_bundle
from tests.deploy.conftest import deploy, reseal
from tests.deploy.serving.running import command, until
from tests.deploy.serving.test_openapi import infer

NAME = "my-cifar.v2"


@pytest.fixture(scope="module")
def named(deployed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    for name in ("ckpt.pt", "compact.pt", "baseline.pt"):
        shutil.copy(deployed / name, folder)
    goals = ("--min-speedup", 0, "--max-accuracy-drop", 100)
    result = deploy(folder, "--name", NAME, *goals)
    assert result.code == 0, result.stderr
    assert json.loads((folder / "bundle" / "manifest.json").read_bytes())["name"] == NAME
    assert f"--name {NAME}" in (folder / "bundle" / "reproduce.sh").read_text()
    return folder / "bundle"


def test_the_server_answers_to_it(named: Path, deployed: Path) -> None:
    """On every path that has a name, in every answer, in the document, and on the page."""
    with command(named, "--allow-load") as process:
        process.wait_ready()
        model = f"/v2/models/{NAME}"
        for path in (model, f"{model}/ready", f"{model}/config"):
            assert process.get(path).json["name"] == NAME, path
        assert process.get("/v1/card").json["name"] == NAME  # which the page shows
        assert process.post(f"{model}/infer", infer()).json["model_name"] == NAME
        image = next((named / "examples").glob("*.png")).read_bytes()
        assert process.post("/v1/classify", image).json["model_name"] == NAME
        assert process.post("/v2/repository/index").json[0]["name"] == NAME
        assert f"{model}/infer" in process.get("/openapi.json").json["paths"]
        load = f"/v2/repository/models/{NAME}/load"
        assert process.post(load).status == 200
        assert process.get("/v2/models/eps_resnet").status == 404
        assert process.post("/v2/models/eps_resnet/infer", infer()).status == 404
        # Clients know the name that the server started with.
        reseal(named, lambda fields: fields.update(name="other"))
        assert process.post(load).status == 400
        until(lambda: any("its model is called other now" in line for line in process.lines))
        assert process.post(f"{model}/infer", infer()).status == 200
        reseal(named, lambda fields: fields.update(name=NAME))


def test_two_bundles_in_one_triton_repository(named: Path, deployed: Path, tmp_path: Path) -> None:
    for bundle in (named, deployed / "bundle"):
        shutil.copytree(bundle / "triton", tmp_path, dirs_exist_ok=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eps_resnet", NAME]
    for folder in tmp_path.iterdir():
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
        assert text_format.Parse(text, triton_pb.ModelConfig()).name == folder.name


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", 'a"b', "-x", "é", "x" * 64, "stats"])
def test_invalid_names(workshop: Path, name: str) -> None:
    result = deploy(workshop, "--name", name, "--dry-run")
    assert (result.code, result.stdout) == (1, "")
    assert result.error.startswith("eps-deploy: error: --name: model name ")


def test_a_bundle_from_before_there_were_names(bundle: Path) -> None:
    reseal(bundle, lambda fields: fields.pop("name"))
    assert load_bundle(bundle).name == "eps_resnet"


@pytest.mark.parametrize("name", ["../x", "a/b", 7, None, ["x"]])
def test_a_forged_name(bundle: Path, name: object) -> None:
    reseal(bundle, lambda fields: fields.update(name=name))
    with pytest.raises(FileFormatError, match="not a usable manifest"):
        load_bundle(bundle)
