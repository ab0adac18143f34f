"""The compact network in other people's formats: readable where none of our packages is.

`pt2` is a `torch.export` archive, for a process that has torch alone. `safetensors` is the tensors,
and beside them a JSON description of every step (see `description`), for one that has not even
that. Both take raw pixels: the normalisation is inside.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from eps_compact.artifact import CompactArtifact
from eps_compact.description import Step, steps, tensors
from eps_compact.outputs import export_files
from eps_train.atomic import replace_file
from eps_train.data import DataIdentity
from eps_train.errors import ConfigError, GraphError
from eps_train.networks import Normalize

KINDS = ("pt2", "safetensors")
ABOUT = "eps_resnet.json"  # name of the description inside a pt2 archive
DESCRIPTION_FORMAT = "eps-resnet-network"
DESCRIPTION_VERSION = 1
INPUT, OUTPUT = "images", "logits"
# Where a recorded step was written: paths of the machine that exported it, of no use to others.
_WHEREABOUTS = ("stack_trace", "from_node", "custom")


class FromPixels(nn.Module):
    """What ships: images uint8 `[N, C, H, W]` to logits float32 `[N, classes]`."""

    def __init__(self, network: nn.Module, identity: DataIdentity) -> None:
        super().__init__()
        self.normalize = Normalize.of(identity)
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits


def files(path: Path, kind: str) -> tuple[Path, ...]:
    """The files that :func:`export` writes for `path`.

    Raises ConfigError when `kind` is none of `KINDS`, or `path` does not end in it.
    """
    if kind not in KINDS:
        raise ConfigError(f"--export {kind}: no such format; choose {' or '.join(KINDS)}")
    if path.suffix != f".{kind}":
        raise ConfigError(f"{path}: not a {kind} file's name; end it in .{kind}")
    return export_files(path, kind)


def export(
    artifact: CompactArtifact, path: Path, kind: str, *, force: bool = False
) -> tuple[Path, ...]:
    """Write the network of `artifact` behind its normalisation; returns the files written.

    It takes `images` uint8 `[N, C, H, W]`, N >= 1, and gives `logits` float32 `[N, classes]`. The
    same artifact gives the same bytes. Each file is written in one step, the tensors before their
    description.

    Args:
        artifact: a compact network, read from its file or not yet written.
        path: the file to write; it ends in `.pt2` or `.safetensors`.
        kind: `pt2` (with a description of preprocessing and classes as the extra file `ABOUT`), or
            `safetensors` (with the whole network's description beside it as `.safetensors.json`).
        force: overwrite what exists.

    Raises:
        ConfigError: a wrong name, an existing file, or no package safetensors.
        GraphError: torch.export cannot express the network.
    """
    written = files(path, kind)
    if existing := [str(file) for file in written if file.exists() and not force]:
        raise ConfigError(f"{', '.join(existing)}: exists; give --force to overwrite")
    program = capture(artifact)
    contents = _pt2(program, artifact) if kind == "pt2" else _safetensors(program, artifact, path)
    for file, content in zip(written, contents, strict=True):
        replace_file(file, content)
    return written


def capture(artifact: CompactArtifact) -> ExportedProgram:
    """The network behind its normalisation as a `torch.export` program with a dynamic batch.

    Raises GraphError when torch.export cannot express it.
    """
    model = FromPixels(artifact.build(), artifact.data).requires_grad_(False)
    # Two images, because torch.export takes a size of 1 for a constant.
    example = torch.zeros((2, *artifact.data.input_shape), dtype=torch.uint8)
    batch = torch.export.Dim("N", min=1)
    try:
        with quiet():
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # it raises dozens of unrelated types
        cause = " ".join(str(error).strip().partition("\n")[0].split())
        raise GraphError(f"--export: torch.export cannot express the network: {cause}") from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in _WHEREABOUTS:
                node.meta.pop(key, None)
    return program


def _pt2(program: ExportedProgram, artifact: CompactArtifact) -> tuple[bytes]:
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files={ABOUT: _json(_about(artifact))})
    return (buffer.getvalue(),)


def _safetensors(
    program: ExportedProgram, artifact: CompactArtifact, path: Path
) -> tuple[bytes, bytes]:
    try:
        from safetensors.torch import save
    except ModuleNotFoundError:
        raise ConfigError(
            "--export safetensors: the package is not installed; pip install safetensors"
        ) from None
    with quiet():
        # No decompositions: this only does away with steps in place.
        program = program.run_decompositions({})
    found, output = steps(program)
    values = tensors(program, found)
    content = save(values, metadata={"eps_resnet_digest": artifact.digest})
    described = {
        **_about(artifact),
        "tensors": {
            "file": path.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "names": {name: _signature(tensor) for name, tensor in sorted(values.items())},
        },
        "operators": sorted({step["op"] for step in found}),
        "steps": found,
        "result": output,
    }
    return content, _json(described, lines=found).encode()


def _about(artifact: CompactArtifact) -> dict[str, Any]:
    """What a program needs to know besides the network, as plain data."""
    data = artifact.data
    return {
        "format": DESCRIPTION_FORMAT,
        "version": DESCRIPTION_VERSION,
        "input": {"name": INPUT, "dtype": "uint8", "shape": ["N", *data.input_shape]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["N", len(data.classes)]},
        "classes": list(data.classes),
        "preprocessing": data.preprocessing.to_dict(),
        "data": {"name": data.name, "sha256": data.sha256},
        "compact": artifact.digest,
        "checkpoint": artifact.checkpoint.get("digest", ""),
        "versions": dict(artifact.versions),
    }


def _signature(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _json(value: dict[str, Any], lines: list[Step] | None = None) -> str:
    """JSON for people too: indented, but each of `lines`, the value of `steps`, in one line."""
    if lines is None:
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    whole = _json({**value, "steps": []})
    rows = ",\n  ".join(json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines)
    return whole.replace('"steps": []', f'"steps": [\n  {rows}\n ]', 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Torch's exporters talk on stdout, in warnings and in logs about their own workings."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
