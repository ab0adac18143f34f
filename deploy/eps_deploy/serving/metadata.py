"""Metadata of the server and its model, in the words of KServe v2 and of Triton's extensions."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME
from eps_deploy.serving.metrics import Statistic, Totals
from eps_deploy.serving.model import VERSION
from eps_deploy.serving.protocol import DATATYPE
from eps_deploy.serving.service import ServedModel


def server(*extensions: str) -> dict[str, Any]:
    return {"name": "eps-serve", "version": version("eps-resnet"), "extensions": list(extensions)}


def model(served: ServedModel) -> dict[str, Any]:
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


def config(served: ServedModel) -> dict[str, Any]:
    """The model configuration as Triton has it: sizes are without the batch."""
    signature = served.signature
    engine = served.model.engines[0].describe()
    on_cpu = engine.get("provider") == "CPUExecutionProvider"
    parameters = {"preprocessing": json.dumps(served.model.bundle.preprocessing.described())}
    if "provider" in engine:
        parameters["execution_provider"] = str(engine["provider"])
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
            {"count": len(served.model.engines), "kind": "KIND_CPU" if on_cpu else "KIND_GPU"}
        ],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


def index(name: str, ready: bool) -> list[dict[str, str]]:
    state = "READY" if ready else "UNAVAILABLE"
    return [{"name": name, "version": VERSION, "state": state, "reason": ""}]


def statistics(served: ServedModel, totals: Totals) -> dict[str, Any]:
    """The model's statistics as Triton has them."""
    none = asdict(Statistic())
    batches = [
        {
            "batch_size": size,
            "compute_input": none,
            "compute_infer": asdict(statistic),
            "compute_output": none,
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
            "success": asdict(totals.success),
            "fail": asdict(totals.fail),
            "queue": asdict(totals.queue),
            "compute_input": none,
            "compute_infer": asdict(totals.compute),
            "compute_output": none,
        },
        "batch_stats": batches,
    }
    return {"model_stats": [entry]}
