"""Servers under load in turns, the bare network on ONNX Runtime right before each of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from _peers import Side
from _servers import Server, held
from _wrk import Load, load

from eps_deploy.bench.machine import Conditions, MachineMonitor
from eps_deploy.engines.base import Engine, Images

SETTLING = 1  # seconds of load that are not counted
FLOOR = 0.5  # seconds for each of its batch sizes
IDLING = 2.0  # seconds
RESTLESS = 0.05  # cores that a server uses for nothing, from which on it would disturb the others


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A server that runs, and how it is asked.

    Attributes:
        idle_cores: that it uses while nobody asks it.
    """

    server: Server
    side: Side
    idle_cores: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One load on one server.

    Attributes:
        load: what wrk saw.
        floor: images a second of the bare network just before, with the batch that it is best at.
        cores: that the server used.
        waited: seconds that its threads, added up, had to wait for a core, in each second.
        conditions: what went on beside all of them.
    """

    load: Load
    floor: float
    cores: float
    waited: float
    conditions: Conditions


class Floor:
    """The network in this process: images a second, one call after another."""

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
    """Load all servers, one after another, `repeats` times; which one begins rotates.

    Those that are restless are held meanwhile. Not all, since Triton does not survive it.
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
    """Servers to be loaded, after a look at what each does while nobody asks it."""
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
        # That threads of a loaded server wait for a core is no disturbance: wrk is on one.
        conditions=replace(conditions, others=others, waited=None),
    )


def _of_children() -> float:
    """Seconds of the processor that loads took so far."""
    times = os.times()
    return times.children_user + times.children_system
