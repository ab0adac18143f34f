"""Export of compact networks as `torch.export` archives and safetensors files.

`pt2` runs in a process that has only torch; it takes raw pixels, the normalisation is inside.
`safetensors` holds the tensors for other frameworks. Both carry a JSON description of
preprocessing and classes.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, fx

from eps_compact.artifact import CompactArtifact
from eps_core.errors import ConfigError, GraphError
from eps_core.files import replace_file
from eps_train.models.resnets import FromPixels

KINDS = ("pt2", "safetensors")
# Name of the description: of an extra file inside a pt2 archive, of an entry of the metadata of a
# safetensors file (which has no other: its format does not keep the order of several).
ABOUT = "eps_resnet.json"
# Where a recorded step was written: paths of the machine that exported it, of no use to others.
_WHEREABOUTS = ("stack_trace", "from_node", "custom")


def export(artifact: CompactArtifact, path: Path, kind: str, *, force: bool = False) -> None:
    """Write the network of `artifact` to `path`. The same artifact gives the same bytes.

    Args:
        kind: `pt2`: the network behind its normalisation, which maps `images` uint8
            `[N, C, H, W]`, N >= 1, to `logits` float32 `[N, classes]`. `safetensors`: its
            parameters and buffers, by name.
        path: the file to write; it ends in `.pt2` or `.safetensors`.
        force: overwrite an existing file.

    Raises:
        ConfigError: a wrong kind or name, an existing file, or the package safetensors is missing.
        GraphError: torch.export cannot express the network.
    """
    if kind not in KINDS:
        raise ConfigError(f"--export {kind}: no such format; choose {' or '.join(KINDS)}")
    if path.suffix != f".{kind}":
        raise ConfigError(f"{path}: not a {kind} file's name; end it in .{kind}")
    if path.exists() and not force:
        raise ConfigError(f"{path}: exists; give --force to overwrite")
    replace_file(path, _pt2(artifact) if kind == "pt2" else _safetensors(artifact))


def _pt2(artifact: CompactArtifact) -> bytes:
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
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            for key in _WHEREABOUTS:
                node.meta.pop(key, None)
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files={ABOUT: _description(artifact)})
    return buffer.getvalue()


def _safetensors(artifact: CompactArtifact) -> bytes:
    try:
        from safetensors.torch import save
    except ModuleNotFoundError:
        raise ConfigError(
            "--export safetensors: the package is not installed; pip install safetensors"
        ) from None
    model = FromPixels(artifact.build(), artifact.data)
    # Buffers that are no part of the state dict too: the network computes with them. Each is a
    # copy, as safetensors refuses tensors that share memory.
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in named.items()}
    content: bytes = save(tensors, metadata={ABOUT: _description(artifact)})
    return content


def _description(artifact: CompactArtifact) -> str:
    """Return what a program needs to know besides the network, as JSON."""
    data = artifact.data
    about = {
        "format": "eps-resnet-network",
        "version": 1,
        "input": {"name": "images", "dtype": "uint8", "shape": ["N", *data.input_shape]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["N", len(data.classes)]},
        "classes": list(data.classes),
        "preprocessing": data.preprocessing.to_dict(),
        "data": {"name": data.name, "sha256": data.sha256},
        "compact": artifact.digest,
        "checkpoint": artifact.checkpoint.get("digest", ""),
        "versions": dict(artifact.versions),
    }
    return json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence stdout, warnings and logs of torch's exporters."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
