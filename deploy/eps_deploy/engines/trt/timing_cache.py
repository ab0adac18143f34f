"""What earlier builds measured of kernels, so that a build does not start from nothing.

A help and no more: whatever goes wrong with the cache is said, and the build goes on without.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eps_deploy.engines.trt.sidecar import Host
from eps_train import folder_lock
from eps_train.atomic import replace_file
from eps_train.errors import EpsError

Say = Callable[[str], None]


def cache_file(folder: Path, host: Host) -> Path:
    """Its place: times hold for one version of TensorRT and one model of GPU."""
    parts = (host.flavour, host.tensorrt, f"sm{host.compute_capability}", host.device)
    return folder / (re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(parts)).strip("-") + ".timing")


def take(config: Any, folder: Path, host: Host, say: Say) -> bytes | None:
    """Give what the cache holds to a build, whose own measurements will be added to it.

    Returns what was read, for :func:`keep`; None when there can be no cache.
    """
    path = cache_file(folder, host)
    try:
        content = path.read_bytes() if path.exists() else b""
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            say(f"{path}: TensorRT refuses this timing cache; building with an empty one")
            content, cache = b"", config.create_timing_cache(b"")
            if cache is None or not config.set_timing_cache(cache, False):
                return None
    except OSError as error:
        say(f"{path}: {error.strerror or error}; building without a timing cache")
        return None
    return content


def keep(config: Any, folder: Path, host: Host, before: bytes | None, say: Say) -> None:
    """Write the cache back after a build, together with what others wrote meanwhile.

    Args:
        before: what :func:`take` returned.
    """
    if before is None:
        return
    path = cache_file(folder, host)
    try:
        with folder_lock.held(folder, f"{folder}: another build is writing its times just now"):
            cache = config.get_timing_cache()
            if cache is None:
                say(f"{path}: TensorRT has no timing cache to keep")
                return
            now = path.read_bytes() if path.exists() else b""
            if now not in (b"", before):
                theirs = config.create_timing_cache(now)
                if theirs is None or not cache.combine(theirs, False):
                    say(f"{path}: what another build wrote does not fit; replacing it")
            serialized = cache.serialize()
            if serialized is None:
                say(f"{path}: TensorRT does not give its timing cache away; it is not kept")
                return
            replace_file(path, bytes(serialized))
    except (OSError, EpsError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        say(f"{path}: the timing cache is not kept: {reason}")
