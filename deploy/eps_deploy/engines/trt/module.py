"""Finding the Python package of TensorRT, or saying in one line why it is not to be had."""

from __future__ import annotations

import importlib
from typing import Any

from eps_deploy.engines.base import EngineError

OLDEST, NEWEST = 10, 11  # major versions
_INSTALL = "pip install 'eps-resnet[trt]'"


def load_tensorrt() -> Any:
    """The module `tensorrt`.

    Imported here and nowhere else: it takes hundreds of megabytes of libraries with it, and most
    machines do not have it.

    Raises:
        EngineError: not installed, not loadable on this machine, or of a version that we do not
            know.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise _unloadable(error) from error
        raise EngineError(
            f"TensorRT is not installed; {_INSTALL} (Linux with an NVIDIA GPU)"
        ) from error
    except Exception as error:  # ImportError, OSError, RuntimeError: whatever its libraries meet
        raise _unloadable(error) from error
    if not OLDEST <= release(trt.__version__)[0] <= NEWEST:
        raise EngineError(
            f"TensorRT {trt.__version__} is installed; eps-resnet builds with"
            f" {OLDEST} and {NEWEST}; {_INSTALL}"
        )
    return trt


def flavour(trt: Any) -> str:
    """`tensorrt`, or `tensorrt_rtx` for TensorRT for RTX, whose plans are of another kind."""
    name: str = trt.__name__.partition(".")[0]
    return name


def release(version: str) -> tuple[int, ...]:
    """`11.4.0.106` as numbers, to be compared; what follows the numbers does not count."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers) or (0,)


def _unloadable(error: Exception) -> EngineError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return EngineError(
        f"TensorRT is installed but does not load ({cause}); install an NVIDIA driver that fits"
        f" it, or a version that fits the driver: {_INSTALL}"
    )
