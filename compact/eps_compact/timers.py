"""Which runtime times the blocks: what other packages offer, and torch where there is nothing else.

Networks are served by the engines of `eps_deploy`, so their times are those that count. It may
import this package and not the other way round; what it offers is found by entry point.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from eps_compact.timing import Timer, TorchTimer
from eps_train.console import missing_package
from eps_train.data import DataIdentity
from eps_train.errors import ConfigError

GROUP = "eps_resnet.block_timers"  # entry points: callables from a DataIdentity to a Timer
PREFERRED = "ort"


def make_timer(
    name: str | None, identity: DataIdentity, report: Callable[[str], None] = lambda line: None
) -> Timer:
    """The timer of `--timer`; where that was not given, ONNX Runtime's if it is installed.

    Args:
        name: `ort`, `torch`, or None.
        identity: the data that the networks were trained on.
        report: told, in one line, why torch has to do.

    Raises:
        ConfigError: what was asked for is not installed; the line names the extra.
    """
    if name == "torch":
        return TorchTimer(identity)
    try:
        return _offered(name or PREFERRED)(identity)
    except ConfigError as error:
        if name is not None:
            raise
        report(f"times are torch's: {error}")
        return TorchTimer(identity)


def _offered(name: str) -> Callable[[DataIdentity], Timer]:
    found = next(iter(entry_points(group=GROUP, name=name)), None)
    if found is None:
        raise ConfigError(
            f"--timer {name}: this installation of eps-resnet does not offer it; install it again,"
            " or give --timer torch"
        )
    try:
        timer: Callable[[DataIdentity], Timer] = found.load()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--timer {name}: {missing_package(error)}, or give --timer torch"
        ) from error
    return timer
