"""The shadow: comparison with the served engine, and no effect on answers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eps_deploy.bundle import encode_manifest, load_bundle, open_engine, open_onnx
from eps_deploy.cli.serve import main
from eps_deploy.engines.base import Images, Logits
from eps_deploy.serving import service as service_module
from eps_deploy.serving import shadow as shadow_module
from eps_deploy.serving.limits import Limits
from eps_deploy.serving.shadow import Shadow
from tests.commands import run
from tests.deploy.serving.engines import FakeEngine, numbered
from tests.deploy.serving.running import MODEL, Client, command, thread, until
from tests.deploy.serving.test_inference import INFER, body
from tests.deploy.serving.test_service import Loader


def change_manifest(bundle: Path, **changes: Any) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    sealed = ("format", "schema", "digest")
    fields = {key: value for key, value in manifest.items() if key not in sealed} | changes
    (bundle / "manifest.json").write_bytes(encode_manifest(fields))


def figures(client: Client) -> Any:
    return client.get("/v1/figures").json["shadow"]


def seen(client: Client) -> int:
    told = figures(client)
    return int(told["images"] + told["dropped_images"])


def series(client: Client) -> dict[str, float]:
    lines = client.get("/metrics").body.decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("eps_shadow"))
    return {name: float(value) for name, value in pairs}


def test_the_baseline_as_shadow(deployed: Path) -> None:
    """The disagreement is that of the two networks run by hand on the same images."""
    bundle = load_bundle(deployed / "bundle")
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    with open_engine(bundle) as pruned, open_onnx(bundle, file="baseline.onnx") as whole:
        answers = [pruned.infer(images[at : at + 3]) for at in range(0, 60, 3)]
        theirs = [whole.infer(images[at : at + 3]) for at in range(0, 60, 3)]
    wanted = sum(
        int((a.argmax(1) != b.argmax(1)).sum()) for a, b in zip(answers, theirs, strict=True)
    )
    assert 0 < wanted <= 60
    arguments = ("--shadow", "baseline", "--shadow-share", 1, "--no-batching")
    with command(deployed / "bundle", *arguments) as process:
        process.wait_ready()
        for done, answer in enumerate(answers):
            logits = ask(process, images[3 * done : 3 * done + 3])
            np.testing.assert_array_equal(logits, answer)
            until(lambda done=done: seen(process) == 3 * done + 3)
        told = figures(process)
        assert told["images"] == 60
        assert told["disagreements"] == wanted
        assert told["disagreement"] == wanted / 60
        assert told["time_ratio"] > 0
        assert (told["dropped_images"], told["failed_batches"]) == (0, 0)
        found = series(process)
        assert found["eps_shadow_images_total"] == 60
        assert found["eps_shadow_disagreements_total"] == wanted
        assert found["eps_shadow_inference_seconds_count"] == 20
        assert found["eps_shadow_served_seconds_count"] == 20
        ours = process.get("/metrics").body.decode()
        assert "eps_images_total 60.0" in ours  # the shadow's are not counted as answers
        until(lambda: any("shadow: baseline.onnx runs 1 of" in line for line in process.lines))
        assert process.stop() == 0


def ask(client: Client, images: Images) -> Logits:
    head = {
        "inputs": [
            {
                "name": "images",
                "datatype": "UINT8",
                "shape": list(images.shape),
                "data": images.ravel().tolist(),
            }
        ]
    }
    answer = client.post(f"{MODEL}/infer", json.dumps(head).encode())
    assert answer.status == 200, answer.body
    flat = answer.json["outputs"][0]["data"]
    return np.array(flat, dtype=np.float32).reshape(len(images), -1)


def test_another_bundle_is_read_again_with_the_served_one(deployed: Path, bundle: Path) -> None:
    """Here a copy: it agrees with itself. A shadow that does not load stops the exchange."""
    images = np.random.default_rng(1).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)
    arguments = ("--shadow", bundle, "--shadow-share", 1, "--allow-load")
    with command(deployed / "bundle", *arguments) as process:
        process.wait_ready()
        ask(process, images)
        until(lambda: seen(process) == 4)
        assert process.post("/v2/repository/models/eps_resnet/load").status == 200
        ask(process, images)
        until(lambda: seen(process) == 8)
        (bundle / "model.onnx").write_bytes(b"x")
        answer = process.post("/v2/repository/models/eps_resnet/load")
        assert "served on" in answer.error
        ask(process, images)
        until(lambda: seen(process) == 12)
        assert figures(process)["disagreement"] == 0
        assert process.stop() == 0


def test_no_shadow_no_statistics(deployed: Path) -> None:
    with thread(deployed / "bundle", limits=Limits()) as client:
        assert figures(client) is None
        assert series(client) == {}


def refused(deployed: Path, *args: object) -> str:
    result = run("eps-serve", main, "bundle", *args, cwd=deployed)
    assert (result.code, result.stdout) == (1, ""), result.stderr
    return result.error


def test_a_shadow_with_other_data_is_rejected_at_start(deployed: Path, bundle: Path) -> None:
    assert "no such folder" in refused(deployed, "--shadow", "nowhere")
    change_manifest(bundle, labels=[f"digit {index}" for index in range(10)])
    error = refused(deployed, "--shadow", bundle)
    assert f"--shadow {bundle}: labels digit 0, digit 1" in error
    assert "has 0, 1, 2" in error


def test_a_plan_has_no_baseline(bundle: Path, deployed: Path) -> None:
    shutil.copy(bundle / "model.onnx", bundle / "model.plan")
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = manifest["files"] | {"model.plan": manifest["files"]["model.onnx"]}
    change_manifest(bundle, engine=manifest["engine"] | {"file": "model.plan"}, files=files)
    result = run("eps-serve", main, bundle, "--shadow", "baseline", cwd=deployed)
    assert result.code == 1
    assert "--defer-build" in result.error


def test_a_shadow_with_smaller_batches_is_rejected(deployed: Path, bundle: Path) -> None:
    engine = json.loads((bundle / "manifest.json").read_text())["engine"]
    change_manifest(bundle, engine=engine | {"max_batch": 4})
    with command(deployed / "bundle", "--shadow", bundle) as process:
        assert process.wait() == 1
        assert "deploy it with --max-batch 32" in process.lines[-1]


@pytest.mark.parametrize("share", ["0", "1.5", "nan"])
def test_an_invalid_share(deployed: Path, share: str) -> None:
    arguments = ("--shadow", "baseline", "--shadow-share", share)
    assert run("eps-serve", main, "bundle", *arguments, cwd=deployed).code == 2


class Beside(FakeEngine):
    """Its best label is the served engine's, except for images whose number is odd."""

    def infer(self, images: Images) -> Logits:
        logits = super().infer(images)
        odd = images[:, 0, 0, 0] % 2 == 1
        return np.where(odd[:, None], logits[:, ::-1], logits)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch, deployed: Path) -> Iterator[tuple[Client, Beside]]:
    """A server of a fake engine, and the fake engine that is its shadow."""
    Loader(monkeypatch, load_bundle(deployed / "bundle"))
    engine = Beside()
    monkeypatch.setattr(service_module, "open_shadow", lambda *_, **__: engine)
    source = {"shadow": "baseline", "shadow_share": 1.0}
    with thread(deployed / "bundle", limits=Limits(), **source) as client:
        yield client, engine
    assert engine.closed


def answered(client: Client, *values: int) -> None:
    answer = client.post(INFER, body(*values))
    assert answer.status == 200
    assert answer.json["outputs"][0]["data"][::2] == list(values)


def test_a_shadow_that_hangs_delays_no_answer(beside: tuple[Client, Beside]) -> None:
    """What it has no room for is dropped, and counted."""
    client, engine = beside
    engine.open_gate.clear()
    answered(client, 1)
    assert engine.entered.acquire(timeout=60)  # it has this one, and is stuck with it
    for _ in range(20):  # 64 images may wait
        answered(client, 2, 3, 4, 6)
    until(lambda: figures(client)["dropped_images"] == 16)
    assert figures(client)["images"] == 0
    engine.open_gate.set()
    until(lambda: figures(client)["images"] == 65)
    assert figures(client)["disagreements"] == 17
    assert client.get("/v2/health/ready").status == 200


def test_a_shadow_that_fails_is_only_counted(beside: tuple[Client, Beside]) -> None:
    client, engine = beside
    engine.fails = True
    for count in range(1, 6):
        answered(client, count)
        until(lambda count=count: figures(client)["failed_batches"] == count)
    assert client.get("/v2/health/live").status == 200
    assert series(client)["eps_shadow_failures_total"] == 5
    assert figures(client)["disagreement"] is None
    engine.fails = False
    answered(client, 3, 4)
    until(lambda: figures(client)["images"] == 2)
    assert figures(client)["disagreements"] == 1


def beginning(share: float, test: Callable[[Shadow, Beside], None]) -> tuple[bool, Beside]:
    """Runs a test on a shadow by itself; whether the shadow ended in time, and its engine."""
    engine = Beside()

    async def everything() -> bool:
        said: dict[str, Any] = {"observe": lambda batch: None, "log": lambda line: None}
        shadow = Shadow(engine, FakeEngine(), share, **said)
        await asyncio.to_thread(test, shadow, engine)
        return await shadow.end()

    return asyncio.run(everything()), engine


def offer(shadow: Shadow, *values: int) -> None:
    logits = np.zeros((len(values), 2), dtype=np.float32)
    shadow.offer(numbered(*values), logits)


def test_sampling_of_batches_is_reproducible() -> None:
    def test(shadow: Shadow, engine: Beside) -> None:
        for index in range(200):
            offer(shadow, index)

        def everything_ran() -> bool:
            offer(shadow, 255)
            return [255] in engine.batches

        until(everything_ran)

    drawn = []
    for _ in range(2):
        ended, engine = beginning(0.2, test)
        assert ended
        drawn.append([value for (value,) in engine.batches[::2] if value < 255])
    assert drawn[0] == drawn[1]
    assert 30 <= len(drawn[0]) <= 50


def test_shutdown_does_not_wait_for_a_shadow_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And forgets what waits: the end of the server is not the time for it."""
    monkeypatch.setattr(shadow_module, "_JOIN_SECONDS", 0.01)

    def test(shadow: Shadow, engine: Beside) -> None:
        engine.open_gate.clear()
        for value in range(3):
            offer(shadow, value)
        assert engine.entered.acquire(timeout=60)

    ended, engine = beginning(1.0, test)
    assert not ended
    engine.open_gate.set()
    until(lambda: engine.closed)
    assert engine.batches == [[0], [0]]  # each batch twice, of which the first run warms up
