"""Write a bundle: its examples, manifest entries and `reproduce.sh`, and its folder atomically."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version as package_version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from PIL import Image

from eps_core import files as folder_lock
from eps_core.cli import refuse_existing
from eps_core.errors import ConfigError, naming
from eps_deploy.bundle import MANIFEST, encode_manifest, is_bundle, load_bundle
from eps_deploy.engines.base import INPUT_NAME, OUTPUT_NAME, EngineError, Images
from eps_deploy.engines.trt.plan import PLAN
from eps_deploy.export.mixed_precision import Repair
from eps_deploy.export.types import executed_types, layer_types
from eps_deploy.pipeline.builder import Models, Variants
from eps_deploy.pipeline.inputs import Inputs
from eps_deploy.pipeline.options import Options
from eps_deploy.report import report
from eps_deploy.triton import Kind, TritonModel
from eps_train.data import dataset
from eps_train.data.dataset import DataIdentity

EXAMPLES = 10


def write_examples(
    folder: Path, images: Images, labels: npt.NDArray[np.int64], classes: Sequence[str]
) -> list[Path]:
    """Write the first test image of up to ten classes as PNG files, named by label and index."""
    folder.mkdir()
    chosen = np.linspace(0, len(classes) - 1, min(EXAMPLES, len(classes))).round().astype(int)
    written = []
    for label in chosen.tolist():
        members = np.flatnonzero(labels == label)
        if len(members):
            name = re.sub(r"[^A-Za-z0-9_-]+", "_", classes[label])
            path = folder / f"label-{name}-test-{members[0]:04d}.png"
            path.write_bytes(png(images[members[0]]))
            written.append(path)
    return written


def write_gallery(
    folder: Path, images: Images, changed: Sequence[Mapping[str, Any]]
) -> dict[str, bytes]:
    """Write the images that a report's `changed` names; return the files by their name there."""
    files = {e["image"]: png(images[e["index"]]) for e in changed if e["image"] is not None}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode raw pixels, uint8 `[C, H, W]`, as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def precision_entry(
    options: Options, models: Models, variants: Variants, repair: Repair | None
) -> dict[str, Any]:
    """The report's entry: the types asked for, those in `model.onnx`, and those executed."""
    types = layer_types(onnx.load_from_string(models.compact))
    executed = None
    if variants.plan is not None:
        executed = dict(variants.plan.metadata.layers) or None
    elif options.engine == "ort" and options.provider != "tensorrt":
        # With TensorRT's provider, ONNX Runtime does not save the graph that it compiled.
        with suppress(EngineError):  # all is measured by now: no reason to end a deployment
            executed = executed_types(models.compact, provider=options.provider)
    return report.precision_entry(
        options.precision,
        graph=dict(sorted(Counter(types.values()).items())),
        executed=executed,
        calibration=models.calibration,
        kept=models.kept,
        repair=repair,
    )


def served(options: Options, data: DataIdentity, variants: Variants) -> TritonModel:
    """The configuration of the model in Triton's repository."""
    kind: Kind = "KIND_AUTO"  # beside a plan, `model.onnx` runs wherever there is room
    if options.engine == "ort":
        kind = "KIND_CPU" if options.provider == "cpu" else "KIND_GPU"
    return TritonModel(
        input_shape=data.input_shape,
        labels=data.classes,
        preprocessing=data.preprocessing.described(),
        max_batch=options.max_batch,
        kind=kind,
        threads=options.threads if kind == "KIND_CPU" else None,
        capability=variants.plan.metadata.host.compute_capability if variants.plan else None,
    )


def manifest_fields(options: Options, inputs: Inputs, variants: Variants) -> dict[str, Any]:
    """`manifest.json` without the hashes of the files, which `BundleWriter` adds."""
    data = inputs.compact.data
    return {
        "name": options.name,
        "input": {
            "name": INPUT_NAME,
            "dtype": "uint8",
            "shape": ["N", *data.input_shape],
            "layout": "NCHW",
            "color": data.preprocessing.color,
            "range": [0, 255],
        },
        "output": {"name": OUTPUT_NAME, "dtype": "float32", "shape": ["N", len(data.classes)]},
        "preprocessing": data.preprocessing.to_dict(),
        # For clients that send raw pixels: libraries differ in what they call bilinear.
        "resampling": {
            "interpolation": data.preprocessing.interpolation,
            "antialias": data.preprocessing.antialias,
            "reference": "Pillow",
        },
        # Applied inside the network; recorded for information.
        "normalization": dataset.summary(data.mean, data.std),
        "labels": list(data.classes),
        "precision": options.precision.name,
        "engine": {**variants.describe(options), "file": PLAN if variants.plan else "model.onnx"},
        "source": {
            "compact_digest": inputs.compact.digest,
            "checkpoint_digest": inputs.checkpoint.digest,
            "baseline_digest": inputs.baseline.digest if inputs.baseline else None,
        },
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "split_seed": data.split_seed,
            "sizes": dict(data.sizes),
        },
        "versions": {**inputs.compact.versions, "eps_resnet": package_version("eps-resnet")},
    }


# -- The folder: written beside its place, verified, then renamed into place
#
# The temporary folder always has the same name and is locked, so that the next run takes over what
# a killed run left, and two runs at once do not write into it.


class BundleWriter:
    """A context manager: write files into `folder`, then `commit`, or nothing remains.

    Args:
        output: the bundle's place. An existing one is replaced only with `force`, and only if it is
            a bundle that contains nothing but its own files.
        force: as `--force`.

    Raises:
        ConfigError: `output` exists and may not be replaced.
    """

    def __init__(self, output: Path, *, force: bool) -> None:
        self.output = Path(os.path.abspath(output))
        self.folder = self.output.with_name(f".{self.output.name}.eps-deploy.part")
        self._old = self.output.with_name(f".{self.output.name}.eps-deploy.old")
        self._named = output
        self._force = force
        self._check_place()

    def _check_place(self) -> None:
        for parent in self.output.parents:
            if parent.exists():
                if not parent.is_dir():
                    raise ConfigError(f"{self._named}: {parent.name} is a file; choose another -o")
                break
        refuse_existing([self._named], self._force)
        if not self.output.exists() and not self.output.is_symlink():
            return
        if self.output.is_symlink() or not is_bundle(self.output):
            raise ConfigError(
                f"{self._named}: is not a bundle, so --force does not replace it; choose another -o"
            )
        listed = json.loads((self.output / MANIFEST).read_bytes()).get("files")
        own = listed if isinstance(listed, dict) else {}
        if strangers := _files(self.output) - {MANIFEST, *own}:
            raise ConfigError(
                f"{self._named}: --force would delete {min(strangers)}, which is no part of the"
                " bundle; move it away or choose another -o"
            )

    def __enter__(self) -> BundleWriter:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with naming(self._named):
            self._lock = folder_lock.acquire(
                self.folder,
                f"{self._named}: another eps-deploy is writing it; wait for that one or choose"
                " another -o",
                follow=False,  # a link would lead to a folder that is not ours to empty
            )
        try:
            with naming(self._named):
                self._clear_up()
            self._check_place()  # cleaning up may have restored an old bundle
        except BaseException:
            self._leave()
            raise
        return self

    def _clear_up(self) -> None:
        """Remove what a killed run left; restore the bundle that it had moved aside."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self._old.exists() and not self.output.exists():
            self._old.rename(self.output)
        elif self._old.exists():
            shutil.rmtree(self._old)

    def commit(self, fields: Mapping[str, Any]) -> None:
        """Write the manifest, of `fields` and every file in `folder`; verify; move into place."""
        files = {}
        for name in sorted(_files(self.folder)):
            content = (self.folder / name).read_bytes()
            files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (self.folder / MANIFEST).write_bytes(encode_manifest({**fields, "files": files}))
        for name in (*files, MANIFEST):
            with (self.folder / name).open("r+b") as file:
                os.fsync(file)
        load_bundle(self.folder)
        self._check_place()  # somebody may have created it meanwhile
        replacing = self.output.exists()
        if replacing:
            self.output.rename(self._old)
        try:
            self.folder.rename(self.output)
        except OSError:
            if replacing:
                self._old.rename(self.output)
            raise
        if replacing:
            shutil.rmtree(self._old)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()
        # Name the bundle, not a temporary file that the user does not know.
        if isinstance(error, OSError) and error.errno is not None:
            name = error.filename
            if name is None or Path(name).is_relative_to(self.folder):
                error.filename = str(self._named)

    def _leave(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already after a commit
        folder_lock.release(self._lock)


def _files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in found}


# -- `reproduce.sh`: the commands that made a bundle, with pinned versions


def reproduce_script(options: Options, inputs: Inputs, report: Mapping[str, Any]) -> str:
    """A POSIX shell script that checks the digests of its input files and makes the bundle again.

    It installs into a virtual environment of its own and writes into a folder of its own.
    """
    extras = "deploy,ort" if options.engine == "ort" else "deploy,ort,trt"
    packages = {name: found for name, found in report["environment"]["packages"].items() if found}
    ours = f"eps-resnet[{extras}]=={packages.pop('eps-resnet')}"
    # Without the build of a version (2.13.0+cpu): registries only have the version.
    pins = [f"{name}=={found.partition('+')[0]}" for name, found in packages.items()]
    checkpoint = options.checkpoint.name if options.checkpoint else None
    files = {
        options.model.name: inputs.compact.digest,
        checkpoint or inputs.compact.checkpoint["path"]: inputs.checkpoint.digest,
    }
    if inputs.baseline is not None and inputs.baseline_path is not None:
        files[inputs.baseline_path.name] = inputs.baseline.digest
    listed = ", ".join(files)
    lines = [
        "#!/bin/sh",
        "# Makes this bundle again, in reproduced/, on a machine of the same kind. Run it where",
        f"# {listed} lie (made by eps-train and eps-compact).",
        f"# Python {report['environment']['python']}, {report['environment']['system']}",
        "set -eu",
        "python3 -m venv reproduced/venv",
        f"reproduced/venv/bin/pip install {shlex.join([ours, *pins])}",
        "reproduced/venv/bin/python - <<'EOF'",
        "import hashlib",
        f"for name, digest in {files!r}.items():",
        "    with open(name, 'rb') as file:",
        "        found = hashlib.sha256(file.read()[:-64]).hexdigest()",
        "    assert found == digest, name + ': not the file that this bundle was made from'",
        "EOF",
        f"reproduced/venv/bin/{report['command']} -o reproduced/bundle",
        "",
    ]
    return "\n".join(lines)
