"""`triton/`: a model repository for NVIDIA Triton, made of a bundle's own files.

    triton/NAME/config.pbtxt        serves the plan if there is one, else the ONNX file
    triton/NAME/configs/onnx.pbtxt  beside a plan: --model-config-name=onnx serves the ONNX file
    triton/NAME/labels.txt          names of the classes, one a line
    triton/NAME/warmup/             real images, which Triton runs before it says that it is ready
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

from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, Images

FOLDER = "triton"
ONNX_CONFIG = "onnx"
_ONNX, _PLAN = "model.onnx", "model.plan"
_WARM_UPS = 4  # images; each is run alone, the first also as the largest batch

Kind = Literal["KIND_CPU", "KIND_GPU", "KIND_AUTO"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What Triton has to know of the network.

    Attributes:
        input_shape: `[C, H, W]` of one image.
        labels: names of the classes, by index.
        preprocessing: how an image becomes the input, for clients, which have to do it.
        max_batch: largest batch; with a plan, of its profile.
        kind: where ONNX Runtime runs `model.onnx`; KIND_AUTO: on a GPU if there is one.
        threads: of ONNX Runtime within one operator, as measured; None: its own choice.
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


def write_repository(folder: Path, served: Served, samples: Images, *, name: str) -> Path:
    """Write `triton/NAME` into the bundle that is being written at `folder`; return that folder.

    Args:
        folder: holds `model.onnx`, and `model.plan` where `served` has a capability.
        served: see there.
        samples: real images, uint8 `[N, C, H, W]`, N at least 1; the first few become warm-ups.
        name: of the model, as `check_name` accepts it; clients ask for it.

    Raises:
        OSError: as the file system does.
    """
    assert len(samples) > 0
    assert samples.shape[1:] == tuple(served.input_shape)
    model = folder / FOLDER / name
    (model / "1").mkdir(parents=True)
    _place(folder / _ONNX, model / "1" / _ONNX)
    images = _write_warm_ups(model / "warmup", samples)
    onnx = "\n".join([*_common(served, name, images), *_onnx(served)]) + "\n"
    if served.capability is None:
        _write_text(model / "config.pbtxt", onnx)
    else:
        _place(folder / _PLAN, model / "1" / _PLAN)
        plan = "\n".join([*_common(served, name, images), *_plan(served.capability)]) + "\n"
        _write_text(model / "config.pbtxt", plan)
        (model / "configs").mkdir()
        _write_text(model / "configs" / f"{ONNX_CONFIG}.pbtxt", onnx)
    _write_text(model / "labels.txt", "".join(f"{_line(label)}\n" for label in served.labels))
    return model


def _common(served: Served, name: str, warm_ups: Sequence[str]) -> list[str]:
    """What both configurations say. The batch size is in `max_batch_size`, so no part of `dims`.

    Nothing is set of the dynamic batcher: it takes as many waiting requests as fit, and delays
    none.
    """
    image = f"data_type: TYPE_UINT8 dims: [ {', '.join(map(str, served.input_shape))} ]"
    classes = len(served.labels)
    runs = [(1, file) for file in warm_ups]
    if served.max_batch > 1:
        runs.append((served.max_batch, warm_ups[0]))
    return [
        f'name: "{name}"',
        f"max_batch_size: {served.max_batch}",
        f'input [ {{ name: "{INPUT_NAME}" {image} }} ]',
        f'output [ {{ name: "{OUTPUT_NAME}" data_type: TYPE_FP32 dims: [ {classes} ]'
        ' label_filename: "labels.txt" } ]',
        "dynamic_batching { }",
        # JSON in a string of protobuf's text format, whose escapes are those of JSON.
        'parameters { key: "preprocessing" value { string_value:'
        f" {json.dumps(json.dumps(served.preprocessing))} }} }}",
        *(
            f'model_warmup [ {{ name: "{file}-batch-{batch}" batch_size: {batch}'
            f' inputs {{ key: "{INPUT_NAME}" value {{ {image} input_data_file: "{file}" }} }} }} ]'
            for batch, file in runs
        ),
    ]


def _onnx(served: Served) -> list[str]:
    lines = [
        'backend: "onnxruntime"',
        f'default_model_filename: "{_ONNX}"',
        f"instance_group [ {{ count: 1 kind: {served.kind} }} ]",
    ]
    if served.threads is not None:  # else Triton gives every instance all cores
        lines += [
            'parameters { key: "intra_op_thread_count"'
            f' value {{ string_value: "{served.threads}" }} }}',
            'parameters { key: "inter_op_thread_count" value { string_value: "1" } }',
        ]
    return lines


def _plan(capability: str) -> list[str]:
    return [
        'backend: "tensorrt"',
        f'default_model_filename: "{_PLAN}"',
        # Whoever builds a plan for another kind of GPU puts it beside this one and adds a line.
        f'cc_model_filenames [ {{ key: "{capability}" value: "{_PLAN}" }} ]',
        "instance_group [ { count: 1 kind: KIND_GPU } ]",
    ]


def _write_warm_ups(folder: Path, samples: Images) -> list[str]:
    """Raw pixels, one image a file: Triton itself repeats it up to the batch size asked for."""
    folder.mkdir()
    names = []
    for index, image in enumerate(samples[:_WARM_UPS]):
        names.append(f"{INPUT_NAME}-{index}")
        (folder / names[-1]).write_bytes(image.tobytes())
    return names


def _place(source: Path, target: Path) -> None:
    """A second name for the same bytes, or a copy where the file system has no hard links.

    A link, because the manifest vouches for both names and nothing ever changes a bundle's files,
    so a copy would only double its size. Not a symbolic one: `triton/` is mounted alone.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _line(label: str) -> str:
    """A class's name on one line; Triton counts lines."""
    return " ".join(label.split())


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
