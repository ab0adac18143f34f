"""Overload: accepted requests are answered in time, the others are rejected at once.

How long an accepted request took is counted in images: how many the server answered meanwhile. A
bound in seconds is the same at a steady throughput, and means nothing on a machine that others slow
down for a while.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from eps_compact import CompactArtifact, compact
from eps_deploy.serving.limits import Limits
from eps_train.models.spec import NetworkSpec
from tests.checkpoints import make_checkpoint
from tests.deploy.conftest import deploy
from tests.deploy.serving.load import Crowd, Outcome, infer_request
from tests.deploy.serving.running import MODEL, Process, command, read_all, thread, until
from tests.deploy.serving.test_fuzz import attack
from tests.deploy.serving.usage import Usage, usage

MAX_BATCH = 32  # of the bundles here, as `eps-deploy` has it by default
MIB = 1 << 20
ONE = infer_request((1, 1, 8, 8))
Counts = npt.NDArray[np.int64]
RAW = {"Inference_Header_Content_Length": "0"}


def waited(outcome: Outcome, sizes: tuple[int, ...], kind: int) -> Counts:
    """Of each accepted request of a kind: images that were answered from its start to its end."""
    accepted = outcome.status == 200
    kinds, began, ended = (
        column[accepted] for column in (outcome.kind, outcome.began, outcome.ended)
    )
    answered = np.concatenate([[0], np.cumsum(np.array(sizes)[kinds])])
    mine = kinds == kind  # and rows stand in the order of their end
    first, last = (np.searchsorted(ended, times[mine]) for times in (began, ended))
    counted: Counts = answered[last] - answered[first]
    return counted


def check_refusals(outcome: Outcome) -> None:
    """200 or 503 and nothing else; each 503 says when to come back."""
    assert len(outcome.status) == outcome.sent
    assert set(outcome.status.tolist()) == {200, 503}
    refused = outcome.status == 503
    assert (outcome.retry[refused] >= 1).all()
    assert (outcome.retry[~refused] == -1).all()


def figure(process: Process, name: str) -> float:
    """Of /metrics; NaN when there are too many connections to be told."""
    lines = process.get("/metrics").body.decode().splitlines()
    found = (float(line.split()[1]) for line in lines if line.startswith(f"{name} "))
    return next(found, math.nan)


@contextmanager
def as_before(process: Process) -> Iterator[None]:
    """After this, the first request is answered, and nothing is left of those before."""
    before = usage(process.process.pid)
    yield
    assert process.post(f"{MODEL}/infer", bytes(64), **RAW).status == 200
    assert figure(process, "eps_queue_images") == 0
    assert figure(process, "eps_body_bytes") == 0
    until(lambda: figure(process, "eps_connections") == 1)  # the one that asks
    until(lambda: usage(process.process.pid).files <= before.files)
    assert usage(process.process.pid).threads <= before.threads
    assert process.get("/v2/health/ready").status == 200
    assert not any("must not happen" in line for line in process.lines)


def test_more_than_can_be_answered(deployed: Path) -> None:
    """A hundred connections that never pause, and a queue of four."""
    with command(deployed / "bundle", "--max-queue", 4) as process:
        process.wait_ready()
        with as_before(process), Crowd(process, [ONE], 100) as crowd:
            outcome = crowd.offer(1.0)
        check_refusals(outcome)
        assert outcome.good == figure(process, "eps_images_total") - 1
        assert process.stop() == 0


@contextmanager
def past_its_time(began: float, seconds: float) -> Iterator[None]:
    """A connection that is closed under the client, which no one does before its time is over."""
    try:
        yield
    except ConnectionError:
        assert time.monotonic() - began >= seconds


def test_five_hundred_slow_clients(deployed: Path) -> None:
    """Slowloris: half of them drip headers, half bodies; others are served, as many as ever."""
    limits = Limits(header_seconds=3.0, body_seconds=3.0)
    heads = (
        b"GET /v2 HTTP/1.1\r\nx: ",
        b"POST /v1/classify HTTP/1.1\r\ncontent-length: 99\r\n\r\n",
    )
    with thread(deployed / "bundle", limits=limits) as client, ExitStack() as stack:
        began = time.monotonic()
        slow = [stack.enter_context(client.open()) for _ in range(500)]
        for index, connection in enumerate(slow):
            connection.sendall(heads[index % 2])
        answers: list[bytes] = []
        with Crowd(client, [ONE], 4) as crowd:
            for _ in range(5):
                outcome = crowd.offer(0.1)
                assert set(outcome.status.tolist()) == {200}
                for connection in slow:
                    with past_its_time(began, limits.header_seconds):
                        connection.sendall(b"x")
        for connection in slow:
            with past_its_time(began, limits.header_seconds):
                answers.append(read_all(connection))
        assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
        assert client.get("/v2/health/ready").status == 200


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of about 2 ms an image: depth 44, 64 channels, 8x8."""
    folder = tmp_path_factory.mktemp("slow")
    dead = ("stages.0.1",)
    checkpoint = make_checkpoint(depth=44, width=64, dead=dead)
    digest = checkpoint.save(folder / "ckpt.pt")
    network = checkpoint.network
    CompactArtifact(
        network=NetworkSpec(family=network.family, arguments=network.arguments, removed=dead),
        state=dict(compact(checkpoint.build_gated()).state_dict()),
        data=checkpoint.data,
        certificate={},
        checkpoint={"path": "ckpt.pt", "digest": digest},
    ).save(folder / "compact.pt")
    result = deploy(folder, "--min-speedup", "0")
    assert result.code == 0, result.stderr
    return folder / "bundle"


@pytest.mark.slow
def test_ten_times_the_capacity_for_two_minutes(slow_bundle: Path) -> None:
    max_queue = 256
    with command(slow_bundle, "--max-queue", max_queue) as process:
        process.wait_ready()
        seen: list[Usage] = []
        with as_before(process), Crowd(process, [ONE], 600) as crowd:
            outcome = crowd.offer(
                120.0, over=11.0, watch=lambda: seen.append(usage(process.process.pid))
            )
        with Crowd(process, [ONE], 32) as crowd:
            assert set(crowd.offer(3.0).status.tolist()) == {200}
        assert process.stop() == 0
    check_refusals(outcome)
    assert outcome.sent >= 10 * outcome.good
    full = max_queue + MAX_BATCH  # what waits, and what the engine is at
    assert np.percentile(waited(outcome, (1,), 0), 99) <= 2 * full
    refused = outcome.status == 503
    assert np.median(outcome.seconds[refused]) < 0.2 * np.median(outcome.seconds[~refused])
    later = seen[20:]
    assert max(one.memory for one in later) - later[0].memory < 4 * MIB
    assert {one.threads for one in later} == {later[0].threads}
    assert max(one.files for one in later) <= later[0].files


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 16), (1, 64)], ids=str)
def test_small_and_large_requests_at_ten_times_the_capacity(
    slow_bundle: Path, sizes: tuple[int, int]
) -> None:
    """As many of one as of the other; a batch holds 32."""
    max_queue = 256
    with command(slow_bundle, "--max-queue", max_queue) as process:
        process.wait_ready()
        requests = [infer_request((size, 1, 8, 8)) for size in sizes]
        with as_before(process), Crowd(process, requests, 400) as crowd:
            outcome = crowd.offer(30.0, over=11.0)
    check_refusals(outcome)
    full = max_queue + MAX_BATCH + sizes[1] - 1  # the last one that is let in may go beyond
    for kind in (0, 1):
        times = waited(outcome, sizes, kind)
        assert len(times) >= 20
        assert np.percentile(times, 99) <= 2 * full


def cancel(process: Process, stage: int) -> None:
    """Send a part of a request, or all of it, and go away with a reset."""
    with process.open() as connection:
        connection.sendall(ONE[: (10, len(ONE) // 2, len(ONE) - 1, len(ONE))[stage % 4]])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def work(process: Process, deployed: Path, *, asked: int, odd: int) -> None:
    """So many requests that are right, and so many of each kind that are not."""
    answered = 0
    with Crowd(process, [ONE], 8) as crowd:
        while answered < asked:
            outcome = crowd.offer(0.5)
            assert set(outcome.status.tolist()) == {200}
            answered += outcome.good
    for stage in range(odd):
        cancel(process, stage)
        if stage % 100 == 99:  # or the most that are open at one time would differ
            until(lambda: figure(process, "eps_connections") == 1)
    attack(process, deployed, odd, seed=2)


def load(process: Process, times: int) -> None:
    """The bundle anew."""
    for _ in range(times):
        assert process.post("/v2/repository/models/eps_resnet/load").status == 200
        assert process.post(f"{MODEL}/infer", bytes(64), **RAW).status == 200


@pytest.mark.slow
def test_nothing_is_left_of_what_is_over(deployed: Path) -> None:
    """The first ones of each kind fill caches and pools; engines leave gaps between what stays."""
    with command(deployed / "bundle", "--allow-load") as process:
        process.wait_ready()
        number = process.process.pid
        work(process, deployed, asked=2000, odd=500)
        first = usage(number)
        work(process, deployed, asked=20_000, odd=2000)
        second = usage(number)
        assert second.memory - first.memory < 3 * MIB
        assert second.threads == first.threads
        load(process, 50)
        third = usage(number)
        load(process, 200)
        fourth = usage(number)
        assert fourth.memory - third.memory < 10 * MIB
        assert fourth.threads <= third.threads + 2  # asyncio's pool grows up to six
        until(lambda: usage(number).files <= first.files)
        assert process.stop() == 0
