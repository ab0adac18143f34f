"""Interleaved load on servers, with the bare network on ONNX Runtime right before each turn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from _peers import Side
from _servers import Server, held
from _wrk import Load, load

from eps_core.machine import Conditions, MachineMonitor
from eps_deploy.engines.base import Engine, Images

SETTLING = 1  # seconds of load that are not counted
FLOOR = 0.5  # seconds per batch size
IDLING = 2.0  # seconds
RESTLESS = 0.05  # cores; an idle server that uses more is suspended during other turns


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A running server and how to query it.

    Attributes:
        idle_cores: cores that it uses when idle.
    """

    server: Server
    side: Side
    idle_cores: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One load on one server.

    Attributes:
        load: wrk's measurement.
        floor: images per second of the bare network right before, at its best batch size.
        cores: cores that the server used.
        waited: seconds per second that its threads, in total, waited for a core.
        conditions: other activity on the machine.
    """

    load: Load
    floor: float
    cores: float
    waited: float
    conditions: Conditions


class Floor:
    """The bare network in this process: images per second of sequential calls."""

    def __init__(self, engine: Engine, image: Images, batches: Sequence[int]) -> None:
        self._engine = engine
        self._inputs = {batch: np.repeat(image, batch, axis=0) for batch in batches}

    def rate(self, batch: int) -> float:
        images, calls = self._inputs[batch], 0
        began = time.perf_counter()
        while (seconds := time.perf_counter() - began) < FLOOR:
            self._engine.infer(images)
            calls += 1
        return calls * batch / seconds


def in_turns(
    contenders: Mapping[str, Contender],
    floor: Callable[[], float],
    image: Images,
    *,
    connections: int,
    seconds: int,
    repeats: int,
) -> dict[str, list[Turn]]:
    """Load all servers, one after another, `repeats` times; the first one rotates.

    Servers that use a core when idle are suspended during other turns; not all, because Triton does
    not survive it.
    """
    found: dict[str, list[Turn]] = {name: [] for name in contenders}
    names = list(contenders)
    restless = {
        name: contender.server
        for name, contender in contenders.items()
        if contender.idle_cores > RESTLESS
    }
    for index in range(repeats):
        start = index % len(names)
        for name in (*names[start:], *names[:start]):
            loaded = contenders[name]
            with held(restless.values()):
                rate = floor()
            with held(server for other, server in restless.items() if other != name):
                found[name].append(_turn(loaded, rate, image, connections, seconds))
    return found


def watch_idle(servers: Mapping[str, tuple[Server, Side]]) -> dict[str, Contender]:
    """Measure the CPU use of idle servers, and return the contenders."""
    before = {name: server.used() for name, (server, _) in servers.items()}
    time.sleep(IDLING)
    return {
        name: Contender(
            server=server, side=side, idle_cores=(server.used() - before[name]) / IDLING
        )
        for name, (server, side) in servers.items()
    }


def _turn(loaded: Contender, floor: float, image: Images, connections: int, seconds: int) -> Turn:
    server, post = loaded.server, loaded.side.post(image)
    load(server, post, connections=connections, seconds=SETTLING)
    used, waited, generated = server.used(), server.waited(), _of_children()
    with MachineMonitor() as monitor:
        monitor.poll()
        seen = load(server, post, connections=connections, seconds=seconds)
        monitor.poll()
        conditions = monitor.conditions()
    length, used = conditions.seconds, server.used() - used
    others = conditions.others
    if others is not None:
        others = max(0.0, others - (used + _of_children() - generated) / length)
    return Turn(
        load=seen,
        floor=floor,
        cores=used / length,
        waited=(server.waited() - waited) / length,
        # Threads of a loaded server that wait for a core are no disturbance: wrk occupies one.
        conditions=replace(conditions, others=others, waited=None),
    )


def _of_children() -> float:
    """CPU seconds of all loads so far."""
    times = os.times()
    return times.children_user + times.children_system
