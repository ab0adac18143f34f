"""Compaction benchmark: depth 752, 300 of its 375 blocks dead.

The network is untrained (its batch norms have processed random images once), and its dead blocks
are chosen: neither time, memory nor size depends on the weights. Measured are:

- the steps of `eps-compact` on its checkpoint, from reading one file to writing the other;
- peak memory of the process;
- latency of the compact network (as rewritten, and folded, as it ships) and of the full one,
  interleaved on one thread, beside the ratios of parameters and FLOPs.

The last line printed is one JSON object.

    python benchmarks/compaction.py [--depth N] [--dead N] [--threads N] [--rounds N]
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from _rounds import in_turns, machine, ratio, say, seconds_of
from _steps import random_images
from torch import Tensor, nn

from eps_compact.compaction import Compaction, compact, compact_checkpoint
from eps_train.data.dataset import Data
from eps_train.gating import rewriting
from eps_train.models.resnets import Normalize
from eps_train.models.spec import NetworkSpec
from eps_train.recipes import cifar
from eps_train.training.checkpoint import Checkpoint, GateRecord, PruneRecord
from eps_train.training.evaluate import logits

EPSILON = 2.5
HELDOUT = 32  # images used as the validation part
BATCHES = (1, 16)
CPU = torch.device("cpu")


@click.command()
@click.option("--depth", default=752, show_default=True, help="Of the network: 6n + 2.")
@click.option("--dead", default=300, show_default=True, help="Blocks that are dead.")
@click.option("--threads", default=2, show_default=True, help="Of the compaction.")
@click.option("--rounds", default=10, show_default=True, help="Latency: rounds of all sides.")
def main(depth: int, dead: int, threads: int, rounds: int) -> None:
    """Compact an untrained network of DEPTH with DEAD dead blocks, and time it."""
    torch.set_num_threads(threads)
    conditions = machine(CPU)
    data = random_images(cifar("cifar10-110", dataset="cifar10", depth=depth), 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"building cifar:{depth}x16 with {dead} dead blocks")
        _checkpoint(data, depth, dead).save(folder / "ckpt.pt")
        done, compaction = _compaction(folder)
        sizes = {file: (folder / file).stat().st_size for file in ("ckpt.pt", "compact.pt")}
        checkpoint = Checkpoint.load(folder / "ckpt.pt")
    say(json.dumps(compaction))
    torch.set_num_threads(1)
    result = {
        "machine": conditions,
        "network": {"model": f"cifar:{depth}x16", "image": [3, 32, 32], "dead": dead},
        "compaction": compaction,
        "bytes": {**sizes, "ratio": sizes["ckpt.pt"] / sizes["compact.pt"]},
        **_promised(done),
        "latency": _latency(done, checkpoint, rounds),
    }
    print(json.dumps(result))


def _checkpoint(data: Data, depth: int, dead: int) -> Checkpoint:
    torch.manual_seed(0)
    spec = NetworkSpec.parse(f"cifar:{depth}x16", in_channels=3, classes=10)
    model = spec.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative mean over all images
    identity = data.identity
    normalize = Normalize.of(identity)
    with torch.no_grad():
        model.train()(normalize(_images(HELDOUT)))
    doomed = set(random.Random(0).sample(spec.gated, dead))
    for gate in rewriting.gates(model).values():
        gate.reset_record()
    death = PruneRecord(
        epoch=9, epsilon=EPSILON, steps=60, peak=1.25, heldout_peak=1.0, samples=HELDOUT
    )
    return Checkpoint(
        network=spec,
        state=dict(model.state_dict()),
        gates=[
            GateRecord(
                block=block,
                epsilon=EPSILON,
                steps=20,
                closed_steps=20 if block in doomed else 3,
                peak=1.25 if block in doomed else 7.5,
                death=death if block in doomed else None,
            )
            for block in spec.gated
        ],
        data=identity,
        config={"seed": 0, "epsilon": EPSILON},
        metrics={"epoch": 10, "validation": {"accuracy": 0.1, "loss": 2.3}, "test": None},
    )


def _images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def _compaction(folder: Path) -> tuple[Compaction, dict[str, Any]]:
    """Run the steps of `eps-compact`, and return the seconds of each."""
    began, busy = time.perf_counter(), time.process_time()
    checkpoint = Checkpoint.load(folder / "ckpt.pt")
    marks = [("reading", time.perf_counter())]
    # Each progress line announces the next step.
    steps = iter(("rewriting", "proofs"))

    def report(line: str) -> None:
        marks.append((next(steps), time.perf_counter()))
        say(f"{time.perf_counter() - began:.1f} s: {line}")

    done = compact_checkpoint(
        checkpoint, _images(HELDOUT), checkpoint_path="ckpt.pt", report=report
    )
    marks.append(("held_out_images_and_costs", time.perf_counter()))
    done.artifact.save(folder / "compact.pt")
    marks.append(("writing", time.perf_counter()))
    seconds, before = {}, began
    for part, when in marks:
        seconds[part], before = when - before, when
    return done, {
        "threads": torch.get_num_threads(),
        "seconds": {**seconds, "all": before - began},
        "processor_seconds": time.process_time() - busy,
        "rewriting_and_proofs": seconds["rewriting"] + seconds["proofs"],
        "proofs": [
            {
                "step": proof.stage,
                "batch": proof.worst_batch,
                "images": proof.samples,
                "equal": proof.max_abs == 0,
                "max_abs": proof.max_abs,
            }
            for proof in done.proofs
        ],
        "held_out_images": HELDOUT,
        "peak_bytes": _peak(),
    }


def _peak() -> int | None:
    """Peak memory of this process; None where the system does not report it."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _promised(done: Compaction) -> dict[str, Any]:
    return {
        name: {**counts, "ratio": counts["before"] / counts["after"]}
        for name, counts in done.counts.items()
    }


def _latency(done: Compaction, checkpoint: Checkpoint, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds per batch on one thread, images and networks channels-last."""
    gated = checkpoint.build_gated().eval()
    data = checkpoint.data
    sides: dict[str, nn.Module] = {
        "full": rewriting.drop_taps(rewriting.drop_gates(gated)),
        "compact": compact(gated),
        "folded": done.artifact.build(),
    }
    for side in sides.values():
        side.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalize = Normalize.of(data)
    found = []
    for batch in BATCHES:
        images = _images(batch).contiguous(memory_format=torch.channels_last)
        work = {
            side: partial(seconds_of, partial(logits, model, normalize, images), CPU)
            for side, model in sides.items()
        }
        for timed in work.values():
            timed()  # warm-up
        times = in_turns(work, rounds=rounds)
        row = {
            "batch": batch,
            "milliseconds": {side: 1e3 * statistics.median(each) for side, each in times.items()},
            "speedup": {side: ratio(times["full"], times[side]) for side in ("compact", "folded")},
        }
        say(json.dumps(row))
        found.append(row)
    return found


if __name__ == "__main__":
    main()
