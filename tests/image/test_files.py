"""What can be held of the images' files without building an image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from eps_deploy.serving import healthcheck
from tests.image import dockerfile
from tests.meta.project import ROOT, pyproject, scripts
from tests.meta.test_text import check_usage

TARGETS = ("cpu", "cuda", "trt")
KUBERNETES = "1.32"
MANIFESTS = ROOT / "deploy" / "kubernetes"
STAGES = dockerfile.read(ROOT / "Dockerfile")


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): str(one.specifier) for one in requirements}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def resources() -> dict[str, dict[str, Any]]:
    """Kind -> resource, of the base."""
    listed = documents(MANIFESTS / "base/kustomization.yaml")[0]["resources"]
    found = [document for name in listed for document in documents(MANIFESTS / "base" / name)]
    return {document["kind"]: document for document in found}


def merged(into: Any, patch: Any) -> Any:
    """As kustomize does it: mappings by key, lists by the name of their entries."""
    if isinstance(into, dict) and isinstance(patch, dict):
        return into | {key: merged(into.get(key), value) for key, value in patch.items()}
    if isinstance(into, list) and isinstance(patch, list):
        entries = {entry["name"]: entry for entry in into}
        for entry in patch:
            entries[entry["name"]] = merged(entries.get(entry["name"]), entry)
        return list(entries.values())
    return patch


def container() -> dict[str, Any]:
    (only,) = resources()["Deployment"]["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def test_images_have_the_versions_that_the_tests_ran_with() -> None:
    images, tests = pins("deploy/image/constraints.txt"), pins("constraints.txt")
    both = images.keys() & tests.keys()
    assert {"numpy", "onnxruntime", "pillow"} <= both
    assert {name: images[name] for name in both} == {name: tests[name] for name in both}


@pytest.mark.parametrize("extra", ["ort", "ort-gpu", "trt", "serve"])
def test_what_images_install_is_pinned(extra: str) -> None:
    project = pyproject()["project"]
    listed = project["dependencies"] + project["optional-dependencies"][extra]
    names = {canonicalize_name(Requirement(line).name) for line in listed}
    assert names <= pins("deploy/image/constraints.txt").keys()


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_a_command_that_there_is(target: str) -> None:
    command = [
        *dockerfile.words(STAGES, target, "ENTRYPOINT"),
        *dockerfile.words(STAGES, target, "CMD"),
    ]
    assert command[0] in scripts()
    check_usage(command)


def test_the_cuda_image_never_serves_on_the_processor_in_silence() -> None:
    command = dockerfile.words(STAGES, "cuda", "ENTRYPOINT")
    assert command[-2:] == ["--provider", "cuda"]
    assert dockerfile.words(STAGES, "cuda", "CMD") == ["/models"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_is_not_root_and_tells_its_health(target: str) -> None:
    user = dockerfile.last(STAGES, target, "USER").partition(":")[0]
    pod = resources()["Deployment"]["spec"]["template"]["spec"]["securityContext"]
    assert int(user) == pod["runAsUser"] != 0
    check = json.loads(dockerfile.last(STAGES, target, "HEALTHCHECK").partition(" CMD ")[2])
    assert check == ["python", "-I", "-m", healthcheck.__name__]
    assert container()["readinessProbe"]["httpGet"]["path"] == healthcheck.PATH


def test_a_plan_that_is_being_built_is_not_ill() -> None:
    """Neither for Docker nor for Kubernetes, where no pod waits for the GPU of another one."""
    check = dockerfile.last(STAGES, "trt", "HEALTHCHECK")
    (minutes,) = re.findall(r"--start-period=(\d+)m ", check)
    assert int(minutes) >= 30
    spec = documents(MANIFESTS / "trt/gpu.yaml")[0]["spec"]
    assert spec["progressDeadlineSeconds"] >= 1800
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}


def test_what_runs_read_only_has_a_place_for_temporary_files() -> None:
    """CUDA's and TensorRT's caches are off in silence without one."""
    patch = documents(MANIFESTS / "trt/gpu.yaml")[0]
    for deployment in (resources()["Deployment"], merged(resources()["Deployment"], patch)):
        pod = deployment["spec"]["template"]["spec"]
        assert "/tmp" in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
        assert {"name": "tmp", "emptyDir": {}} in pod["volumes"]
    for service in documents(ROOT / "compose.yaml")[0]["services"].values():
        assert (service["read_only"], service["tmpfs"]) == (True, ["/tmp"])


def test_every_stage_and_every_file_is_there() -> None:
    for stage in STAGES.values():
        assert stage.base == "${BASE_IMAGE}" or stage.base in STAGES
        for word, rest in stage.instructions:
            if word != "COPY":
                continue
            options = [part for part in rest.split() if part.startswith("--")]
            sources = [part for part in rest.split() if not part.startswith("--")][:-1]
            origin = [part.partition("=")[2] for part in options if part.startswith("--from=")]
            assert set(origin) <= STAGES.keys()
            for source in () if origin else sources:
                path = source.replace("${BUNDLE}", "deploy/image/models")
                assert (ROOT / path).exists(), f"{stage.name}: {source}"


def test_kubernetes_accepts_the_manifests() -> None:
    """Strictly: a key that it does not know is a mistake of ours."""
    found = resources()
    patch = documents(MANIFESTS / "trt/gpu.yaml")[0]
    for resource in (*found.values(), merged(found["Deployment"], patch)):
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def test_the_manifests_belong_together() -> None:
    found = resources()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == found["Deployment"]["metadata"]["name"]


def test_what_the_autoscaler_reads_is_measured() -> None:
    from eps_deploy.serving.metrics import Metrics

    metrics = Metrics(queued=lambda: 0, connections=lambda: 0, ready=lambda: True, held=lambda: 0)
    (metric,) = resources()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f"\n{name} " in metrics.exposition().decode()
