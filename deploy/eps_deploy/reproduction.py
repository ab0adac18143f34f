"""`reproduce.sh`: the commands that made a bundle, with the versions that they ran with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from eps_deploy.options import Options
from eps_deploy.sources import Sources

_EXTRAS = {"ort": "deploy,ort", "trt": "deploy,ort,trt"}


def script(options: Options, sources: Sources, report: Mapping[str, Any]) -> str:
    """A POSIX shell script; it starts from the files whose digests it checks first.

    It installs into an environment of its own and writes into a folder of its own.
    """
    packages = {name: found for name, found in report["environment"]["packages"].items() if found}
    # Without what names a build (2.13.0+cpu): registries have the version alone.
    pins = [
        f"{name}=={found.partition('+')[0]}"
        for name, found in packages.items()
        if name != "eps-resnet"
    ]
    extras = _EXTRAS[options.engine]
    ours = f"eps-resnet[{extras}]=={packages['eps-resnet']}"
    files = {options.model.name: sources.compact.digest}
    checkpoint = options.checkpoint.name if options.checkpoint else None
    files[checkpoint or sources.compact.checkpoint["path"]] = sources.checkpoint.digest
    if sources.baseline is not None and sources.baseline_path is not None:
        files[sources.baseline_path.name] = sources.baseline.digest
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
