"""Serving benchmark results: each server against the bare network, eps-serve against peers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
from _rounds import ratio
from _turns import Turn

from eps_core.machine import BUSY
from eps_core.stats import Interval
from eps_deploy.bench.latency import noise, spread, verdict

OURS = "ours"
LEAST_MS = 2.0  # per image; the limit only applies to networks at least this slow
JUDGED, LIMIT, AIM = 16, 0.80, 0.90  # connections; shares of the bare network's throughput


def row(connections: int, turns: Mapping[str, list[Turn]]) -> dict[str, Any]:
    """Results for one number of connections."""
    ours = turns[OURS]
    others = [turn.conditions.others or 0.0 for some in turns.values() for turn in some]
    cores = os.cpu_count() or 1
    floors = [turn.floor for some in turns.values() for turn in some]
    return {
        "connections": connections,
        "floor_images_per_second": _range(floors),
        "sides": {name: _side(name, turns) for name in turns},
        "ours_over": {name: _over(ours, theirs) for name, theirs in turns.items() if name != OURS},
        "others_used_cores": _range(others),
        "disturbed": median(others) > BUSY * cores,
        "noise": _noise(turns, floors),
    }


def _side(name: str, turns: Mapping[str, list[Turn]]) -> dict[str, Any]:
    own = turns[name]
    return {
        "requests_per_second": _range([turn.load.rate for turn in own]),
        "over_floor": ratio([turn.load.rate for turn in own], [turn.floor for turn in own]),
        "p50_ms": median(turn.load.p50_ms for turn in own),
        "p99_ms": median(turn.load.p99_ms for turn in own),
        "failed": sum(turn.load.failed for turn in own),
        "valid": not any(turn.load.failed for turn in own),
        "cores": median(turn.cores for turn in own),
        "waited": median(turn.waited for turn in own),
    }


def _over(ours: list[Turn], theirs: list[Turn]) -> dict[str, Any]:
    """Ratio of throughputs over the rounds; `ours_is` is None if requests failed."""
    found = ratio([turn.load.rate for turn in ours], [turn.load.rate for turn in theirs])
    valid = not any(turn.load.failed for turn in (*ours, *theirs))
    interval = Interval(found["ratio"], *found["interval"])
    return {**found, "ours_is": verdict(interval) if valid else None}


def _noise(turns: Mapping[str, list[Turn]], floors: list[float]) -> str:
    """Noise of the most disturbed turn; the spread of the bare network is that of the machine."""
    every = [turn.conditions for some in turns.values() for turn in some]
    worst = max(every, key=lambda conditions: conditions.others or 0.0)
    return noise(worst, spread(np.array(floors)[:, None]))


def _range(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def judge(rows: list[dict[str, Any]], milliseconds: float) -> dict[str, Any]:
    """Compare with the limit; `passed` is None if the measurement is inconclusive."""
    at = {found["connections"]: found for found in rows}
    slower = [
        [found["connections"], name]
        for found in rows
        for name, over in found["ours_over"].items()
        if over["ours_is"] == "slower"
    ]
    result: dict[str, Any] = {"limit": LIMIT, "aim": AIM, "slower_than": slower, "passed": None}
    if JUDGED not in at:
        return result
    ours = at[JUDGED]["sides"][OURS]
    reached = ours["over_floor"]["ratio"]
    result |= {"over_floor": reached, "aim_reached": reached >= AIM}
    if not any(found["disturbed"] for found in rows) and milliseconds >= LEAST_MS:
        valid = all(found["sides"][OURS]["valid"] for found in rows)
        result["passed"] = valid and reached >= LIMIT and not slower
    return result


def table(found: Mapping[str, Any]) -> str:
    lines = [f"{found['connections']} connections: {found['noise']}"]
    for name, side in found["sides"].items():
        over = found["ours_over"].get(name)
        lines.append(
            f"  {name:9} {side['requests_per_second']['median']:7.1f} requests/s,"
            f" {side['over_floor']['ratio']:.2f} of the floor,"
            f" p50 {side['p50_ms']:.1f} ms, p99 {side['p99_ms']:.1f} ms"
            + (f", {side['failed']} FAILED" if side["failed"] else "")
            + (
                ""
                if over is None
                else "; ours over it {ratio:.2f} ({interval[0]:.2f} to {interval[1]:.2f})".format(
                    **over
                )
            )
        )
    return "\n".join(lines)
