"""Ask a server as a client would: `python -m tests.image.ask HOST:PORT BUNDLE`.

Its samples go there by tritonclient, as JSON and as bytes; its example pictures by HTTP. One JSON
object on stdout: `{difference, labels}`, the largest difference to the samples' stored logits over
both wires, and the label answered for each file.
"""

from __future__ import annotations

import json
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton

BATCH = 4


def logits(address: str, images: Any, *, binary: bool) -> Any:
    with triton.InferenceServerClient(address) as client:
        (model,) = [entry["name"] for entry in client.get_model_repository_index()]
        request = triton.InferInput("images", list(images.shape), "UINT8")
        request.set_data_from_numpy(images, binary_data=binary)
        wanted = triton.InferRequestedOutput("logits", binary_data=binary)
        return client.infer(model, [request], outputs=[wanted]).as_numpy("logits")


def label(address: str, picture: Path) -> str:
    connection = HTTPConnection(address, timeout=30)
    connection.request("POST", "/v1/classify", picture.read_bytes(), {"Content-Type": "image/png"})
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.status == 200, text
    return str(json.loads(text)["predictions"][0]["label"])


def main(address: str, bundle: Path) -> None:
    samples = np.load(bundle / "samples.npz")
    images, expected = samples["images"][:BATCH], samples["logits"][:BATCH]
    differences = [
        float(np.abs(logits(address, images, binary=binary) - expected).max())
        for binary in (False, True)
    ]
    labels = {path.name: label(address, path) for path in sorted(bundle.glob("examples/*"))}
    print(json.dumps({"difference": max(differences), "labels": labels}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
