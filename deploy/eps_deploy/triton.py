"""Model repository for NVIDIA Triton (`triton/` in a bundle), made of the bundle's own files.

    triton/NAME/config.pbtxt        serves the plan if there is one, else the ONNX file
    triton/NAME/configs/onnx.pbtxt  beside a plan: --model-config-name=onnx serves the ONNX file
    triton/NAME/labels.txt          names of the classes, one a line
    triton/NAME/warmup/             real images, which Triton runs before it is ready
    triton/NAME/1/                  model.onnx, model.plan

Layout and fields: Triton's docs/user_guide/model_repository.md and model_configuration.md, and
model_config.proto of its repository `common`. No torch and no protobuf here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images, padded_sizes

FOLDER = "triton"
_ONNX, _PLAN = "model.onnx", "model.plan"
_WARM_UPS = 4  # images; each is run alone, the first also as the largest batch

Kind = Literal["KIND_CPU", "KIND_GPU", "KIND_AUTO"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonModel:
    """The network as Triton's configuration describes it.

    Attributes:
        input_shape: `[C, H, W]` of one image.
        preprocessing: how an image becomes the input, for clients, which do it.
        max_batch: largest batch; with a plan, of its profile.
        kind: where ONNX Runtime runs `model.onnx`; KIND_AUTO: on a GPU if there is one.
        threads: of ONNX Runtime within one operator; None: its own choice.
        capability: compute capability that `model.plan` was built for, such as `9.0`; None: there
            is no plan, or not yet.
    """

    input_shape: tuple[int, int, int]
    labels: Sequence[str]
    preprocessing: Mapping[str, Any]
    max_batch: int
    kind: Kind = "KIND_AUTO"
    threads: int | None = None
    capability: str | None = None


def write_repository(folder: Path, model: TritonModel, samples: Images, *, name: str) -> Path:
    """Write `triton/NAME` into the bundle that is being written at `folder`; return that folder.

    There it finds `model.onnx`, and `model.plan` where `model` has a capability. The first few of
    the `samples`, real images uint8 `[N, C, H, W]`, become warm-ups.
    """
    root = folder / FOLDER / name
    (root / "1").mkdir(parents=True)
    (root / "warmup").mkdir()
    _link(folder / _ONNX, root / "1" / _ONNX)
    warm_ups = []  # raw pixels, one image a file: Triton repeats it up to the batch size
    for index, image in enumerate(samples[:_WARM_UPS]):
        warm_ups.append(f"{INPUT_NAME}-{index}")
        (root / "warmup" / warm_ups[-1]).write_bytes(image.tobytes())
    common = _common(model, name, warm_ups)
    onnx = [*common, *_onnx(model)]
    if model.capability is None:
        _write_lines(root / "config.pbtxt", onnx)
    else:
        _link(folder / _PLAN, root / "1" / _PLAN)
        _write_lines(root / "config.pbtxt", [*common, *_plan(model, model.capability)])
        (root / "configs").mkdir()
        _write_lines(root / "configs" / "onnx.pbtxt", onnx)
    _write_lines(root / "labels.txt", [" ".join(label.split()) for label in model.labels])
    return root


def _common(model: TritonModel, name: str, warm_ups: Sequence[str]) -> list[str]:
    """The lines of both configurations. The batch size is in `max_batch_size`, not in `dims`.

    The dynamic batcher has its defaults: it takes as many waiting requests as fit, without delay.
    """
    image = f"data_type: TYPE_UINT8 dims: {_dims(model)}"
    classes = len(model.labels)
    runs = [(1, file) for file in warm_ups]
    if model.max_batch > 1:
        runs.append((model.max_batch, warm_ups[0]))
    return [
        f'name: "{name}"',
        f"max_batch_size: {model.max_batch}",
        f'input [ {{ name: "{INPUT_NAME}" {image} }} ]',
        f'output [ {{ name: "{OUTPUT_NAME}" data_type: TYPE_FP32 dims: [ {classes} ]'
        ' label_filename: "labels.txt" } ]',
        "dynamic_batching { }",
        # JSON in a string of protobuf's text format, whose escapes are those of JSON.
        'parameters { key: "preprocessing" value { string_value:'
        f" {json.dumps(json.dumps(model.preprocessing))} }} }}",
        *(
            f'model_warmup [ {{ name: "{file}-batch-{batch}" batch_size: {batch}'
            f' inputs {{ key: "{INPUT_NAME}" value {{ {image} input_data_file: "{file}" }} }} }} ]'
            for batch, file in runs
        ),
    ]


def _dims(model: TritonModel) -> str:
    return f"[ {', '.join(map(str, model.input_shape))} ]"


def _onnx(model: TritonModel) -> list[str]:
    lines = [
        'backend: "onnxruntime"',
        f'default_model_filename: "{_ONNX}"',
        f"instance_group [ {{ count: 1 kind: {model.kind} }} ]",
    ]
    if model.threads is not None:  # otherwise each of Triton's instances uses all cores
        for kind, threads in (("intra", model.threads), ("inter", 1)):
            key = f'key: "{kind}_op_thread_count"'
            lines.append(f'parameters {{ {key} value {{ string_value: "{threads}" }} }}')
    return lines


def _plan(model: TritonModel, capability: str) -> list[str]:
    """CUDA graphs for the padded sizes, and two instances: one copies while the other computes.

    Triton takes the first optimization profile alone unless it is told of the others, and runs a
    batch within the bounds of a graph in that graph.
    """
    profiles = ", ".join(f'"{index}"' for index in range(min(model.max_batch, 2)))
    shape = f'input {{ key: "{INPUT_NAME}" value {{ dim: {_dims(model)} }} }}'
    graphs = []
    lowest = 1
    for size in padded_sizes(model.max_batch):
        bound = f" graph_lower_bound {{ batch_size: {lowest} {shape} }}" if lowest < size else ""
        graphs.append(f"  graph_spec [ {{ batch_size: {size} {shape}{bound} }} ]")
        lowest = size + 1
    return [
        'backend: "tensorrt"',
        f'default_model_filename: "{_PLAN}"',
        # A plan for another kind of GPU is put beside this one, with another line here.
        f'cc_model_filenames [ {{ key: "{capability}" value: "{_PLAN}" }} ]',
        f"instance_group [ {{ count: 2 kind: KIND_GPU profile: [ {profiles} ] }} ]",
        "optimization { cuda { graphs: true",
        *graphs,
        "} }",
    ]


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links.

    Nothing ever changes a bundle's files. `triton/` is mounted alone, which a symbolic link breaks.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
