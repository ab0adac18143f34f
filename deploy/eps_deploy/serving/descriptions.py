"""What the server says of itself and of its model, in the protocol's and Triton's words."""

from __future__ import annotations

import json
from typing import Any

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME
from eps_deploy.serving.metrics import Statistic, Totals
from eps_deploy.serving.model import VERSION
from eps_deploy.serving.protocol import DATATYPE
from eps_deploy.serving.service import Served

_EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "statistics")


def server(allow_load: bool) -> dict[str, Any]:
    return _server([*_EXTENSIONS, *(["model_repository"] if allow_load else [])])


def rpc_server() -> dict[str, Any]:
    """As :func:`server`; gRPC has the calls of the protocol itself and none of Triton's."""
    return _server(["classification"])


def _server(extensions: list[str]) -> dict[str, Any]:
    from importlib.metadata import version

    return {"name": "eps-serve", "version": version("eps-resnet"), "extensions": extensions}


def model(served: Served) -> dict[str, Any]:
    signature = served.signature
    return {
        "name": signature.name,
        "versions": [signature.version],
        "platform": served.model.platform,
        "inputs": [
            {"name": INPUT_NAME, "datatype": DATATYPE, "shape": [-1, *signature.input_shape]}
        ],
        "outputs": [
            {"name": OUTPUT_NAME, "datatype": "FP32", "shape": [-1, len(signature.labels)]}
        ],
    }


def config(served: Served) -> dict[str, Any]:
    """As Triton's `config`: sizes are without the batch."""
    signature = served.signature
    engine = served.model.engines[0].describe()
    on_cpu = engine.get("provider") == "CPUExecutionProvider"
    further = {"preprocessing": json.dumps(served.model.bundle.preprocessing.described())}
    if "provider" in engine:
        further["execution_provider"] = str(engine["provider"])
    return {
        "name": signature.name,
        "platform": served.model.platform,
        "max_batch_size": served.model.max_batch,
        "input": [
            {
                "name": INPUT_NAME,
                "data_type": f"TYPE_{DATATYPE}",
                "dims": list(signature.input_shape),
            }
        ],
        "output": [
            {"name": OUTPUT_NAME, "data_type": "TYPE_FP32", "dims": [len(signature.labels)]}
        ],
        "instance_group": [
            {
                "count": len(served.model.engines),
                "kind": "KIND_CPU" if on_cpu else "KIND_GPU",
            }
        ],
        "parameters": {key: {"string_value": value} for key, value in further.items()},
    }


def index(name: str, ready: bool) -> list[dict[str, str]]:
    state = "READY" if ready else "UNAVAILABLE"
    return [{"name": name, "version": VERSION, "state": state, "reason": ""}]


def statistics(served: Served, totals: Totals) -> dict[str, Any]:
    nothing = Statistic().to_dict()
    batches = [
        {
            "batch_size": size,
            "compute_input": nothing,
            "compute_infer": statistic.to_dict(),
            "compute_output": nothing,
        }
        for size, statistic in sorted(totals.by_batch.items())
    ]
    entry = {
        "name": served.signature.name,
        "version": served.signature.version,
        "last_inference": int(totals.last * 1000),
        "inference_count": totals.images,
        "execution_count": totals.batches,
        "inference_stats": {
            "success": totals.success.to_dict(),
            "fail": totals.fail.to_dict(),
            "queue": totals.queue.to_dict(),
            "compute_input": nothing,
            "compute_infer": totals.compute.to_dict(),
            "compute_output": nothing,
        },
        "batch_stats": batches,
    }
    return {"model_stats": [entry]}
