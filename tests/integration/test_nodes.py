"""Two nodes: two network namespaces of this machine, with a process of torchrun in each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from eps_train.training.checkpoint import Checkpoint
from tests.meta.project import ROOT

NODES = (f"eps-{os.getpid()}-0", f"eps-{os.getpid()}-1")
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    """The namespaces, joined by a virtual cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 for network namespaces")
    try:
        for node in NODES:
            ip("netns", "add", node)
        ip(
            "link",
            "add",
            "eps0",
            "netns",
            NODES[0],
            "type",
            "veth",
            "peer",
            "eps0",
            "netns",
            NODES[1],
        )
        for node, address in zip(NODES, ADDRESSES, strict=True):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", "eps0")
            ip("-n", node, "link", "set", "eps0", "up")
            ip("-n", node, "link", "set", "lo", "up")
            ip("netns", "exec", node, "true")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made: {error.stderr.decode().strip()}")
    else:
        yield
    finally:
        for node in NODES:
            ip("netns", "del", node, check=False)


def train(*folders: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run eps-train on both nodes, each in its folder, into `run` there."""
    started = []
    for rank, (node, folder) in enumerate(zip(NODES, folders, strict=True)):
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank)]
        address = ["--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29517"]
        options = [
            "--model",
            "cifar:8x4",
            "--epochs",
            "2",
            "--batch-size",
            "128",
            "--output",
            "run",
        ]
        command = [sys.executable, *launcher, *address, "-m", "eps_train", *options, "--json"]
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", node, *command, "--output", "run"],
                cwd=folder,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "eps0", "OMP_NUM_THREADS": "1"},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    done = []
    for process in started:
        stdout, stderr = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr))
    return done


@pytest.mark.slow
@pytest.mark.usefixtures("nodes")
def test_two_nodes_train_one_network_into_a_shared_folder(tmp_path: Path) -> None:
    first, second = train(tmp_path, tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    (summary,) = json.loads(first.stdout.splitlines()[-1])["runs"]
    assert summary["processes"] == 2
    assert Checkpoint.load(tmp_path / "run" / "ckpt.pt").metrics["epoch"] in (1, 2)


@pytest.mark.usefixtures("nodes")
def test_a_folder_of_each_node_is_refused_before_training(tmp_path: Path) -> None:
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        folder.mkdir()
    (tmp_path / "b" / "run").mkdir()
    first, second = train(*folders)
    assert 0 not in (first.returncode, second.returncode)
    told = "eps-train: error: --output run: is another folder on some of the nodes; give one on a"
    assert told in first.stderr
    assert not list((tmp_path / "a" / "run").iterdir())


def test_the_manifest_has_kubeflows_fields() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest: dict[str, Any] = yaml.safe_load((ROOT / "train/kubernetes/trainjob.yaml").read_text())
    job = models.TrainerV1alpha1TrainJob.from_dict(manifest)
    assert json.loads(job.to_json()) == manifest


def test_the_batch_script_is_valid_shell() -> None:
    script = ROOT / "train/slurm/train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
