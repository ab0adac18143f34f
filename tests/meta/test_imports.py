"""Which module may import which: the stages one way, and nothing heavy where none is needed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta.project import imports, module_name, packages, scripts

# A package may import those before it, never those after it.
ORDER = ("eps_core", "eps_train", "eps_compact", "eps_deploy")

# Run where torch is not installed: the serving image, and eps-predict with the `ort` extra alone.
TORCH_FREE = (
    "eps_core.preprocessing",
    "eps_deploy.bundle",
    "eps_deploy.engines",
    "eps_deploy.cli.predict",
    "eps_deploy.serving",
    "eps_deploy.triton",
    "eps_deploy.bundle",
)

# Seconds to import each; `--help` has no use for them.
HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "matplotlib", "sklearn")

# What only an extra installs.
OPTIONAL = (
    *HEAVY,
    "PIL",
    "cuda",
    "grpc",
    "httptools",
    "jinja2",
    "mlflow",
    "onnxscript",
    "open_inference",
    "prometheus_client",
    "pycuda",
    "scipy",
    "starlette",
    "tensorboard",
    "tensorrt",
    "uvicorn",
    "wandb",
)

IMPORT_ALL = """
import importlib, pkgutil, sys
names = [sys.argv[1]]
for name in names:
    module = importlib.import_module(name)
    inner = pkgutil.iter_modules(getattr(module, "__path__", []))
    names += [f"{name}.{info.name}" for info in inner]
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""

HELP = """
import importlib, sys
script, target, *blocked = sys.argv[1:]

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
sys.argv = [script, "--help"]
module, _, attribute = target.partition(":")
try:
    getattr(importlib.import_module(module), attribute)()
except SystemExit as stop:
    assert not stop.code, f"exit status {stop.code}"
print("MODULES", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def run_python(code: str, *arguments: str, path: Path | None = None) -> str:
    """Standard output of a fresh interpreter with this source tree, and `path` before it."""
    roots = [folder.parent for folder in packages().values()]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*([path] if path else []), *roots])),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_one_way(package: str) -> None:
    later = ORDER[ORDER.index(package) + 1 :]
    back = {
        f"{module_name(path, package)} imports {name}"
        for path in packages()[package].rglob("*.py")
        for name in imports(path)
        if name.partition(".")[0] in later
    }
    assert not back


def test_the_order_covers_every_package() -> None:
    assert set(ORDER) == set(packages())


@pytest.mark.parametrize("package", ORDER)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert not [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]


def test_the_roots_are_not_packages() -> None:
    """An `__init__.py` there would make `train.eps_train` a second copy of `eps_train`."""
    assert not [path for path in packages().values() if (path.parent / "__init__.py").exists()]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch_without_need(module: str) -> None:
    if not exists(module):
        pytest.skip(f"no {module} in this version")
    loaded = run_python(IMPORT_ALL, module).split()
    assert not {"torch", "torchvision"}.intersection(loaded)


@pytest.mark.parametrize("script", sorted(scripts()))
def test_help_imports_nothing_heavy(script: str) -> None:
    text, _, modules = run_python(HELP, script, scripts()[script]).rpartition("MODULES")
    assert f"Usage: {script}" in text
    assert not set(HEAVY).intersection(modules.split())


@pytest.mark.parametrize("script", sorted(scripts()))
def test_help_works_with_the_base_install(script: str) -> None:
    text = run_python(HELP, script, scripts()[script], *OPTIONAL)
    assert f"Usage: {script}" in text
